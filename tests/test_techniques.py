"""What a run may do beside minimising the next-token loss at one batch size: it resumes bit-identical, two processes do
it as one does, and nothing of it is in the saved model."""

import functools

import pytest
import torch

from gpt2modern.evaluation.loss import batch_loss, later_targets
from tests.support.models import random_ids, tiny_model
from tests.support.trainer import TINY, assert_same_weights, losses, metrics, train

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
