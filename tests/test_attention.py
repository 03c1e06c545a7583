"""The attention implementation "blockwise" computes what "eager" computes, for every kind of mask, and compiled."""

import pytest
import torch

from modeling_gpt2modern import attention_gpt2modern
from tests.support.models import FLAG_SETS, random_ids, tiny_model

LENGTH = 24
MASKS = {
    "causal": {},
    "packed": {"position_ids": torch.tensor([[*range(9), *range(15)], [*range(20), *range(4)]])},
    "left_padding": {"attention_mask": torch.tensor([[0] * 5 + [1] * 19, [1] * 24])},
    "right_padding": {"attention_mask": torch.tensor([[1] * 19 + [0] * 5, [1] * 24])},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_gpt2modern, "BLOCKWISE_QUERIES", 7)  # the last block of 24 queries has 3


def loss_and_gradients(model, **inputs) -> torch.Tensor:
    """Return the logits of real tokens and all gradients of the loss as one vector."""
    input_ids = random_ids(2, LENGTH)
    is_token = inputs.get("attention_mask", torch.ones_like(input_ids)) == 1
    # Not the first token after padding: padding predicts it, and what padding attends to is nobody's business.
    labels = input_ids.masked_fill(~is_token | ~is_token.roll(1, dims=1), -100)
    output = model(input_ids, labels=labels, use_cache=False, **inputs)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    logits = output.logits[is_token][..., : model.config.unpadded_vocab_size]
    return torch.cat([part.detach().flatten() for part in (logits, *gradients)])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_blockwise_equals_eager(flag_set, mask):
    model = tiny_model(flag_set)
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, **MASKS[mask])
    model.set_attn_implementation("blockwise")
    torch.testing.assert_close(loss_and_gradients(model, **MASKS[mask]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag_set", ["gpt2", "sliding_mixed"])
def test_blockwise_compiles_into_one_graph(flag_set):
    model = tiny_model(flag_set)
    model.set_attn_implementation("blockwise")
    input_ids = random_ids(2, LENGTH)
    compiled = torch.compile(model, fullgraph=True)(input_ids, use_cache=False).logits
    torch.testing.assert_close(compiled, model(input_ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_blockwise_drops_attention_weights_in_training_only():
    model = tiny_model("gpt2", attention_dropout=0.5)
    model.set_attn_implementation("blockwise")
    input_ids = random_ids(2, LENGTH)
    logits = [model.train(mode)(input_ids).logits for mode in (False, False, True, True)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[2], logits[3])


def test_blockwise_leaves_long_rows_and_cached_keys_to_sdpa(monkeypatch):
    model = tiny_model("modern")
    model.set_attn_implementation("blockwise")
    calls = []
    sdpa = attention_gpt2modern.sdpa_attention_forward
    monkeypatch.setattr(
        attention_gpt2modern,
        "sdpa_attention_forward",
        lambda module, query, *rest, **kwargs: calls.append(query.shape[2]) or sdpa(module, query, *rest, **kwargs),
    )
    input_ids = random_ids(1, LENGTH)
    expected = model(input_ids, use_cache=False).logits
    assert not calls
    cache = model(input_ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert calls == [1, 1]
    monkeypatch.setattr(attention_gpt2modern, "BLOCKWISE_LONGEST_ROW", LENGTH - 1)
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls[2:] == [LENGTH, LENGTH]


def test_blockwise_refuses_a_mask_that_is_not_causal_and_takes_one_with_numbers():
    model = tiny_model("modern")
    input_ids = random_ids(2, LENGTH)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, LENGTH, LENGTH)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(input_ids, attention_mask=seen).logits
    model.set_attn_implementation("blockwise")
    for mask in (seen, added):
        torch.testing.assert_close(model(input_ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="blockwise attention is causal"):
        model(input_ids, attention_mask=torch.ones_like(seen))


def test_blockwise_exports_with_a_length_that_is_not_fixed():
    model = tiny_model("modern")
    model.set_attn_implementation("blockwise")
    length = torch.export.Dim("length", min=2, max=60)
    exported = torch.export.export(
        model,
        (random_ids(2, LENGTH),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    other = random_ids(2, 50)
    expected = model(other, use_cache=False).logits
    torch.testing.assert_close(exported.module()(other, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
