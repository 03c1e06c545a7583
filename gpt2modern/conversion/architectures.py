"""List the stock architectures of transformers that a GPT2-Modern model can be converted to and from.

| architecture          | our models that it can be, besides the rewrites below                                |
|-----------------------|--------------------------------------------------------------------------------------|
| GPT2LMHeadModel       | learned positions, layernorm, MLP without a gate                                     |
| Qwen2ForCausalLM      | rope, rmsnorm, gated MLP, attention biases without o_proj's, any layer_types         |
| LlamaForCausalLM      | rope, rmsnorm, gated MLP, any biases                                                 |
| MistralForCausalLM    | rope, rmsnorm, gated MLP, no biases, every layer sliding or none                     |
| Phi3ForCausalLM       | rope, partial too, rmsnorm, gated MLP, no biases, every layer sliding or none        |
| Qwen3ForCausalLM      | rope, rmsnorm, gated MLP, QK-norm, attention biases, any layer_types                 |
| ArceeForCausalLM      | rope, rmsnorm, MLP without a gate, any biases                                        |
| ApertusForCausalLM    | rope, rmsnorm, MLP without a gate, QK-norm, attention biases                         |
| NemotronForCausalLM   | rope, partial too, layernorm, relu2, any biases                                      |
| GPTNeoXForCausalLM    | rope, partial too, layernorm, MLP without a gate, any biases                         |
| Starcoder2ForCausalLM | rope, layernorm, MLP without a gate, all biases or none, every layer sliding or none |
| OlmoForCausalLM       | rope, weightless layernorm with norm_eps 1e-5, gated MLP, attention biases           |
| StableLmForCausalLM   | rope, partial too, layernorm, gated MLP, biases of q, k and v                        |

Rewrites are exact and made where the architecture needs them: padded vocabulary rows are cut; a norm after the
embedding is applied to its table (with rope); weightless norms get gains of one; missing biases become zeros;
`attention_scale` moves into the queries.

Everything else is refused by name: U-Net skips, value and x0 residuals; soft-cap; learned positions beside rmsnorm, a
gated MLP, grouped heads, QK-norm, windows or an embedding norm; windows per layer beside MLP biases; QK-norm beside
layernorm or MLP biases. On import also parallel residuals, clipped queries, QK-norm with a gain per head, and
activation functions that no entry of MLPS has.
"""

from dataclasses import dataclass

from gpt2modern.conversion.traits import (
    Fused,
    GainsMinusOne,
    Mlp,
    Needs,
    Ours,
    Renamed,
    Rotary,
    Same,
    Theirs,
    Trait,
    Transposed,
    Weights,
    WindowPerLayer,
    WithoutBias,
)
from modeling_gpt2modern.configuration_gpt2modern import ROPE_TYPES, GPT2ModernConfig


@dataclass(frozen=True)
class Architecture:
    """Name a stock class of transformers, its model_type, and its traits in the order in which they turn our weights
    into stock ones."""

    name: str
    model_type: str
    traits: tuple[Trait, ...]

    def in_the_way(self, config: GPT2ModernConfig, weights: Weights | None = None) -> list[str]:
        """List our settings, and with `weights` our weights too, that the architecture cannot have."""
        names = [name for trait in self.traits for name in trait.settings_in_the_way(config)]
        if weights is not None:
            names += [name for trait in self.traits for name in trait.weights_in_the_way(weights)]
        return list(dict.fromkeys(names))


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NO_QK_NORM = Ours(use_qk_norm=False)
QK_NORM = Ours(use_qk_norm=True, qk_norm_affine=True)
BIASES = Same("attention_bias", "mlp_bias")
NO_BIASES = Ours(attention_bias=False, mlp_bias=False)
ATTENTION_BIAS = (Same("attention_bias"), Ours(mlp_bias=False))
SHARED_BIAS_SWITCH = (
    Needs(attention_bias=lambda config: config.attention_bias or not config.mlp_bias),
    Needs(mlp_bias=lambda config: config.mlp_bias or not config.attention_bias),
    Same(attention_bias="use_bias", mlp_bias="use_bias"),
)
FULL = Ours(sliding_window=None)
UNIFORM_WINDOW = (Needs(layer_types=lambda config: len(set(config.layer_types)) == 1), Same("sliding_window"))
GROUPED = Same("num_key_value_heads")
UNGROUPED = Needs(num_key_value_heads=lambda config: config.num_key_value_heads == config.num_attention_heads)
HEADS = (GROUPED, Same("head_dim", optional=True))
# Configuration classes without a head_dim, and those that insist on hidden_size being a multiple of the heads.
USUAL_HEAD_SIZE = Needs(head_dim=lambda config: config.head_dim * config.num_attention_heads == config.hidden_size)
WHOLE_HEADS = (*HEADS, Needs(num_attention_heads=lambda config: config.hidden_size % config.num_attention_heads == 0))
GATED, UNGATED = Mlp(gated=True), Mlp(gated=False)
RMSNORM = (Ours(norm_type="rmsnorm", norm_affine=True), Same(norm_eps="rms_norm_eps", convert=float))
# StableLM rotates the fraction that its configuration names, which the proportional type uses in another way.
NOT_PROPORTIONAL = tuple(name for name in ROPE_TYPES if name != "proportional")

COMMON = (
    Ours(use_unet_skips=False, use_value_residual=False, use_x0_residual=False),
    Ours(attention_scale=None, unpadded_vocab_size=None, use_embedding_norm=False, final_logit_softcapping=None),
    Needs(pad_token_id=lambda config: config.pad_token_id is None or config.pad_token_id < config.vocab_size),
    Same("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    Same("initializer_range", convert=float),
)
USUAL = (
    *COMMON,
    Same("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    Same("attention_dropout"),
)
LLAMA = (*USUAL, Rotary(), *RMSNORM, GATED, NO_QK_NORM)


def layernorm(eps: str) -> tuple[Trait, ...]:
    """Return the traits of a LayerNorm with gain and bias, whose epsilon the stock configuration calls `eps`."""
    return (Ours(norm_type="layernorm", norm_affine=True), Same(norm_eps=eps, convert=float))


# Of those that are exact at the same cost, an export takes the first.
# fmt: off
ARCHITECTURES = tuple(Architecture(name, model_type, tuple(traits)) for name, model_type, *traits in (
    (
        "GPT2LMHeadModel", "gpt2", *COMMON, FULL, NO_QK_NORM,
        Ours(position_embedding_type="learned", attention_bias=True, mlp_bias=True),
        *layernorm("layer_norm_epsilon"), Mlp(gated=False, setting="activation_function"),
        UNGROUPED, USUAL_HEAD_SIZE,
        Theirs(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        Same(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head"),
        # transformers has dropped n_ctx, and llama.cpp's converter still asks for it.
        Same(max_position_embeddings="n_ctx", optional=True),
        Same(max_position_embeddings="n_positions", intermediate_size="n_inner"),
        Same(embedding_dropout="embd_pdrop", attention_dropout="attn_pdrop", hidden_dropout="resid_pdrop"),
        Fused(QKV, "self_attn.c_attn"),
        Transposed(("self_attn.c_attn", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
        Renamed({
            "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.c_attn": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        }),
    ),
    (
        "Qwen2ForCausalLM", "qwen2", *LLAMA, *HEADS, WindowPerLayer(), Ours(attention_bias=True, mlp_bias=False),
        WithoutBias(("self_attn.o_proj",)),
    ),
    ("LlamaForCausalLM", "llama", *LLAMA, *WHOLE_HEADS, BIASES, FULL),
    ("MistralForCausalLM", "mistral", *LLAMA, *HEADS, NO_BIASES, *UNIFORM_WINDOW),
    (
        "Phi3ForCausalLM", "phi3", *USUAL, Rotary(partial=True, rope_types=("default",)), *RMSNORM, GATED,
        NO_QK_NORM, *HEADS, NO_BIASES, *UNIFORM_WINDOW, Same(hidden_dropout="resid_pdrop"),
        Fused(QKV, "self_attn.qkv_proj"), Fused(("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
    ),
    (
        "Qwen3ForCausalLM", "qwen3", *USUAL, Rotary(), *RMSNORM, GATED, QK_NORM, *HEADS, *ATTENTION_BIAS,
        WindowPerLayer(),
    ),
    ("ArceeForCausalLM", "arcee", *USUAL, Rotary(), *RMSNORM, UNGATED, NO_QK_NORM, *WHOLE_HEADS, BIASES, FULL),
    (
        "ApertusForCausalLM", "apertus", *USUAL, Rotary(), *RMSNORM, UNGATED, QK_NORM, *HEADS, *ATTENTION_BIAS, FULL,
        Renamed({"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}),
    ),
    (
        "NemotronForCausalLM", "nemotron", *USUAL, Rotary(partial=True), *layernorm("norm_eps"), NO_QK_NORM, *HEADS,
        Ours(mlp_type="relu2"), Theirs(hidden_act="relu2"), BIASES, FULL, GainsMinusOne(),
    ),
    (
        "GPTNeoXForCausalLM", "gpt_neox", *USUAL, Rotary(partial=True), *layernorm("layer_norm_eps"), UNGATED,
        NO_QK_NORM, UNGROUPED, USUAL_HEAD_SIZE, Same("attention_bias", "hidden_dropout"),
        Ours(mlp_bias=True), FULL, Theirs(use_parallel_residual=False),
        Fused(QKV, "self_attn.query_key_value", per_head=True),
        Renamed({
            "model.embed_tokens": "gpt_neox.embed_in", "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "self_attn.query_key_value": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
        }),
    ),
    (
        "Starcoder2ForCausalLM", "starcoder2", *USUAL, Rotary(), *layernorm("norm_epsilon"), UNGATED, NO_QK_NORM,
        *HEADS, *SHARED_BIAS_SWITCH, *UNIFORM_WINDOW,
        Same(embedding_dropout="embedding_dropout", hidden_dropout="residual_dropout"),
        Renamed({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    ),
    (
        "OlmoForCausalLM", "olmo", *USUAL, Rotary(), Ours(norm_type="layernorm", norm_affine=False, norm_eps=1e-5),
        GATED, NO_QK_NORM, *HEADS, *ATTENTION_BIAS, FULL, Theirs(clip_qkv=None),
    ),
    (
        "StableLmForCausalLM", "stablelm", *USUAL, Rotary(partial=True, rope_types=NOT_PROPORTIONAL), GATED,
        *layernorm("layer_norm_eps"), GROUPED, USUAL_HEAD_SIZE, Same(attention_bias="use_qkv_bias"), FULL, NO_QK_NORM,
        Ours(mlp_bias=False), Theirs(use_parallel_residual=False, qk_layernorm=False),
        WithoutBias(("self_attn.o_proj",)),
    ),
))
# fmt: on
