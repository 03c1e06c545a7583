"""The training loop: exact resume, the same losses however the work is divided, a folder that stock code loads."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoTokenizer

import train_accelerate
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import sha256_of
from gpt2modern.loading import load_model
from gpt2modern.training import memory
from gpt2modern.training.batches import BatchPlan, samples_in_order
from gpt2modern.training.distributed import _refuse_precision
from gpt2modern.training.models import build_model
from gpt2modern.training.stopping import STOPPED_EXIT_CODE
from tests.support.folders import random_rows, write_prepared
from tests.support.trainer import (
    ENVIRONMENT,
    FLAGS,
    MUON_SETTINGS,
    REPOSITORY,
    TINY,
    assert_same_weights,
    command,
    flags_for,
    losses,
    metrics,
    train,
)
from train_accelerate import TrainConfig


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run of 8 steps with checkpoints at 3, 6 and 8; an epoch is 5 or 6 steps."""
    return train(data_dir, tmp_path_factory.mktemp("finished"), config_overrides=TINY + ",hidden_dropout=0.1")


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "configuration_gpt2modern.py", "modeling_gpt2modern.py", "README.md", "summary.json", "metrics.jsonl",
        "training_curves.png", "resolved_config.yaml", "checkpoints",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".")]
    auto_map = json.loads((finished / "config.json").read_text())["auto_map"]
    assert auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_every_logged_step_has_every_measure(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["tokens_seen"] for row in rows] == [256 * step for step in range(1, 9)]
    measures = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_time_s", "peak_memory_gib"}
    assert all(row.keys() >= measures for row in rows)
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8]


def test_the_summary_agrees_with_the_log(finished):
    summary, rows = json.loads((finished / "summary.json").read_text()), metrics(finished)
    assert (summary["train_loss"], summary["eval_loss"]) == (rows[-1]["loss"], rows[-1]["eval_loss"])
    assert (summary["steps"], summary["tokens_seen"]) == (8, 2048)
    assert (summary["mixed_precision"], summary["num_processes"], summary["eval_blocks"]) == ("no", 1, 8)
    assert 0 < summary["bits_per_byte"] < summary["eval_loss"] / 0.69


def test_the_model_learns(finished):
    assert losses(finished)[-1] < losses(finished)[0] - 0.5


@pytest.mark.fault("F1 resume from anywhere")
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_ends_bit_identical(finished, data_dir, tmp_path, step):
    """Step 3 is in the middle of the first epoch, step 6 in the second; dropout is on, workers read ahead."""
    resumed = train(
        data_dir,
        tmp_path,
        config_overrides=TINY + ",hidden_dropout=0.1",
        resume_from_checkpoint=finished / "checkpoints" / f"step_{step:07d}",
        dataloader_num_workers=2,
    )
    assert_same_weights(finished, resumed)
    assert losses(resumed) == losses(finished)[step:]


@pytest.mark.fault("F1 resume from anywhere")
def test_a_second_resume_ends_bit_identical(finished, data_dir, tmp_path):
    flags = {"config_overrides": TINY + ",hidden_dropout=0.1"}
    first = train(data_dir, tmp_path / "1", resume_from_checkpoint=finished / "checkpoints" / "step_0000003", **flags)
    second = train(data_dir, tmp_path / "2", resume_from_checkpoint=first / "checkpoints" / "step_0000006", **flags)
    assert_same_weights(finished, second)
    assert losses(second) == losses(finished)[6:]


@pytest.mark.fault("F1 resume from anywhere")
@pytest.mark.parametrize("changes", [{}, MUON_SETTINGS], ids=["plain", "all settings"])
def test_muon_resumes_bit_identical(data_dir, tmp_path, changes):
    settings = {"model_preset": "speedrun", "optimizer": "muon", "embedding_learning_rate": 0.1} | changes
    whole = train(data_dir, tmp_path / "whole", **settings)
    checkpoint = whole / "checkpoints" / "step_0000003"
    resumed = train(data_dir, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **settings)
    assert_same_weights(whole, resumed)
    assert losses(resumed) == losses(whole)[3:]


def test_the_learning_rates_follow_the_schedule(data_dir, tmp_path):
    flags = {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.5, "decay_type": "linear", "min_lr_ratio": 0}
    run = train(data_dir, tmp_path, **flags)
    expected = [0.005, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    assert [row["learning_rate"] for row in metrics(run)] == pytest.approx(expected)


def test_a_found_micro_batch_trains_like_a_given_one(data_dir, tmp_path, monkeypatch, capsys):
    """Trying sizes changes neither weights nor random numbers; of 8 sequences per step, 4 at a time fit here."""

    def tried(config, accelerator, model, size, block_size):  # on a CPU the estimate decides
        return memory.fits_by_trying(config, accelerator, model, size, block_size, None) and size <= 4

    monkeypatch.setattr(memory, "fits_by_estimate", tried)
    flags = {"config_overrides": TINY + ",hidden_dropout=0.1", "save_steps": 0, "max_steps": 4}
    given = train(data_dir, tmp_path / "given", per_device_train_batch_size=4, **flags)
    found = train(data_dir, tmp_path / "found", per_device_train_batch_size="auto", **flags)
    assert losses(found) == losses(given)
    assert_same_weights(found, given)
    assert capsys.readouterr().out.count("8 x 32 tokens per step, in 2 forward passes per process") == 2


WARM_UP = {"batch_size_warmup_steps": 5, "initial_total_batch_size": 128, "total_batch_size": 512}


@pytest.mark.fault("F1 resume from anywhere")
def test_a_batch_size_warm_up_resumes_bit_identical(data_dir, tmp_path):
    """Steps take 128, 128, 256, 256, 384 and then 512 tokens."""
    whole = train(data_dir, tmp_path / "whole", **WARM_UP)
    assert [row["tokens_seen"] for row in metrics(whole)] == [128, 256, 512, 768, 1152, 1664, 2176, 2688]
    resumed = train(
        data_dir, tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoints" / "step_0000003", **WARM_UP
    )
    assert_same_weights(whole, resumed)
    assert losses(resumed) == losses(whole)[3:]
    assert json.loads((resumed / "summary.json").read_text())["tokens_seen"] == 2688

    checkpoint = whole / "checkpoints" / "step_0000003"
    other = {"per_device_train_batch_size": 2, "resume_from_checkpoint": checkpoint}
    assert losses(train(data_dir, tmp_path / "other", **WARM_UP, **other)) == pytest.approx(losses(whole)[3:], abs=1e-5)


def test_document_masking_reaches_the_loss(data_dir, tmp_path):
    """The test data is one document, so its most frequent token is declared to end documents."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    tokens = torch.cat(list(PackedBlocks(data, "train")))
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"eos_token_id": tokens.mode().values.item()}))
    flags = {"max_steps": 2, "save_steps": 0, "config_overrides": TINY + ",initializer_range=0.5"}
    runs = [train(data, tmp_path / str(mask), document_masking=mask, **flags) for mask in (False, True)]
    assert abs(losses(runs[0])[0] - losses(runs[1])[0]) > 1e-3


@pytest.mark.fault("F4 kill -9 while training, saving, resuming")
def test_a_killed_run_resumes_and_ends_bit_identical(data_dir, tmp_path):
    whole = train(data_dir, tmp_path / "whole", max_steps=40)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(data_dir, killed, max_steps=40), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "summary.json").exists()

    train(data_dir, killed, max_steps=40)
    assert_same_weights(whole, killed)
    assert [row["step"] for row in metrics(killed)] == list(range(1, 41))
    assert losses(killed) == losses(whole)


@pytest.mark.fault("F1 resume from anywhere")
@pytest.mark.slow
def test_four_processes_resume_bit_identical(data_dir, tmp_path):
    """With more than two, the order in which gradients are summed shows in the last bit."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"per_device_train_batch_size": 2, "config_overrides": TINY.replace("32", "64", 1)}
    for run, start in ((whole, "none"), (resumed, whole / "checkpoints" / "step_0000006")):
        arguments = command(data_dir, run, *launcher, resume_from_checkpoint=start, **settings)
        subprocess.run(arguments, env=ENVIRONMENT, check=True, capture_output=True, timeout=200)
    assert_same_weights(whole, resumed)


@pytest.mark.fault("F16 resume under other settings or data")
def test_other_data_is_refused_at_resume(finished, data_dir, tmp_path, capsys):
    other = shutil.copytree(data_dir, tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"seed": 123}))
    with pytest.raises(SystemExit):
        train(other, finished, config_overrides=TINY + ",hidden_dropout=0.1")
    assert "data was" in capsys.readouterr().err


def test_the_seed_decides_the_first_weights(data_dir, tmp_path):
    first = [losses(train(data_dir, tmp_path / str(seed), seed=seed, max_steps=2, save_steps=0))[0] for seed in (1, 2)]
    assert first[0] != first[1]


def test_muon_keeps_a_momentum_for_matrices_in_layers_only(data_dir, tmp_path):
    run = train(data_dir, tmp_path, optimizer="muon", max_steps=2)
    state = load_file(run / "checkpoints" / "step_0000002" / "optimizer.safetensors")
    matrices = {name.split("/")[0] for name in state if name.endswith("/momentum_buffer")}
    assert matrices and all(".layers." in name and name.endswith("_proj.weight") for name in matrices)


def as_written_before(checkpoint, folder):
    """Copy a checkpoint, with trainer_state.json as it was before evaluation results were stored whole."""
    old = shutil.copytree(checkpoint, folder / checkpoint.name)
    state = json.loads((old / "trainer_state.json").read_text())
    evaluation = state.pop("evaluation")
    del state["nonfinite_steps"], state["format_version"], state["has_optimizer_state"]
    state |= {"eval_loss": evaluation.get("eval_loss"), "tokens_seen": 256 * state["step"]}
    (old / "trainer_state.json").write_text(json.dumps(state, indent=2))
    checksums = json.loads((old / "checksums.json").read_text())
    checksums["trainer_state.json"] = sha256_of(old / "trainer_state.json")
    (old / "checksums.json").write_text(json.dumps(checksums, indent=2))
    return old


@pytest.mark.fault("F1 resume from anywhere")
@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_checkpoint_of_the_old_format_resumes_bit_identical(finished, data_dir, tmp_path, step):
    """Step 3 comes before the first evaluation, step 6 after it, step 8 after the last one, which is not repeated."""
    checkpoint = as_written_before(finished / "checkpoints" / f"step_{step:07d}", tmp_path)
    resumed = train(
        data_dir,
        tmp_path / "run",
        config_overrides=TINY + ",hidden_dropout=0.1",
        resume_from_checkpoint=checkpoint,
    )
    assert_same_weights(finished, resumed)
    assert losses(resumed) == losses(finished)[step:]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (finished, resumed)]
    for name in ("steps", "tokens_seen", "eval_loss", "bits_per_byte"):
        assert summaries[0][name] == summaries[1][name]


def hidden(folder):
    return {path.name for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()] if path.name[0] == "."}


@pytest.mark.fault("F8 full disk; F10 read-only, vanished folder: a save fails, the run continues")
@pytest.mark.parametrize("name", ["model.safetensors", "training_curves.png", "README.md", "tokenizer.json"])
def test_a_failed_export_leaves_nothing_half_written(data_dir, tmp_path, capsys, name):
    """A folder has the name of a file that the run writes at its end."""
    (tmp_path / name).mkdir()
    (tmp_path / "resolved_config.yaml").write_text("")  # an earlier run made the folder
    if name == "training_curves.png":
        train(data_dir, tmp_path, max_steps=2, save_steps=0)
    else:
        with pytest.raises(SystemExit, match="2"):
            train(data_dir, tmp_path, max_steps=2, save_steps=0)
    assert f"{name} cannot be written" in (text := capsys.readouterr().err) or "cannot be written to" in text
    assert not hidden(tmp_path) and not list((tmp_path / name).iterdir())


@pytest.mark.fault("F4 kill -9 while training, saving, resuming")
def test_what_a_killed_run_left_is_removed_by_the_next(data_dir, tmp_path):
    """Also by one that is stopped before it saves or exports anything."""
    for name in (".export.tmp", "checkpoints/.step_0000001.tmp", ".hub_upload.tmp"):
        (tmp_path / name / "folder").mkdir(parents=True)
    for name in (f".{name}.{'0' * 32}.tmp" for name in ("metrics.jsonl", "training_curves.png", "summary.json")):
        (tmp_path / name).write_text("half")
    (tmp_path / ".gitignore").write_text("mine")
    train_accelerate.train(config_for(data_dir, tmp_path, save_steps=0, max_train_time="0.001"))
    assert hidden(tmp_path) <= {".gitignore"}


def test_training_time_adds_up_over_restarts(finished, data_dir, tmp_path):
    checkpoint = finished / "checkpoints" / "step_0000008"
    resumed = train(
        data_dir, tmp_path, config_overrides=TINY + ",hidden_dropout=0.1", resume_from_checkpoint=checkpoint
    )
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["wall_time_s"]
    summary = json.loads((resumed / "summary.json").read_text())
    assert saved <= summary["wall_time_s"] < saved + 5
    assert summary["eval_loss"] == json.loads((finished / "summary.json").read_text())["eval_loss"]


def test_a_finished_run_is_not_trained_further(finished, data_dir):
    before = (finished / "model.safetensors").read_bytes()
    train(data_dir, finished, config_overrides=TINY + ",hidden_dropout=0.1")
    assert (finished / "model.safetensors").read_bytes() == before
    assert len(metrics(finished)) == 8


@pytest.mark.fault("F16 resume under other settings or data")
def test_changed_settings_are_refused_and_listed(finished, data_dir, capsys):
    with pytest.raises(SystemExit) as caught:
        train(data_dir, finished, learning_rate=5e-3)
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert "learning_rate was 0.01, is 0.005" in message and "hidden_dropout was 0.1, is 0.0" in message


@pytest.mark.fault("F16 resume under other settings or data")
@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 5e-3}, {"optimizer": "muon"}, {"cautious_weight_decay": True}],
    ids=["rate", "optimizer", "decay"],
)
def test_changed_settings_can_be_forced_and_are_listed(finished, data_dir, tmp_path, capsys, changes):
    checkpoint = finished / "checkpoints" / "step_0000006"
    forced = train(data_dir, tmp_path, force_resume=True, resume_from_checkpoint=checkpoint, **changes)
    printed = capsys.readouterr().out
    name, value = next(iter(changes.items()))
    assert f"{name} was" in printed and f"is {value!r}" in printed and "hidden_dropout was 0.1, is 0.0" in printed
    assert [row["step"] for row in metrics(forced)] == [7, 8]
    assert losses(forced)[0] < losses(finished)[3] and losses(forced)[0] != losses(finished)[6]


def test_the_launchers_precision_is_recorded(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(data_dir, tmp_path, max_steps=2, save_steps=0)
    assert json.loads((run / "summary.json").read_text())["mixed_precision"] == "bf16"
    resolved, card = ((run / name).read_text() for name in ("resolved_config.yaml", "README.md"))
    assert "mixed_precision: bf16" in resolved and "# num_processes: 1\n" in resolved
    assert "| mixed_precision | bf16 |" in card and "| num_processes | 1 |" in card


COSINE = {"lr_scheduler_type": "cosine"}
STABLE = {"lr_scheduler_type": "warmup_stable_decay"}


@pytest.mark.parametrize(
    ("settings", "max_steps", "same_rates"),
    [
        (COSINE, 12, False),
        (COSINE, 6, False),
        ({"lr_scheduler_type": "linear"}, 12, False),
        ({"lr_scheduler_type": "constant"}, 12, True),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.25}, 9, True),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.25}, 40, False),
        (STABLE | {"decay_steps": 2}, 12, True),
        (STABLE | {"decay_ratio": 0.25}, 6, True),
        (STABLE | {"decay_steps": 6}, 9, False),
    ],
)
def test_another_length_keeps_the_learning_rates_or_not(settings, max_steps, same_rates):
    """Compare the first four of eight steps with those of a run of `max_steps`."""
    common = {"data_dir": "data", "output_dir": "out", "warmup_steps": 2} | settings
    common |= {"warmup_steps": None} if "warmup_ratio" in settings else {}
    schedules = [TrainConfig(**common, max_steps=steps).schedule for steps in (8, max_steps)]
    assert schedules[0].gave_the_same(schedules[1], 4) == same_rates
    rates = [[schedule.factor(step) for step in range(4)] for schedule in schedules]
    assert (rates[0] == rates[1]) == same_rates


def test_a_length_with_other_learning_rates_is_refused(finished, data_dir, tmp_path, capsys):
    flags = {"config_overrides": TINY + ",hidden_dropout=0.1", "max_steps": 12}
    flags["resume_from_checkpoint"] = finished / "checkpoints" / "step_0000006"
    with pytest.raises(SystemExit):
        train(data_dir, tmp_path, **flags)
    assert "other settings: max_steps was 8, is 12; restore these settings" in capsys.readouterr().err
    run = train(data_dir, tmp_path, force_resume=True, save_steps=0, **flags)
    assert "changed settings: max_steps was 8, is 12" in capsys.readouterr().out and metrics(run)[-1]["step"] == 12


def test_a_constant_run_is_lengthened(data_dir, tmp_path):
    flags = {"lr_scheduler_type": "constant", "save_steps": 4}
    whole = train(data_dir, tmp_path / "whole", max_steps=8, **flags)
    train(data_dir, tmp_path / "run", max_steps=4, **flags)
    assert losses(train(data_dir, tmp_path / "run", max_steps=8, **flags)) == losses(whole)


def test_a_run_whose_momentum_has_fallen_is_not_lengthened(data_dir, tmp_path, capsys):
    """Its last updates would not be the same. A checkpoint of before the cool-down is lengthened."""
    flags = {"lr_scheduler_type": "constant", "optimizer": "muon", "muon_momentum_cooldown_steps": 3}
    flags |= {"muon_momentum_warmup_steps": 0, "save_steps": 2}
    whole = train(data_dir, tmp_path / "whole", max_steps=8, **flags)
    short = train(data_dir, tmp_path / "short", max_steps=6, **flags)
    with pytest.raises(SystemExit):
        train(data_dir, short, max_steps=8, **flags)
    assert "other settings: max_steps was 6, is 8; restore" in capsys.readouterr().err
    flags["resume_from_checkpoint"] = short / "checkpoints" / "step_0000004"
    assert losses(train(data_dir, tmp_path / "run", max_steps=8, **flags)) == losses(whole)[4:]


def test_muon_is_forced_to_normalize_rows(data_dir, tmp_path, capsys):
    """Its state gets further tensors; so the averages of the run before are not loaded."""
    run = train(data_dir, tmp_path, optimizer="muon", max_steps=3)
    flags = {"optimizer": "muon", "max_steps": 5, "lr_scheduler_type": "cosine", "force_resume": True}
    train(data_dir, run, muon_normalize_rows=True, save_steps=5, **flags)
    assert "muon_normalize_rows was False, is True" in capsys.readouterr().out
    states = [load_file(run / "checkpoints" / f"step_000000{step}" / "optimizer.safetensors") for step in (3, 5)]
    names = states[1].keys() - states[0].keys()
    assert names == {name.replace("momentum_buffer", "row_mean_square") for name in states[0] if "momentum" in name}


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_adamw_accumulates_the_losses_of_one_big_batch(data_dir, tmp_path, micro_batch):
    big = train(data_dir, tmp_path / "big", per_device_train_batch_size=8, save_steps=0)
    small = train(data_dir, tmp_path / "small", per_device_train_batch_size=micro_batch, save_steps=0)
    assert losses(small) == pytest.approx(losses(big), abs=1e-6)


@pytest.mark.parametrize(("in_fp32", "tolerance"), [(True, 5e-6), (False, 1e-3)], ids=["fp32", "bf16"])
def test_muon_accumulates_up_to_its_products(data_dir, tmp_path, monkeypatch, in_fp32, tolerance):
    """At the speedrun recipe's rates. Sums of another order round otherwise, which bf16 makes a hundred times larger;
    it grows: 7e-5 after 12 steps and 6e-3 after 40, with the same products in fp32 5e-7 and 3e-6."""
    monkeypatch.setattr("gpt2modern.training.muon.has_bf16_instructions", lambda device: not in_fp32)
    recipe = {
        "model_preset": "speedrun", "optimizer": "muon", "muon_learning_rate": 0.04, "embedding_learning_rate": 0.6,
        "learning_rate": 8e-3, "scalar_learning_rate": 0.04, "weight_decay": 0.0, "max_grad_norm": 0.0,
        "warmup_steps": 0, "lr_scheduler_type": "constant", "save_steps": 0,
    }  # fmt: skip
    big, small = (
        losses(train(data_dir, tmp_path / str(size), per_device_train_batch_size=size, **recipe)) for size in (8, 2)
    )
    assert small == pytest.approx(big, abs=tolerance)
    assert big[-1] < big[0] - 0.5


def test_another_micro_batch_draws_other_dropout_masks(data_dir, tmp_path):
    """The masks have the same probability: the losses are near, not equal."""
    flags = {"config_overrides": TINY + ",hidden_dropout=0.1", "save_steps": 0}
    big, small = (
        losses(train(data_dir, tmp_path / str(size), per_device_train_batch_size=size, **flags)) for size in (8, 2)
    )
    assert small != big and small == pytest.approx(big, abs=0.1)


@pytest.fixture(scope="module")
def padded_dir(data_dir, tmp_path_factory):
    """Rows of 1 to 32 real targets: two micro-batches of a step rarely have equally many."""
    return write_prepared(
        tmp_path_factory.mktemp("padded") / "data",
        {"train": [random_rows(40, 32, seed=1)], "validation": [random_rows(7, 32, seed=2)]},
        tokenizer_dir=data_dir / "tokenizer",
        block_size=32,
    )


def loss_of_real_targets(model, blocks, indices):
    """Compute the mean loss over the targets that are not padding, from the logits of one sequence at a time."""
    nats, targets = 0.0, 0
    for index in indices:
        tokens = blocks[index]
        tokens = tokens[tokens >= 0]
        nats += torch.nn.functional.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="sum")
        targets += len(tokens) - 1
    return nats / targets


def test_padding_counts_neither_in_loss_nor_gradient_nor_evaluation(padded_dir, tmp_path):
    run = train(padded_dir, tmp_path, max_steps=1, warmup_steps=0, eval_blocks=7, save_steps=0, seed=3)
    blocks = PackedBlocks(padded_dir, "train")
    torch.manual_seed(3)
    model = build_model(TrainConfig(data_dir=padded_dir, output_dir=tmp_path, config_overrides=TINY), blocks)
    samples = samples_in_order(40, BatchPlan(8, 4, 1, 32), seed=3, first=0, count=8)
    loss = loss_of_real_targets(model, blocks, samples)
    loss.backward()
    grad_norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    (row,) = metrics(run)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-5)
    with torch.no_grad():
        expected = loss_of_real_targets(load_model(str(run)), PackedBlocks(padded_dir, "validation"), range(7))
    assert row["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_unevenly_padded_micro_batches_add_up(padded_dir, tmp_path, micro_batch):
    big = train(padded_dir, tmp_path / "big", per_device_train_batch_size=8, save_steps=0, eval_blocks=7)
    small = train(padded_dir, tmp_path / "small", per_device_train_batch_size=micro_batch, save_steps=0, eval_blocks=7)
    assert losses(small)[0] == pytest.approx(losses(big)[0], rel=1e-6)
    assert metrics(small)[0]["grad_norm"] == pytest.approx(metrics(big)[0]["grad_norm"], rel=1e-6)
    assert losses(small) == pytest.approx(losses(big), abs=1e-5)


def test_two_processes_train_like_one(padded_dir, tmp_path):
    """AdamW, without dropout."""
    one = train(padded_dir, tmp_path / "one", per_device_train_batch_size=2)
    two = tmp_path / "two"
    configuration = REPOSITORY / "accelerate_configs" / "cpu_two_processes.yaml"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    subprocess.run(
        command(
            padded_dir,
            two,
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)),
            per_device_train_batch_size=2,
            sample_prompts="def",
            sample_max_new_tokens=4,
        ),
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    evaluated = [[row["eval_loss"] for row in metrics(run) if "eval_loss" in row] for run in (one, two)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    assert len((two / "samples.jsonl").read_text().splitlines()) == 2  # steps 4 and 8, from one process


@pytest.mark.fault("F17 processes that would train apart")
def test_processes_that_would_train_apart_are_refused(data_dir, tmp_path, monkeypatch, capsys):
    """Two processes of a launcher that takes this machine for one with GPUs: Accelerate would see one process each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(SystemExit) as caught:
        train(data_dir, tmp_path / "run")
    assert caught.value.code == 2 and "WORLD_SIZE=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F11 NaN or infinite weights are not saved")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 8, "eval_steps": 0}, r"(loss|gradient norm) is (nan|inf).* at step [2-8]"),
        ({"max_steps": 2, "logging_steps": 100}, r"is (nan|inf) at step 2"),
        ({"max_steps": 8, "logging_steps": 100, "save_steps": 1}, r"norm of the weights is (nan|inf) at step 1"),
    ],
)
def test_a_broken_model_is_neither_saved_nor_exported(data_dir, tmp_path, capsys, changes, expected):
    """A huge first step breaks the weights; what is due next (a logged loss, an evaluation, a save) sees it."""
    with pytest.raises(SystemExit) as caught:
        train(data_dir, tmp_path, **({"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 0} | changes))
    assert caught.value.code == 2 and re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("checkpoints/step_*"))


def test_the_gradient_is_clipped_to_the_norm_asked_for(data_dir, tmp_path):
    """With a large epsilon AdamW's step grows with the gradient, so one that is clipped to nothing learns nothing."""
    settings = {"adam_epsilon": 1.0, "learning_rate": 1.0, "weight_decay": 0.0, "save_steps": 0, "max_steps": 4}
    free = train(data_dir, tmp_path / "free", max_grad_norm=0, **settings)
    clipped = train(data_dir, tmp_path / "clipped", max_grad_norm=1e-9, **settings)
    moved = [abs(row["eval_loss"] - losses(run)[0]) for run in (free, clipped) for row in metrics(run)[-1:]]
    assert moved[0] > 0.05 and moved[1] < 0.05


def test_bf16_trains_and_saves_fp32_weights(data_dir, tmp_path):
    run = train(data_dir, tmp_path, mixed_precision="bf16")
    assert {tensor.dtype for tensor in load_file(run / "model.safetensors").values()} == {torch.float32}
    assert losses(run)[-1] < losses(run)[0] - 0.5


def test_emulated_bf16_is_refused(monkeypatch):
    accelerator = SimpleNamespace(mixed_precision="bf16", device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(GPT2ModernError, match="Tesla T4 does not support bf16; use --mixed_precision fp16"):
        _refuse_precision(accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    _refuse_precision(accelerator)


@pytest.mark.parametrize("document_masking", [False, True], ids=["plain", "masked"])
def test_a_compiled_step_is_never_compiled_again(data_dir, tmp_path, monkeypatch, document_masking):
    """Evaluations, samples, checkpoints and a growing batch come between the steps; the compiler may trace once."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    flags = {"torch_compile": True, "sample_prompts": "def", "document_masking": document_masking, **WARM_UP}
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(data_dir, tmp_path, **flags)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    keys = (
        load_file(compiled / "model.safetensors").keys()
        | load_file(compiled / "checkpoints" / "step_0000003" / "optimizer.safetensors").keys()
    )
    assert not [key for key in keys if "_orig_mod" in key or key.startswith("module.")]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(finished, data_dir, tmp_path, monkeypatch):
    """A second compiled run takes its code from torch's caches on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    eager = train(data_dir, tmp_path / "eager")
    compiled = train(data_dir, tmp_path / "compiled", torch_compile=True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    again = train(data_dir, tmp_path / "again", torch_compile=True)
    counters = torch._dynamo.utils.counters
    assert counters["aot_autograd"]["autograd_cache_hit"] and not counters["aot_autograd"]["autograd_cache_miss"]
    assert not counters["inductor"]["fxgraph_cache_miss"]
    assert losses(again) == losses(compiled)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    assert load_file(compiled / "model.safetensors").keys() == load_file(eager / "model.safetensors").keys()


@pytest.mark.parametrize("preset", ["gpt2", "modern"])
def test_every_preset_is_fitted_to_the_data(data_dir, tmp_path, preset):
    run = train(data_dir, tmp_path, model_preset=preset, max_steps=2, save_steps=0)
    config = json.loads((run / "config.json").read_text())
    manifest = json.loads((data_dir / "manifest.json").read_text())
    assert (config["unpadded_vocab_size"] or config["vocab_size"]) == manifest["vocab_size"]
    assert config["eos_token_id"] == manifest["eos_token_id"]
    assert config["max_position_embeddings"] == manifest["block_size"]


LOAD_ELSEWHERE = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
logits = model(**tokenizer("def main", return_tensors="pt")).logits
AutoModel.from_pretrained(folder, trust_remote_code=True)
text = pipeline("text-generation", model=folder, trust_remote_code=True)("def ", max_new_tokens=5)
print(json.dumps({"module": type(model).__module__, "logits": logits.tolist(), "text": text[0]["generated_text"]}))
"""


@pytest.mark.fault("F22 the folder loads elsewhere, tied")
def test_the_folder_loads_without_this_project(finished, tmp_path):
    """A process that cannot see the repository runs the code of the folder and computes the same logits."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", HIDE_PROJECT + LOAD_ELSEWHERE, str(finished)],
        cwd=tmp_path,
        env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.")
    assert found["text"].startswith("def ")
    inputs = AutoTokenizer.from_pretrained(finished)("def main", return_tensors="pt")
    expected = load_model(str(finished))(**inputs).logits
    assert torch.equal(torch.tensor(found["logits"]), expected)


# An editable installation puts the repository on sys.path; here it must be absent.
HIDE_PROJECT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"modeling_gpt2modern", "gpt2modern", "eval", "train_accelerate", "prepare_data"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_z_loss_is_minimised_but_not_reported(data_dir, tmp_path):
    """The first loss is the same, what follows is not; with a large weight the sum of exp(logits) goes towards 1."""
    settings = {"learning_rate": 0.05, "save_steps": 0}
    runs = {z_loss: train(data_dir, tmp_path / str(z_loss), z_loss=z_loss, **settings) for z_loss in (0.0, 10.0)}
    assert losses(runs[10.0])[0] == pytest.approx(losses(runs[0.0])[0], abs=1e-4)  # 10 x 5.7^2 is taken off
    assert losses(runs[10.0])[1] != losses(runs[0.0])[1]
    batch = PackedBlocks(data_dir, "train").__getitems__([0, 1])
    with torch.no_grad():
        free, held = (load_model(str(run))(batch).logits.logsumexp(-1).abs().mean() for run in runs.values())
    assert held < free - 1


def config_for(data_dir, output_dir, **changes):
    return TrainConfig(**(FLAGS | {"data_dir": data_dir, "output_dir": output_dir, "max_steps": 2} | changes))


def in_a_thread(config):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(train_accelerate.train, config).result()


def test_train_in_a_thread_returns_the_summary(data_dir, tmp_path):
    summary = in_a_thread(config_for(data_dir, tmp_path / "run"))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text()) | {"stopped": None}
    assert summary["steps"] == 2


def test_train_in_a_thread_raises_an_error_of_ours(data_dir, tmp_path):
    """A folder without data, and one with somebody else's files; the next run is not disturbed."""
    with pytest.raises(GPT2ModernError, match="nothing"):
        in_a_thread(config_for(tmp_path / "nothing", tmp_path / "run"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("precious")
    with pytest.raises(GPT2ModernError, match=r"contains a README\.md that was not written by a training run"):
        in_a_thread(config_for(data_dir, tmp_path / "thesis"))
    assert in_a_thread(config_for(data_dir, tmp_path / "run", save_steps=0))["steps"] == 2


def test_a_second_run_in_the_same_process_is_refused(data_dir, tmp_path):
    """Two runs would share random numbers: the second is refused while the first is at its first update."""
    refused = []

    def start_another(event, **details):
        if event == "before_update" and not refused:
            with pytest.raises(GPT2ModernError, match="another run is training in this Python process") as caught:
                in_a_thread(config_for(data_dir, tmp_path / "second"))
            refused.append(caught)

    train_accelerate.train(config_for(data_dir, tmp_path / "first"), start_another)
    assert len(refused) == 1 and not (tmp_path / "second").exists()


def test_an_accelerator_of_the_caller_stays_as_it_is(data_dir, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    train_accelerate.train(config_for(data_dir, tmp_path / "run", save_steps=0))
    assert accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_precisions_in_one_process(data_dir, tmp_path):
    for precision in ("no", "bf16", "no"):
        summary = train_accelerate.train(
            config_for(data_dir, tmp_path / precision, mixed_precision=precision, save_steps=0)
        )
        assert (summary["mixed_precision"], summary["stopped"]) == (precision, None)


def test_a_refused_launch_leaves_nothing_behind(data_dir, tmp_path, monkeypatch):
    """The Accelerator of the refused one, in another precision, would stay the process's own."""
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        with pytest.raises(GPT2ModernError, match="needs processes started by"):
            train_accelerate.train(config_for(data_dir, tmp_path, mixed_precision="no"))
    summary = train_accelerate.train(config_for(data_dir, tmp_path, mixed_precision="bf16", save_steps=0))
    assert summary["mixed_precision"] == "bf16"


def test_a_stopped_run_says_why(data_dir, tmp_path, capsys):
    """From Python the summary has it; the command exits with a code of its own."""
    summary = train_accelerate.train(config_for(data_dir, tmp_path, max_train_time="0.001"))
    assert (summary["steps"], summary["stopped"]) == (1, "--max_train_time is over")
    with pytest.raises(SystemExit) as caught:
        train(data_dir, tmp_path, max_steps=8, force_resume=True, max_train_time="0.001")
    assert caught.value.code == STOPPED_EXIT_CODE and "stopped after step 2" in capsys.readouterr().out


def test_the_callback_is_told_every_event(data_dir, tmp_path):
    told, rows = [], []

    def callback(event, step, **details):
        told.append((event, step))
        rows.extend([details["row"]] if event == "logged" else [])

    train_accelerate.train(config_for(data_dir, tmp_path, eval_steps=0, save_steps=1), callback)
    first = [(event, 1) for event in ("before_update", "logged", "saving")]
    last = [(event, 2) for event in ("before_update", "evaluating", "logged", "saving")]
    assert told == first + last
    assert [row["loss"] for row in rows] == losses(tmp_path)


def own_calls(data_dir, output_dir):
    """Train for one step and list the calls of this project's functions within it and the reading of its batch.

    Each is (file, function, the chain of own functions that lead to it, without those of the model).
    """
    calls, product = [], {}

    def is_own(code):
        if code not in product:
            path = Path(code.co_filename)
            place = path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else "elsewhere"
            product[code] = None if place.startswith(("elsewhere", "tests/", ".venv/")) else place
        return product[code]

    def trace(frame, event, argument):
        if event == "call" and (file := is_own(frame.f_code)):
            name, chain = frame.f_code.co_qualname, []
            while frame:
                if (place := is_own(frame.f_code)) and not place.startswith("modeling_gpt2modern/"):
                    chain.insert(0, frame.f_code.co_name)
                frame = frame.f_back
            if "train_step" in chain or "step_batches" in chain:
                calls.append((file, name, chain))

    arguments = flags_for(data_dir, output_dir, max_steps=1, warmup_steps=0, save_steps=0, eval_steps=0)
    sys.setprofile(trace)
    try:
        train_accelerate.main(arguments)
    finally:
        sys.setprofile(None)
    return calls


def test_a_step_is_read_in_seven_files(data_dir, tmp_path):
    """Four functions of ours lead from the command to the model, whose own files do not count."""
    calls = own_calls(data_dir, tmp_path)
    chains = [chain for _, name, chain in calls if name == "GPT2ModernForCausalLM.forward"]
    assert chains == 2 * [["main", "train", "train_step", "batch_loss"]]  # one for each micro-batch
    files = {file for file, _, _ in calls if not file.startswith("modeling_gpt2modern/")}
    assert "gpt2modern/data/blocks.py" in files and len(files) <= 7, sorted(files)
