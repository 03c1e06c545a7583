"""A folder of another architecture is imported with the same logits, or refused in one line, wherever it is loaded."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.dynamic_module_utils import get_imports

from modeling_gpt2modern import (
    GPT2ModernConfig,
    GPT2ModernForCausalLM,
    GPT2ModernForSequenceClassification,
    GPT2ModernModel,
    configuration_gpt2modern,
)
from tests.support.models import random_ids, tiny_model
from tests.support.trainer import losses, train

GPT2 = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=48)
LLAMA = LlamaConfig(
    vocab_size=300, max_position_embeddings=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
PARALLEL_NEOX = GPTNeoXConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)
INPUT_IDS = random_ids(2, 24)


def stock(model_class, config):
    """Build a stock model with weights ten times as large as usual, so that every part of it has an effect."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save one folder per model: two that are imported, four that have no counterpart, and a base model."""
    root = tmp_path_factory.mktemp("stock")
    models = {
        "gpt2": stock(GPT2LMHeadModel, GPT2),
        "llama": stock(LlamaForCausalLM, LLAMA),
        "gpt2-base": stock(GPT2Model, GPT2),
        "mamba": MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)),
        "bloom": BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "neox": GPTNeoXForCausalLM(PARALLEL_NEOX),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_from_pretrained_imports_a_stock_folder(folders, name):
    imported = GPT2ModernForCausalLM.from_pretrained(folders / name)
    assert type(imported) is GPT2ModernForCausalLM and imported.config.name_or_path == str(folders / name)
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / name))
    torch.testing.assert_close(logits(imported), expected, atol=1e-5, rtol=0)


def test_keywords_reach_the_imported_model(folders):
    model, report = GPT2ModernForCausalLM.from_pretrained(
        folders / "gpt2",
        dtype=torch.bfloat16,
        hidden_dropout=0.25,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert (model.dtype, model.config.hidden_dropout) == (torch.bfloat16, 0.25)
    assert model.config._attn_implementation == "eager" and not report["missing_keys"]


def test_precision_and_generation_settings_come_along(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt2", dtype=torch.bfloat16)
    model.generation_config.top_k, model.generation_config.do_sample = 7, True
    model.save_pretrained(tmp_path)
    imported = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    assert (imported.generation_config.top_k, imported.dtype) == (7, torch.bfloat16)


def test_special_ids_outside_a_small_vocabulary_are_dropped(folders):
    """GPT2Config has 50256 as BOS and EOS, whatever its vocab_size."""
    config = GPT2ModernConfig.from_pretrained(folders / "gpt2")
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (None, None, 300)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_configuration_of_a_stock_folder_is_translated(folders, name):
    config = GPT2ModernConfig.from_pretrained(folders / name, hidden_dropout=0.5)
    expected = GPT2ModernForCausalLM.from_pretrained(folders / name).config
    assert type(config) is GPT2ModernConfig and config.hidden_dropout == 0.5
    names = set(GPT2ModernConfig.__annotations__) - {"hidden_dropout"}
    assert {key: getattr(config, key) for key in names} == {key: getattr(expected, key) for key in names}


def test_auto_class_with_our_configuration_imports_too(folders):
    config = GPT2ModernConfig.from_pretrained(folders / "gpt2", embedding_dropout=0.5)
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt2", config=config)
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / "gpt2"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert model.config.embedding_dropout == 0.5


def test_subfolder_and_the_folder_s_own_configuration_may_be_given(folders):
    expected = logits(GPT2ModernForCausalLM.from_pretrained(folders / "gpt2"))
    stock = AutoConfig.from_pretrained(folders / "gpt2")
    for model in (
        GPT2ModernForCausalLM.from_pretrained(folders, subfolder="gpt2"),
        GPT2ModernForCausalLM.from_pretrained(folders / "gpt2", config=stock),
    ):
        assert torch.equal(logits(model), expected)


def test_configuration_that_contradicts_the_folder_is_refused(folders):
    config = GPT2ModernConfig.from_pretrained(folders / "gpt2", mlp_type="gelu")  # its weights would fit
    with pytest.raises(ValueError, match=r"gpt2 has mlp_type='gelu_new', but .* has mlp_type='gelu'; omit it"):
        AutoModelForCausalLM.from_pretrained(folders / "gpt2", config=config)


def test_base_model_and_classifier_start_from_a_stock_folder(folders):
    with torch.no_grad():
        states = GPT2ModernModel.from_pretrained(folders / "gpt2").eval()(INPUT_IDS).last_hidden_state
        expected = AutoModelForCausalLM.from_pretrained(folders / "gpt2").transformer(INPUT_IDS).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    classifier = GPT2ModernForSequenceClassification.from_pretrained(folders / "gpt2", num_labels=3)
    assert classifier.score.weight.shape == (3, 32)
    assert torch.equal(
        classifier.model.embed_tokens.weight,
        load_file(folders / "gpt2" / "model.safetensors")["transformer.wte.weight"],
    )


def test_folder_of_a_base_model_is_imported_with_a_tied_head(folders):
    imported = GPT2ModernForCausalLM.from_pretrained(folders / "gpt2-base")
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / "gpt2-base"))
    torch.testing.assert_close(logits(imported), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mamba", "a mamba model has no counterpart"),
        ("bloom", "a bloom model has no counterpart"),
        ("t5", "a t5 model has no counterpart"),
        ("neox", "use_parallel_residual=True has no counterpart"),
    ],
)
@pytest.mark.parametrize("what", [GPT2ModernConfig, GPT2ModernForCausalLM, GPT2ModernModel])
def test_folder_without_a_counterpart_is_refused_in_one_line(folders, name, problem, what):
    with pytest.raises(ValueError, match=problem) as refusal:
        what.from_pretrained(folders / name)
    assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_without_the_library_a_stock_folder_is_refused_with_the_way_out(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt2modern.conversion", None)
    monkeypatch.delattr("gpt2modern.conversion", raising=False)
    with pytest.raises(ValueError, match=r"is a gpt2 model, .* pip install gpt2-modern"):
        GPT2ModernForCausalLM.from_pretrained(folders / "gpt2")


def test_saved_model_code_needs_only_torch_transformers_and_the_hub():
    assert not {"gpt2modern"} & set(get_imports(configuration_gpt2modern.__file__))


def test_own_folder_loads_as_before(tmp_path):
    tiny_model("modern").save_pretrained(tmp_path)
    loaded = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(tiny_model("modern")), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainer_fine_tunes_a_stock_folder(folders, data_dir, name, tmp_path, capsys):
    """The first loss is that of the imported model: more than a new model's ln(300), because its weights are large."""
    flags = {"model_name_or_path": folders / name, "config_overrides": "hidden_dropout=0.0,embedding_dropout=0.0"}
    flags |= {"max_steps": 4, "save_steps": 2}
    train(data_dir, tmp_path / "run", **flags)
    first = losses(tmp_path / "run")
    train(data_dir, tmp_path / "run", **flags)
    assert "resumed from" in capsys.readouterr().out and losses(tmp_path / "run") == first
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run")) is GPT2ModernForCausalLM


def test_trainer_refuses_a_folder_without_a_counterpart(folders, data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(data_dir, tmp_path / "run", model_name_or_path=folders / "bloom", config_overrides="")
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: --model_name_or_path")
    assert "a bloom model has no counterpart" in error[-1] and not (tmp_path / "run").exists()
