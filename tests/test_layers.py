"""Norms, MLPs, RoPE, residual mixes and the loss equal their formulas in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_gpt2modern import MLPS
from modeling_gpt2modern.layers_gpt2modern import (
    NORMS,
    EmbeddingResidual,
    GPT2ModernRMSNorm,
    GPT2ModernRotaryEmbedding,
    PackedDocuments,
    ValueResidual,
    WeightedSum,
    apply_rotary,
    build_mlp,
    positions_from_lengths,
)
from modeling_gpt2modern.loss_gpt2modern import soft_cap
from tests.support.models import linear_cross_entropy, tiny_config


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def centered(x):
    return x - x.mean(-1, keepdim=True)


NORM_FORMULAS = {
    "layernorm": lambda x, eps: centered(x) / (centered(x).pow(2).mean(-1, keepdim=True) + eps).sqrt(),
    "rmsnorm": lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(),
}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm_type", NORMS)
def test_norm_is_its_formula(norm_type, affine, dtype, atol):
    norm = NORMS[norm_type](33, eps=1e-2, elementwise_affine=affine).to(dtype)
    hidden_states = normal(3, 5, 33, dtype=dtype)
    gain, bias = torch.ones(33), torch.zeros(33)
    if affine:
        with torch.no_grad():
            gain = norm.weight.copy_(normal(33, seed=1))
            bias = norm.bias.copy_(normal(33, seed=2)) if norm_type == "layernorm" else bias
    expected = NORM_FORMULAS[norm_type](hidden_states.double(), 1e-2) * gain.double() + bias.double()
    actual = norm(hidden_states)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("norm_type", NORMS)
def test_norm_without_gain_has_no_parameters(norm_type):
    assert not list(NORMS[norm_type](8, eps=1e-5, elementwise_affine=False).parameters())


def test_rms_norm_squares_in_fp32():
    """300^2 overflows fp16, whose largest number is 65504."""
    norm = GPT2ModernRMSNorm(4, eps=1e-5, elementwise_affine=False)
    assert torch.equal(norm(torch.full((1, 4), 300.0, dtype=torch.float16)), torch.ones(1, 4, dtype=torch.float16))


MLP_FORMULAS = {
    "gelu": lambda up, gate: up * 0.5 * (1 + torch.erf(up / math.sqrt(2))),
    "gelu_new": lambda up, gate: 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
    "relu2": lambda up, gate: up.clamp(min=0) ** 2,
    "swiglu": lambda up, gate: up * gate * torch.sigmoid(gate),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mlp_type", MLPS)
def test_mlp_is_its_formula(mlp_type, bias):
    torch.manual_seed(0)
    mlp = build_mlp(tiny_config(mlp_type=mlp_type, mlp_bias=bias)).double()
    hidden_states = normal(2, 5, 32, dtype=torch.float64)
    gate = mlp.gate_proj(hidden_states) if MLPS[mlp_type].gated else None
    expected = MLP_FORMULAS[mlp_type](mlp.up_proj(hidden_states), gate) @ mlp.down_proj.weight.T
    expected = expected + (mlp.down_proj.bias if bias else 0)
    torch.testing.assert_close(mlp(hidden_states), expected, atol=1e-12, rtol=0)
    assert (mlp.up_proj.bias is not None) == bias


def rotated_by_hand(states: torch.Tensor, position: int, theta: float, rotary_dim: int) -> torch.Tensor:
    """Rotate one vector in float64: dimensions i and i + rotary_dim / 2 by the angle position * theta^(-2i / dim)."""
    result, half = states.double().clone(), rotary_dim // 2
    for index in range(half):
        angle = position * theta ** (-2 * index / rotary_dim)
        x, y = states[index].double(), states[index + half].double()
        result[index] = x * math.cos(angle) - y * math.sin(angle)
        result[index + half] = y * math.cos(angle) + x * math.sin(angle)
    return result


@pytest.mark.parametrize(("fraction", "theta"), [(1.0, 10000.0), (0.5, 10000.0), (0.25, 500.0)])
def test_rotary_embedding_is_its_formula(fraction, theta):
    config = tiny_config(partial_rotary_factor=fraction, rope_parameters={"rope_theta": theta})
    query, key = normal(1, 4, 3, 8), normal(1, 2, 3, 8, seed=1)
    position_ids = torch.tensor([[0, 7, 50]])
    rotated = apply_rotary(query, key, *GPT2ModernRotaryEmbedding(config)(query, position_ids))
    for states, actual in zip((query, key), rotated, strict=True):
        for head in range(states.shape[1]):
            for index, position in enumerate(position_ids[0].tolist()):
                expected = rotated_by_hand(states[0, head, index], position, theta, int(8 * fraction))
                torch.testing.assert_close(actual[0, head, index].double(), expected, atol=5e-6, rtol=0)


def test_rotary_scores_depend_on_the_distance_only():
    rotary, query, key = GPT2ModernRotaryEmbedding(tiny_config()), normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            apply_rotary(states, states, *rotary(states, torch.tensor([[position]])))[0]
            for states, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(45, 40), atol=1e-5, rtol=0)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotary_embedding_turns_bf16_in_fp32():
    """cos and sin of position 1000 rounded to bf16 would be off by up to 2^-9; the result is rounded once instead."""
    rotary = GPT2ModernRotaryEmbedding(tiny_config())
    states = normal(1, 1, 1, 8, dtype=torch.bfloat16)
    cos, sin = rotary(states, torch.tensor([[1000]]))
    assert cos.dtype == sin.dtype == torch.float32
    actual = apply_rotary(states, states, cos, sin)[0]
    exact = apply_rotary(states.double(), states.double(), cos.double(), sin.double())[0]
    assert torch.equal(actual, exact.to(torch.bfloat16))


def test_residual_mixes_are_their_formulas():
    x, y = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    for mix, weight, expected in (
        (WeightedSum(), [0.3], x + 0.3 * y),
        (EmbeddingResidual(), [0.7, 0.2], 0.7 * x + 0.2 * y),
        (ValueResidual(), [0.2], 0.8 * x + 0.2 * y),
    ):
        with torch.no_grad():
            mix.weight.copy_(torch.tensor(weight))
        torch.testing.assert_close(mix(x, y), expected)


def test_soft_cap_bounds_and_leaves_small_values():
    torch.testing.assert_close(soft_cap(torch.tensor([0.1, 1e4, -1e4]), 30.0), torch.tensor([0.1, 30.0, -30.0]))


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_linear_cross_entropy_is_its_formula(vocab_size, softcap, num_items):
    hidden_states, weight = normal(17, 8), normal(48, 8, seed=1)
    labels = torch.randint(0, 40, (17,), generator=torch.Generator().manual_seed(2))
    labels[[0, 9]] = -100
    logits = (hidden_states.double() @ weight.double().T)[:, :vocab_size]
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = [logits[row].logsumexp(0) - logits[row, label] for row, label in enumerate(labels.tolist()) if label >= 0]
    expected = torch.stack(losses).sum() / (15 if num_items is None else 5)
    actual = linear_cross_entropy(
        hidden_states, weight, labels, vocab_size=vocab_size, softcap=softcap, num_items_in_batch=num_items
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=0, rtol=1e-6)


def test_positions_restart_with_each_document():
    lengths = torch.tensor([0, 3, 4, 8, 8], dtype=torch.int32)
    assert positions_from_lengths(lengths, 2, 4).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_documents_are_found_by_their_restarts():
    documents = PackedDocuments.find(torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]]), 0, None)
    assert documents.starts.tolist() == [[0, 0, 0, 3, 3], [0, 0, 2, 3, 3]]


@pytest.mark.parametrize(
    ("position_ids", "past_length", "attention_mask"),
    [
        ([[0, 1, 2, 3]], 0, None),
        ([[5, 6, 7, 8]], 5, None),
        ([[100, 101, 102, 103]], 0, None),
        ([[0, 0, 0, 1]], 0, [[0, 0, 1, 1]]),  # padding on the left, as generate() counts it
        ([[0, 1, 1, 1]], 0, [[1, 1, 0, 0]]),
        ([[0, 1, 1, 2]], 0, [[1, 1, 0, 1]]),  # padding between two turns of a conversation
        ([[1, 2, 3]], 3, [[0, 0, 1, 1, 1, 1]]),
        ([[2, 2, 3]], 3, [[1, 1, 0, 0, 1, 1]]),
    ],
)
def test_one_document_is_not_taken_for_several(position_ids, past_length, attention_mask):
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    assert PackedDocuments.find(torch.tensor(position_ids), past_length, mask) is None


def test_document_that_began_in_the_cache_is_found_by_its_position():
    """Seven tokens are cached; the last three of them belong to the document that continues."""
    documents = PackedDocuments.find(torch.tensor([[3, 4, 0, 1]]), 7, None)
    assert documents.starts.tolist() == [[4, 4, 9, 9]]


def test_flash_arguments_are_the_boundaries_of_the_documents():
    documents = PackedDocuments.find(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]), 0, None)
    arguments = documents.flash_arguments(key_length=5, key_offset=0)
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 10]
    assert (arguments["max_length_q"], arguments["max_length_k"], arguments["attention_mask"]) == (4, 4, None)
    assert arguments["cu_seq_lens_q"].dtype == torch.int32


def test_flash_attention_refuses_padding_beside_documents():
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    documents = PackedDocuments.find(torch.tensor([[0, 0, 1, 0, 1]]), 0, mask)
    with pytest.raises(ValueError, match="padding, not both"):
        documents.flash_arguments(key_length=5, key_offset=0)


def test_linear_cross_entropy_gradients_are_those_of_cross_entropy():
    hidden_states = normal(17, 8, dtype=torch.float64).requires_grad_()
    weight = normal(48, 8, seed=1, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 40, (17,), generator=torch.Generator().manual_seed(2))
    labels[3] = -100
    expected = torch.autograd.grad(
        F.cross_entropy(3 * torch.tanh(hidden_states @ weight[:40].T / 3), labels), (hidden_states, weight)
    )
    hidden_states, weight = (tensor.detach().float().requires_grad_() for tensor in (hidden_states, weight))
    loss = linear_cross_entropy(hidden_states, weight, labels, vocab_size=40, softcap=3.0)
    actual = torch.autograd.grad(loss, (hidden_states, weight))
    torch.testing.assert_close(actual, tuple(gradient.float() for gradient in expected), atol=1e-6, rtol=0)
