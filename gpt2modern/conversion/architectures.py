"""List the stock architectures (model classes of transformers) that a GPT2-Modern model can be converted to and from.

| architecture          | GPT2-Modern models with the same logits, in addition to the rewrites below           |
|-----------------------|--------------------------------------------------------------------------------------|
| GPT2LMHeadModel       | learned positions, layernorm, MLP without a gate                                     |
| Qwen2ForCausalLM      | rope, rmsnorm, gated MLP, biases of q, k and v only, any layer_types                 |
| LlamaForCausalLM      | rope, rmsnorm, gated MLP, any biases                                                 |
| MistralForCausalLM    | rope, rmsnorm, gated MLP, no biases, window in all layers or none                    |
| Phi3ForCausalLM       | rope (also partial), rmsnorm, gated MLP, no biases, window in all layers or none     |
| Qwen3ForCausalLM      | rope, rmsnorm, gated MLP, QK-norm, attention biases, any layer_types                 |
| ArceeForCausalLM      | rope, rmsnorm, MLP without a gate, any biases                                        |
| ApertusForCausalLM    | rope, rmsnorm, MLP without a gate, QK-norm, attention biases                         |
| GPTNeoXForCausalLM    | rope (also partial), layernorm, MLP without a gate, any biases                       |
| Starcoder2ForCausalLM | rope, layernorm, MLP without a gate, any biases, window in all layers or none        |
| StableLmForCausalLM   | rope (also partial), layernorm, gated MLP, biases of q, k and v                      |

An export rewrites the model, which changes weights and settings but not the logits: padding rows of the vocabulary are
removed; a norm after the embedding is applied to the embedding table (with rope); norms without a gain get gains of
one; `attention_scale` becomes a factor of the queries; biases that the architecture needs are added as zeros.

All other models are refused, and the error names the setting: U-Net skips, value and x0 residuals, backout; value
embeddings, smear, bigrams, key offsets; a soft cap; learned positions with rmsnorm, a gated MLP, grouped heads,
QK-norm, windows or an embedding norm; windows in some layers with MLP biases; QK-norm with layernorm or MLP biases. An
import also refuses parallel residuals, QK-norm with a separate gain for each head, and activation functions that no
`mlp_type` has.
"""

from gpt2modern.conversion.traits import (
    Fused,
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
    WithoutOutputBias,
)
from modeling_gpt2modern.configuration_gpt2modern import GPT2ModernConfig

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NO_QK_NORM = Ours(use_qk_norm=False)
QK_NORM = Ours(use_qk_norm=True)
BIASES = Same("attention_bias", "mlp_bias")
NO_BIASES = Ours(attention_bias=False, mlp_bias=False)
ATTENTION_BIAS = (Same("attention_bias"), Ours(mlp_bias=False))
FULL = Ours(sliding_window=None)
UNIFORM_WINDOW = (Needs(layer_types=lambda config: len(set(config.layer_types)) == 1), Same("sliding_window"))
UNGROUPED = Needs(num_key_value_heads=lambda config: config.num_key_value_heads == config.num_attention_heads)
HEADS = (Same("num_key_value_heads"), Same("head_dim", optional=True))
# For configuration classes without a head_dim, and for those that need hidden_size to be a multiple of the heads.
USUAL_HEAD_SIZE = Needs(head_dim=lambda config: config.head_dim * config.num_attention_heads == config.hidden_size)
WHOLE_HEADS = (*HEADS, Needs(num_attention_heads=lambda config: config.hidden_size % config.num_attention_heads == 0))
GATED, UNGATED = Mlp(gated=True), Mlp(gated=False)
RMSNORM = (Ours(norm_type="rmsnorm"), Same(norm_eps="rms_norm_eps"))
# These classes rotate the fraction that their configuration names, for every rope_type.
PARTIAL_DEFAULT = Rotary(partial=True, rope_types=("default",))

COMMON = (
    Ours(use_unet_skips=False, use_value_residual=False, use_x0_residual=False),
    Ours(use_embedding_norm=False, final_logit_softcapping=None, use_backout=False),
    Ours(value_embedding_layers=None, use_smear=False, bigram_vocab_size=None, use_key_offset=False),
    Needs(pad_token_id=lambda config: config.pad_token_id is None or config.pad_token_id < config.vocab_size),
    Same("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    Same("initializer_range"),
)
USUAL = (
    *COMMON,
    Same("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    Same("attention_dropout"),
)
LLAMA = (*USUAL, Rotary(), *RMSNORM, GATED, NO_QK_NORM)


def layernorm(eps: str) -> tuple[Trait, ...]:
    """Return the traits (rules that translate settings) of a LayerNorm whose stock epsilon setting is called `eps`."""
    return (Ours(norm_type="layernorm"), Same(norm_eps=eps))


# Name of the class in transformers -> its traits, in the order in which they turn GPT2-Modern weights to stock weights.
# If several are exact and need the same biases of zero, an export takes the first.
# fmt: off
ARCHITECTURES: dict[str, tuple[Trait, ...]] = {
    "GPT2LMHeadModel": (
        *COMMON, FULL, NO_QK_NORM,
        Ours(position_embedding_type="learned", attention_bias=True, mlp_bias=True),
        *layernorm("layer_norm_epsilon"), Mlp(gated=False, setting="activation_function"), UNGROUPED, USUAL_HEAD_SIZE,
        Theirs(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        Same(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head"),
        # transformers has removed n_ctx, but llama.cpp's converter still reads it.
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
    "Qwen2ForCausalLM": (
        *LLAMA, *HEADS, WindowPerLayer(), Ours(attention_bias=True, mlp_bias=False), WithoutOutputBias(),
    ),
    "LlamaForCausalLM": (*LLAMA, *WHOLE_HEADS, BIASES, FULL),
    "MistralForCausalLM": (*LLAMA, *HEADS, NO_BIASES, *UNIFORM_WINDOW),
    "Phi3ForCausalLM": (
        *USUAL, PARTIAL_DEFAULT, *RMSNORM, GATED, NO_QK_NORM, *HEADS, NO_BIASES, *UNIFORM_WINDOW,
        Same(hidden_dropout="resid_pdrop"),
        Fused(QKV, "self_attn.qkv_proj"), Fused(("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
    ),
    "Qwen3ForCausalLM": (*USUAL, Rotary(), *RMSNORM, GATED, QK_NORM, *HEADS, *ATTENTION_BIAS, WindowPerLayer()),
    "ArceeForCausalLM": (*USUAL, Rotary(), *RMSNORM, UNGATED, NO_QK_NORM, *WHOLE_HEADS, BIASES, FULL),
    "ApertusForCausalLM": (
        *USUAL, Rotary(), *RMSNORM, UNGATED, QK_NORM, *HEADS, *ATTENTION_BIAS, FULL,
        Renamed({"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}),
    ),
    "GPTNeoXForCausalLM": (
        *USUAL, Rotary(partial=True, older_names=True), *layernorm("layer_norm_eps"), UNGATED, NO_QK_NORM, UNGROUPED,
        USUAL_HEAD_SIZE, Same("attention_bias", "hidden_dropout"), Ours(mlp_bias=True), FULL,
        Theirs(use_parallel_residual=False),
        Fused(QKV, "self_attn.query_key_value", per_head=True),
        Renamed({
            "model.embed_tokens": "gpt_neox.embed_in", "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "self_attn.query_key_value": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
        }),
    ),
    "Starcoder2ForCausalLM": (
        *USUAL, Rotary(), *layernorm("norm_epsilon"), UNGATED, NO_QK_NORM, *HEADS, *UNIFORM_WINDOW,
        Ours(attention_bias=True, mlp_bias=True), Theirs(use_bias=True),
        Same(embedding_dropout="embedding_dropout", hidden_dropout="residual_dropout"),
        Renamed({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    ),
    "StableLmForCausalLM": (
        *USUAL, PARTIAL_DEFAULT, GATED, *layernorm("layer_norm_eps"), USUAL_HEAD_SIZE, FULL, NO_QK_NORM,
        Same("num_key_value_heads", attention_bias="use_qkv_bias"), Ours(mlp_bias=False), WithoutOutputBias(),
        Theirs(use_parallel_residual=False, qk_layernorm=False),
    ),
}
# fmt: on


def unsupported(name: str, config: GPT2ModernConfig, weights: Weights) -> list[str]:
    """Return the names of settings and weights that the stock class `name` does not support; [] allows the export."""
    return list(dict.fromkeys(key for trait in ARCHITECTURES[name] for key in trait.unsupported(config, weights)))
