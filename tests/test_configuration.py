"""The configuration refuses invalid settings, survives JSON, and its presets have the published sizes."""

import dataclasses
import json
import re
from functools import partial

import pytest
import torch
from transformers.activations import ACT2FN

from modeling_gpt2modern import MLPS, PRESETS, GPT2ModernConfig, GPT2ModernForCausalLM, MLPKind
from modeling_gpt2modern.layers_gpt2modern import build_mlp
from tests.support.models import FLAG_SETS, tiny_config


def on_meta(preset: str) -> GPT2ModernForCausalLM:
    with torch.device("meta"):
        return GPT2ModernForCausalLM(GPT2ModernConfig.from_preset(preset))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("modern", 123_587_328),
        ("modern-medium", 355_124_224),
        ("modern-large", 778_169_600),
        ("modern-xl", 1_560_116_800),
        ("modern-muon", 162_201_600),
        ("modern-muon-medium", 406_585_344),
        ("modern-muon-large", 842_465_280),
        ("modern-muon-xl", 1_640_448_000),
        ("speedrun", 162_201_600 + 41),  # matrices, and 6 + 2 x 12 + 11 weights of the residual stream
        # As speedrun; 100,608 rows of bigrams, 6 tables of 50,304 rows, weights of bigrams, gates of values.
        ("frontier", 162_201_641 + 768 * (100_608 + 6 * 50_304) + 12 + 6 * 6 * 12),
        ("frontier-medium", 1_126_171_883),
        ("frontier-large", 2_124_351_761),
        ("frontier-xl", 3_728_186_615),
    ],
)
def test_preset_has_its_exact_number_of_parameters(preset, parameters):
    assert on_meta(preset).num_parameters() == parameters


def test_every_preset_is_counted():
    counted = next(
        mark for mark in test_preset_has_its_exact_number_of_parameters.pytestmark if mark.name == "parametrize"
    )
    assert {preset for preset, _ in counted.args[1]} == set(PRESETS)


def test_speedrun_matrices_have_exactly_the_parameters_of_the_record():
    assert sum(weight.numel() for weight in on_meta("speedrun").parameters() if weight.ndim == 2) == 162_201_600


@pytest.mark.parametrize("preset", [name for name in PRESETS if re.match("modern(?!-muon)", name)])
def test_modern_presets_are_the_size_of_their_gpt2(preset):
    """Within 1 %, so that comparing them compares architectures: 8/3 x hidden_size in a gated MLP keeps it so."""
    modern, gpt2 = on_meta(preset).num_parameters(), on_meta(preset.replace("modern", "gpt2")).num_parameters()
    assert abs(modern / gpt2 - 1) < 0.01


MISTAKES = {
    "misspelt key": ({"nrom_type": "rmsnorm"}, "unknown configuration key 'nrom_type'; did you mean 'norm_type'"),
    "foreign key": ({"frobnicate": 1}, "unknown configuration key 'frobnicate'"),
    "generation setting": ({"temperature": 0.5}, "unknown configuration key 'temperature'"),
    "unknown choice": ({"norm_type": "batchnorm"}, "norm_type.*batchnorm"),
    "unknown MLP": ({"mlp_type": "geglu"}, "mlp_type='geglu' is unknown; choose from gelu_new, gelu, relu2, swiglu"),
    "wrong type": ({"hidden_size": "32"}, "hidden_size.*expected int"),
    "heads do not divide": ({"hidden_size": 30}, "hidden_size=30 .*num_attention_heads=12"),
    "key heads do not divide": ({"num_key_value_heads": 5}, "num_attention_heads=12 .*num_key_value_heads=5"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "padding is negative": ({"unpadded_vocab_size": 60000}, "unpadded_vocab_size=60000.*vocab_size=50257"),
    "no layer slides": ({"sliding_window": 4, "layer_types": ["full_attention"] * 12}, "sliding_window=4"),
    "no window": ({"layer_types": ["sliding_attention"] * 12}, "sliding_window=None"),
    "empty window": ({"sliding_window": 0}, "sliding_window=0"),
    "too few layer types": ({"layer_types": ["full_attention"] * 3}, r"num_hidden_layers.*\(12\).*layer_types.*\(3\)"),
    "layer type of other models": ({"layer_types": ["chunked_attention"] * 12}, "chunked_attention"),
    "rope without rope": ({"position_embedding_type": "learned", "rope_theta": 1e4}, "rope_theta has no effect"),
    "rope parameters without rope": (
        {"position_embedding_type": "learned", "rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters has no effect",
    ),
    "partial rope without rope": (
        {"position_embedding_type": "learned", "partial_rotary_factor": 0.5},
        "partial_rotary_factor has no effect",
    ),
    "two fractions": (
        {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.5 contradicts",
    ),
    "odd rotary size": ({"partial_rotary_factor": 0.05}, "partial_rotary_factor=0.05"),
    "more than all": ({"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
    "unknown rope type": ({"rope_parameters": {"rope_type": "lineer"}}, "rope_type='lineer'"),
    "incomplete rope": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "misspelt rope key": ({"rope_parameters": {"rope_thta": 1e4}}, "rope_thta"),
    "value embedding of no layer": (
        {"value_embedding_layers": [12]},
        r"value_embedding_layers=\[12\] must be None, 'alternating', or rising layers up to 11",
    ),
    "value embedding of a layer twice": ({"value_embedding_layers": [1, 1]}, "must be .* rising layers"),
    "value embeddings in no layers": ({"value_embedding_layers": []}, r"value_embedding_layers=\[\] must be"),
    "value embeddings of no kind": ({"value_embedding_layers": "all"}, "value_embedding_layers='all' must be"),
    "tables of no layer": ({"num_value_embeddings": 1}, "num_value_embeddings=1 must be"),
    "no bigrams": ({"bigram_vocab_size": 1}, "bigram_vocab_size=1 must be at least 2"),
    "offset without full attention": (
        {"use_key_offset": True, "partial_rotary_factor": 0.5, "sliding_window": 4},
        "all slide with sliding_window=4",
    ),
    "keys that RoPE rotates whole": ({"use_key_offset": True}, "with partial_rotary_factor=1.0 below 1"),
    "soft cap of zero": ({"final_logit_softcapping": 0}, "final_logit_softcapping=0"),
    "two names, two values": ({"n_embd": 64, "hidden_size": 32}, "n_embd=64 contradicts hidden_size=32"),
    "two names of GPT-2, two values": ({"n_ctx": 64, "n_positions": 32}, "contradicts max_position_embeddings="),
    "unknown activation": ({"activation_function": "relu"}, "mlp_type='relu' is unknown; choose from gelu_new"),
    "switch of GPT-2's scores": ({"scale_attn_weights": False}, "'scale_attn_weights'; did you mean 'attention_scale'"),
    "activation of Llama": ({"hidden_act": "silu"}, "'hidden_act'; did you mean 'mlp_type'"),
    "setting of GPT-2 that is none here": (
        {"reorder_and_upcast_attn": True},
        "unknown configuration key 'reorder_and_upcast_attn'; remove it",
    ),
    "two thetas": ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta=5.0 contradicts"),
    "two scalings": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e4}},
        "rope_scaling=.* contradicts",
    ),
    "negative eps": ({"norm_eps": -1.0}, "norm_eps=-1.0"),
    "negative deviation": ({"initializer_range": -1.0}, "initializer_range=-1.0"),
    "scale of zero": ({"attention_scale": 0}, "attention_scale=0"),
    "dropout of everything": ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
}


@pytest.mark.parametrize(("keys", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_raises_value_error_naming_the_key(keys, message):
    with pytest.raises(ValueError, match=message):
        GPT2ModernConfig(**keys)


def test_mlp_kind_of_a_user_is_a_choice_like_ours(monkeypatch, tmp_path):
    """One entry in MLPS is enough: the model is built from it with its default size and plans, saved and loaded."""
    monkeypatch.setitem(MLPS, "reglu", MLPKind("relu", gated=True))
    config = tiny_config(mlp_type="reglu")
    assert config.intermediate_size == 128 and "layers.*.mlp.gate_proj" in config.base_model_tp_plan
    model = GPT2ModernForCausalLM(config).eval()
    mlp, hidden_states = model.model.layers[0].mlp, torch.randn(2, 3, 32)
    expected = mlp.down_proj(mlp.gate_proj(hidden_states).clamp(min=0) * mlp.up_proj(hidden_states))
    torch.testing.assert_close(mlp(hidden_states), expected)
    model.save_pretrained(tmp_path)
    assert GPT2ModernForCausalLM.from_pretrained(tmp_path).config.mlp_type == "reglu"


def test_mlp_kind_may_have_an_activation_function_of_its_own(monkeypatch):
    """The function is added to transformers' ACT2FN by its name, the kind to MLPS."""

    class CubedReLU(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states.relu() ** 3

    monkeypatch.setitem(ACT2FN, "relu3", CubedReLU)
    monkeypatch.setitem(MLPS, "relu3", MLPKind("relu3"))
    mlp, hidden_states = build_mlp(tiny_config(mlp_type="relu3")), torch.randn(2, 3, 32)
    torch.testing.assert_close(mlp(hidden_states), mlp.down_proj(mlp.up_proj(hidden_states).clamp(min=0) ** 3))


def test_assignment_of_a_wrong_type_raises_value_error():
    config = GPT2ModernConfig()
    with pytest.raises(ValueError, match="hidden_size"):
        config.hidden_size = "32"


def test_misspelt_override_of_a_preset_raises():
    with pytest.raises(ValueError, match="use_qk_norm"):
        GPT2ModernConfig.from_preset("modern", use_qknorm=True)


def test_unknown_preset_is_answered_with_the_list():
    with pytest.raises(ValueError, match=r"unknown preset 'modren'.*modern-xl"):
        GPT2ModernConfig.from_preset("modren")
    with pytest.raises(ValueError, match="hidden_size=64 is not a multiple of 128, the size of a head of 'frontier'"):
        GPT2ModernConfig.from_preset("frontier", hidden_size=64)


def test_mistake_set_after_construction_is_refused_at_saving(tmp_path):
    config = GPT2ModernConfig()
    config.num_key_value_heads = 5
    with pytest.raises(ValueError, match="num_key_value_heads=5"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_misspelt_key_in_config_json_raises(tmp_path):
    GPT2ModernConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"use_qk_nrom": True}))
    with pytest.raises(ValueError, match="use_qk_norm"):
        GPT2ModernConfig.from_pretrained(tmp_path)


def test_attribute_that_is_no_key_is_not_saved(tmp_path):
    """Otherwise a saved configuration might be refused when it is loaded."""
    config = GPT2ModernConfig()
    config.norm_epsilon = 1e-6
    config.save_pretrained(tmp_path)
    assert "norm_epsilon" not in json.loads((tmp_path / "config.json").read_text())


def test_mark_that_a_tool_left_in_config_json_is_no_obstacle(tmp_path):
    GPT2ModernConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"sometool_version": "1.0"}))
    assert GPT2ModernConfig.from_pretrained(tmp_path).hidden_size == 768


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_survives_json(preset, tmp_path):
    config = GPT2ModernConfig.from_preset(preset)
    config.save_pretrained(tmp_path)
    loaded = GPT2ModernConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(config):
        if field.name != "transformers_version":
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_flag_set_survives_two_rounds_of_dict(flag_set):
    config = tiny_config(flag_set)
    once = GPT2ModernConfig.from_dict(config.to_dict())
    assert GPT2ModernConfig.from_dict(once.to_dict()).to_dict() == once.to_dict() == config.to_dict()


def test_auto_map_names_every_auto_class():
    assert set(GPT2ModernConfig().auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }


def test_saved_auto_map_points_into_the_saved_folder(tmp_path):
    """A copy loaded from the Hub may refer to its repository; a saved one refers to the code files beside it."""
    config = GPT2ModernConfig(
        auto_map={"AutoConfig": "someone/model--configuration_gpt2modern.GPT2ModernConfig", "AutoTokenizer": "own.Own"}
    )
    assert config.auto_map["AutoConfig"].startswith("someone/model--")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == GPT2ModernConfig().auto_map | {"AutoTokenizer": "own.Own"}


def test_defaults_are_the_modern_preset():
    """Only special token ids and padding of GPT-2's vocabulary differ."""
    default, preset = GPT2ModernConfig().to_dict(), GPT2ModernConfig.from_preset("modern").to_dict()
    vocabulary = {"vocab_size", "unpadded_vocab_size", "bos_token_id", "eos_token_id"}
    assert {key for key in default if default[key] != preset[key]} == vocabulary


@pytest.mark.parametrize(("mlp_type", "intermediate_size"), [("gelu", 4 * 1280), ("swiglu", 3456)])
def test_intermediate_size_follows_the_hidden_size(mlp_type, intermediate_size):
    """8/3 x 1280 = 3413.3; the next multiple of 64 is 3456."""
    config = GPT2ModernConfig.from_preset("modern", mlp_type=mlp_type, hidden_size=1280)
    assert config.intermediate_size == intermediate_size


@pytest.mark.parametrize(
    ("preset", "hidden_size", "heads"), [("modern", 256, 4), ("speedrun", 256, 2), ("gpt2", 96, 12)]
)
def test_heads_keep_their_size_where_they_can(preset, hidden_size, heads):
    assert GPT2ModernConfig.from_preset(preset, hidden_size=hidden_size).num_attention_heads == heads


def test_layer_types_follow_the_number_of_layers():
    config = GPT2ModernConfig.from_preset("modern", num_hidden_layers=3, sliding_window=8)
    assert config.layer_types == ["sliding_attention"] * 3


def test_new_vocabulary_drops_the_padding_and_the_ids_of_the_old_one():
    config = GPT2ModernConfig.from_preset("modern", vocab_size=8192)
    assert (config.unpadded_vocab_size, config.bos_token_id, config.eos_token_id) == (None, None, None)


# Every setting of GPT2Config that changes a GPT2LMHeadModel, with the field that has its meaning.
NAMES_OF_GPT2 = {
    "n_embd": ("hidden_size", 64),
    "n_layer": ("num_hidden_layers", 3),
    "n_head": ("num_attention_heads", 4),
    "n_positions": ("max_position_embeddings", 32),
    "n_ctx": ("max_position_embeddings", 32),
    "n_inner": ("intermediate_size", 96),
    "activation_function": ("mlp_type", "gelu"),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
    "resid_pdrop": ("hidden_dropout", 0.3),
    "embd_pdrop": ("embedding_dropout", 0.4),
    "attn_pdrop": ("attention_dropout", 0.2),
}


@pytest.mark.parametrize("build", [GPT2ModernConfig, partial(GPT2ModernConfig.from_preset, "gpt2")])
def test_names_of_gpt2_are_aliases(build):
    config = build(**{alias: value for alias, (_, value) in NAMES_OF_GPT2.items()})
    for alias, (name, value) in NAMES_OF_GPT2.items():
        assert getattr(config, name) == getattr(config, alias) == value
        assert name in config.to_dict() and alias not in config.to_dict()
    assert config.head_dim == 16


def test_names_of_gpt2_are_read_from_a_string():
    """run_clm.py sets them this way."""
    config = GPT2ModernConfig.from_preset("gpt2")
    config.update_from_string("n_layer=10,resid_pdrop=0.2,activation_function=gelu")
    assert (config.num_hidden_layers, config.hidden_dropout, config.mlp_type) == (10, 0.2, "gelu")


def test_two_names_of_a_setting_with_two_values_raise_in_a_preset_too():
    with pytest.raises(ValueError, match="n_embd=128 contradicts hidden_size=64; remove one of them"):
        GPT2ModernConfig.from_preset("gpt2", hidden_size=64, n_embd=128)


@pytest.mark.parametrize("eos_token_id", [None, [1, 2]])
def test_new_vocabulary_takes_the_special_tokens_that_are_given(eos_token_id):
    config = GPT2ModernConfig.from_preset("gpt2", vocab_size=96, eos_token_id=eos_token_id)
    assert (config.bos_token_id, config.eos_token_id) == (None, eos_token_id)


def test_names_of_gpt2_override_presets():
    config = GPT2ModernConfig.from_preset("gpt2", n_embd=128, n_layer=2)
    assert (config.hidden_size, config.num_attention_heads, config.layer_types) == (128, 2, ["full_attention"] * 2)


def test_rope_parameters_of_the_caller_stay_as_they_were():
    given = {"rope_theta": 5e4}
    config = GPT2ModernConfig(rope_parameters=given)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 1.0}
    assert given == {"rope_theta": 5e4}
