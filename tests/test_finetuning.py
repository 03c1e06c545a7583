"""Fine-tuning begins with the model's weights; adapters alone are trained, resume exactly, are saved in two forms."""

import hashlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.loading import load_model
from tests.support.folders import write_prepared
from tests.support.trainer import assert_same_weights, losses, metrics, train
from train_accelerate import main

LORA = {"lora_rank": 4, "learning_rate": 1e-2, "config_overrides": "hidden_dropout=0.1"}


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory):
    return train(data_dir, tmp_path_factory.mktemp("base"), max_steps=8, save_steps=0)


def finetune(data_dir, output_dir, base, extra=(), **changes):
    return train(data_dir, output_dir, extra, model_name_or_path=base, **({"config_overrides": ""} | changes))


@pytest.fixture(scope="module")
def adapted(data_dir, base, tmp_path_factory):
    return finetune(data_dir, tmp_path_factory.mktemp("adapted"), base, **LORA)


def test_training_starts_where_the_model_stands(data_dir, base, tmp_path):
    run = finetune(data_dir, tmp_path, base, max_steps=2, save_steps=0, seed=7)
    assert losses(run)[0] < losses(base)[0] - 0.3
    assert losses(run)[0] == pytest.approx(metrics(base)[-1]["loss"], abs=0.3)


def test_adapters_alone_are_trained_and_both_forms_are_saved(adapted, base, data_dir):
    """PEFT on top of the base gives the logits of the merged model, which stock code loads without PEFT."""
    merged = load_model(str(adapted))
    assert load_file(adapted / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    stacked = PeftModel.from_pretrained(load_model(str(base)), adapted / "adapter").eval()
    batch = PackedBlocks(data_dir, "train").__getitems__([0, 1])
    with torch.no_grad():
        expected, before = merged(batch).logits, load_model(str(base))(batch).logits
        torch.testing.assert_close(stacked(batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1
    optimizer = load_file(adapted / "checkpoints" / "step_0000008" / "optimizer.safetensors")
    assert optimizer and all(".lora_" in name for name in optimizer)
    norms = {"model.norm.weight", "model.embed_tokens.weight"}
    first, last = load_file(base / "model.safetensors"), load_file(adapted / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in norms)


def test_adapters_learn(adapted, base):
    assert metrics(adapted)[-1]["eval_loss"] < metrics(base)[-1]["eval_loss"] - 0.02


@pytest.mark.parametrize("step", [3, 6])
def test_adapters_resume_bit_identical(adapted, base, data_dir, tmp_path, step):
    checkpoint = adapted / "checkpoints" / f"step_{step:07d}"
    resumed = finetune(data_dir, tmp_path, base, resume_from_checkpoint=checkpoint, **LORA)
    assert_same_weights(adapted, resumed)
    assert losses(resumed) == losses(adapted)[step:]
    names = [run / "adapter" / "adapter_model.safetensors" for run in (adapted, resumed)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_checkpoint_of_adapters_is_a_model_folder(adapted):
    assert_same_weights(adapted, adapted / "checkpoints" / "step_0000008")


def test_adapters_go_where_they_are_told(data_dir, base, tmp_path):
    run = finetune(
        data_dir, tmp_path, base, ["--lora_target_modules", "q_proj", "v_proj"], lora_rank=2, max_steps=2, save_steps=0
    )
    names = load_file(run / "adapter" / "adapter_model.safetensors").keys()
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_the_resolved_recipe_repeats_the_run(adapted, data_dir, tmp_path):
    main(["--config", str(adapted / "resolved_config.yaml"), "--output_dir", str(tmp_path)])
    assert losses(tmp_path) == losses(adapted)


def test_another_base_than_the_checkpoints_is_refused(adapted, base, data_dir, tmp_path, capsys):
    other = train(data_dir, tmp_path / "other", max_steps=2, save_steps=0, seed=3)
    checkpoint = adapted / "checkpoints" / "step_0000003"
    with pytest.raises(SystemExit):
        finetune(data_dir, tmp_path / "run", other, resume_from_checkpoint=checkpoint, **LORA)
    assert "was trained on another --model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["lora-finetune", "chat-finetune"])
def test_recipes_train(recipe, data_dir, base, tmp_path):
    flags = f"--data_dir {data_dir} --model_name_or_path {base} --output_dir {tmp_path} --max_steps 2 --logging_steps 1"
    main(["--config", recipe, *flags.split()])
    assert len(losses(tmp_path)) == 2 and (tmp_path / "adapter").exists() == (recipe == "lora-finetune")


def test_a_dry_run_names_the_model(base, data_dir, tmp_path, capsys):
    finetune(data_dir, tmp_path / "run", base, dry_run=True, lora_rank=4)
    assert "model_name_or_path: " in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_larger_vocabulary_is_refused(data_dir, base, tmp_path, capsys):
    tokenizer = data_dir / "tokenizer"
    rows = [list(range(33)) for _ in range(8)]
    data = write_prepared(
        tmp_path / "data", {"train": [rows], "validation": [rows]}, tokenizer_dir=tokenizer, block_size=32,
        vocab_size=999,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        finetune(data, tmp_path / "run", base)
    assert "the data has 999 token ids" in capsys.readouterr().err


def test_the_base_stays_as_it_was(data_dir, base, tmp_path):
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    finetune(data_dir, tmp_path, base, max_steps=2, save_steps=0)
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before
