"""Translate settings and weights between GPT2-Modern and stock architectures of transformers.

A trait translates one part of a model in both directions; an architecture is a tuple of traits (architectures.py).
"Ours" means GPT2-Modern, "stock" a class of transformers.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS

from modeling_gpt2modern.configuration_gpt2modern import MLPS, ROPE_TYPES, GPT2ModernConfig

Weights = dict[str, torch.Tensor]

# The forms of GELU with a tanh differ by rounding only, and swish is another name of silu.
ACTIVATION_SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


def of_layers(weights: Weights, modules: Iterable[str], kinds: Iterable[str] = ("weight", "bias")) -> list[str]:
    """List the names of the weights and biases of these modules in every layer."""
    endings = tuple(f".{module}.{kind}" for module in modules for kind in kinds)
    return [name for name in weights if name.startswith("model.layers.") and name.endswith(endings)]


class Trait:
    """Translate one part of a model; a method that a trait does not override leaves settings and weights unchanged.

    Weights are passed all at once: to `stock_weights` under our names, which it may change, to `our_weights` under
    the names that `stock_weights` returns.
    """

    def in_the_way(self, config: GPT2ModernConfig, weights: Weights) -> list[str]:
        """List our settings and weights whose values the architecture cannot have."""
        return []

    def stock_settings(self, config: GPT2ModernConfig) -> dict[str, Any]:
        """Return fields of the stock configuration."""
        return {}

    def our_settings(self, stock: PreTrainedConfig) -> dict[str, Any]:
        """Return fields of our configuration. Raises ValueError for a stock setting that we do not have."""
        return {}

    def stock_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        """Return the weights as the stock architecture has them."""
        return weights

    def our_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        """Return the weights as our model has them; biases that are absent from them will be zero."""
        return weights


class Ours(Trait):
    """Require these values of our fields: the architecture has no others."""

    def __init__(self, **values: Any):
        self.values = values

    def in_the_way(self, config, weights):
        return [name for name, value in self.values.items() if getattr(config, name) != value]

    def our_settings(self, stock):
        return dict(self.values)


class Theirs(Trait):
    """Require these values of stock fields: our model has no others."""

    def __init__(self, **values: Any):
        self.values = values

    def stock_settings(self, config):
        return dict(self.values)

    def our_settings(self, stock):
        for name, value in self.values.items():
            if (found := getattr(stock, name, value)) != value:
                raise ValueError(f"{name}={found!r} has no counterpart here; only {name}={value!r} has")
        return {}


class Same(Trait):
    """Copy fields, given as one name for both sides or as our_name="stock_name".

    optional: stock configurations may lack the field, and ours then keeps its default.
    """

    def __init__(self, *shared: str, optional: bool = False, **names: str):
        self.names = dict(zip(shared, shared, strict=True)) | names
        self.optional = optional

    def stock_settings(self, config):
        return {theirs: getattr(config, ours) for ours, theirs in self.names.items()}

    def our_settings(self, stock):
        pairs = self.names.items()
        return {ours: getattr(stock, name) for ours, name in pairs if hasattr(stock, name) or not self.optional}


class Needs(Trait):
    """Require that our fields pass a test of the configuration; `Same` or another trait translates their values."""

    def __init__(self, **tests: Callable[[GPT2ModernConfig], bool]):
        self.tests = tests

    def in_the_way(self, config, weights):
        return [name for name, test in self.tests.items() if not test(config)]


@dataclass(frozen=True)
class Rotary(Trait):
    """Translate RoPE. partial: a fraction of each head may be rotated. rope_types: those that behave as ours do."""

    partial: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES

    def in_the_way(self, config, weights):
        if config.position_embedding_type != "rope":
            return ["position_embedding_type"]
        rope_type = config.rope_parameters["rope_type"]
        names = ["rope_parameters"] if rope_type not in self.rope_types else []
        # The proportional type rotates whole heads, some pairs of dimensions by an angle of zero.
        is_partial = config.partial_rotary_factor != 1.0 and rope_type != "proportional"
        return [*names, "partial_rotary_factor"] if is_partial and not self.partial else names

    def stock_settings(self, config):
        return {"rope_parameters": dict(config.rope_parameters)}

    def our_settings(self, stock):
        parameters = dict(stock.rope_parameters)
        if (rope_type := parameters["rope_type"]) not in self.rope_types:
            raise ValueError(f"rope_parameters with rope_type={rope_type!r} has no counterpart here")
        if not self.partial and rope_type != "proportional":
            parameters.pop("partial_rotary_factor", None)  # the stock class ignores it, ours would rotate less
        return {"position_embedding_type": "rope", "rope_parameters": parameters}


class WindowPerLayer(Trait):
    """Translate `layer_types`, beside which there is a switch `use_sliding_window`, as in Qwen."""

    def stock_settings(self, config):
        window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
        return {"layer_types": list(config.layer_types)} | window

    def our_settings(self, stock):
        slides = "sliding_attention" in stock.layer_types
        return {"layer_types": list(stock.layer_types), "sliding_window": stock.sliding_window if slides else None}


@dataclass(frozen=True)
class Mlp(Trait):
    """Translate the MLP kind to the activation function that the stock field `setting` names.

    Every entry of MLPS is translated, except for an activation function that stock transformers does not have.
    """

    gated: bool
    setting: str = "hidden_act"

    def in_the_way(self, config, weights):
        kind = MLPS[config.mlp_type]
        return [] if kind.gated == self.gated and kind.activation in ACT2CLS else ["mlp_type"]

    def stock_settings(self, config):
        return {self.setting: MLPS[config.mlp_type].activation}

    def our_settings(self, stock):
        names = {kind.activation: name for name, kind in MLPS.items() if kind.gated == self.gated}
        activation = getattr(stock, self.setting)
        name = names.get(ACTIVATION_SYNONYMS.get(activation, activation))
        if name is None:
            raise ValueError(f"{self.setting}={activation!r} has no counterpart here; only {', '.join(names)} have")
        return {"mlp_type": name}


class Renamed(Trait):
    """Rename modules: our path = stock path, by whole components; the pairs are applied one after the other."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def stock_weights(self, weights, config):
        for old, new in self.names.items():
            path = re.compile(rf"(?<![^.]){re.escape(old)}(?=\.)")
            weights = {path.sub(new, name): weight for name, weight in weights.items()}
        return weights

    def our_weights(self, weights, config):
        return Renamed({theirs: ours for ours, theirs in self.names.items()}).stock_weights(weights, config)


@dataclass(frozen=True)
class Fused(Trait):
    """Concatenate the rows of several matrices of a layer to one, `into`; per_head: all parts of head 0 come first."""

    parts: tuple[str, ...]
    into: str
    per_head: bool = False

    def stock_weights(self, weights, config):
        fused, groups = dict(weights), config.num_attention_heads if self.per_head else 1
        for first in of_layers(weights, self.parts[:1]):
            names = [first.replace(self.parts[0], part) for part in self.parts]
            tensors = [fused.pop(name).unflatten(0, (groups, -1)) for name in names]  # (groups, rows / groups, ...)
            fused[first.replace(self.parts[0], self.into)] = torch.cat(tensors, dim=1).flatten(0, 1)
        return fused

    def our_weights(self, weights, config):
        split, groups = dict(weights), config.num_attention_heads if self.per_head else 1
        key_rows = config.num_key_value_heads * config.head_dim
        sizes = {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": key_rows, "v_proj": key_rows}
        rows = [sizes.get(part.rpartition(".")[2], config.intermediate_size) // groups for part in self.parts]
        for name in of_layers(weights, [self.into]):
            tensors = split.pop(name).unflatten(0, (groups, -1)).split(rows, dim=1)
            for part, tensor in zip(self.parts, tensors, strict=True):
                split[name.replace(self.into, part)] = tensor.flatten(0, 1)
        return split


@dataclass(frozen=True)
class Transposed(Trait):
    """Transpose matrices to shape (inputs, outputs), as GPT-2's Conv1D has them."""

    modules: tuple[str, ...]

    def stock_weights(self, weights, config):
        return weights | {name: weights[name].t().contiguous() for name in of_layers(weights, self.modules, ["weight"])}

    our_weights = stock_weights


class WithoutOutputBias(Trait):
    """Drop the bias of o_proj, which must be 0: the stock class has biases of q, k and v only."""

    def in_the_way(self, config, weights):
        return [name for name in of_layers(weights, ["self_attn.o_proj"], ["bias"]) if weights[name].any()][:1]

    def stock_weights(self, weights, config):
        return {name: weight for name, weight in weights.items() if not name.endswith("o_proj.bias")}
