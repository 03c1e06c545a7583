"""Compute the loss of a linear head without holding all logits: cross-entropy, soft cap (bound of logits), z-loss."""

import functools
import re
from collections.abc import Callable

import torch


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap * tanh(logits / cap) (arXiv:2408.00118); if cap is None, the logits."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


# Rows of the weight gradient that are added up at a time. One 8,192 x 768 block in fp32 is 25 MB: small enough that the
# allocator keeps it between blocks. An `add_` of bf16 to fp32 over all 50,304 rows at once takes 9x as long on CPU.
_WEIGHT_ROWS_PER_BLOCK = 8192
# Scores that become gradients at a time if nothing is compiled; on a CPU 8 MB in fp32, which stay in its cache.
_SCORES_PER_BLOCK_ON_CPU, _SCORES_PER_BLOCK_ON_GPU = 2**21, 2**25


def _loss_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    z_loss_coefficient: float,
    loss_dtype: torch.dtype,
    later_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target, log(sum(exp(scores))) and the gradient of the loss with respect to the
    logits, where scores are the logits after the soft cap.

    logits: (rows, vocab_size); targets: (rows, 1 + later), int64: the next token, whose loss has the weight 1, and
    later ones; later_weights: (rows, later), theirs, None if there are none. The results are (rows, 1 + later), (rows,
    1) and (rows, vocab_size) in loss_dtype, in which everything is computed.
    """
    scores = logits.to(loss_dtype)
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores = softcap * bounded
    probabilities = torch.softmax(scores, dim=-1)
    # The largest probability is 1 / sum(exp(scores - largest score)).
    largest, log_of_largest = scores.amax(1, keepdim=True), probabilities.amax(1, keepdim=True).log()
    log_sum = largest - log_of_largest
    log_probs = scores.gather(1, targets) - largest + log_of_largest  # in this order: exact beside large scores
    # d loss / d scores = softmax - one_hot. expm1 keeps p - 1 of a confident token, which bf16 would round to 0.
    at_target, slope = log_probs[:, :1].expm1(), 0.0
    if z_loss_coefficient:  # d log_sum^2 / d scores = 2 log_sum softmax
        slope = 2 * z_loss_coefficient * log_sum
    if later_weights is not None:
        slope = slope + later_weights.sum(1, keepdim=True)
    if z_loss_coefficient or later_weights is not None:
        probabilities = probabilities.mul_(1 + slope)
        at_target = at_target + slope * log_probs[:, :1].exp()
    gradient = probabilities.scatter_(1, targets[:, :1], at_target)
    for index in range(1, targets.shape[1]):  # one at a time: a row may have the same target twice
        gradient = gradient.scatter_add_(1, targets[:, index : index + 1], -later_weights[:, index - 1 : index])
    if softcap is not None:
        gradient = gradient.addcmul_(gradient, bounded.square_(), value=-1)
    return log_probs, log_sum, gradient


@functools.cache
def _compiled_loss_and_gradient() -> Callable:
    return torch.compile(_loss_and_gradient)


def _summed_loss_and_gradients(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    later_labels: torch.Tensor | None,
    later_weights: torch.Tensor | None,
    softcap: float | None,
    z_loss_coefficient: float,
    vocab_size: int,
    ignore_index: int,
    chunk_size: int,
    is_compiled: bool,
    compute_dtype: torch.dtype,
    needs_hidden_gradient: bool,
    needs_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss summed over the tokens, the part of it that is z-loss (a penalty on large logits) or loss of
    later tokens, and the gradients of this sum with respect to hidden_states and weight. Works on `chunk_size` tokens
    at a time. is_compiled: whether a GPU may compile the part between the matrix products into one kernel.

    hidden_states: (num_tokens, hidden_size); weight: (rows, hidden_size); labels: (num_tokens,), int64; later_labels:
    (num_tokens, later), int64; later_weights: (later,). The two losses are scalars in at least fp32. The gradients have
    the shapes of their tensors; that of hidden_states is in compute_dtype, that of weight in at least fp32. A gradient
    that is not needed is an empty tensor.
    """
    num_tokens = hidden_states.shape[0]
    loss_dtype = torch.promote_types(compute_dtype, torch.float32)
    total, auxiliary_total, hidden_gradient, weight_gradient = _empty_outputs(
        hidden_states, weight, compute_dtype, needs_hidden_gradient, needs_weight_gradient
    )
    total.zero_()
    auxiliary_total.zero_()
    all_labels = labels.unsqueeze(1)  # (num_tokens, 1 + later)
    if later_labels is not None:
        all_labels = torch.cat([all_labels, later_labels], dim=1)
    weight_gradient[vocab_size if num_tokens else 0 :].zero_()
    output_weight = weight[:vocab_size].to(compute_dtype)  # (vocab_size, hidden_size)

    # Allocated once: a fresh 150 MB buffer per chunk would cost the CPU more in page faults than the softmax itself.
    buffer = hidden_states.new_empty((min(chunk_size, num_tokens), vocab_size), dtype=compute_dtype)
    # On a GPU one compiled kernel reads the logits; on a CPU, blocks in its cache are as fast without a compiler.
    is_on_cpu = hidden_states.device.type == "cpu"
    if is_compiled and not is_on_cpu:
        loss_and_gradient, block_size = _compiled_loss_and_gradient(), chunk_size
    else:
        scores = _SCORES_PER_BLOCK_ON_CPU if is_on_cpu else _SCORES_PER_BLOCK_ON_GPU
        loss_and_gradient, block_size = _loss_and_gradient, max(1, scores // vocab_size)

    for start in range(0, num_tokens, chunk_size):
        chunk = slice(start, min(start + chunk_size, num_tokens))
        is_ignored = (labels[chunk] == ignore_index).unsqueeze(1)  # (rows, 1)
        targets = all_labels[chunk].masked_fill(all_labels[chunk] == ignore_index, 0)  # (rows, 1 + later)
        weights = None
        if later_labels is not None:
            no_loss = is_ignored | (later_labels[chunk] == ignore_index)
            weights = later_weights.to(loss_dtype).expand_as(no_loss).masked_fill(no_loss, 0)  # (rows, later)
        # A zeroed hidden state adds exactly nothing to the weight gradient: cheaper than masking (rows, vocab_size).
        inputs = hidden_states[chunk].to(compute_dtype).masked_fill(is_ignored, 0)  # (rows, hidden_size)
        # Holds the logits, (rows, vocab_size), until each block of them is replaced by its gradient.
        gradient = torch.mm(inputs, output_weight.t(), out=buffer[: len(inputs)])
        for first in range(0, len(inputs), block_size):
            block = slice(first, first + block_size)
            of_block = None if weights is None else weights[block]
            log_probs, log_sum, gradient[block] = loss_and_gradient(
                gradient[block], targets[block], softcap, z_loss_coefficient, loss_dtype, of_block
            )
            total -= log_probs[:, :1].masked_fill(is_ignored[block], 0).sum()
            if z_loss_coefficient:
                auxiliary_total += z_loss_coefficient * log_sum.square().masked_fill(is_ignored[block], 0).sum()
            if of_block is not None:
                auxiliary_total -= (log_probs[:, 1:] * of_block).sum()
        if needs_hidden_gradient:
            hidden_gradient[chunk] = (gradient @ output_weight).masked_fill_(is_ignored, 0)
        if needs_weight_gradient:
            for first_row in range(0, vocab_size, _WEIGHT_ROWS_PER_BLOCK):
                rows = slice(first_row, min(first_row + _WEIGHT_ROWS_PER_BLOCK, vocab_size))
                product = gradient[:, rows].t() @ inputs
                weight_gradient[rows] = product if start == 0 else weight_gradient[rows] + product

    return total.add_(auxiliary_total), auxiliary_total, hidden_gradient, weight_gradient


def _empty_outputs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    compute_dtype: torch.dtype,
    needs_hidden_gradient: bool,
    needs_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return uninitialised tensors for loss, part of it and two gradients; a gradient that is not needed is empty."""
    loss_dtype = torch.promote_types(compute_dtype, torch.float32)
    return (
        hidden_states.new_empty((), dtype=loss_dtype),
        hidden_states.new_empty((), dtype=loss_dtype),
        hidden_states.new_empty(hidden_states.shape if needs_hidden_gradient else (0,), dtype=compute_dtype),
        weight.new_empty(weight.shape if needs_weight_gradient else (0,), dtype=loss_dtype),
    )


# One opaque operator, so that torch.compile neither breaks the graph here nor unrolls the loop over chunks. Its name
# must be unique in the process: in torch a second registration silently replaces the first, and each checkpoint that is
# loaded with trust_remote_code brings its own copy of this file, under another module name.
_linear_cross_entropy_sum = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z_]', '_', __name__)}::linear_cross_entropy_sum", _summed_loss_and_gradients, mutates_args=()
)


@_linear_cross_entropy_sum.register_fake
def _(hidden_states, weight, *settings):
    return _empty_outputs(hidden_states, weight, *settings[-3:])


def _keep_gradients(ctx, inputs, output) -> None:
    hidden_states, weight, *_, needs_hidden_gradient, needs_weight_gradient = inputs
    _, auxiliary_total, hidden_gradient, weight_gradient = output
    ctx.mark_non_differentiable(auxiliary_total, hidden_gradient, weight_gradient)
    ctx.set_materialize_grads(False)  # otherwise backward receives a (vocab_size, hidden_size) block of zeros
    ctx.save_for_backward(hidden_gradient, weight_gradient)
    ctx.dtypes = (
        hidden_states.dtype if needs_hidden_gradient else None,
        weight.dtype if needs_weight_gradient else None,
    )


def _scale_gradients(ctx, total_gradient: torch.Tensor | None, *_):
    """Return the gradients that the forward pass has computed, times `total_gradient`, and None for other arguments.

    `total_gradient` contains 1 / num_items, and in fp16 the loss scale. Raises RuntimeError for a second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once only; for create_graph=True use skip_logits=False"
        )
    # Multiply in the loss dtype, then round: in bf16 the factor 1 / num_items alone is wrong by up to 0.2 %.
    hidden_gradient, weight_gradient = (
        None if dtype is None or total_gradient is None else (saved.to(total_gradient.dtype) * total_gradient).to(dtype)
        for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return hidden_gradient, weight_gradient, *(None,) * 12


_linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def default_chunk_size(hidden_size: int, device_type: str, dtype: torch.dtype) -> int:
    """Return how many tokens' logits, of `dtype`, the loss holds at the same time: on a CPU as much memory as the fp32
    gradient of the head takes, or as 1,024 tokens in fp32; on a GPU, which adds to that gradient slowly, twice this."""
    fp32_tokens = max(1024, hidden_size) * (1 if device_type == "cpu" else 2)
    return fp32_tokens * torch.float32.itemsize // dtype.itemsize


def linear_cross_entropy_and_z_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss_coefficient: float = 0.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    later_labels: torch.Tensor | None = None,
    later_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cross_entropy(soft_cap(hidden_states @ weight.T, softcap), labels) without holding all logits in memory,
    and add the z-loss and the losses on later tokens. Returns two scalars: this total, and what was added.

    hidden_states: (num_tokens, hidden_size), floating point; weight: (rows, hidden_size), of any floating dtype;
    labels: (num_tokens,), int64, already shifted by the caller; tokens with the label `ignore_index` have no loss.
    z_loss_coefficient: factor of the square of log(sum(exp(logits))), averaged over the tokens as the cross-entropy is.
    This term prevents a growth of all logits by the same amount, which the softmax does not notice (PaLM,
    arXiv:2204.02311, section 5, uses 1e-4).
    vocab_size: number of token ids; the rows of `weight` beyond it have probability 0 and a gradient of exactly zero.
    softcap: bound of the logits, applied in fp32; None means no bound.
    num_items_in_batch: divisor of the summed loss; None means the number of labels that are not ignored.
    chunk_size: number of tokens whose logits exist at the same time; None means `default_chunk_size`.
    later_labels: (..., later), int64, for num_tokens tokens: the tokens after `labels` that the same logits also
    predict; later_weights: (later,), the factors of these cross-entropies, which the divisor does not count
    (multi-token prediction without further parameters; modded-nanogpt, record 53).

    Both results are in nats per token and in fp32 (float64 for float64 inputs); the second one has no gradient. Matrix
    products run in the dtype of autocast if it is enabled, otherwise in that of hidden_states; softmax, loss and the
    sum of the weight gradient stay in fp32. As in `torch.nn.functional.cross_entropy`, the mean over no labels is NaN,
    with gradients of zero. The forward pass computes the gradients (as Liger Kernel does, arXiv:2410.10989) and the
    backward pass only scales them; a second derivative raises RuntimeError. Raises ValueError for shapes that do not
    match, a vocab_size out of range, and a chunk_size or softcap that is not positive.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    is_2d = hidden_states.dim() == weight.dim() == 2
    if not is_2d or hidden_states.shape != (*labels.shape, weight.shape[1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden_states, weight, labels))
        expected = "(num_tokens, hidden_size), (rows, hidden_size), (num_tokens,)"
        raise ValueError(f"shapes must be {expected} for hidden_states, weight and labels, got {shapes}")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be between 1 and the {weight.shape[0]} rows of weight, got {vocab_size}")
    if (chunk_size is not None and chunk_size < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"chunk_size and softcap (or None) must be positive, got {chunk_size} and {softcap}")
    device_type = hidden_states.device.type
    compute_dtype = hidden_states.dtype
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[1], device_type, compute_dtype)
    total, auxiliary_total, _, _ = _linear_cross_entropy_sum(
        hidden_states,
        weight,
        labels,
        None if later_labels is None else later_labels.flatten(0, -2).to(labels.device),
        None if later_weights is None else later_weights.to(labels.device),
        softcap,
        z_loss_coefficient,
        vocab_size,
        ignore_index,
        chunk_size,
        torch.compiler.is_compiling(),
        compute_dtype,
        torch.is_grad_enabled() and hidden_states.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    totals = (total, auxiliary_total)
    loss, auxiliary_loss = (_mean_over_labels(each, labels, num_items_in_batch, ignore_index) for each in totals)
    return loss, auxiliary_loss


def logits_z_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss_coefficient: float,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the z-loss, z_loss_coefficient times the mean of log(sum(exp(logits)))^2, with a gradient.

    logits: (..., vocab_size); labels: (...). The mean is over the tokens whose label is not `ignore_index`, or the sum
    is divided by num_items_in_batch if that is given."""
    log_sum = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)  # (...)
    total = z_loss_coefficient * log_sum.square().masked_fill(labels == ignore_index, 0).sum()
    return _mean_over_labels(total, labels, num_items_in_batch, ignore_index)


def _mean_over_labels(
    total: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    if num_items_in_batch is None:
        num_labels = (labels != ignore_index).sum()
        # Dividing by zero would make the gradients NaN too; those of nn.functional.cross_entropy are zero.
        return torch.where(num_labels > 0, total / num_labels.clamp(min=1), torch.nan)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
