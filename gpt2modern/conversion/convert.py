"""The same weights under a stock architecture of transformers, and stock weights as GPT2-Modern.

python -m gpt2modern.conversion --model DIR --output_dir NATIVE [--architecture NAME]

A folder of GPT2-Modern is exported to the stock architecture that computes the same logits, so that it loads without
trust_remote_code; a folder of one of these architectures is imported. Whatever has no exact counterpart is refused, and
the refusal names the settings. Equal means within 1e-5 in fp32; dropout probabilities without a counterpart are lost.

| architecture                | our models that it can be, besides the rewrites below                                 |
|-----------------------------|---------------------------------------------------------------------------------------|
| GPT2LMHeadModel             | learned positions, layernorm, any MLP but swiglu                                      |
| Qwen2ForCausalLM            | rope, rmsnorm, swiglu, attention biases without o_proj's, any layer_types             |
| LlamaForCausalLM            | rope, rmsnorm, swiglu, any biases                                                     |
| MistralForCausalLM          | rope, rmsnorm, swiglu, no biases, every layer sliding or none                         |
| MinistralForCausalLM        | rope, rmsnorm, swiglu, no biases, any layer_types                                     |
| CwmForCausalLM              | the same, MLP biases; needs bos_token_id and eos_token_id                             |
| SmolLM3ForCausalLM          | rope, rmsnorm, swiglu, any biases, any layer_types                                    |
| Phi3ForCausalLM             | rope, partial too, rmsnorm, swiglu, no biases, every layer sliding or none            |
| Qwen3ForCausalLM            | rope, rmsnorm, swiglu, QK-norm, attention biases, any layer_types                     |
| HunYuanDenseV1ForCausalLM   | the same, full attention, QK-norm whose gain has two equal halves (it rotates first)  |
| ArceeForCausalLM            | rope, rmsnorm, any MLP but swiglu, any biases                                         |
| NanoChatForCausalLM         | rope, weightless rmsnorm and QK-norm, embedding norm, any MLP but swiglu, soft-cap    |
| ApertusForCausalLM          | rope, rmsnorm, any MLP but swiglu, QK-norm, attention biases                          |
| VaultGemmaForCausalLM       | rope, rmsnorm, swiglu, soft-cap, attention biases, any layer_types                    |
| NemotronForCausalLM         | rope, partial too, layernorm, relu2, any biases                                       |
| Jais2ForCausalLM            | rope, layernorm, relu2, any biases                                                    |
| GPTNeoXForCausalLM          | rope, partial too, layernorm, any MLP but swiglu, any biases                          |
| Starcoder2ForCausalLM       | rope, layernorm, any MLP but swiglu, all biases or none, every layer sliding or none  |
| OlmoForCausalLM             | rope, weightless layernorm with norm_eps 1e-5, swiglu, attention biases               |
| StableLmForCausalLM         | rope, partial too, layernorm, swiglu, QK-norm without bias, biases of q, k and v      |

Rewrites, exact and made where the architecture wants them: padded vocabulary rows are cut; a norm after the embedding
is applied to its table (with rope); weightless norms get gains of one; missing biases become zeros; `attention_scale`
moves into the queries; keys and values of grouped heads are repeated, at the price of a larger cache; a tied head
becomes a matrix of its own. Gains are never folded into the next matrix: no flags would gain an architecture by it.

What the table does not list has no counterpart. So it is with U-Net skips, value and x0 residuals; with learned
positions beside rmsnorm, swiglu, QK-norm, windows, soft-cap or an embedding norm; with soft-cap beside layernorm,
QK-norm or a non-gated MLP, NanoChat's combination excepted; with windows beside a non-gated MLP and rmsnorm; with
QK-norm beside MLP biases. Refused on reading: other activations, parallel residuals, layers without RoPE, capped
attention scores, clipped queries. Biases of q, k and v alone are read with zeros for o_proj, and written back.
"""

import contextlib
import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from gpt2modern.cli import check_writable_folder, exit_code_2_on_user_error, parse_arguments
from gpt2modern.errors import GPT2ModernError, first_line
from modeling_gpt2modern.configuration_gpt2modern import MLPS, ROPE_TYPES, GPT2ModernConfig
from modeling_gpt2modern.layers_gpt2modern import NORMS
from modeling_gpt2modern.modeling_gpt2modern import GPT2ModernForCausalLM

Weights = dict[str, torch.Tensor]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ATTENTION_MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP_MATRICES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# Names under which transformers knows our activations; its three tanh forms of GELU differ by rounding only.
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu2": "relu2",
}


def of_layers(weights: Weights, modules: Iterable[str], kind: str = "weight") -> list[str]:
    """Names of the weights (or biases) of these modules in every layer that has them."""
    endings = tuple(f".{module}.{kind}" for module in modules)
    return [name for name in weights if name.startswith("model.layers.") and name.endswith(endings)]


class Trait:
    """One trait of a stock architecture, in both directions. Each method tells its part and leaves the rest alone.

    Weights always come in all at once: under our names towards `stock_weights`, which may rename them, and back.
    """

    def settings_in_the_way(self, config: GPT2ModernConfig) -> list[str]:
        """Names of our configuration fields whose values the architecture cannot have."""
        return []

    def weights_in_the_way(self, weights: Weights) -> list[str]:
        """Names of our weights whose values the architecture cannot have."""
        return []

    def stock_settings(self, config: GPT2ModernConfig) -> dict[str, Any]:
        """Fields of the stock configuration."""
        return {}

    def our_settings(self, stock: PreTrainedConfig) -> dict[str, Any]:
        """Fields of our configuration. Raises ValueError for a stock setting that we do not have."""
        return {}

    def stock_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        return weights

    def our_weights(self, weights: Weights, config: GPT2ModernConfig) -> Weights:
        return weights


class Ours(Trait):
    """Our fields that always have these values there."""

    def __init__(self, **values: Any):
        self.values = values

    def settings_in_the_way(self, config):
        return [name for name, value in self.values.items() if getattr(config, name) != value]

    def our_settings(self, stock):
        return dict(self.values)


class Theirs(Trait):
    """Stock fields that must have these values to be ours; a tuple lists synonyms, of which the first is written."""

    def __init__(self, **values: Any):
        self.values = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}

    def stock_settings(self, config):
        return {name: values[0] for name, values in self.values.items()}

    def our_settings(self, stock):
        for name, values in self.values.items():
            if (value := getattr(stock, name, values[0])) not in values:
                raise ValueError(f"{name}={value!r} has no counterpart; {name}={values[0]!r} has")
        return {}


class Same(Trait):
    """Our field = stock field. `convert` makes of our value what the strictly typed stock field takes."""

    def __init__(self, *shared: str, convert: Callable[[Any], Any] = lambda value: value, **names: str):
        self.names = dict(zip(shared, shared, strict=True)) | names
        self.convert = convert

    def stock_settings(self, config):
        return {theirs: self.convert(getattr(config, ours)) for ours, theirs in self.names.items()}

    def our_settings(self, stock):
        return {ours: getattr(stock, theirs) for ours, theirs in self.names.items()}


class Needs(Trait):
    """Our fields that must pass a test, read as `Same` or another trait reads them."""

    def __init__(self, **tests: Callable[[GPT2ModernConfig], bool]):
        self.tests = tests

    def settings_in_the_way(self, config):
        return [name for name, test in self.tests.items() if not test(config)]


@dataclass(frozen=True)
class Heads(Trait):
    """grouped: keys and values may have fewer heads. free_size: head_dim is a setting of its own. whole: the
    configuration class insists on hidden_size being a multiple of num_attention_heads."""

    grouped: bool = True
    free_size: bool = True
    whole: bool = False

    def settings_in_the_way(self, config):
        tests = {
            "num_key_value_heads": self.grouped or config.num_key_value_heads == config.num_attention_heads,
            "head_dim": self.free_size or config.head_dim * config.num_attention_heads == config.hidden_size,
            "num_attention_heads": not self.whole or config.hidden_size % config.num_attention_heads == 0,
        }
        return [name for name, passed in tests.items() if not passed]

    def stock_settings(self, config):
        settings = {"num_key_value_heads": config.num_key_value_heads} if self.grouped else {}
        return settings | ({"head_dim": config.head_dim} if self.free_size else {})

    def our_settings(self, stock):
        settings = {"num_key_value_heads": stock.num_key_value_heads} if self.grouped else {}
        return settings | ({"head_dim": getattr(stock, "head_dim", None)} if self.free_size else {})


@dataclass(frozen=True)
class Rotary(Trait):
    """RoPE. partial: a fraction of each head may be rotated. rope_types: those that behave as ours do."""

    partial: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES

    def settings_in_the_way(self, config):
        if config.position_embedding_type != "rope":
            return ["position_embedding_type"]
        rope_type = config.rope_parameters["rope_type"]
        names = ["rope_parameters"] if rope_type not in self.rope_types else []
        # The proportional type rotates whole heads, some pairs of them by zero.
        is_partial = config.partial_rotary_factor != 1.0 and rope_type != "proportional"
        return [*names, "partial_rotary_factor"] if is_partial and not self.partial else names

    def stock_settings(self, config):
        return {"rope_parameters": self._without_idle_fraction(config.rope_parameters)}

    def our_settings(self, stock):
        if (rope_type := stock.rope_parameters["rope_type"]) not in self.rope_types:
            raise ValueError(f"rope_parameters with rope_type={rope_type!r} has no counterpart")
        parameters = self._without_idle_fraction(stock.rope_parameters)
        return {"position_embedding_type": "rope", "rope_parameters": parameters}

    def _without_idle_fraction(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Where it is not read, a fraction in the stock configuration would be misunderstood as one."""
        reads_it = self.partial or parameters["rope_type"] == "proportional"
        return {key: value for key, value in parameters.items() if reads_it or key != "partial_rotary_factor"}


class UniformWindow(Trait):
    """One sliding window for every layer, or none."""

    def settings_in_the_way(self, config):
        return ["layer_types"] if len(set(config.layer_types)) > 1 else []

    def stock_settings(self, config):
        return {"sliding_window": config.sliding_window}

    def our_settings(self, stock):
        return {"sliding_window": stock.sliding_window}


@dataclass(frozen=True)
class WindowPerLayer(Trait):
    """layer_types. switch: there is a `use_sliding_window` too. always_set: a window is wanted even if none is used."""

    switch: bool = False
    always_set: bool = False

    def stock_settings(self, config):
        window = config.sliding_window
        if window is None and self.always_set:
            window = config.max_position_embeddings
        settings = {"layer_types": list(config.layer_types), "sliding_window": window}
        return settings | ({"use_sliding_window": config.sliding_window is not None} if self.switch else {})

    def our_settings(self, stock):
        slides = "sliding_attention" in stock.layer_types
        return {"layer_types": list(stock.layer_types), "sliding_window": stock.sliding_window if slides else None}


@dataclass(frozen=True)
class Activation(Trait):
    """An MLP of two matrices with an activation of transformers' choice, called `setting` there."""

    setting: str = "hidden_act"

    def settings_in_the_way(self, config):
        return ["mlp_type"] if MLPS[config.mlp_type].gated else []

    def stock_settings(self, config):
        return {self.setting: config.mlp_type}

    def our_settings(self, stock):
        if (activation := getattr(stock, self.setting)) not in ACTIVATIONS:
            raise ValueError(f"{self.setting}={activation!r} has no counterpart; {', '.join(ACTIVATIONS)} have")
        return {"mlp_type": ACTIVATIONS[activation]}


class SharedBiasSwitch(Trait):
    """`use_bias` for attention and MLP together."""

    def settings_in_the_way(self, config):
        names = ("attention_bias", "mlp_bias")
        return [name for name in names if not getattr(config, name) and any(getattr(config, other) for other in names)]

    def stock_settings(self, config):
        return {"use_bias": config.attention_bias}

    def our_settings(self, stock):
        return {"attention_bias": stock.use_bias, "mlp_bias": stock.use_bias}


class QueryScalar(Trait):
    """The attention scale is query_pre_attn_scalar^-0.5. It is an integer there, so that ours goes into the queries."""

    def stock_settings(self, config):
        return {"query_pre_attn_scalar": config.head_dim}

    def our_settings(self, stock):
        scalar = stock.query_pre_attn_scalar
        return {"attention_scale": None if scalar == stock.head_dim else scalar**-0.5}


class ContextLength(Trait):
    """`n_ctx`, which transformers has dropped and llama.cpp's converter still asks for."""

    def stock_settings(self, config):
        return {"n_ctx": config.max_position_embeddings}


class RopeInEveryLayer(Trait):
    """`no_rope_layers` is 1 for a layer that has RoPE."""

    def stock_settings(self, config):
        return {"no_rope_layers": [1] * config.num_hidden_layers}

    def our_settings(self, stock):
        if not all(stock.no_rope_layers):
            raise ValueError(f"no_rope_layers={stock.no_rope_layers} has no counterpart; 1 for every layer has")
        return {}


class Renamed(Trait):
    """Our module path = stock module path, by whole components; the pairs are applied one after the other."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def stock_weights(self, weights, config):
        return self._renamed(weights, self.names.items())

    def our_weights(self, weights, config):
        return self._renamed(weights, [(theirs, ours) for ours, theirs in self.names.items()])

    @staticmethod
    def _renamed(weights: Weights, pairs: Iterable[tuple[str, str]]) -> Weights:
        for old, new in pairs:
            path = re.compile(rf"(?<![^.]){re.escape(old)}(?=\.)")
            weights = {path.sub(new, name): weight for name, weight in weights.items()}
        return weights


@dataclass(frozen=True)
class Fused(Trait):
    """Several matrices of a layer as one, `into`, their rows one after the other; per_head: those of head 0 first."""

    parts: tuple[str, ...]
    into: str
    per_head: bool = False

    def stock_weights(self, weights, config):
        fused = dict(weights)
        for kind in ("weight", "bias"):
            for first in of_layers(weights, self.parts[:1], kind):
                tensors = [fused.pop(first.replace(self.parts[0], part)) for part in self.parts]
                if self.per_head:
                    tensors = [tensor.unflatten(0, (config.num_attention_heads, -1)) for tensor in tensors]
                    tensor = torch.cat(tensors, dim=1).flatten(0, 1)
                else:
                    tensor = torch.cat(tensors)
                fused[first.replace(self.parts[0], self.into)] = tensor
        return fused

    def our_weights(self, weights, config):
        split = dict(weights)
        for kind in ("weight", "bias"):
            for name in of_layers(weights, [self.into], kind):
                tensor = split.pop(name)
                if self.per_head:
                    heads = tensor.unflatten(0, (config.num_attention_heads, -1))
                    tensors = [part.flatten(0, 1) for part in heads.chunk(len(self.parts), dim=1)]
                else:
                    tensors = tensor.split([self._rows(part, config) for part in self.parts])
                split |= {
                    name.replace(self.into, part): part_of for part, part_of in zip(self.parts, tensors, strict=True)
                }
        return split

    @staticmethod
    def _rows(part: str, config: GPT2ModernConfig) -> int:
        rows = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rows["v_proj"] = rows["k_proj"]
        name = part.rpartition(".")[2]
        return rows[name] * config.head_dim if name in rows else config.intermediate_size


@dataclass(frozen=True)
class Transposed(Trait):
    """Matrices of shape (in, out), as GPT-2's Conv1D has them."""

    modules: tuple[str, ...]

    def stock_weights(self, weights, config):
        return weights | {name: weights[name].t().contiguous() for name in of_layers(weights, self.modules)}

    our_weights = stock_weights


@dataclass(frozen=True)
class WithoutBias(Trait):
    """Modules that have no bias there though ours have one wherever `setting` is on: it must be zero."""

    setting: str
    modules: tuple[str, ...]

    def weights_in_the_way(self, weights):
        return [name for name in of_layers(weights, self.modules, "bias") if weights[name].any()][:1]

    def stock_weights(self, weights, config):
        absent = of_layers(weights, self.modules, "bias")
        return {name: weight for name, weight in weights.items() if name not in absent}

    def our_weights(self, weights, config):
        return with_zero_biases(weights, self.modules) if getattr(config, self.setting) else weights


class OwnNormPerHead(Trait):
    """QK-norm with a gain for each head, where ours has one for all, and a switch."""

    def settings_in_the_way(self, config):
        return ["qk_norm_affine"] if config.use_qk_norm and not config.qk_norm_affine else []

    def stock_settings(self, config):
        return {"qk_layernorm": config.use_qk_norm}

    def our_settings(self, stock):
        return {"use_qk_norm": stock.qk_layernorm}

    def stock_weights(self, weights, config):
        per_head = dict(weights)
        heads = dict(zip(QK_NORMS, (config.num_attention_heads, config.num_key_value_heads), strict=True))
        for norm, number in heads.items():
            for name in of_layers(weights, [norm]):
                stem = name.removesuffix("_norm.weight")
                gain = per_head.pop(name)
                per_head |= {f"{stem}_layernorm.norms.{head}.weight": gain.clone() for head in range(number)}
        return per_head

    def our_weights(self, weights, config):
        ours: Weights = {}
        for name, weight in weights.items():
            shared = re.sub(r"_layernorm\.norms\.\d+\.weight$", "_norm.weight", name)
            if not torch.equal(ours.setdefault(shared, weight), weight):
                raise ValueError(f"the heads' gains differ in {name}; ours have one gain for all heads")
        return ours


class NormAfterRotation(Trait):
    """QK-norm comes after RoPE. A gain commutes with the rotation if it is the same for both halves of the head."""

    def weights_in_the_way(self, weights):
        halves = {name: weights[name].chunk(2) for name in of_layers(weights, QK_NORMS)}
        return [name for name, (first, second) in halves.items() if not torch.equal(first, second)][:1]


class OppositeRotation(Trait):
    """RoPE turns the other way, which is the same with the halves of each query and key swapped."""

    def stock_weights(self, weights, config):
        swapped = dict(weights)
        for kind in ("weight", "bias"):
            for name in of_layers(weights, ("self_attn.q_proj", "self_attn.k_proj"), kind):
                heads = weights[name].unflatten(0, (-1, 2, config.head_dim // 2))
                swapped[name] = heads.flip(1).flatten(0, 2)
        return swapped

    our_weights = stock_weights


class GainsMinusOne(Trait):
    """Norms multiply by 1 + weight."""

    def stock_weights(self, weights, config):
        return self._shifted(weights, -1.0)

    def our_weights(self, weights, config):
        return self._shifted(weights, 1.0)

    @staticmethod
    def _shifted(weights: Weights, offset: float) -> Weights:
        return {name: weight + offset if name.endswith("norm.weight") else weight for name, weight in weights.items()}


class ScaledEmbedding(Trait):
    """Embeddings are multiplied by sqrt(hidden_size); a tied head is not, so that ours is always untied."""

    def stock_weights(self, weights, config):
        return weights | {EMBEDDING: weights[EMBEDDING] / math.sqrt(config.hidden_size)}

    def our_weights(self, weights, config):
        return weights | {EMBEDDING: weights[EMBEDDING] * math.sqrt(config.hidden_size)}


@dataclass(frozen=True)
class Architecture:
    """A stock architecture: its class in transformers, its model_type, and its traits in the order in which they turn
    our weights into stock ones."""

    name: str
    model_type: str
    traits: tuple[Trait, ...]

    def in_the_way(self, config: GPT2ModernConfig, weights: Weights | None = None) -> list[str]:
        """Our settings, and with `weights` our weights too, that the architecture cannot have."""
        names = [name for trait in self.traits for name in trait.settings_in_the_way(config)]
        if weights is not None:
            names += [name for trait in self.traits for name in trait.weights_in_the_way(weights)]
        return list(dict.fromkeys(names))


PLAIN = (
    Ours(use_unet_skips=False, use_value_residual=False, use_x0_residual=False),
    Ours(attention_scale=None, unpadded_vocab_size=None),
    Needs(pad_token_id=lambda config: config.pad_token_id is None or config.pad_token_id < config.vocab_size),
    Same("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    Same("initializer_range", convert=float),
)
TIED_OR_NOT = Same("tie_word_embeddings")
NO_EMBEDDING_NORM = Ours(use_embedding_norm=False)
NO_SOFTCAP = Ours(final_logit_softcapping=None)
SOFTCAP = Same("final_logit_softcapping", convert=lambda cap: cap and float(cap))
SIZES = Same("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
DECODER = (*PLAIN, SIZES, Same("attention_dropout"))
USUAL = (*DECODER, TIED_OR_NOT, NO_EMBEDDING_NORM, NO_SOFTCAP)

SWIGLU = (Ours(mlp_type="swiglu"), Theirs(hidden_act=("silu", "swish")))
RELU2 = (Ours(mlp_type="relu2"), Theirs(hidden_act="relu2"))
RMSNORM = (Ours(norm_type="rmsnorm", norm_affine=True), Same(norm_eps="rms_norm_eps", convert=float))
NO_QK_NORM = Ours(use_qk_norm=False)
QK_NORM = Ours(use_qk_norm=True, qk_norm_affine=True)
BIASES = Same("attention_bias", "mlp_bias")
NO_BIASES = Ours(attention_bias=False, mlp_bias=False)
ATTENTION_BIAS = (Same("attention_bias"), Ours(mlp_bias=False))
FULL = Ours(sliding_window=None)
LLAMA = (*USUAL, Rotary(), *RMSNORM, *SWIGLU, NO_QK_NORM)
QKV = ATTENTION_MATRICES[:3]
# Types that scale cos and sin: a norm after the rotation would undo that.
UNSCALED = tuple(name for name in ROPE_TYPES if name not in ("yarn", "longrope"))
# StableLM rotates the fraction that its configuration names, of which the proportional type makes something else.
NOT_PROPORTIONAL = tuple(name for name in ROPE_TYPES if name != "proportional")


def layernorm(eps: str) -> tuple[Trait, ...]:
    return (Ours(norm_type="layernorm", norm_affine=True), Same(norm_eps=eps, convert=float))


def entry(name: str, model_type: str, *traits: Trait) -> Architecture:
    return Architecture(name, model_type, traits)


# Of those that are exact at the same cost, an export takes the first.
# fmt: off
ARCHITECTURES = (
    entry(
        "GPT2LMHeadModel", "gpt2", *PLAIN, TIED_OR_NOT, NO_EMBEDDING_NORM, NO_SOFTCAP, FULL, NO_QK_NORM,
        Ours(position_embedding_type="learned", attention_bias=True, mlp_bias=True),
        *layernorm("layer_norm_epsilon"), Activation("activation_function"), Heads(grouped=False, free_size=False),
        Theirs(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        Same(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head"),
        Same(max_position_embeddings="n_positions", intermediate_size="n_inner"),
        Same(embedding_dropout="embd_pdrop", attention_dropout="attn_pdrop", hidden_dropout="resid_pdrop"),
        ContextLength(), Fused(QKV, "self_attn.c_attn"),
        Transposed(("self_attn.c_attn", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
        Renamed({
            "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.c_attn": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        }),
    ),
    entry(
        "Qwen2ForCausalLM", "qwen2", *LLAMA, Heads(), WindowPerLayer(switch=True),
        Ours(attention_bias=True, mlp_bias=False), WithoutBias("attention_bias", ("self_attn.o_proj",)),
    ),
    entry("LlamaForCausalLM", "llama", *LLAMA, Heads(whole=True), BIASES, FULL),
    entry("MistralForCausalLM", "mistral", *LLAMA, Heads(), NO_BIASES, UniformWindow()),
    entry("MinistralForCausalLM", "ministral", *LLAMA, Heads(), NO_BIASES, WindowPerLayer(always_set=True)),
    entry(
        "CwmForCausalLM", "cwm", *LLAMA, Heads(whole=True), WindowPerLayer(always_set=True),
        Ours(attention_bias=False), Same("mlp_bias"),
        # Its configuration replaces missing ids by those of its own vocabulary.
        Needs(
            bos_token_id=lambda config: config.bos_token_id is not None,
            eos_token_id=lambda config: config.eos_token_id is not None,
        ),
    ),
    entry(
        "SmolLM3ForCausalLM", "smollm3", *LLAMA, Heads(), BIASES, WindowPerLayer(switch=True), RopeInEveryLayer()
    ),
    entry(
        "Phi3ForCausalLM", "phi3", *USUAL, Rotary(partial=True, rope_types=("default",)), *RMSNORM, *SWIGLU,
        NO_QK_NORM, Heads(), NO_BIASES, UniformWindow(), Same(hidden_dropout="resid_pdrop"),
        Fused(QKV, "self_attn.qkv_proj"), Fused(MLP_MATRICES[:2], "mlp.gate_up_proj"),
    ),
    entry(
        "Qwen3ForCausalLM", "qwen3", *USUAL, Rotary(), *RMSNORM, *SWIGLU, QK_NORM, Heads(), *ATTENTION_BIAS,
        WindowPerLayer(switch=True),
    ),
    entry(
        "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", *USUAL, Rotary(rope_types=UNSCALED), *RMSNORM, *SWIGLU,
        QK_NORM, Heads(), *ATTENTION_BIAS, FULL, NormAfterRotation(),
        Renamed({"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}),
    ),
    entry(
        "ArceeForCausalLM", "arcee", *USUAL, Rotary(), *RMSNORM, Activation(), NO_QK_NORM, Heads(whole=True), BIASES,
        FULL,
    ),
    entry(
        "NanoChatForCausalLM", "nanochat", *DECODER, TIED_OR_NOT, SOFTCAP, Rotary(rope_types=UNSCALED), Activation(),
        Ours(norm_type="rmsnorm", norm_affine=False, use_embedding_norm=True, use_qk_norm=True, qk_norm_affine=False),
        Same(norm_eps="rms_norm_eps", convert=float), Heads(), *ATTENTION_BIAS, FULL,
        OppositeRotation(), Renamed({"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}),
    ),
    entry(
        "ApertusForCausalLM", "apertus", *USUAL, Rotary(), *RMSNORM, Activation(), QK_NORM, Heads(), *ATTENTION_BIAS,
        FULL,
        Renamed({"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}),
    ),
    entry(
        "VaultGemmaForCausalLM", "vaultgemma", *DECODER, NO_EMBEDDING_NORM, SOFTCAP, Rotary(), *RMSNORM, NO_QK_NORM,
        Ours(mlp_type="swiglu", tie_word_embeddings=False), Heads(whole=True), *ATTENTION_BIAS,
        Theirs(tie_word_embeddings=(False, True), hidden_activation=("silu", "swish"), attn_logit_softcapping=None),
        WindowPerLayer(always_set=True), QueryScalar(), GainsMinusOne(), ScaledEmbedding(),
        Renamed({"post_attention_layernorm": "pre_feedforward_layernorm"}),
    ),
    entry(
        "NemotronForCausalLM", "nemotron", *USUAL, Rotary(partial=True), *layernorm("norm_eps"), *RELU2, NO_QK_NORM,
        Heads(), BIASES, FULL, GainsMinusOne(),
    ),
    entry(
        "Jais2ForCausalLM", "jais2", *USUAL, Rotary(), *layernorm("layer_norm_eps"), *RELU2, NO_QK_NORM,
        Heads(whole=True), BIASES, FULL,
    ),
    entry(
        "GPTNeoXForCausalLM", "gpt_neox", *USUAL, Rotary(partial=True), *layernorm("layer_norm_eps"), Activation(),
        NO_QK_NORM, Heads(grouped=False, free_size=False), Same("attention_bias", "hidden_dropout"),
        Ours(mlp_bias=True), FULL, Theirs(use_parallel_residual=False),
        Fused(QKV, "self_attn.query_key_value", per_head=True),
        Renamed({
            "model.embed_tokens": "gpt_neox.embed_in", "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "self_attn.query_key_value": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
        }),
    ),
    entry(
        "Starcoder2ForCausalLM", "starcoder2", *USUAL, Rotary(), *layernorm("norm_epsilon"), Activation(), NO_QK_NORM,
        Heads(), SharedBiasSwitch(), UniformWindow(),
        Same(embedding_dropout="embedding_dropout", hidden_dropout="residual_dropout"),
        Renamed({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    ),
    entry(
        "OlmoForCausalLM", "olmo", *USUAL, Rotary(), Ours(norm_type="layernorm", norm_affine=False, norm_eps=1e-5),
        *SWIGLU, NO_QK_NORM, Heads(), *ATTENTION_BIAS, FULL, Theirs(clip_qkv=None),
    ),
    entry(
        "StableLmForCausalLM", "stablelm", *USUAL, Rotary(partial=True, rope_types=NOT_PROPORTIONAL), *SWIGLU,
        *layernorm("layer_norm_eps"), Heads(free_size=False), Same(attention_bias="use_qkv_bias"), Ours(mlp_bias=False),
        FULL, Theirs(use_parallel_residual=False), WithoutBias("attention_bias", ("self_attn.o_proj",)),
        WithoutBias("use_qk_norm", QK_NORMS), OwnNormPerHead(),
    ),
)
# fmt: on


def with_zero_biases(weights: Weights, modules: Iterable[str]) -> Weights:
    """The modules of every layer (`modules`) with a bias of zero, where they have none."""
    matrices = of_layers(weights, modules)
    biases = {name.removesuffix("weight") + "bias": weights[name].new_zeros(len(weights[name])) for name in matrices}
    return biases | weights


def with_unit_gains(weights: Weights, config: GPT2ModernConfig, norms: Iterable[str], size: int) -> Weights:
    """`norms` with gains of one, and biases of zero for layernorm."""
    like = weights[EMBEDDING]
    gains = {f"{norm}.weight": like.new_ones(size) for norm in norms}
    biases = {f"{norm}.bias": like.new_zeros(size) for norm in norms} if config.norm_type == "layernorm" else {}
    return weights | gains | biases


def in_every_layer(config: GPT2ModernConfig, modules: Iterable[str]) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(config.num_hidden_layers) for module in modules]


def cut_vocabulary(weights: Weights, config: GPT2ModernConfig) -> Weights:
    return weights | {name: weights[name][: config.unpadded_vocab_size] for name in (EMBEDDING, HEAD)}


def norm_embedding_table(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Nothing stands between the table and its norm where positions are rotations."""
    norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)
    prefix = "model.embedding_norm."
    own = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
    norm.to(weights[EMBEDDING]).load_state_dict({name.removeprefix(prefix): weight for name, weight in own.items()})
    with torch.no_grad():
        table = norm(weights[EMBEDDING])
    return {name: weight for name, weight in weights.items() if name not in own} | {EMBEDDING: table}


def scale_queries(weights: Weights, config: GPT2ModernConfig) -> Weights:
    """Stock attention divides by sqrt(head_dim). Behind a norm only its gain can carry another factor."""
    module = "self_attn.q_norm" if config.use_qk_norm else "self_attn.q_proj"
    names = of_layers(weights, [module]) + of_layers(weights, [module], "bias")
    factor = config.attention_scale * math.sqrt(config.head_dim)
    return weights | {name: weights[name] * factor for name in names}


def repeat_keys_and_values(weights: Weights, config: GPT2ModernConfig) -> Weights:
    repeats = config.num_attention_heads // config.num_key_value_heads
    modules = ("self_attn.k_proj", "self_attn.v_proj")
    names = of_layers(weights, modules) + of_layers(weights, modules, "bias")
    heads = {name: weights[name].unflatten(0, (config.num_key_value_heads, -1)) for name in names}
    return weights | {name: head.repeat_interleave(repeats, dim=0).flatten(0, 1) for name, head in heads.items()}


@dataclass(frozen=True)
class Rewrite:
    """The same model of ours without `setting` having its value: the fields that change, given the configuration, or
    None if it cannot be done; and the weights, given the configuration from before. Architectures that get by at a
    lower cost are preferred."""

    setting: str
    changes: Callable[[GPT2ModernConfig], dict[str, Any] | None]
    weights: Callable[[Weights, GPT2ModernConfig], Weights]
    cost: int = 1


REWRITES = (
    Rewrite(
        "unpadded_vocab_size",
        lambda config: {"vocab_size": config.unpadded_vocab_size, "unpadded_vocab_size": None},
        cut_vocabulary,
    ),
    Rewrite(
        "use_embedding_norm",
        lambda config: (
            {"use_embedding_norm": False, "tie_word_embeddings": False}
            if config.use_embedding_norm and config.position_embedding_type == "rope"
            else None
        ),
        norm_embedding_table,
    ),
    Rewrite(
        "norm_affine",
        lambda config: None if config.norm_affine else {"norm_affine": True},
        lambda weights, config: with_unit_gains(
            weights, config, [*in_every_layer(config, BLOCK_NORMS), "model.norm"], config.hidden_size
        ),
    ),
    Rewrite(
        "qk_norm_affine",
        lambda config: None if config.qk_norm_affine else {"qk_norm_affine": True},
        lambda weights, config: (
            with_unit_gains(weights, config, in_every_layer(config, QK_NORMS), config.head_dim)
            if config.use_qk_norm
            else weights
        ),
    ),
    Rewrite(
        "attention_scale",
        lambda config: {"attention_scale": None} if config.qk_norm_affine or not config.use_qk_norm else None,
        scale_queries,
    ),
    Rewrite(
        "attention_bias",
        lambda config: None if config.attention_bias else {"attention_bias": True},
        lambda weights, config: with_zero_biases(weights, ATTENTION_MATRICES),
    ),
    Rewrite(
        "mlp_bias",
        lambda config: None if config.mlp_bias else {"mlp_bias": True},
        lambda weights, config: with_zero_biases(weights, MLP_MATRICES),
    ),
    Rewrite(
        "num_key_value_heads",
        lambda config: {"num_key_value_heads": config.num_attention_heads},
        repeat_keys_and_values,
        cost=10,
    ),
    Rewrite(
        "tie_word_embeddings",
        lambda config: {"tie_word_embeddings": False} if config.tie_word_embeddings else None,
        lambda weights, config: weights,
    ),
)


@dataclass(frozen=True)
class Plan:
    """How a model becomes `architecture`: rewrites, each with the configuration that it starts from, the configuration
    after the last, and what is in the way all the same."""

    architecture: Architecture
    rewrites: list[tuple[Rewrite, GPT2ModernConfig]]
    config: GPT2ModernConfig
    in_the_way: list[str]

    @property
    def cost(self) -> int:
        return sum(rewrite.cost for rewrite, _ in self.rewrites)


def plan_export(architecture: Architecture, config: GPT2ModernConfig, weights: Weights | None = None) -> Plan:
    """Apply the rewrites that help. Without `weights` only the settings are looked at."""
    rewrites = []
    for rewrite in REWRITES:
        if rewrite.setting not in architecture.in_the_way(config) or (changes := rewrite.changes(config)) is None:
            continue
        rewritten = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(rewritten, name, value)
        if rewrite.setting not in architecture.in_the_way(rewritten):
            rewrites.append((rewrite, config))
            config = rewritten
    return Plan(architecture, rewrites, config, architecture.in_the_way(config, weights))


def to_native(model: PreTrainedModel, architecture: str | None = None) -> PreTrainedModel:
    """`model` (GPT2ModernForCausalLM) as the stock class of ARCHITECTURES with the same logits, in evaluation mode.

    Of the classes that are exact it is the one that needs the fewest rewrites, of those the first in ARCHITECTURES;
    `architecture` names another. Weights keep their dtype, or become fp32 where a rewrite would round them. The
    generation configuration comes along. The model itself stays as it is.

    Raises ValueError if no class, or not `architecture`, is exact, naming the settings or weights in the way.
    """
    if type(model).__name__ != GPT2ModernForCausalLM.__name__:
        raise ValueError(f"a {type(model).__name__} cannot be exported, only a {GPT2ModernForCausalLM.__name__}")
    config = model.config
    candidates = [entry for entry in ARCHITECTURES if architecture in (None, entry.name)]
    if not candidates:
        names = ", ".join(entry.name for entry in ARCHITECTURES)
        raise ValueError(f"architecture={architecture!r} is not one of those that can be written: {names}")
    weights = _in_full_precision(model)
    plans = [plan_export(candidate, config, weights) for candidate in candidates]
    exact = [plan for plan in plans if not plan.in_the_way]
    if not exact:
        raise ValueError(_refusal(plans, config))
    plan = min(exact, key=lambda plan: plan.cost)
    for rewrite, before in plan.rewrites:
        weights = rewrite.weights(weights, before)
    settings: dict[str, Any] = {}
    for trait in plan.architecture.traits:
        settings |= trait.stock_settings(plan.config)
        weights = trait.stock_weights(weights, plan.config)
    stock_class = getattr(transformers, plan.architecture.name)
    stock_config = AutoConfig.for_model(plan.architecture.model_type, **settings)
    return _build(stock_class, stock_config, weights, model)


def from_native(model: PreTrainedModel | str | os.PathLike) -> GPT2ModernForCausalLM:
    """A stock model, or a folder of one, as GPT2ModernForCausalLM with the same logits, in evaluation mode.

    Weights keep their dtype and the generation configuration comes along. Raises ValueError for an architecture that is
    not in ARCHITECTURES, and for a setting or weight of it that has no counterpart here, naming it.
    """
    if not isinstance(model, PreTrainedModel):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        _architecture_of(config.model_type, (config.architectures or [None])[0])
        model = _load(model)
    architecture = _architecture_of(model.config.model_type, type(model).__name__)
    settings: dict[str, Any] = {}
    try:
        for trait in architecture.traits:
            settings |= trait.our_settings(model.config)
        config = GPT2ModernConfig(**settings)
        weights = _in_full_precision(model)
        for trait in reversed(architecture.traits):
            weights = trait.our_weights(weights, config)
        if names := [name for trait in architecture.traits for name in trait.weights_in_the_way(weights)]:
            raise ValueError(f"{names[0]} has values that ours cannot have")
    except ValueError as error:
        raise ValueError(f"this {architecture.name} cannot be imported: {error}") from error
    return _build(GPT2ModernForCausalLM, config, weights, model)


def from_gpt2(model: PreTrainedModel | str | os.PathLike) -> GPT2ModernForCausalLM:
    """A GPT2LMHeadModel of any size, or a folder of one; see `from_native`."""
    is_model = isinstance(model, PreTrainedModel)
    config = model.config if is_model else AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type != "gpt2":
        raise ValueError(f"model_type={config.model_type!r} is not 'gpt2'; from_native takes other architectures")
    return from_native(model)


def _architecture_of(model_type: str, class_name: str | None) -> Architecture:
    if model_type == GPT2ModernConfig.model_type:
        raise ValueError("this is a GPT2-Modern model already; to_native exports it")
    found = [entry for entry in ARCHITECTURES if entry.model_type == model_type]
    if not found or class_name not in (None, found[0].name):
        names = ", ".join(entry.name for entry in ARCHITECTURES)
        raise ValueError(f"architecture {class_name or model_type} cannot be imported; these can: {names}")
    return found[0]


def _refusal(plans: list[Plan], config: GPT2ModernConfig) -> str:
    """What is in the way everywhere; if nothing is, what is in the way of the nearest few."""

    def described(name: str) -> str:
        if not hasattr(config, name):
            return f"{name} (its values)"
        value = getattr(config, name)
        if name == "layer_types":
            value = sorted(set(value))
        return f"{name}={value!r}"

    nearest = sorted(plans, key=lambda plan: (len(plan.in_the_way), plan.cost))
    if len(nearest) == 1:
        reasons = ", ".join(map(described, nearest[0].in_the_way))
        return f"{nearest[0].architecture.name} cannot have the same logits; in the way: {reasons}"
    if everywhere := [name for name in nearest[0].in_the_way if all(name in plan.in_the_way for plan in plans)]:
        return f"no stock architecture has the same logits; in the way: {', '.join(map(described, everywhere))}"
    shown: list[Plan] = []
    for plan in nearest:
        if not any(set(plan.in_the_way) >= set(other.in_the_way) for other in shown):
            shown.append(plan)
    reasons = [f"of {plan.architecture.name} {', '.join(map(described, plan.in_the_way))}" for plan in shown[:3]]
    return f"no stock architecture has the same logits; in the way {'; '.join(reasons)}"


def _in_full_precision(model: PreTrainedModel) -> Weights:
    """Copies of all weights, in fp32 if they have less, so that rewrites round at most once."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return {name: weight.detach().to(dtype, copy=True) for name, weight in model.state_dict().items()}


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, source: PreTrainedModel
) -> PreTrainedModel:
    """The model with exactly these weights, in `source`'s dtype if that loses nothing."""
    fits = all(torch.equal(weight.to(source.dtype).to(weight.dtype), weight) for weight in weights.values())
    dtype = source.dtype if fits else next(iter(weights.values())).dtype
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}, key=str):
        raise ValueError(
            f"weight {wrong[0]} has no counterpart; merge adapters and undo quantisation before the conversion"
        )
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device)


def _load(name: str | os.PathLike, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The causal language model of a folder. Raises ValueError if weights are missing, which would be random ones."""
    model, report = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, among them {missing[0]}")
    return model


@dataclass
class ConversionConfig:
    model: str = field(metadata={"help": "folder of a GPT2-Modern model, or of a stock one to import"})
    output_dir: str = field(metadata={"help": "folder to write, which must not exist yet"})
    architecture: str | None = field(
        default=None, metadata={"help": "stock class to export to; by default the nearest that is exact"}
    )

    def __post_init__(self):
        if not Path(self.model, "config.json").is_file():
            raise ValueError(f"--model {self.model} is not a model folder: it has no config.json")
        output_dir = Path(self.output_dir)
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"--output_dir {self.output_dir} exists; delete it, or name another folder")
        check_writable_folder("--output_dir", self.output_dir)


CARD = """\
---
{{ card_data }}
---

# {{ name }}

`{{ source }}`, {{ source_class }}, as {{ architecture }}: the same model in another layout, converted
by GPT2-Modern.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ name }}"{{ trust }})
```

On {{ tokens }} random tokens the logits of the two differ by {{ difference }} at most, in fp32; the largest logit is
{{ largest }}.
"""

# Letters, digits, spaces, line breaks and other scripts: where tokenizers of different classes part ways.
TOKENIZER_SAMPLE = "Hello  World's 12345\n\n\tdef f(x): return x+1  # \u00e9t\u00e9 \u65e5\u672c we'RE"


def convert_folder(model_dir: Path, output_dir: Path, architecture: str | None = None) -> dict[str, Any]:
    """Export or import the folder `model_dir` to `output_dir`, with tokenizer, generation configuration and a card.

    Returns what the card says: name, source, source_class, architecture, tokens, difference and largest (of logits).
    `output_dir` appears whole or not at all. Raises GPT2ModernError for what the folder or the disk does not allow, and
    RuntimeError if the written model computes something else, which would be a defect here.
    """
    original = _load_or_user_error(model_dir)
    is_export = original.config.model_type == GPT2ModernConfig.model_type
    if architecture and not is_export:
        raise GPT2ModernError(f"--architecture {architecture} is for exports, and --model {model_dir} is a stock model")
    try:
        converted = to_native(original, architecture) if is_export else from_native(original)
    except ValueError as error:
        raise GPT2ModernError(f"--model {model_dir}: {error}") from None
    facts = {
        "name": output_dir.name,
        "source": model_dir.resolve().name,
        "source_class": type(original).__name__,
        "architecture": type(converted).__name__,
    }
    temporary = output_dir.parent / f".{output_dir.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        converted.save_pretrained(temporary)
        del converted
        _keep_tokenizer(model_dir, temporary, facts["architecture"])
        facts |= _compare(original, _load(temporary, torch.float32))
        _write_card(temporary / "README.md", facts, needs_trust=not is_export)
        _give_usual_modes(temporary)
        temporary.replace(output_dir)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {output_dir}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _load_or_user_error(model_dir: Path) -> PreTrainedModel:
    try:
        return _load(model_dir)
    except Exception as error:  # OSError, KeyError, UnpicklingError, ... by what is wrong with the folder
        raise GPT2ModernError(f"--model {model_dir} cannot be loaded: {first_line(error)}") from error


def _keep_tokenizer(model_dir: Path, output_dir: Path, architecture: str) -> None:
    """Save the tokenizer if there is one. transformers picks its class by model_type too, so that it is tried out."""
    if not any((model_dir / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with its files
        raise GPT2ModernError(
            f"--model {model_dir} has a tokenizer that cannot be loaded: {first_line(error)}"
        ) from error
    tokenizer.save_pretrained(output_dir)
    kept = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    if kept(TOKENIZER_SAMPLE).input_ids != tokenizer(TOKENIZER_SAMPLE).input_ids:
        raise GPT2ModernError(
            f"--model {model_dir}: transformers reads this tokenizer as a {type(kept).__name__} beside a model of "
            f"{architecture}, and that splits text differently; name another class with --architecture"
        )


def _compare(original: PreTrainedModel, converted: PreTrainedModel) -> dict[str, Any]:
    """Number of random tokens, largest difference between the logits of the two models in fp32, largest logit."""
    config = original.config
    length = min(config.max_position_embeddings, 2 * (getattr(config, "sliding_window", None) or 64))
    vocab_size = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    input_ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = (model.float().eval()(input_ids).logits for model in (original, converted))
    largest = expected.abs().max().item()
    difference = (expected - actual).abs().max().item()
    if not math.isfinite(largest):
        raise GPT2ModernError("--model has logits that are not finite numbers, so that there is nothing to compare")
    # fp32 has 7 digits and a deep model loses some of them; a wrong layout changes the first.
    if not difference <= 1e-4 * max(1.0, largest):
        raise RuntimeError(f"logits of the converted model differ by {difference}, the largest is {largest}")
    return {"tokens": length, "difference": f"{difference:.1e}", "largest": f"{largest:.3g}"}


def _write_card(path: Path, facts: dict[str, Any], needs_trust: bool) -> None:
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2-modern", "text-generation", *(["custom_code"] if needs_trust else [])],
    )
    trust = ", trust_remote_code=True" if needs_trust else ""
    ModelCard.from_template(card_data, template_str=CARD, trust=trust, **facts).save(path)


def _give_usual_modes(folder: Path) -> None:
    """safetensors creates files that only their owner can read; a model folder has the modes of its user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of loading: what matters of them is raised here."""
    verbosity, has_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_bars:
            hf_logging.enable_progress_bar()


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(ConversionConfig, argv, __doc__)
    with _quiet_transformers():
        facts = convert_folder(Path(config.model), Path(config.output_dir), config.architecture)
    print(f"{facts['source_class']} -> {facts['architecture']}: {config.output_dir}")
    print(f"logits differ by at most {facts['difference']} on {facts['tokens']} tokens (largest: {facts['largest']})")


if __name__ == "__main__":
    main()
