"""What a run may do beside minimising the next-token loss at one batch size: it resumes bit-identical, two processes do
it as one does, and nothing of it is in the saved model."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gpt2modern.cli import parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import batch_loss, evaluate_loss, later_targets
from gpt2modern.files import sha256_of
from gpt2modern.loading import load_model
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.depth import flags_of_depth
from gpt2modern.training.models import build_model, size_of_depth
from gpt2modern.training.schedules import Schedule, scaled_windows
from gpt2modern.training.speed import Stopwatch
from tests.support.folders import change_json
from tests.support.models import random_ids, tiny_model
from tests.support.trainer import (
    REPOSITORY,
    TINY,
    TORCHRUN,
    assert_same_weights,
    command,
    config_of,
    environment,
    losses,
    metrics,
    train,
)
from train_accelerate import TrainConfig, main
from train_accelerate import train as train_config

MULTI_TOKEN = ["--multi_token_prediction", "0.5", "0.25"]


# Multi-token prediction

SEPARATOR = 9


def test_later_targets_stay_in_the_block_and_in_its_padding():
    batch = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 9, 4, -100, -100]])
    found = later_targets(batch, torch.ones(2), None)["later_labels"]  # (2, 5, 2)
    assert found[0].tolist() == [[3, 4], [4, 5], [5, 6], [6, -100], [-100, -100]]
    assert found[1].tolist() == [[9, 4], [4, -100], [-100, -100], [-100, -100], [-100, -100]]


def test_later_targets_stay_in_their_document():
    """1 2 3 | 4 5 | 6 7 with separators as ends; the separator belongs to the document that it ends."""
    batch = torch.tensor([[1, 2, 3, SEPARATOR, 4, 5, SEPARATOR, 6, 7]])
    found = later_targets(batch, torch.ones(2), SEPARATOR)["later_labels"][0]
    no = -100
    assert found.tolist() == [[3, 9], [9, no], [no, no], [no, no], [9, no], [no, no], [no, no], [no, no]]


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_the_minimised_loss_is_the_weighted_sum_and_the_reported_one_is_not(separator):
    """By hand, from the logits of one sequence at a time."""
    model, batch, weights = tiny_model("speedrun").train(), random_ids(2, 12), [0.5, 0.25]
    batch[0, [3, 7]] = SEPARATOR
    batch[1, 9:] = -100
    minimised, reported = batch_loss(
        model, batch, num_items=17, separator=separator, z_loss=0.1, later_weights=torch.tensor(weights)
    )
    next_token, with_z_loss = batch_loss(model, batch, num_items=17, separator=separator, z_loss=0.1)[::-1]
    torch.testing.assert_close(reported, next_token)
    expected = 0.0
    for row in batch:
        tokens = row[row >= 0]
        documents = (tokens == SEPARATOR).cumsum(0) - (tokens == SEPARATOR).int()  # index of each token's document
        positions = torch.cat([torch.arange(n) for n in documents[:-1].bincount().tolist()])
        positions = None if separator is None else positions[None]
        log_probs = model(tokens[None, :-1], position_ids=positions).logits[0].log_softmax(-1)
        for ahead, weight in enumerate(weights, start=2):
            for place in range(len(tokens) - ahead):
                if separator is None or documents[place] == documents[place + ahead]:
                    expected -= weight * log_probs[place, tokens[place + ahead]].item() / 17
    assert (minimised - with_z_loss).item() == pytest.approx(expected, rel=1e-5)


def test_multi_token_prediction_resumes_bit_identical_and_is_not_saved(data_dir, tmp_path):
    """Killed in the first third and in the second; the last third trains on the next token alone."""
    whole = train(data_dir, tmp_path / "whole", MULTI_TOKEN, max_steps=9, document_masking=True)
    for step in (3, 6):
        run = train(
            data_dir, tmp_path / str(step), MULTI_TOKEN, max_steps=9, document_masking=True,
            resume_from_checkpoint=whole / "checkpoints" / f"step_000000{step}",
        )  # fmt: skip
        assert losses(run) == losses(whole)[step:]
        assert_same_weights(run, whole)
    plain = train(data_dir, tmp_path / "plain", max_steps=9, document_masking=True)
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], abs=1e-6)  # the reported loss is that of the next token
    assert metrics(whole)[0]["grad_norm"] > 1.2 * metrics(plain)[0]["grad_norm"]
    assert (whole / "config.json").read_bytes() == (plain / "config.json").read_bytes()


def test_multi_token_prediction_accumulates_the_losses_of_one_big_batch(data_dir, tmp_path):
    big, small = (
        train(data_dir, tmp_path / str(size), MULTI_TOKEN, per_device_train_batch_size=size, save_steps=0)
        for size in (8, 2)
    )
    assert losses(small) == pytest.approx(losses(big), abs=1e-5)


def test_weights_that_fall_do_not_compile_a_step_again(data_dir, tmp_path, monkeypatch):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(data_dir, tmp_path, MULTI_TOKEN, torch_compile=True, config_overrides=TINY)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# The mean of the last weights


@pytest.fixture(scope="module")
def averaged(data_dir, tmp_path_factory):
    """Eight steps, of which the last four are averaged, with a checkpoint after each."""
    return train(data_dir, tmp_path_factory.mktemp("averaged"), average_last=0.5, save_steps=1, eval_steps=3)


def checkpoint_of(run, step):
    return run / "checkpoints" / f"step_000000{step}"


def test_the_final_model_is_the_mean_of_the_last_weights(averaged):
    found = load_file(averaged / "model.safetensors")
    last = [load_file(checkpoint_of(averaged, step) / "model.safetensors") for step in (5, 6, 7, 8)]
    for name, weight in found.items():
        torch.testing.assert_close(weight, torch.stack([each[name] for each in last]).mean(0), atol=1e-6, rtol=1e-5)
    assert max((weight - last[-1][name]).abs().max() for name, weight in found.items()) > 1e-3


def test_both_losses_are_those_of_the_two_models(averaged, data_dir):
    """At step 3 nothing is averaged yet; at step 6 the mean has two weights in it, at step 8 four."""
    blocks = PackedBlocks(data_dir, "validation")
    evaluated = {row["step"]: row for row in metrics(averaged) if "eval_loss" in row}
    loss_of = {
        folder: evaluate_loss(load_model(str(folder)), blocks, batch_size=8, max_blocks=8)
        for folder in (averaged, checkpoint_of(averaged, 3), checkpoint_of(averaged, 6), checkpoint_of(averaged, 8))
    }
    assert "unaveraged_eval_loss" not in evaluated[3]
    assert evaluated[3]["eval_loss"] == pytest.approx(loss_of[checkpoint_of(averaged, 3)], abs=1e-6)
    assert evaluated[6]["unaveraged_eval_loss"] == pytest.approx(loss_of[checkpoint_of(averaged, 6)], abs=1e-6)
    assert evaluated[8]["unaveraged_eval_loss"] == pytest.approx(loss_of[checkpoint_of(averaged, 8)], abs=1e-6)
    assert evaluated[8]["eval_loss"] == pytest.approx(loss_of[averaged], abs=1e-6)
    assert evaluated[8]["eval_loss"] != evaluated[8]["unaveraged_eval_loss"]
    assert json.loads((averaged / "summary.json").read_text())["eval_loss"] == evaluated[8]["eval_loss"]


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_an_averaged_run_resumes_bit_identical(averaged, data_dir, tmp_path, step):
    """From before the average, at its begin, in it, and finished."""
    run = train(
        data_dir, tmp_path, average_last=0.5, save_steps=4, eval_steps=3,
        resume_from_checkpoint=checkpoint_of(averaged, step),
    )  # fmt: skip
    assert losses(run) == losses(averaged)[step:]
    assert_same_weights(run, averaged)
    states = [load_file(checkpoint_of(each, 8) / "optimizer.safetensors") for each in (run, averaged) if step < 8]
    assert all(torch.equal(states[0][name], states[1][name]) for state in states for name in state)


def test_a_run_that_is_stopped_while_it_evaluates_resumes_with_both_losses(averaged, data_dir, tmp_path):
    """The signal arrives before the pass over the weights; the resumed run begins with the evaluation of step 6."""

    def stop(event, step, **details):
        if event == "evaluating" and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    flags = {"average_last": 0.5, "save_steps": 1, "eval_steps": 3}
    with pytest.raises(SystemExit):
        train(data_dir, tmp_path, callback=stop, **flags)
    run = train(data_dir, tmp_path, **flags)
    assert_same_weights(run, averaged)
    for name in ("eval_loss", "unaveraged_eval_loss"):
        assert [row.get(name) for row in metrics(run)] == [row.get(name) for row in metrics(averaged)]


def test_an_average_that_is_turned_on_later_is_one_line(averaged, data_dir, tmp_path, capsys):
    plain = train(data_dir, tmp_path / "plain", max_steps=3)
    resume = {"resume_from_checkpoint": checkpoint_of(plain, 3), "average_last": 0.5, "force_resume": True}
    with pytest.raises(SystemExit, match="2"):
        train(data_dir, tmp_path / "resumed", **resume)
    assert "average_last was None of 3 steps, is 0.5" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_average_that_has_begun_cannot_be_moved(averaged, data_dir, tmp_path, capsys):
    """After 3 of 8 updates the mean of the last half is not begun; that of the last 0.9 would hold 2 of them."""
    resume = {"resume_from_checkpoint": checkpoint_of(averaged, 3), "average_last": 0.9, "force_resume": True}
    with pytest.raises(SystemExit, match="2"):
        train(data_dir, tmp_path / "resumed", **resume)
    assert "the mean of other weights: average_last was 0.5 of 8 steps, is 0.9" in capsys.readouterr().err
    assert not (tmp_path / "resumed" / "summary.json").exists()


def test_training_does_not_see_the_average(averaged, data_dir, tmp_path):
    plain = train(data_dir, tmp_path, save_steps=8, eval_steps=0)
    assert losses(plain) == losses(averaged)
    assert_same_weights(plain, checkpoint_of(averaged, 8))
    states = [set(load_file(checkpoint_of(run, 8) / "optimizer.safetensors")) for run in (averaged, plain)]
    assert states[0] - states[1] == {name for name in states[0] if name.endswith("/mean")}
    assert len(states[0] - states[1]) == len(load_file(plain / "model.safetensors"))


def test_a_run_that_skipped_its_first_updates_is_averaged_and_resumes(data_dir, tmp_path):
    """A checkpoint in which no optimizer has a state yet has no mean either."""

    def break_first(event, step, **details):
        if event == "before_update" and step < 3:
            details["loss"].fill_(float("nan"))

    flags = {"average_last": 1.0, "on_nonfinite": "skip", "save_steps": 1, "save_total_limit": 0, "max_steps": 5}
    whole = config_of(data_dir, tmp_path / "whole", **flags)
    train_config(whole, break_first)
    checkpoint = checkpoint_of(tmp_path / "whole", 1)
    assert not load_file(checkpoint / "optimizer.safetensors")
    resumed = config_of(data_dir, tmp_path / "resumed", **flags, resume_from_checkpoint=str(checkpoint))
    train_config(resumed, break_first)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_another_length_that_changes_the_average_is_refused(averaged, data_dir, tmp_path):
    flags = {"average_last": 0.5, "lr_scheduler_type": "constant", "save_steps": 1, "save_total_limit": 0}
    run = config_of(data_dir, tmp_path / "run", **flags, max_steps=4)
    train_config(run)
    more = {"max_steps": 6, "resume_from_checkpoint": str(checkpoint_of(tmp_path / "run", 3))}
    with pytest.raises(GPT2ModernError, match="max_steps was 4, is 6"):
        train_config(config_of(data_dir, tmp_path / "late", **(flags | more)))
    more["resume_from_checkpoint"] = str(checkpoint_of(tmp_path / "run", 2))  # before the average
    train_config(config_of(data_dir, tmp_path / "early", **(flags | more)))


# One number for the size


def derived(capsys, *flags):
    """Return what a dry run prints: the settings, and the comment that says the size."""
    main([*flags, "--dry_run", "true"])
    text = capsys.readouterr().out
    return yaml.safe_load(text), re.search(r"^# size +(.*)$", text, re.MULTILINE)[1]


def test_depth_12_is_the_default_run(capsys):
    """12 x (12 x 12 x 768^2 + 50257 x 768) tokens in steps of 2^19."""
    settings, size = derived(capsys, "--depth", "12")
    assert size == "12 layers of width 768, 6 heads"
    tokens = 12 * (12 * 12 * 768**2 + 50257 * 768)
    assert (settings["total_batch_size"], settings["max_steps"]) == (2**19, round(tokens / 2**19))
    assert (settings["learning_rate"], settings["muon_learning_rate"], settings["weight_decay"]) == (6e-4, 0.02, 0.1)


def test_depth_20_by_hand(capsys):
    """P = 12 (12 x 20 x 1280^2 + 50257 x 1280) is 3.7039 times that of depth 12; to the power of 0.383 that is 1.65,
    nearer to 2 than to 1."""
    settings, size = derived(capsys, "--depth", "20")
    assert size == "20 layers of width 1280, 10 heads"
    assert (settings["total_batch_size"], settings["max_steps"]) == (2**20, round(5490539520 / 2**20))
    assert settings["learning_rate"] == pytest.approx(6e-4 * (2 * 768 / 1280) ** 0.5, rel=2e-3)
    assert settings["muon_learning_rate"] == pytest.approx(0.02 * 2**0.5, rel=2e-3)
    assert settings["weight_decay"] == pytest.approx(0.1 * 2**0.5 / 3.7039, rel=2e-3)


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 64, 1), (7, 448, 7), (8, 512, 4), (9, 640, 5)]
)  # fmt: skip
def test_heads_are_whole_and_wide_where_the_model_is(depth, width, heads):
    assert size_of_depth(depth) == {
        "num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads
    }  # fmt: skip


def test_flags_and_recipes_replace_what_depth_derives(capsys, data_dir, tmp_path):
    """What follows from a value that is given follows from it: here a batch of 2^17, a quarter, halves the rates."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weight_decay: 0.1\nmax_steps: 10\n")
    flags = ["--config", str(recipe), "--depth", "12", "--total_batch_size", str(2**17)]
    settings, size = derived(capsys, *flags, "--learning_rate", "6e-4", "--config_overrides", "hidden_size=384")
    assert (settings["max_steps"], settings["weight_decay"], settings["learning_rate"]) == (10, 0.1, 6e-4)
    assert settings["muon_learning_rate"] == 0.01 and size == "12 layers of width 384, 6 heads"


def test_the_vocabulary_and_the_length_of_the_data_count(capsys, data_dir):
    settings, _ = derived(capsys, "--depth", "2", "--data_dir", str(data_dir))
    tokens, base = (12 * (12 * depth * (64 * depth) ** 2 + 300 * 64 * depth) for depth in (2, 12))
    batch = 2 ** round(math.log2(2**19 * (tokens / base) ** 0.383))
    assert (settings["total_batch_size"], settings["max_steps"]) == (batch, round(tokens / batch))
    config = parse_arguments(TrainConfig, ["--depth", "2", "--dry_run"], derive=flags_of_depth)
    assert parse_arguments(TrainConfig, ["--dry_run"], derive=flags_of_depth).depth is None
    model = build_model(config, PackedBlocks(data_dir, "train"))
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.head_dim) == (2, 128, 64)


# A batch that grows

RAMP = ["--batch_size_ramp", "1", "2", "4"]


def test_a_ramp_resumes_bit_identical_in_each_of_its_parts(data_dir, tmp_path):
    """Thirds of nine steps with 64, 128 and 256 tokens, across the end of an epoch; saved at steps 2, 4, 6 and 8."""
    flags = {"max_steps": 9, "save_steps": 2, "per_device_train_batch_size": 1}
    whole = train(data_dir, tmp_path / "whole", RAMP, **flags)
    rows = metrics(whole)
    assert [row["tokens_seen"] for row in rows] == [64, 128, 192, 320, 448, 576, 832, 1088, 1344]
    assert rows[3]["learning_rate"] / rows[2]["learning_rate"] == pytest.approx(
        2**0.5 * rate(3, 9) / rate(2, 9), rel=1e-6
    )
    for step in (2, 4, 6, 8):
        run = train(data_dir, tmp_path / str(step), RAMP, **flags, resume_from_checkpoint=checkpoint_of(whole, step))
        assert losses(run) == losses(whole)[step:]
        assert_same_weights(run, whole)
    other = {"per_device_train_batch_size": 2, "resume_from_checkpoint": checkpoint_of(whole, 4)}
    assert losses(train(data_dir, tmp_path / "other", RAMP, **(flags | other))) == pytest.approx(
        losses(whole)[4:], abs=1e-5
    )


# Windows that grow

WINDOWS = ["--sliding_window_ramp", "1", "2"]
SLIDING = {"max_steps": 6, "save_steps": 1, "config_overrides": f"{TINY},sliding_window=8"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_grow_in_the_parts_of_a_run(data_dir, tmp_path, attention):
    """Halves of six steps with windows of 4 and 8 tokens: the first half is that of a model with a window of 4, but for
    its evaluation."""
    flags = SLIDING | {"attn_implementation": attention, "eval_steps": 2}
    narrow = train(data_dir, tmp_path / "narrow", **(flags | {"config_overrides": f"{TINY},sliding_window=4"}))
    wide = train(data_dir, tmp_path / "wide", **flags)
    grown = train(data_dir, tmp_path / "grown", WINDOWS, **flags)
    assert losses(grown)[:3] == losses(narrow)[:3] != losses(wide)[:3]
    assert losses(grown)[3] != losses(narrow)[3]
    model = load_model(str(checkpoint_of(grown, 2)), flag="--model")
    assert model.config.sliding_window == 8
    expected = evaluate_loss(model, PackedBlocks(data_dir, "validation"), batch_size=8, max_blocks=8)
    assert metrics(grown)[1]["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert abs(metrics(narrow)[1]["eval_loss"] - expected) > 1e-3


def test_a_window_ramp_resumes_bit_identical(data_dir, tmp_path):
    whole = train(data_dir, tmp_path / "whole", WINDOWS, **SLIDING)
    for step in (2, 3, 5):
        run = train(
            data_dir, tmp_path / str(step), WINDOWS, **SLIDING, resume_from_checkpoint=checkpoint_of(whole, step)
        )
        assert losses(run) == losses(whole)[step:]
        assert_same_weights(run, whole)


def test_windows_are_scaled_in_a_block_only():
    model = tiny_model("modern", sliding_window=8)
    attention, ids = model.model.layers[0].self_attn, random_ids(1, 12)
    wide = model(ids).logits
    with scaled_windows(model, 0.5):
        assert attention.sliding_window == model.config.sliding_window == 4
        narrow = model(ids).logits
    assert attention.sliding_window == model.config.sliding_window == 8
    assert torch.equal(model(ids).logits, wide)
    assert torch.equal(narrow[:, :4], wide[:, :4]) and not torch.allclose(narrow[:, 8:], wide[:, 8:])


def rate(step, max_steps):
    """Return the cosine that the tiny runs have, after two steps of warm-up."""
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (step - 2) / (max_steps - 2)))


def test_the_remaining_time_counts_tokens(monkeypatch):
    """Three steps of 64 tokens took 3 s; three of 128 and three of 256 are left."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    ramp = Schedule("constant", 9, batch_size_ramp=[1, 2, 4])
    stopwatch = Stopwatch(
        torch.device("cpu"), tiny_model(), BatchPlan(8, 1, 1, 32, 6, ramp=ramp), step=0, wall_time_s=0.0
    )
    now[0] = 3.0
    assert stopwatch.lap(3)["tokens_per_second"] == 64
    assert stopwatch.remaining_s(6) == pytest.approx(18)


def test_a_dry_run_counts_the_tokens_of_each_part(capsys):
    main(["--dry_run", "true", *RAMP, "--total_batch_size", "32768", "--max_steps", "9"])
    assert "# tokens               172,032 (no --data_dir)" in capsys.readouterr().out  # 3 x (8192 + 16384 + 32768)


def test_a_checkpoint_from_before_these_settings_is_resumed(data_dir, tmp_path):
    """It names none of them."""
    plain = train(data_dir, tmp_path / "plain")
    checkpoint = checkpoint_of(plain, 3)
    new = {"multi_token_prediction", "average_last", "batch_size_ramp", "sliding_window_ramp"}

    def forget(state):
        for values in (state["settings"], state["schedule"]):
            for name in new | {"max_document_length"}:
                values.pop(name, None)

    change_json(checkpoint / "trainer_state.json", forget)
    sums = {"trainer_state.json": sha256_of(checkpoint / "trainer_state.json")}
    change_json(checkpoint / "checksums.json", lambda checksums: checksums.update(sums))
    run = train(data_dir, tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert_same_weights(run, plain)


# Two processes

ALL = {
    "config_overrides": f"{TINY},sliding_window=8",
    "average_last": 0.5,
    "max_steps": 6,
    "per_device_train_batch_size": 1,
    "eval_steps": 4,
    "ddp_timeout": 120,
}


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    return train(data_dir, tmp_path_factory.mktemp("alone"), [*MULTI_TOKEN, *RAMP, *WINDOWS], **ALL)


@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["DDP", "FSDP2"])
def test_two_processes_do_it_as_one_does(alone, data_dir, tmp_path, variables):
    arguments = [*command(data_dir, tmp_path, *TORCHRUN, "2", **ALL), *MULTI_TOKEN, *RAMP, *WINDOWS]
    result = subprocess.run(
        arguments, env=environment(**variables), capture_output=True, text=True, timeout=200, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)
    for name in ("eval_loss", "unaveraged_eval_loss"):
        values = [[row[name] for row in metrics(run) if name in row] for run in (tmp_path, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    for path in ("model.safetensors", "checkpoints/step_0000006/optimizer.safetensors"):
        found, expected = load_file(tmp_path / path), load_file(alone / path)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)
