"""A model has the same logits under a stock class and back; a model without a stock class is refused by name."""

import copy
import dataclasses
import json
import os
import re
import shutil
import stat
import string

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN

from gpt2modern.conversion import ARCHITECTURES, architectures, convert, from_native, to_native
from gpt2modern.conversion.convert import main
from modeling_gpt2modern import MLPS, GPT2ModernForCausalLM, MLPKind
from tests.support.models import random_ids, tiny_config

ATOL = 1e-5
END_OF_TEXT = 88
INPUT_IDS = random_ids(2, 24)

LAYERNORM = {"norm_type": "layernorm"}
ALL_BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"sliding_window": 4}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
GQA = {"num_key_value_heads": 2}
UNTIED = {"tie_word_embeddings": False}
WEIGHTLESS_QK = {"use_qk_norm": True, "qk_norm_affine": False}
NANOCHAT = WEIGHTLESS_QK | {"norm_affine": False, "use_embedding_norm": True, "mlp_type": "relu2"}
SOFTCAP = {"final_logit_softcapping": 3.0}
UNEVEN_HEADS = {"head_dim": 6}  # 4 heads x 6 are not the 32 of hidden_size
HALF_ROTARY = {"partial_rotary_factor": 0.5}
PROPORTIONAL = {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}

# architecture -> (flag set, overrides) of models that it has without any rewrite, so that the way back is exact too
ROWS = {
    "GPT2LMHeadModel": [
        ("gpt2", {}),
        ("gpt2", {"mlp_type": "relu2", "intermediate_size": 40, "hidden_dropout": 0.2, **UNTIED}),
    ],
    "Qwen2ForCausalLM": [("modern", {"attention_bias": True, **GQA, **MIXED})],
    "LlamaForCausalLM": [
        ("modern", {**GQA, **UNTIED}),
        ("modern", {**ALL_BIASES, **UNEVEN_HEADS, "norm_eps": 1e-3}),
        ("modern", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        ("modern", PROPORTIONAL),
        ("modern", YARN),
    ],
    "MistralForCausalLM": [("modern", {**WINDOW, **GQA, **UNEVEN_HEADS})],
    "Phi3ForCausalLM": [("modern", {**HALF_ROTARY, **GQA, **WINDOW}), ("modern", UNEVEN_HEADS)],
    "Qwen3ForCausalLM": [
        ("modern", {"use_qk_norm": True, **MIXED, **GQA, "attention_bias": True}),
        ("modern", {"use_qk_norm": True, **UNEVEN_HEADS, **UNTIED}),
    ],
    "ArceeForCausalLM": [
        ("modern", {"mlp_type": "relu2", **ALL_BIASES, **GQA}),
        ("modern", {"mlp_type": "gelu", **UNEVEN_HEADS}),
    ],
    "ApertusForCausalLM": [("modern", {"use_qk_norm": True, "mlp_type": "gelu_new", "attention_bias": True, **GQA})],
    "GPTNeoXForCausalLM": [
        ("modern", {**LAYERNORM, "mlp_type": "gelu", **ALL_BIASES, **HALF_ROTARY}),
        ("modern", {**LAYERNORM, "mlp_type": "gelu", "mlp_bias": True, **UNTIED, **PROPORTIONAL}),
    ],
    "Starcoder2ForCausalLM": [
        ("modern", {**LAYERNORM, "mlp_type": "gelu_new", **ALL_BIASES, **WINDOW, **GQA}),
        ("modern", {**LAYERNORM, "mlp_type": "relu2", **ALL_BIASES, **UNEVEN_HEADS}),
    ],
    "StableLmForCausalLM": [
        ("modern", {**LAYERNORM, **HALF_ROTARY, **GQA}),
        ("modern", {**LAYERNORM, "attention_bias": True}),
    ],
}
CASES = [
    pytest.param(architecture, *row, id=f"{architecture}-{number}")
    for architecture, rows in ROWS.items()
    for number, row in enumerate(rows)
]


def randomise(model, seed=7):
    """Draw all parameters at random: matrices 0.2 n, biases 0.3 n, gains 1 + 0.3 n, with n from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith("weight") and parameter.ndim == 1
            parameter.normal_(1.0 if is_gain else 0.0, 0.3 if parameter.ndim == 1 else 0.2, generator=generator)
    return model.eval()


def ours(flag_set="modern", **overrides):
    return randomise(GPT2ModernForCausalLM(tiny_config(flag_set, **overrides)))


def fit_for(architecture, model):
    """Set the biases to zero that an architecture lacks where a random model of ours has one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if architecture in ("Qwen2ForCausalLM", "StableLmForCausalLM") and name.endswith("o_proj.bias"):
                parameter.zero_()
    return model


def logits(model, input_ids=INPUT_IDS):
    """Return the logits of the token ids, without the columns of padded rows, which stock models do not have."""
    with torch.no_grad():
        return model(input_ids).logits[..., : getattr(model.config, "unpadded_vocab_size", None)]


def assert_same_logits(one, other):
    torch.testing.assert_close(logits(one), logits(other), atol=ATOL, rtol=0)


def own_settings(config):
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field.name for field in dataclasses.fields(config) if field.name not in inherited]
    return {name: getattr(config, name) for name in own}


def test_every_architecture_has_its_row_here_and_in_the_docstring():
    assert list(ARCHITECTURES) == list(ROWS)
    assert re.findall(r"^\| (\w+ForCausalLM|GPT2LMHeadModel) ", architectures.__doc__, re.MULTILINE) == list(ROWS)


@pytest.mark.parametrize(("architecture", "flag_set", "overrides"), CASES)
def test_export_and_import_keep_the_logits_and_the_configuration(architecture, flag_set, overrides):
    model = fit_for(architecture, ours(flag_set, **overrides))
    native = to_native(model, architecture)
    assert type(native) is getattr(transformers, architecture)
    assert_same_logits(native, model)
    back = from_native(native)
    assert_same_logits(back, model)
    assert own_settings(back.config) == own_settings(model.config)


@pytest.mark.parametrize(("architecture", "flag_set", "overrides"), CASES)
def test_stock_model_with_random_weights_is_imported(architecture, flag_set, overrides):
    """Tests the import alone, with weights that no export has written."""
    stock = randomise(to_native(fit_for(architecture, ours(flag_set, **overrides)), architecture))
    assert_same_logits(from_native(stock), stock)


@pytest.mark.parametrize("architecture", ROWS)
def test_the_stock_class_generates_the_same_from_its_cache(architecture):
    flag_set, overrides = ROWS[architecture][0]
    model = fit_for(architecture, ours(flag_set, **overrides))
    native = to_native(model, architecture)
    arguments = {"attention_mask": torch.ones_like(INPUT_IDS), "max_new_tokens": 8, "min_new_tokens": 8}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    assert torch.equal(native.generate(INPUT_IDS, **arguments), model.generate(INPUT_IDS, **arguments))


CHOICES = [
    ("gpt2", {}, "GPT2LMHeadModel"),
    ("modern", {}, "LlamaForCausalLM"),
    ("modern", {"norm_affine": False}, "LlamaForCausalLM"),
    ("modern", {"use_embedding_norm": True}, "LlamaForCausalLM"),
    ("modern", {"attention_bias": True}, "LlamaForCausalLM"),
    ("modern", {"num_attention_heads": 3, "head_dim": 8}, "MistralForCausalLM"),  # hidden_size 32 is no multiple of 3
    ("modern", WINDOW, "MistralForCausalLM"),
    ("modern", MIXED, "Qwen2ForCausalLM"),
    ("modern", HALF_ROTARY, "Phi3ForCausalLM"),
    ("modern", {"use_qk_norm": True}, "Qwen3ForCausalLM"),
    ("modern", {**WEIGHTLESS_QK, **MIXED}, "Qwen3ForCausalLM"),
    ("modern", {"mlp_type": "relu2"}, "ArceeForCausalLM"),
    ("modern", {"mlp_type": "relu2", "use_qk_norm": True}, "ApertusForCausalLM"),
    ("modern", NANOCHAT, "ApertusForCausalLM"),
    ("modern", {**LAYERNORM, "mlp_type": "relu2"}, "GPTNeoXForCausalLM"),
    ("modern", {**LAYERNORM, "mlp_type": "gelu", **ALL_BIASES}, "GPTNeoXForCausalLM"),
    ("modern", {**LAYERNORM, "mlp_type": "gelu", **ALL_BIASES, **GQA}, "Starcoder2ForCausalLM"),
    ("modern", {**LAYERNORM, "mlp_type": "gelu", "mlp_bias": True, **GQA}, "Starcoder2ForCausalLM"),
    ("modern", {**LAYERNORM, "mlp_type": "relu2", **GQA}, "Starcoder2ForCausalLM"),
    ("modern", {**LAYERNORM, "norm_affine": False}, "StableLmForCausalLM"),
    ("modern", LAYERNORM, "StableLmForCausalLM"),
]


@pytest.mark.parametrize(("flag_set", "overrides", "architecture"), CHOICES)
def test_flags_lead_to_the_architecture_that_is_nearest(flag_set, overrides, architecture):
    model = ours(flag_set, **overrides)
    native = to_native(model)
    assert type(native).__name__ == architecture
    assert_same_logits(native, model)


REWRITTEN = {
    "padded vocabulary": ("modern", {"unpadded_vocab_size": 90}),
    "padded vocabulary untied": ("modern", {"unpadded_vocab_size": 90, **UNTIED}),
    "padded vocabulary of gpt2": ("gpt2", {"unpadded_vocab_size": 90}),
    "attention scale": ("modern", {"attention_scale": 0.7}),
    "attention scale and biases": ("modern", {"attention_scale": 0.7, "attention_bias": True}),
    "attention scale of gpt2": ("gpt2", {"attention_scale": 0.7}),
    "attention scale and QK-norm": ("modern", {"attention_scale": 0.7, "use_qk_norm": True}),
    "attention scale and weightless QK-norm": ("modern", {"attention_scale": 0.7, **WEIGHTLESS_QK}),
    "weightless norms": ("modern", {"norm_affine": False, "mlp_type": "relu2"}),
    "weightless layernorms": ("gpt2", {"norm_affine": False}),
    "embedding norm, tied": ("modern", {"use_embedding_norm": True}),
    "embedding layernorm": ("modern", {"use_embedding_norm": True, **LAYERNORM}),
    "embedding norm without gain": ("modern", {"use_embedding_norm": True, "norm_affine": False}),
    "missing biases": ("gpt2", {"attention_bias": False, "mlp_bias": False}),
    "all norms of nanochat": ("modern", {**NANOCHAT, "attention_scale": 0.7}),
    "one bias switch": ("modern", {**LAYERNORM, "mlp_type": "gelu", "mlp_bias": True, **GQA}),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_rewrites_keep_the_logits(case):
    flag_set, overrides = REWRITTEN[case]
    model = ours(flag_set, **overrides)
    native = to_native(model)
    assert_same_logits(native, model)
    assert_same_logits(from_native(native), model)


def test_padded_rows_are_cut():
    native = to_native(ours(unpadded_vocab_size=90))
    assert native.config.vocab_size == native.get_input_embeddings().num_embeddings == 90


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flag_set", ["gpt2", "modern"])
def test_the_head_stays_tied_or_untied(flag_set, tied):
    native = to_native(ours(flag_set, tie_word_embeddings=tied))
    assert (native.get_output_embeddings().weight is native.get_input_embeddings().weight) == tied


def test_a_norm_in_the_embedding_table_unties_the_head():
    native = to_native(ours(use_embedding_norm=True))
    assert not native.config.tie_word_embeddings


def test_export_leaves_the_model_alone():
    model = ours(attention_scale=0.7, unpadded_vocab_size=90)
    before, config = copy.deepcopy(model.state_dict()), own_settings(model.config)
    native = randomise(to_native(model))
    del native
    assert own_settings(model.config) == config
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize(("scale", "dtype"), [(None, torch.bfloat16), (0.7, torch.float32)])
def test_bf16_weights_stay_so_unless_that_would_round_them(scale, dtype):
    weights = ours().state_dict()  # not model.to(bf16), which would round RoPE's frequencies as well
    config = tiny_config(attention_scale=scale)
    model = GPT2ModernForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.bfloat16)
    native = to_native(model)
    assert native.dtype == dtype
    assert_same_logits(native.float(), model.float())


def test_generation_configuration_comes_along():
    model = ours()
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=5)
    native = to_native(model)
    assert native.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert from_native(native).generation_config.top_k == 7


@pytest.mark.parametrize(("mlp_type", "name"), [("swiglu", "Qwen3ForCausalLM"), ("relu2", "ApertusForCausalLM")])
def test_modern_muon_has_a_stock_class(mlp_type, name):
    model = ours("modern_muon", mlp_type=mlp_type)
    native = to_native(model)
    assert type(native).__name__ == name
    assert_same_logits(native, model)


REFUSED = {
    "speedrun": ("speedrun", {}, ["use_unet_skips=True", "use_value_residual=True", "use_x0_residual=True"]),
    "frontier": ("frontier_sliding_mixed", {}, ["use_smear=True", "value_embedding_layers=[1]", "use_backout=True"]),
    "learned rmsnorm": ("modern", {"position_embedding_type": "learned"}, ["position_embedding_type='learned'"]),
    "learned with window": ("gpt2", WINDOW, ["sliding_window=4"]),
    "learned with embedding norm": ("gpt2", {"use_embedding_norm": True}, ["use_embedding_norm=True"]),
    "learned with grouped heads": ("gpt2", GQA, ["num_key_value_heads=2"]),
    "softcap": ("modern", SOFTCAP, ["final_logit_softcapping=3.0"]),
    "windows with relu2": ("modern", {**MIXED, "mlp_type": "relu2"}, ["ArceeForCausalLM", "sliding_window=4"]),
    "partial rotation of relu2": ("modern", {**HALF_ROTARY, "mlp_type": "relu2"}, ["mlp_type='relu2'"]),
    "QK-norm with MLP biases": ("modern", {"use_qk_norm": True, "mlp_bias": True}, ["use_qk_norm=True"]),
    "QK-norm with layernorm": ("modern", {"use_qk_norm": True, **LAYERNORM}, ["norm_type='layernorm'"]),
    "windows with MLP biases": ("modern", {**MIXED, **ALL_BIASES}, ["LlamaForCausalLM", "sliding_window=4"]),
    "padding token among padded rows": ("modern", {"unpadded_vocab_size": 90, "pad_token_id": 95}, ["pad_token_id=95"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_unsupported(case):
    flag_set, overrides, named = REFUSED[case]
    with pytest.raises(ValueError, match="no stock architecture has the same logits") as refusal:
        to_native(ours(flag_set, **overrides))
    assert all(name in str(refusal.value) for name in named), refusal.value


def test_a_rope_type_that_means_something_else_there_is_refused():
    with pytest.raises(ValueError, match="StableLmForCausalLM does not allow rope_parameters="):
        to_native(ours(**LAYERNORM, **PROPORTIONAL), "StableLmForCausalLM")


def test_a_rope_type_that_means_something_else_here_is_refused():
    with pytest.raises(ValueError, match="rope_type='proportional' has no counterpart"):
        from_native(stock_model("StableLmForCausalLM", **PROPORTIONAL))


def test_mlp_kind_of_a_user_is_exported_and_imported(monkeypatch):
    monkeypatch.setitem(MLPS, "reglu", MLPKind("relu", gated=True))
    model = ours(mlp_type="reglu")
    native = to_native(model)
    assert isinstance(native, LlamaForCausalLM) and native.config.hidden_act == "relu"
    assert_same_logits(native, model)
    assert from_native(native).config.mlp_type == "reglu"


def test_mlp_kind_whose_activation_is_not_in_transformers_is_refused_by_name(monkeypatch):
    """The stock class could be built here, where the activation was added, but loaded nowhere else."""
    monkeypatch.setitem(ACT2FN, "cube", torch.nn.Softsign)
    monkeypatch.setitem(MLPS, "cubed", MLPKind("cube"))
    with pytest.raises(ValueError, match="mlp_type='cubed'"):
        to_native(ours(mlp_type="cubed"))


def test_gpt2_has_what_llama_cpps_converter_asks_for():
    assert to_native(ours("gpt2")).config.n_ctx == 64


def test_a_named_architecture_is_refused_for_its_own_reasons():
    with pytest.raises(ValueError, match="LlamaForCausalLM does not allow mlp_type='relu2', sliding_window=4"):
        to_native(ours(mlp_type="relu2", **WINDOW), "LlamaForCausalLM")


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture='BertModel' is unknown; choose from GPT2LMHeadModel"):
        to_native(ours(), "BertModel")


def test_a_bias_that_qwen2_lacks_is_named():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.o_proj\.bias"):
        to_native(ours(attention_bias=True), "Qwen2ForCausalLM")


def test_only_our_causal_lm_is_exported():
    with pytest.raises(ValueError, match="GPT2ModernModel cannot be exported"):
        to_native(ours().model)


def test_weights_beside_the_model_are_refused():
    """Adapters, for example, which no stock class has."""
    model = ours()
    model.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has no counterpart; merge adapters"):
        to_native(model)


GPT2_SIZES = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}


def gpt2(**overrides):
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return randomise(GPT2LMHeadModel(GPT2Config(**(GPT2_SIZES | ids | overrides))))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_inner": 40, "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"n_head": 2},
    ],
    ids=str,
)
def test_gpt2_is_imported(overrides):
    stock = gpt2(**overrides)
    model = from_native(stock)
    assert_same_logits(model, stock)
    assert model.num_parameters() == stock.num_parameters()


def test_gpt2s_gradients_arrive_at_the_same_weights():
    stock = gpt2()
    model = from_native(stock)
    for each in (stock, model):
        each(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    expected = stock.transformer.h[1].attn.c_attn.weight.grad.t().chunk(3)[1]
    torch.testing.assert_close(model.model.layers[1].self_attn.k_proj.weight.grad, expected, atol=ATOL, rtol=0)


def test_gpt2_is_imported_from_a_folder(tmp_path):
    stock = gpt2()
    stock.save_pretrained(tmp_path)
    assert_same_logits(from_native(tmp_path), stock)


def llama(**overrides):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**(sizes | {"num_attention_heads": 4, "max_position_embeddings": 64} | overrides))
    return randomise(LlamaForCausalLM(config))


NOT_IMPORTED = {
    "inverse layer scale": (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    "unscaled attention": (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights=False"),
    "tanh": (lambda: gpt2(activation_function="tanh"), "activation_function='tanh'"),
    "gated gelu": (lambda: llama(hidden_act="gelu"), "hidden_act='gelu'"),
    "another class": (
        lambda: transformers.OPTForCausalLM(tiny_opt()),
        "OPTForCausalLM cannot be converted to GPT2-Modern",
    ),
    "another head": (lambda: transformers.LlamaModel(llama().config), "LlamaModel cannot be converted to GPT2-Modern"),
    "ours": (ours, "GPT2ModernForCausalLM cannot be converted to GPT2-Modern"),
}


def tiny_opt():
    return transformers.OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=32
    )


@pytest.mark.parametrize("case", NOT_IMPORTED)
def test_an_import_that_is_not_exact_is_refused_by_name(case):
    build, named = NOT_IMPORTED[case]
    with pytest.raises(ValueError, match=named):
        from_native(build())


STOCK_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def stock_model(name, **overrides):
    config_class = getattr(transformers, name.replace("ForCausalLM", "Config"))
    return randomise(getattr(transformers, name)(config_class(**(STOCK_SIZES | overrides))))


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("StableLmForCausalLM", {"use_parallel_residual": True}, "use_parallel_residual=True"),
        ("StableLmForCausalLM", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("ApertusForCausalLM", {}, "hidden_act='xielu'"),
        ("Qwen2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_stock_settings_without_a_counterpart_are_named(name, overrides, named):
    with pytest.raises(ValueError, match=f"{name} cannot be imported.*{named}"):
        from_native(stock_model(name, **overrides))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("Qwen2ForCausalLM", {}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("Qwen3ForCausalLM", {"head_dim": 8}),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | HALF_ROTARY},
        ),  # not read
        ("MistralForCausalLM", {"sliding_window": None}),
        ("StableLmForCausalLM", {"use_qkv_bias": True}),
        ("Phi3ForCausalLM", {}),
    ],
)
def test_stock_defaults_are_read_as_the_stock_class_means_them(name, overrides):
    stock = stock_model(name, **overrides)
    assert_same_logits(from_native(stock), stock)


def byte_tokenizer():
    """Build a byte-level BPE of at most 90 entries, whose one merge shows whether digits are split before it."""
    symbols = [*string.ascii_letters, *string.digits, *".,:;!?'()+-=<>|#_/", "\u0120", "\u010a", "12"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    fast = Tokenizer(models.BPE(vocab=vocab | {"<|endoftext|>": END_OF_TEXT}, merges=[("1", "2")]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>")


def save_folder(model, folder):
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=END_OF_TEXT)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Save a model with padded rows to a folder, and convert the folder by the command."""
    root = tmp_path_factory.mktemp("exported")
    model = save_folder(ours(unpadded_vocab_size=90, attention_scale=0.7), root / "mine")
    main(["--model", str(root / "mine"), "--output_dir", str(root / "native")])
    return model, root


def test_the_exported_folder_loads_without_trust(exported):
    model, root = exported
    native = AutoModelForCausalLM.from_pretrained(root / "native", trust_remote_code=False)
    assert type(native) is LlamaForCausalLM
    assert_same_logits(native, model)


def test_the_exported_folder_generates_the_same(exported):
    model, root = exported
    native = AutoModelForCausalLM.from_pretrained(root / "native")
    arguments = {
        "attention_mask": torch.ones_like(INPUT_IDS),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": END_OF_TEXT,
    }
    assert torch.equal(native.generate(INPUT_IDS, **arguments), model.generate(INPUT_IDS, **arguments))


def test_the_exported_folder_has_no_code(exported):
    folder = exported[1] / "native"
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_the_exported_folder_keeps_its_tokenizer_and_generation_configuration(exported):
    root = exported[1]
    text = "abc  ab 12<|endoftext|>'s"
    tokenizer = AutoTokenizer.from_pretrained(root / "native")
    assert tokenizer(text).input_ids == byte_tokenizer()(text).input_ids
    assert tokenizer.eos_token_id == END_OF_TEXT
    assert GenerationConfig.from_pretrained(root / "native").top_k == 7


def test_the_exported_tokenizer_says_nothing_about_this_call(exported):
    settings = json.loads((exported[1] / "native" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>" and not {"is_local", "local_files_only", "name_or_path"} & set(
        settings
    )


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}], ids=str)
def test_gpt_neox_is_also_described_as_older_readers_expect_it(rope, tmp_path):
    """llama.cpp and transformers 4 read rotary_pct and rotary_emb_base, and take 0.25 and 10000 without them."""
    to_native(ours(**LAYERNORM, mlp_type="gelu", **ALL_BIASES, **rope), "GPTNeoXForCausalLM").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    older = {"rotary_pct": saved["rotary_pct"], "rotary_emb_base": saved["rotary_emb_base"]}
    assert transformers.GPTNeoXConfig(**older).rope_parameters == saved["rope_parameters"]
    assert older == (
        {"rotary_pct": 0.5, "rotary_emb_base": 5e5} if rope else {"rotary_pct": 1.0, "rotary_emb_base": 1e4}
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(from_native(reloaded), reloaded)


def test_the_card_says_where_the_model_came_from(exported):
    card = (exported[1] / "native" / "README.md").read_text()
    assert "`mine` (GPT2ModernForCausalLM) in the layout of LlamaForCausalLM" in card
    assert "trust_remote_code" not in card and str(exported[1]) not in card


def test_exported_files_have_the_usual_modes(exported):
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (exported[1] / "native").iterdir()}
    assert modes == {0o666 & ~umask}


def test_the_command_prints_what_it_measured(exported, tmp_path, capsys):
    model, root = exported
    main(["--model", str(root / "mine"), "--output_dir", str(tmp_path / "native")])
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    input_ids = torch.randint(90, (1, 64), generator=torch.Generator().manual_seed(0))
    difference = (logits(native, input_ids) - logits(model, input_ids)).abs().max()
    assert 0 < difference < ATOL
    assert f"differ by at most {difference:.1e} on 64 tokens" in capsys.readouterr().out


def test_the_command_imports_a_stock_folder(tmp_path, capsys):
    stock = save_folder(gpt2(), tmp_path / "stock")
    main(["--model", str(tmp_path / "stock"), "--output_dir", str(tmp_path / "imported")])
    assert "GPT2LMHeadModel -> GPT2ModernForCausalLM" in capsys.readouterr().out
    assert_same_logits(GPT2ModernForCausalLM.from_pretrained(tmp_path / "imported"), stock)
    assert (tmp_path / "imported" / "modeling_gpt2modern.py").is_file()
    assert "trust_remote_code=True" in (tmp_path / "imported" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "imported").eos_token_id == END_OF_TEXT


def test_a_wrong_conversion_is_not_written(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "to_native", lambda model, _: randomise(to_native(model), seed=8))
    with pytest.raises(RuntimeError, match="logits of the converted model differ"):
        main(["--model", str(exported[1] / "mine"), "--output_dir", str(tmp_path / "native")])
    assert not list(tmp_path.iterdir())


def remove_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def add_unet_skips(folder):
    ours(use_unet_skips=True).save_pretrained(folder)


MISTAKES = {
    "unexportable": (add_unet_skips, [], ["--model", "use_unet_skips=True"]),
    "missing weight": (remove_a_weight, [], ["--model", "model.norm.weight"]),
    "truncated weights": (truncate_weights, [], ["--model", "cannot be loaded"]),
    "broken tokenizer": (break_tokenizer, [], ["--model", "tokenizer"]),
    "unknown architecture": (None, ["--architecture", "BertModel"], ["BertModel", "LlamaForCausalLM"]),
    "unknown flag": (None, ["--outptu_dir", "x"], ["--outptu_dir"]),
    "tokenizer of another class": (None, ["--architecture", "Qwen2ForCausalLM"], ["Qwen2Tokenizer", "--architecture"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(case, exported, tmp_path, capsys):
    spoil, flags, named = MISTAKES[case]
    folder = shutil.copytree(exported[1] / "mine", tmp_path / "mine")
    if spoil:
        spoil(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(folder), "--output_dir", str(tmp_path / "native"), *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(name in error for name in named), error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: (folder / "model").mkdir(), "no config.json"),
        (lambda folder: None, "no config.json"),
    ],
    ids=["empty folder", "no folder"],
)
def test_a_folder_without_a_model_is_refused(make, named, tmp_path, capsys):
    make(tmp_path)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "native")])
    assert named in capsys.readouterr().err


def test_an_output_folder_with_files_in_it_is_left_alone(exported, capsys):
    folder = exported[1] / "mine"
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--output_dir", str(folder)])
    assert f"--output_dir {folder} is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_model_without_values_is_converted_as_a_trained_one():
    """Before training, --export_stock asks which class there will be: biases are 0 then, and not afterwards."""
    for overrides, expected in (({}, "LlamaForCausalLM"), (MIXED, None)):
        with torch.device("meta"):
            model = GPT2ModernForCausalLM(tiny_config(**overrides, attention_bias=True))
        if expected is None:
            with pytest.raises(
                ValueError, match=r"Qwen2ForCausalLM, does not allow model\.layers\.0\.self_attn\.o_proj\.bias"
            ):
                to_native(model)
        else:
            native = to_native(model)
            assert type(native).__name__ == expected and native.device.type == "meta"
