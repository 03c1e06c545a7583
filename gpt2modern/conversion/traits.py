"""Translate settings and weights between GPT2-Modern and stock architectures (model classes of transformers).

A trait is a rule that translates one part of a model in both directions; an architecture is a tuple of traits, see
architectures.py. In names, `our` means GPT2-Modern; `stock` and `their` mean transformers.
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

# The forms of GELU with a tanh differ only by rounding, and swish is another name of silu.
ACTIVATION_SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


def of_layers(weights: Weights, modules: Iterable[str], kinds: Iterable[str] = ("weight", "bias")) -> list[str]:
    """Return the names of the weights and biases (`kinds`) of these modules in every layer, as far as they exist."""
    endings = tuple(f".{module}.{kind}" for module in modules for kind in kinds)
    return [name for name in weights if name.startswith("model.layers.") and name.endswith(endings)]


class Trait:
    """Translate one part of a model between GPT2-Modern and a stock class; the base class translates nothing.

    `stock_weights` gets all weights of the model under GPT2-Modern's names and may rename them; `our_weights` gets all
    under the names that `stock_weights` returns.
    """

    def unsupported(self, config: GPT2ModernConfig, weights: Weights) -> list[str]:
        """Return the names of GPT2-Modern settings and weights whose values the stock class does not support."""
        return []

    def stock_settings(self, config: GPT2ModernConfig) -> dict[str, Any]:
        """Return the fields of the stock configuration that this trait derives from a GPT2-Modern configuration."""
        return {}

    def our_settings(self, stock: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields of the GPT2-Modern configuration that this trait derives from a stock configuration. Raises
        ValueError for a stock value that GPT2-Modern does not support."""
        return {}

    def stock_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        """Return all weights; those of this trait get the stock class's names and layout instead of GPT2-Modern's."""
        return weights

    def our_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        """Return all weights; those of this trait get GPT2-Modern's names and layout instead of the stock class's.
        Missing biases are added later, as zeros."""
        return weights


class Ours(Trait):
    """Require that GPT2-Modern fields have these values, because the stock class supports no others."""

    def __init__(self, **values: Any):
        self.values = values

    def unsupported(self, config, weights):
        return [name for name, value in self.values.items() if getattr(config, name) != value]

    def our_settings(self, stock):
        return dict(self.values)


class Theirs(Trait):
    """Require that stock fields have these values, because GPT2-Modern supports no others."""

    def __init__(self, **values: Any):
        self.values = values

    def stock_settings(self, config):
        return dict(self.values)

    def our_settings(self, stock):
        for name, value in self.values.items():
            if (found := getattr(stock, name, value)) != value:
                raise ValueError(f"{name}={found!r} has no counterpart in GPT2-Modern; only {name}={value!r} has")
        return {}


class Same(Trait):
    """Copy fields between the two configurations: `shared` names are the same in both, `names` map the GPT2-Modern name
    to the stock name. optional: if the stock configuration lacks the field, GPT2-Modern keeps its default.
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
    """Require that a test of the GPT2-Modern configuration returns True for each named field. Translates no values."""

    def __init__(self, **tests: Callable[[GPT2ModernConfig], bool]):
        self.tests = tests

    def unsupported(self, config, weights):
        return [name for name, test in self.tests.items() if not test(config)]


@dataclass(frozen=True)
class Rotary(Trait):
    """Translate the RoPE settings. partial: the stock class can rotate a fraction of each head only. rope_types: those
    that compute the same in the stock class as in GPT2-Modern; all others are refused. older_names: write GPT-NeoX's
    older names too, without which llama.cpp and transformers 4 assume a fraction of 0.25."""

    partial: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    older_names: bool = False

    def unsupported(self, config, weights):
        if config.position_embedding_type != "rope":
            return ["position_embedding_type"]
        rope_type = config.rope_parameters["rope_type"]
        names = ["rope_parameters"] if rope_type not in self.rope_types else []
        # The proportional type rotates all dimensions of a head, some of them by an angle of zero.
        is_partial = config.partial_rotary_factor != 1.0 and rope_type != "proportional"
        return [*names, "partial_rotary_factor"] if is_partial and not self.partial else names

    def stock_settings(self, config):
        parameters = dict(config.rope_parameters)
        older = {"rotary_pct": config.partial_rotary_factor, "rotary_emb_base": parameters["rope_theta"]}
        return {"rope_parameters": parameters} | (older if self.older_names else {})

    def our_settings(self, stock):
        parameters = dict(stock.rope_parameters)
        if (rope_type := parameters["rope_type"]) not in self.rope_types:
            raise ValueError(f"rope_parameters with rope_type={rope_type!r} has no counterpart in GPT2-Modern")
        if not self.partial and rope_type != "proportional":
            parameters.pop("partial_rotary_factor", None)  # the stock class ignores it, GPT2-Modern would not
        return {"position_embedding_type": "rope", "rope_parameters": parameters}


class WindowPerLayer(Trait):
    """Translate `layer_types` and `sliding_window` for stock classes with `use_sliding_window` too, such as Qwen2."""

    def stock_settings(self, config):
        window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
        return {"layer_types": list(config.layer_types)} | window

    def our_settings(self, stock):
        slides = "sliding_attention" in stock.layer_types
        return {"layer_types": list(stock.layer_types), "sliding_window": stock.sliding_window if slides else None}


@dataclass(frozen=True)
class Mlp(Trait):
    """Translate `mlp_type` to and from the stock field `setting`, which names the activation function.

    Supports every entry of the table MLPS that is gated as required and whose activation is part of transformers.
    """

    gated: bool
    setting: str = "hidden_act"

    def unsupported(self, config, weights):
        kind = MLPS[config.mlp_type]
        return [] if kind.gated == self.gated and kind.activation in ACT2CLS else ["mlp_type"]

    def stock_settings(self, config):
        return {self.setting: MLPS[config.mlp_type].activation}

    def our_settings(self, stock):
        names = {kind.activation: name for name, kind in MLPS.items() if kind.gated == self.gated}
        activation = getattr(stock, self.setting)
        name = names.get(ACTIVATION_SYNONYMS.get(activation, activation))
        if name is None:
            known = ", ".join(names)
            raise ValueError(f"{self.setting}={activation!r} has no counterpart in GPT2-Modern; only {known} have one")
        return {"mlp_type": name}


class Renamed(Trait):
    """Rename modules in the names of weights: `names` maps GPT2-Modern paths to stock paths and is applied in order."""

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
    """Concatenate the rows of several matrices of a layer, `parts`, to one matrix of the stock class, `into`, and split
    them on import. per_head: the rows of all parts of head 0 come first, then those of head 1."""

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
    """Transpose the matrices of these modules to the shape (inputs, outputs), which GPT-2's Conv1D has, and back."""

    modules: tuple[str, ...]

    def stock_weights(self, weights, config):
        return weights | {name: weights[name].t().contiguous() for name in of_layers(weights, self.modules, ["weight"])}

    our_weights = stock_weights


class WithoutOutputBias(Trait):
    """Remove the bias of o_proj for stock classes that have biases only of q, k and v. Refuses a bias that is not 0."""

    def unsupported(self, config, weights):
        biases = of_layers(weights, ["self_attn.o_proj"], ["bias"])
        return [name for name in biases if weights[name].is_meta or weights[name].any()][:1]

    def stock_weights(self, weights, config):
        return {name: weight for name, weight in weights.items() if not name.endswith("o_proj.bias")}
