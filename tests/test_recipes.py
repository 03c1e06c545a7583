"""Every recipe is found by its name, --dry_run prints the sizes of its run, and every line of it says its unit."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import GPT2LMHeadModel

import train_accelerate
from gpt2modern.conversion import to_native
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.models import parse_config_overrides
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from tests.support.trainer import TINY, train

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def dry_run(*flags):
    """Return the (settings, facts) that the command prints."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train_accelerate.main(["--dry_run", "true", *map(str, flags)])
    lines = [line[2:] for line in output.getvalue().splitlines() if line.startswith("# ")]
    return yaml.safe_load(output.getvalue()), {line[:20].strip(): line[21:] for line in lines}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_by_its_name(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, facts = dry_run("--config", recipe.stem)
    given = yaml.safe_load(recipe.read_text())
    assert {name: settings[name] for name in given} == given
    assert facts["steps"] == f"{given['max_steps']:,}"
    assert not list(tmp_path.iterdir())


def test_the_demo_has_a_stock_class():
    settings, facts = dry_run("--config", "demo")
    assert facts["stock class"] == "Qwen3ForCausalLM" and settings["export_stock"] == "auto"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_number_of_a_recipe_says_what_it_counts(recipe):
    lines = [line for line in recipe.read_text().splitlines() if line and not line.startswith("#")]
    silent = [line for line in lines if any(c.isdigit() for c in line.split(": ")[1].split("#")[0]) and "#" not in line]
    assert not [line for line in silent if not line.startswith(("model_preset", "config_overrides"))]


@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [
        ("gpt2-124m-fineweb-edu", 9_999_745_024, 124_439_808 + 47 * 768),
        ("modern-124m-fineweb-edu", 9_999_745_024, None),
        ("speedrun-124m-fineweb", 1_572_864_000, None),
        ("gpt2-medium-fineweb-edu", None, 354_823_168 + 47 * 1024),
        ("gpt2-large-fineweb-edu", None, 774_030_080 + 47 * 1280),
        ("gpt2-xl-fineweb-edu", None, 1_557_611_200 + 47 * 1600),
    ],
)
def test_published_sizes(name, tokens, parameters):
    _, facts = dry_run("--config", next(path for path in RECIPES if path.stem == name))
    assert tokens is None or facts["tokens"].startswith(f"{tokens:,} ")
    assert parameters is None or facts["parameters"] == f"{parameters:,}"


@pytest.mark.parametrize("recipe", sorted(RECIPES[0].parent.glob("gpt2-*.yaml")), ids=lambda path: path.stem)
def test_padded_vocabulary_of_gpt2_is_exported_without_the_padding(recipe):
    """The recipe's own settings, at a small width: all that differs from the models of 2019 is the padding."""
    given = yaml.safe_load(recipe.read_text())
    settings = parse_config_overrides(given["config_overrides"])
    settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPT2ModernConfig.from_preset(given["model_preset"], **settings)
    assert (config.vocab_size % 128, config.unpadded_vocab_size) == (0, 50257)
    model = GPT2ModernForCausalLM(config).eval()
    native = to_native(model)
    assert type(native) is GPT2LMHeadModel and native.config.vocab_size == len(native.lm_head.weight) == 50257
    input_ids = torch.tensor([[0, 50256, 17]])
    with torch.no_grad():
        logits = model(input_ids).logits[..., :50257]
        torch.testing.assert_close(native(input_ids).logits, logits, atol=1e-5, rtol=0)


def test_data_with_more_ids_than_a_padded_model_is_refused(data_dir, tmp_path, capsys):
    """Rows of padding are no room for ids: their probability is 0."""
    flags = {"config_overrides": f"{TINY},vocab_size=320,unpadded_vocab_size=299"}
    with pytest.raises(SystemExit):
        train(data_dir, tmp_path / "run", **flags)
    assert "the data has 300 token ids, but the vocab_size of the model is only 299" in capsys.readouterr().err


def test_adapters_are_counted_as_what_is_trained():
    recipe = next(path for path in RECIPES if path.stem == "lora-finetune")
    _, facts = dry_run("--config", recipe, "--model_preset", "gpt2")
    _, whole = dry_run("--model_preset", "gpt2")
    trained = 12 * 16 * (4 * (768 + 768) + 2 * (768 + 3072))  # layers, rank, widths in and out of the six projections
    assert facts["trained parameters"].startswith(f"{trained:,} (2.09%)")
    assert facts["model"].startswith("preset gpt2, in place of the --model_name_or_path")
    frozen, attention = 124_439_808, 12 * 12 * 768 * 1024
    assert facts["FLOPs per token"].startswith(f"{6 * trained + 4 * frozen + attention:,} (6 P + 4 (N - P)")
    assert whole["FLOPs per token"].startswith(f"{6 * frozen + attention:,} (6 N")
    for name, bytes_each in (("gradients", 4), ("optimizer states", 8)):
        assert facts[name] == f"{bytes_each * trained / 2**30:.2f} GiB" != whole[name]


def test_a_dry_run_with_data_counts_its_epochs_and_is_itself_a_recipe(data_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--max_steps", 30, "--config_overrides", "hidden_size=32,num_attention_heads=2"]
    settings, facts = dry_run(*flags, "--output_dir", tmp_path / "run")
    epochs = 30 * 8 / len(PackedBlocks(data_dir, "train"))
    assert facts["tokens"] == f"{30 * 8 * 32:,} ({epochs:.2f} epochs of the data)"
    assert not (tmp_path / "run").exists() and "dry_run" not in settings
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert dry_run("--config", tmp_path / "recipe.yaml") == (settings, facts)
