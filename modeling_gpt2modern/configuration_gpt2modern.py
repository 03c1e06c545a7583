"""Define the configuration of GPT2-Modern, a field for each choice between GPT-2 (2019) and Llama, and the presets."""

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Where the Auto classes find the code that is saved next to the weights; vLLM loads the entry AutoModel.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2modern.GPT2ModernConfig",
    "AutoModel": "modeling_gpt2modern.GPT2ModernModel",
    "AutoModelForCausalLM": "modeling_gpt2modern.GPT2ModernForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_gpt2modern.GPT2ModernForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_gpt2modern.GPT2ModernForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt2modern.GPT2ModernForTokenClassification",
}

# Keywords that transformers itself reads from a config without declaring them as fields of PreTrainedConfig.
TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "classifier_dropout",
    "custom_pipelines",
    "experts_implementation",
    "is_causal",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "tie_last_hidden_states",
    "token_classification_bias",
    "torch_dtype",
    "transformers_weights",
}

# Keys of other models whose nearest field has another kind of value, and so cannot be in `attribute_map`.
NEAREST = {"hidden_act": ["mlp_type"], "scale_attn_weights": ["attention_scale"]}


class MLPKind(NamedTuple):
    """Describe one kind of MLP: the name of its activation function in transformers' ACT2FN, and whether it is gated.

    Without a gate it computes down(activation(up(x))), with a gate down(activation(gate(x)) * up(x)).
    """

    activation: str
    gated: bool = False

    def default_intermediate_size(self, hidden_size: int) -> int:
        """Return the default MLP width: 4 x hidden_size without a gate; with a gate 8/3 x hidden_size, rounded up to a
        multiple of 64, so that its three matrices have about as many parameters as the two without a gate."""
        return -(-hidden_size * 8 // (3 * 64)) * 64 if self.gated else 4 * hidden_size


# The one table of MLP kinds: `mlp_type` takes its keys; layers, default sizes, parallel plans and conversion read it.
MLPS: dict[str, MLPKind] = {
    "gelu_new": MLPKind("gelu_new"),
    "gelu": MLPKind("gelu"),
    "relu2": MLPKind("relu2"),
    "swiglu": MLPKind("silu", gated=True),
}

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
ROPE_KEYS = tuple(RopeParameters.__annotations__)


def _check_mlp_type(mlp_type: str) -> None:
    """Raise ValueError if `mlp_type` is not a key of the table MLPS. `@strict` calls this whenever the field is set."""
    if mlp_type not in MLPS:
        raise ValueError(f"mlp_type={mlp_type!r} is unknown; choose from {', '.join(MLPS)}")


def _as_value_error(method: Callable) -> Callable:
    """Wrap a method that huggingface_hub's `@strict` has added: its exceptions become ValueErrors of one line."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error

    return wrapped


def load_conversion(name: str | os.PathLike, model_type: str) -> ModuleType:
    """Return the module that imports stock models. Raises ValueError, with the model's name and type, if the package
    gpt2-modern is not installed."""
    try:  # this file travels with every saved model, also to where nothing else of GPT2-Modern is installed
        from gpt2modern import conversion  # noqa: PLC0415  optional: needed only for stock models
    except ImportError as error:
        raise ValueError(
            f"{name} is a {model_type} model, which only the package gpt2-modern can import ({error}); load it with "
            "AutoModelForCausalLM, or pip install gpt2-modern"
        ) from error
    return conversion


@strict
class GPT2ModernConfig(PreTrainedConfig):
    """Hold every setting of a GPT2-Modern model. The defaults are Llama's design in the size of GPT-2.

    - vocab_size: number of rows of the embedding and of the head. `unpadded_vocab_size`: number of token ids (None
        means vocab_size). The remaining rows only make the matrices faster; their tokens have probability 0.
    - intermediate_size: width of the MLP; None means the value of `MLPKind.default_intermediate_size`.
    - head_dim: None means hidden_size / num_attention_heads. `num_key_value_heads`: None means num_attention_heads.
    - position_embedding_type: "learned" (GPT-2) or "rope" (arXiv:2104.09864), configured by `rope_parameters` as for
        any model of transformers; `partial_rotary_factor` is the rotated fraction of each head.
    - norm_type: "layernorm" (arXiv:1607.06450) or "rmsnorm" (arXiv:1910.07467). `norm_affine`: norms have a learned
        gain (and a bias, for layernorm). `norm_eps`: a small number that is added to the variance.
    - mlp_type: a key of MLPS: "gelu_new" (GPT-2's tanh form), "gelu" (arXiv:1606.08415), "relu2" (arXiv:2109.08668),
        "swiglu" (arXiv:2002.05202).
    - attention_scale: factor of the attention scores; None means 1 / sqrt(head_dim).
    - use_qk_norm: normalise queries and keys per head before RoPE (arXiv:2010.04245). `qk_norm_affine`: with a gain.
    - sliding_window: number of tokens, including the token itself, that a token attends to in a layer of the type
        "sliding_attention" (arXiv:2004.05150). `layer_types` lists the type of each layer; None means
        "sliding_attention" for all layers if sliding_window is set, and "full_attention" for all layers otherwise.
    - use_unet_skips, use_value_residual (arXiv:2410.17897), use_x0_residual, use_embedding_norm: the residual stream of
        the GPT-2 speedrun (github.com/KellerJordan/modded-nanogpt, record of 2024-11-10).
    - value_embedding_layers: layers whose attention values get a gated embedding of the token added, which starts at
        standard deviation 0.01; "alternating" means every other layer, counting from the last. Reads token ids, so that
        `inputs_embeds` is refused. `num_value_embeddings`: tables that the layers take in turn; None means one each.
    - use_smear: add a gated share of the previous token's embedding to each embedding. Like the next two, reads the
        previous token's id, which is neither padding nor of another document: no `inputs_embeds`, no 4D masks.
    - bigram_vocab_size: rows of a table into which the pair of a token and the previous one is hashed; each layer adds
        a share of this row, which starts at zero, to its input. None means no table.
    - use_key_offset: in layers of the type "full_attention", the dimensions of a key that RoPE does not rotate come
        from the previous token; needs partial_rotary_factor < 1.
    - use_backout: subtract a learned share of the hidden states at two thirds of the depth from the last.
    - final_logit_softcapping: c in logits = c tanh(logits / c) (arXiv:2408.00118); None means no soft cap.
    - initializer_range: standard deviation with which all matrices start. `embedding_initializer_range`: that of the
        token embedding (None: the same). Output matrices of attention and MLP use initializer_range / sqrt(2 x
        num_hidden_layers), as in GPT-2; with `zero_init_projections` they and an untied head start at zero.

    Raises ValueError for an unknown key, for a value of the wrong type, and for values that contradict each other.
    """

    model_type = "gpt2modern"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {  # the names of GPT2Config
        "activation_function": "mlp_type",
        "attn_pdrop": "attention_dropout",
        "embd_pdrop": "embedding_dropout",
        "layer_norm_epsilon": "norm_eps",
        "n_ctx": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "resid_pdrop": "hidden_dropout",
    }
    _auto_class = "AutoConfig"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.value_residual": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    unpadded_vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024

    position_embedding_type: Literal["learned", "rope"] = "rope"
    rope_parameters: dict | None = None
    partial_rotary_factor: float | int = 1.0
    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_affine: bool = True
    norm_eps: float = 1e-5
    mlp_type: str = validated_field(_check_mlp_type, default="swiglu")
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_scale: float | int | None = None
    use_qk_norm: bool = False
    qk_norm_affine: bool = True
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    use_unet_skips: bool = False
    use_value_residual: bool = False
    use_x0_residual: bool = False
    use_embedding_norm: bool = False

    value_embedding_layers: list[int] | str | None = None
    num_value_embeddings: int | None = None
    use_smear: bool = False
    bigram_vocab_size: int | None = None
    use_key_offset: bool = False
    use_backout: bool = False

    tie_word_embeddings: bool = True
    final_logit_softcapping: float | int | None = None

    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0

    initializer_range: float | int = 0.02
    embedding_initializer_range: float | int | None = None
    zero_init_projections: bool = False

    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GPT2ModernConfig":
        """Return the configuration of the preset `name` (a key of PRESETS), with the fields in `overrides` replaced.

        Fields that depend on an overridden field, and are not overridden themselves, are derived again: the number of
        heads changes so that the heads keep their size, if hidden_size is a multiple of it; a new vocab_size has no
        padding rows, and as many bigram rows per token; special token ids that are not below it are removed. Raises
        ValueError for an unknown preset or field and for values that the configuration refuses.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        for alias, field in cls.attribute_map.items():
            if alias in overrides and overrides.setdefault(field, value := overrides.pop(alias)) != value:
                raise ValueError(f"{alias}={value} contradicts {field}={overrides[field]}; remove one of them")
        for key in ("hidden_size", "vocab_size"):  # used in arithmetic below, before `@strict` checks types
            if not isinstance(overrides.get(key, 0), int):
                raise ValueError(f"{key}={overrides[key]!r} must be a whole number")
        fields = PRESETS[name] | overrides
        head_dim = PRESETS[name]["hidden_size"] // PRESETS[name]["num_attention_heads"]
        keeps_heads = not {"num_attention_heads", "head_dim"} & set(overrides)
        if keeps_heads and fields["hidden_size"] % head_dim == 0:
            fields["num_attention_heads"] = fields["hidden_size"] // head_dim
        elif keeps_heads and fields["hidden_size"] % fields["num_attention_heads"]:
            raise ValueError(
                f"hidden_size={fields['hidden_size']} is not a multiple of {head_dim}, the size of a head of {name!r}; "
                "set num_attention_heads too"
            )
        if "vocab_size" in overrides:
            derived = {"unpadded_vocab_size"} | {key for key, row in GPT2_TOKENS.items() if row >= fields["vocab_size"]}
            fields = {key: value for key, value in fields.items() if key in overrides or key not in derived}
            if rows := PRESETS[name].get("bigram_vocab_size"):
                fields |= {"bigram_vocab_size": rows // PRESETS[name]["vocab_size"] * fields["vocab_size"]} | overrides
        return cls(**fields)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Read config.json as transformers does, and translate the settings of a stock architecture (GPT-2, Llama, ...)
        to those with the same logits. Raises ValueError for an architecture or a setting without a counterpart."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (model_type := settings.get("model_type", cls.model_type)) != cls.model_type:
            conversion = load_conversion(pretrained_model_name_or_path, model_type)
            settings = conversion.our_config(settings, pretrained_model_name_or_path).to_dict()
        return settings, kwargs

    def __post_init__(self, **kwargs):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                value = kwargs.pop(alias)
                if getattr(self, name) not in (defaults[name], value):
                    raise ValueError(f"{alias}={value} contradicts {name}={getattr(self, name)}; remove one of them")
                setattr(self, name, value)
        for key in ("rope_theta", "rope_scaling"):  # older names for keys of rope_parameters
            value = kwargs.get(key)
            if value is not None and self.rope_parameters and self.rope_parameters.get(key) != value:
                raise ValueError(f"{key}={value} contradicts rope_parameters={self.rope_parameters}; remove one")
        for name in defaults:
            if isinstance(value := getattr(self, name), int) and value >= 2**31:
                raise ValueError(f"{name}={value} must be at most {2**31 - 1}")
        is_loaded = self.transformers_version is not None  # from a config.json
        self._refuse_unknown_keys(kwargs, is_loaded)

        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}; change one of them, or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = MLPS[self.mlp_type].default_intermediate_size(self.hidden_size)
        if self.layer_types is None:
            layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers
        if self.value_embedding_layers == "alternating":
            self.value_embedding_layers = list(range((self.num_hidden_layers - 1) % 2, self.num_hidden_layers, 2))
        # Not in a validation method, which also runs before saving: transformers' own tools set a window on models
        # whose layers do not use it, and save them.
        if self.sliding_window is not None and "sliding_attention" not in self.layer_types and not is_loaded:
            raise ValueError(
                f"sliding_window={self.sliding_window}, but layer_types has no 'sliding_attention'; change one of them"
            )

        self.auto_map = AUTO_MAP | (kwargs.pop("auto_map", None) or {})
        self._choose_parallel_plans()
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "rope":
            self.partial_rotary_factor = self.rope_parameters.get("partial_rotary_factor", 1.0)

    def _choose_parallel_plans(self) -> None:
        """Remove from the tensor-parallel plan (how transformers splits each module over GPUs) the modules that this
        model does not have (all, if it has weights of single heads, which no plan splits), and set the
        pipeline-parallel plan to None if stages would compute wrong logits.

        A pipeline stage receives only the output of the stage before it, as `inputs_embeds`. Residuals from earlier
        layers are then missing, and learned positions or an embedding norm would be applied a second time.
        """
        absent = {
            "gate_proj": not MLPS[self.mlp_type].gated,
            "q_norm": not (self.use_qk_norm and self.qk_norm_affine),
            "k_norm": not (self.use_qk_norm and self.qk_norm_affine),
            "value_residual": not self.use_value_residual,
        }
        self.base_model_tp_plan = {
            name: style for name, style in self.base_model_tp_plan.items() if not absent.get(name.rpartition(".")[2])
        }
        if self.value_embedding_layers:
            self.base_model_tp_plan = {}
        residuals = self.use_unet_skips or self.use_value_residual or self.use_x0_residual
        reads_ids = self.value_embedding_layers or self.use_smear or self.bigram_vocab_size or self.use_key_offset
        embeds_once = self.use_embedding_norm or self.position_embedding_type == "learned"
        if residuals or reads_ids or embeds_once or self.use_backout:
            self.base_model_pp_plan = None

    def _refuse_unknown_keys(self, kwargs: dict[str, Any], is_loaded: bool) -> None:
        """Raise ValueError for a key that is not a configuration field; transformers would keep it without effect.

        A key in a config.json (`is_loaded`) only causes a warning, unless it looks like a misspelt field: other tools
        write keys of their own into this file, and the checkpoint should still load.
        """
        for key in kwargs:
            if self._is_known(key):
                continue
            names = [field.name for field in dataclasses.fields(self)]
            nearest = NEAREST.get(key) or difflib.get_close_matches(key, names, n=1, cutoff=0.75)
            if is_loaded and not nearest:
                logger.warning(f"config.json has the key {key!r}, which is unknown to GPT2-Modern and has no effect")
                continue
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; remove it"
            raise ValueError(f"unknown configuration key {key!r}{hint}")

    def _is_known(self, key: str) -> bool:
        fields = {field.name for field in dataclasses.fields(self)}
        return key in fields or key in self.attribute_map or key in TRANSFORMERS_KEYS or key.startswith("_")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict, as transformers does, but without attributes that are not fields."""
        return {key: value for key, value in super().to_dict().items() if self._is_known(key)}

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """Fill in the missing entries of `rope_parameters` and return the keyword arguments that are left. Raises
        ValueError for an unknown or contradicting RoPE setting, and for any such setting with learned positions."""
        if self.position_embedding_type == "rope":
            # A copy, because the dict belongs to the caller. `type` is the older name of rope_type.
            parameters = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
            rope_type = parameters.setdefault("rope_type", parameters.pop("type", "default"))
            if rope_type not in ROPE_TYPES:
                raise ValueError(
                    f"rope_parameters has the unknown rope_type={rope_type!r}; choose from {', '.join(ROPE_TYPES)}"
                )
            for key in parameters:
                if key not in ROPE_KEYS:
                    raise ValueError(f"rope_parameters has the unknown key {key!r}; choose from {', '.join(ROPE_KEYS)}")
            fraction = parameters.setdefault("partial_rotary_factor", self.partial_rotary_factor)
            if self.partial_rotary_factor not in (1.0, fraction):
                raise ValueError(
                    f"partial_rotary_factor={self.partial_rotary_factor} contradicts the "
                    f"partial_rotary_factor={fraction} in rope_parameters; remove one of them"
                )
            self.rope_parameters = parameters
            return super().convert_rope_params_to_dict(**kwargs)
        given = [key for key in ("rope_theta", "rope_scaling") if kwargs.get(key) is not None]
        given += ["rope_parameters"] if self.rope_parameters else []
        given += ["partial_rotary_factor"] if self.partial_rotary_factor != 1.0 else []
        if given:
            raise ValueError(
                f"{given[0]} has no effect with position_embedding_type={self.position_embedding_type!r}; "
                "remove it, or set position_embedding_type='rope'"
            )
        self.rope_parameters = None
        return kwargs

    def validate_rope(self):
        """Check `rope_parameters` as transformers does, and also raise ValueError for values that give wrong angles:
        numbers that are not positive and finite, and lists of factors of the wrong length.

        transformers 5.23 only logs a warning for some of them, and accepts the others: the angles would be NaN or turn
        backwards, and a list of one factor would be used for all dimensions.
        """
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        parameters = self.rope_parameters or {}
        numbers = ("rope_theta", "factor", "attention_factor", "original_max_position_embeddings")
        for key in (*numbers, "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = parameters.get(key)
            is_given = value is not None or parameters.get("rope_theta", 1) is None
            if is_given and not (isinstance(value, int | float) and 0 < value < 2.0**63):
                raise ValueError(f"rope_parameters has {key}={value!r}; it must be a finite number above 0")
        count = int(self.head_dim * self.partial_rotary_factor) // 2
        for key in ("short_factor", "long_factor"):
            if parameters.get(key) is not None and len(parameters[key]) != count:
                raise ValueError(f"rope_parameters has {key}={parameters[key]!r}; it must be a list of {count} numbers")

    def validate_architecture(self):
        """Raise ValueError if a field is out of range or contradicts another field. `@strict` calls this after the
        configuration is built and before it is saved."""
        for name in type(self).__annotations__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number")
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive += ("num_key_value_heads", "head_dim", "max_position_embeddings")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; change one of them"
            )
        if self.unpadded_vocab_size is not None and not 0 < self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size={self.unpadded_vocab_size} must be between 1 and vocab_size={self.vocab_size}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name}={value} must be between 0 and {self.vocab_size - 1}, the last token id")
        layers, tables, depth = self.value_embedding_layers, self.num_value_embeddings, self.num_hidden_layers
        if layers is not None and (not layers or layers != sorted({*layers} & {*range(depth)})):
            raise ValueError(
                f"value_embedding_layers={layers!r} must be None, 'alternating', or rising layers up to {depth - 1}"
            )
        if tables is not None and not 1 <= tables <= len(layers or []):
            raise ValueError(f"num_value_embeddings={tables} must be from 1 to the number of value_embedding_layers")
        if self.bigram_vocab_size is not None and self.bigram_vocab_size < 2:
            raise ValueError(f"bigram_vocab_size={self.bigram_vocab_size} must be at least 2, or None")
        slides = "sliding_attention" in self.layer_types
        if slides and not (self.sliding_window and self.sliding_window > 0):
            raise ValueError(
                f"layer_types has 'sliding_attention', but sliding_window={self.sliding_window}; set it to at least 1"
            )
        if unknown := set(self.layer_types) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types has unknown {sorted(unknown)}; choose full_attention, sliding_attention")
        for name in ("attention_scale", "final_logit_softcapping"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, or None")
        for name in ("norm_eps", "initializer_range", "embedding_initializer_range"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        rotary_dim = int(self.head_dim * self.partial_rotary_factor)
        if self.position_embedding_type == "rope" and (rotary_dim < 2 or rotary_dim > self.head_dim or rotary_dim % 2):
            raise ValueError(
                f"head_dim={self.head_dim} x partial_rotary_factor={self.partial_rotary_factor} is {rotary_dim} "
                "rotated dimensions per head; it must be an even number between 2 and head_dim; change one of them"
            )

        if self.use_key_offset and rotary_dim == self.head_dim:
            raise ValueError(
                f"use_key_offset needs position_embedding_type='rope' with partial_rotary_factor="
                f"{self.partial_rotary_factor} below 1; change them, or set use_key_offset=False"
            )
        if self.use_key_offset and "full_attention" not in self.layer_types:
            raise ValueError(
                f"use_key_offset needs a layer with full attention, but all slide with sliding_window="
                f"{self.sliding_window}; set layer_types, or use_key_offset=False"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Write config.json as transformers does; its `auto_map` names the model code files saved next to it."""
        self.auto_map = self.auto_map | AUTO_MAP
        super().save_pretrained(save_directory, *args, **kwargs)


GPT2ModernConfig.validate = _as_value_error(GPT2ModernConfig.validate)
GPT2ModernConfig.__setattr__ = _as_value_error(GPT2ModernConfig.__setattr__)


# Width, depth and heads of the four GPT-2 models (Radford et al., 2019).
SIZES = {
    "": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "-medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "-large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "-xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
}

GPT2_TOKENS = {"bos_token_id": 50256, "eos_token_id": 50256}

# 50304 = 393 x 128: matrix products with a multiple of 64 or 128 rows run on full tiles.
PADDED_VOCABULARY = {"vocab_size": 50304, "unpadded_vocab_size": 50257}

GPT2 = GPT2_TOKENS | {
    "position_embedding_type": "learned",
    "norm_type": "layernorm",
    "mlp_type": "gelu_new",
    "mlp_bias": True,
    "attention_bias": True,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}

# Made for Muon; of all that differs from `modern`, nothing is missing in stock architectures (arXiv:2010.04245 and the
# GPT-2 speedrun). Linears start at torch's uniform(+-1/sqrt(fan_in)), of standard deviation 1/sqrt(3 x 768) = 0.0208.
MODERN_MUON = (
    GPT2_TOKENS
    | PADDED_VOCABULARY
    | {
        "norm_affine": False,
        "norm_eps": 1e-6,
        "use_qk_norm": True,
        "qk_norm_affine": False,
        "use_embedding_norm": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.0208,
        "embedding_initializer_range": 1.0,
        "zero_init_projections": True,
    }
)


def with_wide_heads(size: dict[str, int]) -> dict[str, int]:
    """Return a size with heads of 128 dimensions instead of 64, as the speedrun has, where they divide its width."""
    return size if size["hidden_size"] % 128 else size | {"num_attention_heads": size["hidden_size"] // 128}


# Recipe B of the GPT-2 speedrun: record of 2024-11-10, 3.2753 nats/token on FineWeb after 1.573B tokens.
SPEEDRUN = MODERN_MUON | {
    "mlp_type": "relu2",
    "use_unet_skips": True,
    "use_value_residual": True,
    "use_x0_residual": True,
    "final_logit_softcapping": 30.0,
}

# The speedrun with those of its later techniques that lowered the loss here (docs/ablation.md).
FRONTIER = SPEEDRUN | {
    "partial_rotary_factor": 0.5,
    "use_key_offset": True,
    "value_embedding_layers": "alternating",
    "bigram_vocab_size": 2 * PADDED_VOCABULARY["vocab_size"],
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"gpt2{suffix}": GPT2 | size for suffix, size in SIZES.items()},
    **{f"modern{suffix}": GPT2_TOKENS | PADDED_VOCABULARY | size for suffix, size in SIZES.items()},
    **{f"modern-muon{suffix}": MODERN_MUON | with_wide_heads(size) for suffix, size in SIZES.items()},
    "speedrun": SPEEDRUN | with_wide_heads(SIZES[""]),
    **{f"frontier{suffix}": FRONTIER | with_wide_heads(size) for suffix, size in SIZES.items()},
}
