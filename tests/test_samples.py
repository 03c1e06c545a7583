"""Samples are written at each evaluation, the same for the same seed, and training does not notice."""

import json

import pytest
import torch

from gpt2modern.cli import parse_arguments
from tests.support.trainer import TINY, assert_same_weights, flags_for, metrics, train
from train_accelerate import TrainConfig
from train_accelerate import train as train_with

PROMPTS = ["--sample_prompts", "def ", "", "--sample_max_new_tokens", "6"]


def samples(output_dir):
    return [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(data_dir, tmp_path_factory):
    """Train with dropout, evaluated at steps 2, 4 and 6."""
    return train(data_dir, tmp_path_factory.mktemp("run"), extra=PROMPTS, **settings())


def settings(**changes):
    return {"config_overrides": TINY + ",hidden_dropout=0.1", "max_steps": 6, "eval_steps": 2} | changes


def test_each_evaluation_continues_every_prompt(sampled):
    rows = samples(sampled)
    assert [(row["step"], row["prompt"]) for row in rows] == [(n, text) for n in (2, 4, 6) for text in ("def ", "")]
    assert len({row["text"] for row in rows}) == len(rows)  # other steps and prompts draw other numbers


@pytest.mark.fault("F21 samples and evaluations change nothing")
def test_training_does_not_notice(sampled, data_dir, tmp_path):
    silent = train(data_dir, tmp_path, **settings())
    assert_same_weights(sampled, silent)
    assert [row["loss"] for row in metrics(sampled)] == [row["loss"] for row in metrics(silent)]
    assert not (silent / "samples.jsonl").exists()


@pytest.mark.fault("F21 samples and evaluations change nothing")
def test_the_generators_of_training_stay_as_they_were(data_dir, tmp_path):
    """Between the start of an evaluation with samples and the row that it ends with."""
    states = {}

    def watch(event, **details):
        if event in ("evaluating", "logged"):
            states.setdefault(details["step"], []).append(torch.get_rng_state())

    flags = flags_for(data_dir, tmp_path, **settings(max_steps=2))
    train_with(parse_arguments(TrainConfig, [*flags, *PROMPTS]), watch)
    before, after = states[2]
    assert torch.equal(before, after)


def test_a_resumed_run_writes_the_same_samples_once(sampled, data_dir, tmp_path):
    train(data_dir, tmp_path, extra=PROMPTS, **settings(max_steps=3, save_steps=3, lr_scheduler_type="constant"))
    train(data_dir, tmp_path, extra=PROMPTS, **settings(save_steps=3, lr_scheduler_type="constant"))
    assert [row["step"] for row in samples(tmp_path)] == [2, 2, 3, 3, 4, 4, 6, 6]
    train(data_dir, tmp_path, extra=PROMPTS, **settings(save_steps=3, lr_scheduler_type="constant"))  # nothing left
    assert [row["step"] for row in samples(tmp_path)] == [2, 2, 3, 3, 4, 4, 6, 6]


def test_a_failure_is_a_warning(data_dir, tmp_path, capsys):
    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    def callback(event, model=None, **details):
        if event == "before_update":
            model.generate = out_of_memory

    flags = flags_for(data_dir, tmp_path, **settings(max_steps=2))
    train_with(parse_arguments(TrainConfig, [*flags, *PROMPTS]), callback)
    assert "warning: the samples could not be generated (RuntimeError: out of memory)" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").exists()


def test_a_prompt_too_long_for_learned_positions_is_an_error_at_the_start(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(data_dir, tmp_path / "run", extra=[*PROMPTS[:3], "--sample_max_new_tokens", "32"], model_preset="gpt2")
    assert "--sample_prompts 'def '" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
