"""linear_cross_entropy equals F.cross_entropy, never holds all logits, and works with compile, autocast and DDP."""

import functools
import importlib.util
import inspect
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from modeling_gpt2modern import loss_gpt2modern
from modeling_gpt2modern.loss_gpt2modern import (
    _compiled_loss_and_gradient,
    _linear_cross_entropy_sum,
    _loss_and_gradient,
    _summed_loss_and_gradients,
    linear_cross_entropy_and_z_loss,
    logits_z_loss,
    soft_cap,
)
from tests.support.models import linear_cross_entropy, random_ids, tiny_model

NUM_TOKENS, HIDDEN_SIZE, ROWS = 37, 16, 56
TOLERANCES = {torch.float64: {"atol": 1e-13, "rtol": 1e-11}, torch.float32: {"atol": 1e-6, "rtol": 1e-5}}


def make_inputs(dtype=torch.float32, vocab_size=ROWS, num_tokens=NUM_TOKENS, with_ignored=True):
    """Draw hidden states, weight (both require grad) and labels, every fifth of which is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    if with_ignored:
        labels[::5] = -100
    return hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def logits_cross_entropy(hidden_states, weight, labels, vocab_size=ROWS, softcap=None, num_items_in_batch=None):
    """Compute the same loss directly from all logits."""
    logits = hidden_states @ weight[:vocab_size].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def loss_and_gradients(loss_function, hidden_states, weight, labels, **options):
    loss = loss_function(hidden_states, weight, labels, **options)
    return loss, *torch.autograd.grad(loss, (hidden_states, weight))


@pytest.mark.parametrize("chunk_size", [1, 8, None])
@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(11)], ids=["mean", "divided"])
@pytest.mark.parametrize("with_ignored", [False, True], ids=["all-labels", "some-ignored"])
@pytest.mark.parametrize("vocab_size", [ROWS, 50])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradients_equal_cross_entropy(
    dtype, softcap, vocab_size, with_ignored, num_items_in_batch, chunk_size
):
    inputs = make_inputs(dtype, vocab_size, with_ignored=with_ignored)
    options = {"vocab_size": vocab_size, "softcap": softcap, "num_items_in_batch": num_items_in_batch}
    expected = loss_and_gradients(logits_cross_entropy, *inputs, **options)
    actual = loss_and_gradients(linear_cross_entropy, *inputs, **options, chunk_size=chunk_size)
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_the_slope_of_the_loss(softcap):
    hidden_states, weight, labels = make_inputs(torch.float64, num_tokens=6)
    loss = functools.partial(linear_cross_entropy, labels=labels, softcap=softcap, chunk_size=4)
    assert torch.autograd.gradcheck(loss, (hidden_states, weight))


@pytest.mark.parametrize("chunk_size", [8, None])
@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(11)], ids=["mean", "divided"])
@pytest.mark.parametrize("vocab_size", [ROWS, 50])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_z_loss_and_its_gradients_equal_those_of_all_logits(dtype, softcap, vocab_size, num_items_in_batch, chunk_size):
    """Some labels are ignored. The z-loss is also returned alone, without a gradient."""
    hidden_states, weight, labels = make_inputs(dtype, vocab_size)
    logits = hidden_states @ weight[:vocab_size].t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    num_items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    z_loss = 0.1 * logits.logsumexp(-1)[labels != -100].square().sum() / num_items
    loss = F.cross_entropy(logits, labels, reduction="sum") / num_items + z_loss
    expected = loss, *torch.autograd.grad(loss, (hidden_states, weight), retain_graph=True)

    options = {"z_loss_coefficient": 0.1, "num_items_in_batch": num_items_in_batch}
    actual_loss, actual_z_loss = linear_cross_entropy_and_z_loss(
        hidden_states, weight, labels, vocab_size=vocab_size, softcap=softcap, chunk_size=chunk_size, **options
    )
    actual = actual_loss, *torch.autograd.grad(actual_loss, (hidden_states, weight))
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])
    torch.testing.assert_close(actual_z_loss, z_loss.detach(), **TOLERANCES[dtype])
    torch.testing.assert_close(logits_z_loss(logits, labels, **options), z_loss, **TOLERANCES[dtype])
    assert not actual_z_loss.requires_grad


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_with_z_loss_are_the_slope_of_the_loss(softcap):
    hidden_states, weight, labels = make_inputs(torch.float64, num_tokens=6)
    options = {"labels": labels, "softcap": softcap, "chunk_size": 4, "z_loss_coefficient": 0.1}
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_cross_entropy_and_z_loss(*inputs, **options)[0], (hidden_states, weight)
    )


LATER_WEIGHTS = [0.5, 0.25]


def make_later_labels(labels, vocab_size=ROWS):
    """Draw two later labels per token: some are ignored, some equal the label, some equal each other."""
    later = torch.randint(vocab_size, (len(labels), 2), generator=torch.Generator().manual_seed(1))
    later[::3, 1] = -100
    later[1::5, 0] = labels[1::5]
    later[2::5] = later[2::5, :1]
    return later


@pytest.mark.parametrize("chunk_size", [8, None])
@pytest.mark.parametrize("z_loss_coefficient", [0.0, 0.1])
@pytest.mark.parametrize(("softcap", "vocab_size"), [(None, ROWS), (3.0, 50)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_losses_of_later_tokens_equal_those_of_all_logits(dtype, softcap, vocab_size, z_loss_coefficient, chunk_size):
    hidden_states, weight, labels = make_inputs(dtype, vocab_size)
    later_labels = make_later_labels(labels, vocab_size)
    logits = hidden_states @ weight[:vocab_size].t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    counted = labels != -100
    added = z_loss_coefficient * logits.logsumexp(-1)[counted].square().sum() / 7
    for index, factor in enumerate(LATER_WEIGHTS):
        each = F.cross_entropy(logits, later_labels[:, index], reduction="none")  # 0 where the label is -100
        added = added + factor * each[counted].sum() / 7
    loss = F.cross_entropy(logits, labels, reduction="sum") / 7 + added
    expected = loss, added, *torch.autograd.grad(loss, (hidden_states, weight))

    actual = linear_cross_entropy_and_z_loss(
        hidden_states, weight, labels, vocab_size=vocab_size, softcap=softcap, chunk_size=chunk_size,
        z_loss_coefficient=z_loss_coefficient, num_items_in_batch=7,
        later_labels=later_labels, later_weights=torch.tensor(LATER_WEIGHTS),
    )  # fmt: skip
    torch.testing.assert_close(
        (*actual, *torch.autograd.grad(actual[0], (hidden_states, weight))), expected, **TOLERANCES[dtype]
    )


def test_later_tokens_without_weight_change_nothing():
    hidden_states, weight, labels = make_inputs()
    later = {"later_labels": make_later_labels(labels), "later_weights": torch.zeros(2)}
    results = []
    for options in ({}, later):
        loss, added = linear_cross_entropy_and_z_loss(hidden_states, weight, labels, **options)
        results.append((loss, added, *torch.autograd.grad(loss, (hidden_states, weight))))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)


def test_later_tokens_need_the_loss_without_logits():
    with pytest.raises(ValueError, match="later_labels need shift_labels, skip_logits=True"):
        tiny_model()(random_ids(2, 8), labels=random_ids(2, 8), later_labels=random_ids(2, 8, 1), later_weights=[0.5])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_soft_cap_is_its_formula(dtype):
    """In the chunked loss, its gradients, and on logits; logits beyond the cap have finite gradients."""
    hidden_states, weight, labels = make_inputs(dtype)
    logits = 10 * hidden_states @ weight.t()  # up to 150
    capped = 30 * torch.tanh(logits / 30)
    torch.testing.assert_close(soft_cap(logits, 30.0), capped, **TOLERANCES[dtype])
    loss = F.cross_entropy(capped, labels)
    expected = loss, *torch.autograd.grad(loss, (hidden_states, weight))
    options = {"softcap": 30.0, "chunk_size": 8}
    actual = loss_and_gradients(
        lambda x, *rest, **o: linear_cross_entropy(10 * x, *rest, **o), *make_inputs(dtype), **options
    )
    torch.testing.assert_close(actual, expected, atol=3e-6 if dtype == torch.float32 else 1e-12, rtol=1e-5)


@pytest.mark.parametrize("flag_set", ["padded_vocabulary", "speedrun", "frontier_sliding_mixed"])
def test_the_model_gives_the_same_z_loss_with_and_without_logits(flag_set):
    model, input_ids = tiny_model(flag_set).train(), random_ids(2, 12)
    results = []
    for skip_logits in (True, False):
        model.zero_grad()
        output = model(input_ids, labels=input_ids, z_loss_coefficient=0.01, skip_logits=skip_logits)
        output.loss.backward()
        results.append((output.loss, output.auxiliary_loss, [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
    plain = model(input_ids, labels=input_ids)
    assert plain.auxiliary_loss is None and results[0][1] > 0
    torch.testing.assert_close(results[0][0] - results[0][1], plain.loss)


def test_weight_of_many_rows_is_summed_over_every_block_of_rows():
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(5, 4, generator=generator, requires_grad=True)
    weight = torch.randn(20_000, 4, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 8191, 8192, 16384, 19_999])
    expected = loss_and_gradients(logits_cross_entropy, hidden_states, weight, labels, vocab_size=None)
    actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels)
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


def test_rows_beyond_the_vocabulary_get_an_exactly_zero_gradient():
    hidden_states, weight, labels = make_inputs(vocab_size=50)
    _, _, weight_gradient = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels, vocab_size=50)
    assert torch.equal(weight_gradient[50:], torch.zeros(ROWS - 50, HIDDEN_SIZE))
    assert weight_gradient[:50].ne(0).all()


def test_values_of_rows_beyond_the_vocabulary_do_not_matter():
    hidden_states, weight, labels = make_inputs(vocab_size=50)
    poisoned = weight.detach().clone()
    poisoned[50:] = float("inf")
    expected = linear_cross_entropy(hidden_states, weight, labels, vocab_size=50)
    assert torch.equal(linear_cross_entropy(hidden_states, poisoned, labels, vocab_size=50), expected)


def test_label_beyond_the_vocabulary_raises():
    hidden_states, weight, labels = make_inputs()
    labels[1] = 52
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden_states, weight, labels, vocab_size=50)


def test_ignored_position_gets_no_gradient_and_cannot_poison_the_others():
    hidden_states, weight, labels = make_inputs()
    poisoned = hidden_states.detach().clone()
    poisoned[::5] = float("nan")
    expected = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels)
    actual = loss_and_gradients(linear_cross_entropy, poisoned.requires_grad_(), weight, labels)
    assert torch.equal(actual[1][::5], torch.zeros(8, HIDDEN_SIZE))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_another_ignore_index():
    hidden_states, weight, labels = make_inputs()
    expected = linear_cross_entropy(hidden_states, weight, labels)
    assert torch.equal(
        linear_cross_entropy(hidden_states, weight, labels.masked_fill(labels == -100, -1), ignore_index=-1), expected
    )


def test_mean_over_no_labels_is_nan_with_zero_gradients_as_in_cross_entropy():
    hidden_states, weight, labels = make_inputs()
    labels.fill_(-100)
    expected = loss_and_gradients(logits_cross_entropy, hidden_states, weight, labels)
    actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels)
    assert expected[0].isnan()
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=0, rtol=0)


def test_sum_over_no_labels_is_zero():
    hidden_states, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden_states, weight, labels.fill_(-100), num_items_in_batch=7)
    assert loss.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_precision_inputs_give_an_fp32_loss_and_gradients_in_their_dtype(dtype, softcap):
    hidden_states, weight, labels = make_inputs(dtype)
    actual = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels, softcap=softcap, chunk_size=8)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    expected = loss_and_gradients(logits_cross_entropy, *exact_inputs, labels, softcap=softcap)
    assert [tensor.dtype for tensor in actual] == [torch.float32, dtype, dtype]
    # One rounding of a logit near 8 is 0.4% in bf16; fp32 arithmetic after it leaves an error far below that.
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=2e-3, atol=0)
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        assert (gradient - exact).norm() / exact.norm() < 8e-3


def test_bf16_weight_gradient_does_not_lose_precision_with_more_chunks():
    hidden_states, weight, labels = make_inputs(torch.bfloat16, num_tokens=2048)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    exact = loss_and_gradients(logits_cross_entropy, *exact_inputs, labels)[2]
    for chunk_size in (2048, 8):
        gradient = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels, chunk_size=chunk_size)[2]
        assert (gradient - exact).norm() / exact.norm() < 4e-3, chunk_size


def test_confident_token_keeps_its_gradient_in_bf16():
    # p = 1 - 6e-5: in bf16 p rounds to 1, and p - 1 to zero.
    hidden_states = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[9.75], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    _, _, weight_gradient = loss_and_gradients(linear_cross_entropy, hidden_states, weight, torch.tensor([0]))
    expected = 1 / (1 + torch.tensor(9.75).exp())
    torch.testing.assert_close(
        weight_gradient.float().squeeze(1), torch.stack((-expected, expected)), rtol=4e-3, atol=0
    )


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_multiplies_in_bf16_and_returns_gradients_in_the_dtype_of_each_input(hidden_dtype):
    hidden_states, weight, labels = make_inputs()
    hidden_states = hidden_states.detach().bfloat16()
    half_inputs = (hidden_states.clone().requires_grad_(), weight.detach().bfloat16().requires_grad_())
    expected = loss_and_gradients(linear_cross_entropy, *half_inputs, labels)
    hidden_states = hidden_states.to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, weight, labels)
    gradients = torch.autograd.grad(loss, (hidden_states, weight))
    assert torch.equal(loss, expected[0])
    assert [gradient.dtype for gradient in gradients] == [hidden_dtype, torch.float32]
    for gradient, half in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(gradient.bfloat16(), half)


def test_bf16_hidden_states_meet_an_fp32_weight_without_autocast():
    hidden_states, weight, labels = make_inputs()
    half = hidden_states.detach().bfloat16()
    expected = linear_cross_entropy(half, weight.bfloat16(), labels)
    assert torch.equal(linear_cross_entropy(half, weight, labels), expected)


def test_upstream_gradient_scales_the_gradients():
    hidden_states, weight, labels = make_inputs()
    expected = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels)
    (linear_cross_entropy(hidden_states, weight, labels) * 1024).backward()
    assert torch.equal(hidden_states.grad, expected[1] * 1024)
    assert torch.equal(weight.grad, expected[2] * 1024)


def test_bf16_gradients_are_divided_by_the_exact_number_of_items():
    # 1/3 rounds to 0.33398 in bf16: every gradient would be 0.2% too large, in the same direction.
    hidden_states, weight, labels = make_inputs(torch.bfloat16)
    summed = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels, num_items_in_batch=1)
    divided = loss_and_gradients(linear_cross_entropy, hidden_states, weight, labels, num_items_in_batch=3)
    assert torch.equal(divided[1], (summed[1].float() / 3).bfloat16())


def test_fp16_gradients_of_unlikely_tokens_survive_with_a_loss_scale():
    # 1 / (56 tokens in the vocabulary x 65,536 items) is below the smallest fp16 number unless the scale comes first.
    hidden_states, weight, labels = make_inputs(torch.float16)
    loss = linear_cross_entropy(hidden_states, weight, labels, num_items_in_batch=65536)
    (hidden_gradient,) = torch.autograd.grad(loss * 65536, hidden_states)
    (expected,) = torch.autograd.grad(
        linear_cross_entropy(hidden_states, weight, labels, num_items_in_batch=1), hidden_states
    )
    assert torch.equal(hidden_gradient, expected)


def test_backward_can_be_repeated_on_a_retained_graph():
    hidden_states, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden_states, weight, labels)
    first = torch.autograd.grad(loss, (hidden_states, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden_states, weight))))


def test_differentiating_twice_raises():
    hidden_states, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden_states, weight, labels)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden_states, create_graph=True)


class RecordAllocations(TorchDispatchMode):
    """Record the largest tensor, in elements, and the matrix products of all operators that run under this mode."""

    def __init__(self):
        super().__init__()
        self.largest_tensor = 0
        self.num_matmuls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _linear_cross_entropy_sum._opoverload:
            with self:  # a mode sees an operator from outside only: step in
                return _summed_loss_and_gradients(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        ]
        self.largest_tensor = max([self.largest_tensor, *sizes])
        self.num_matmuls += function._schema.name in ("aten::mm", "aten::matmul")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_the_size_of_the_logits_is_made(dtype):
    inputs = make_inputs(dtype, num_tokens=512)
    with RecordAllocations() as direct:
        loss_and_gradients(logits_cross_entropy, *inputs)
    with RecordAllocations() as chunked:
        loss_and_gradients(linear_cross_entropy, *inputs, softcap=30.0, chunk_size=8)
    assert direct.largest_tensor == 512 * ROWS
    assert chunked.largest_tensor == 512 * HIDDEN_SIZE  # the hidden states and their gradient


@pytest.mark.parametrize(
    ("hidden_needs_gradient", "weight_needs_gradient", "num_matmuls"),
    [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)],
)
def test_only_the_gradients_that_are_needed_are_formed(hidden_needs_gradient, weight_needs_gradient, num_matmuls):
    hidden_states, weight, labels = make_inputs()
    hidden_states.requires_grad_(hidden_needs_gradient)
    weight.requires_grad_(weight_needs_gradient)
    with RecordAllocations() as recorded:
        linear_cross_entropy(hidden_states, weight, labels)
    assert recorded.num_matmuls == num_matmuls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_loss_is_computed(context):
    inputs = make_inputs()
    expected = linear_cross_entropy(*inputs)
    with context(), RecordAllocations() as recorded:
        loss = linear_cross_entropy(*inputs)
    assert torch.equal(loss, expected)
    assert recorded.num_matmuls == 1


def test_works_on_the_meta_device():
    hidden_states, weight, labels = (tensor.detach().to("meta") for tensor in make_inputs())
    assert linear_cross_entropy(hidden_states, weight.requires_grad_(), labels).shape == ()


def test_another_copy_of_the_file_does_not_replace_the_operator(tmp_path):
    inputs = make_inputs()
    expected = linear_cross_entropy(*inputs)
    source = Path(inspect.getfile(linear_cross_entropy_and_z_loss)).read_text()
    copied_file = tmp_path / "copied_layers.py"
    copied_file.write_text(source.replace("total -= ", "total += "))
    specification = importlib.util.spec_from_file_location("copied-package.copied_layers", copied_file)
    copied_module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copied_module)
    assert torch.equal(copied_module.linear_cross_entropy_and_z_loss(*inputs)[0], -expected)
    assert torch.equal(linear_cross_entropy(*inputs), expected)


class TiedModel(nn.Module):
    """Compute the loss of an embedding, one linear layer, and a head that shares the weight of the embedding."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(ROWS, HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.use_reentrant = use_reentrant

    def loss(self, hidden_states, labels):
        return linear_cross_entropy(
            self.linear(hidden_states), self.embed_tokens.weight, labels, vocab_size=50, softcap=5.0
        )

    def forward(self, input_ids, labels):
        hidden_states = self.embed_tokens(input_ids)
        if self.use_reentrant is None:
            return self.loss(hidden_states, labels)
        return checkpoint(self.loss, hidden_states, labels, use_reentrant=self.use_reentrant)


def gradients_of(model, input_ids, labels):
    model.zero_grad()
    loss = model(input_ids, labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.fixture
def token_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, (2, NUM_TOKENS), generator=generator).unbind(0)


def test_tied_weight_gets_the_gradient_of_both_its_uses(token_batch):
    input_ids, labels = token_batch
    model = TiedModel()
    actual = gradients_of(model, input_ids, labels)
    model.loss = lambda hidden_states, labels: logits_cross_entropy(
        model.linear(hidden_states), model.embed_tokens.weight, labels, vocab_size=50, softcap=5.0
    )
    torch.testing.assert_close(actual, gradients_of(model, input_ids, labels))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_around_the_loss(token_batch, use_reentrant):
    actual = gradients_of(TiedModel(use_reentrant), *token_batch)
    torch.testing.assert_close(actual, gradients_of(TiedModel(), *token_batch), atol=0, rtol=0)


@pytest.mark.parametrize("use_autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_as_one_graph_with_equal_loss_and_gradients(token_batch, use_autocast):
    torch._dynamo.reset()
    model = TiedModel()
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        expected = gradients_of(model, *token_batch)
        actual = gradients_of(torch.compile(model, fullgraph=True, backend="aot_eager"), *token_batch)
    torch.testing.assert_close(actual, expected)


def test_compiled_graph_holds_no_logits():
    torch._dynamo.reset()
    largest = []

    def record_largest(graph_module, example_inputs):
        values = [node.meta.get("val") for node in graph_module.graph.nodes]
        largest.append(max(leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)))
        return make_boxed_func(graph_module.forward)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record_largest, bw_compiler=record_largest)
    inputs = make_inputs(num_tokens=512)
    for loss_function, expected in ((logits_cross_entropy, 512 * ROWS), (linear_cross_entropy, 512 * HIDDEN_SIZE)):
        largest.clear()
        torch._dynamo.reset()
        loss_and_gradients(torch.compile(loss_function, backend=backend, fullgraph=True), *inputs)
        assert max(largest) == expected, loss_function.__name__
        assert len(largest) == 2


def test_one_compiled_graph_serves_other_token_counts():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (37, 61, 600):
        inputs = make_inputs(num_tokens=num_tokens)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = loss_and_gradients(compiled, *inputs)
        torch.testing.assert_close(actual, loss_and_gradients(linear_cross_entropy, *inputs))


def test_operator_is_registered_as_torch_demands():
    hidden_states, weight, labels = make_inputs(vocab_size=50)
    later = (make_later_labels(labels, 50), torch.tensor(LATER_WEIGHTS))
    for more in (later, (None, None)):
        operator_arguments = (hidden_states, weight, labels, *more)
        operator_arguments += (3.0, 1e-4, 50, -100, 8, False, torch.float32, True, True)
        torch.library.opcheck(_linear_cross_entropy_sum, operator_arguments)
    requires_grad = [output.requires_grad for output in _linear_cross_entropy_sum(*operator_arguments)]
    assert requires_grad == [True, False, False, False]


def _ddp_worker(rank, folder, batches):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(TiedModel())
    gradients = gradients_of(model, *batches[rank])
    if rank == 0:
        torch.save(gradients[1:], f"{folder}/gradients.pt")
    torch.distributed.barrier()
    # Not an orderly exit: a Reducer that outlives its gloo group joins the group's thread with the GIL held, and hung.
    os._exit(0)


def test_ddp_averages_the_gradients_of_a_tied_weight(tmp_path):
    generator = torch.Generator().manual_seed(2)
    batches = torch.randint(50, (2, 2, NUM_TOKENS), generator=generator)
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path), batches), nprocs=2)
    per_rank = [gradients_of(TiedModel(), *batch)[1:] for batch in batches]
    expected = [(first + second) / 2 for first, second in zip(*per_rank, strict=True)]
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(NUM_TOKENS - 1, dtype=torch.long)}, "shapes must be"),
        ({"weight": torch.zeros(ROWS, HIDDEN_SIZE + 1)}, "shapes must be"),
        ({"hidden_states": torch.zeros(1, NUM_TOKENS, HIDDEN_SIZE)}, "shapes must be"),
        ({"vocab_size": ROWS + 1}, "vocab_size must be"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"softcap": 0.0}, r"softcap \(or None\) must be positive"),
        ({"chunk_size": 0}, r"chunk_size and softcap \(or None\) must be positive"),
    ],
    ids=["labels", "hidden-size", "three-dimensions", "vocab-too-large", "vocab-empty", "softcap", "chunk"],
)
def test_arguments_that_do_not_fit_raise_value_error(change, message):
    hidden_states, weight, labels = make_inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden_states": hidden_states, "weight": weight, "labels": labels} | change))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("z_loss_coefficient", [0.0, 1e-2])
def test_the_part_that_a_gpu_compiles_equals_the_uncompiled_one(softcap, z_loss_coefficient):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 50, dtype=torch.bfloat16) * 5, torch.randint(50, (6, 3))
    for later_weights in (None, torch.tensor([[0.5, 0.25]]).expand(6, -1)):
        arguments = (
            logits,
            targets[:, : 1 if later_weights is None else 3],
            softcap,
            z_loss_coefficient,
            torch.float32,
            later_weights,
        )
        results = [call(*arguments) for call in (_compiled_loss_and_gradient(), _loss_and_gradient)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_blocks_of_scores_do_not_change_the_loss(monkeypatch):
    torch.manual_seed(0)
    inputs = (torch.randn(13, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randint(50, (13,)))
    expected = linear_cross_entropy(*inputs, chunk_size=13)
    monkeypatch.setattr(loss_gpt2modern, "_SCORES_PER_BLOCK_ON_CPU", 200)  # four rows of 50 scores
    actual = linear_cross_entropy(*inputs, chunk_size=13)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs[:2]), torch.autograd.grad(expected, inputs[:2]))


@pytest.mark.parametrize(("offset", "lead"), [(0, 14), (-100, 14), (1000, 12)])
def test_confident_tokens_and_a_common_offset_are_as_exact_as_cross_entropy(offset, lead):
    torch.manual_seed(0)
    labels = torch.randint(50, (64,))
    scores = offset + torch.randn(64, 50) * 0.1 + lead * F.one_hot(labels, 50)

    def errors(loss_function, dtype=torch.float32):
        inputs = scores.to(dtype).requires_grad_()
        loss = loss_function(inputs)
        return loss.detach().double(), torch.autograd.grad(loss, inputs)[0].double()

    exact = errors(lambda inputs: F.cross_entropy(inputs, labels), torch.float64)
    stock = errors(lambda inputs: F.cross_entropy(inputs, labels))
    ours = errors(lambda inputs: linear_cross_entropy(inputs, torch.eye(50, dtype=inputs.dtype), labels))
    for value, other, right in zip(ours, stock, exact, strict=True):
        assert (value - right).norm() <= 3 * (other - right).norm() + 1e-9


def test_huge_finite_logits_have_a_finite_loss_without_z_loss():
    inputs = torch.zeros(2, 4)
    inputs[:, 1] = 1e20
    assert linear_cross_entropy(inputs, torch.eye(4), torch.tensor([1, 1])) == 0
    assert linear_cross_entropy(inputs, torch.eye(4), torch.tensor([0, 0])) == 1e20
