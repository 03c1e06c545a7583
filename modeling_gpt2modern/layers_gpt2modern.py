"""Norms, MLPs, rotary embedding, residual mixes and the loss of GPT2-Modern: parts that know nothing of each other."""

import re
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils.import_utils import is_tracing


class GPT2ModernRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain if `elementwise_affine` (arXiv:1910.07467).

    Computed in fp32 whatever the input, returned in the input's dtype; identical to Llama's where there is a gain.
    """

    def __init__(self, normalized_shape: int, eps: float, elementwise_affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape)) if elementwise_affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states * torch.rsqrt(variance + self.eps)).to(input_dtype)
        return hidden_states if self.weight is None else (self.weight * hidden_states).to(input_dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, elementwise_affine={self.weight is not None}"


NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": GPT2ModernRMSNorm}


class GPT2ModernMLP(nn.Module):
    """down(act(up(x))), as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[config.mlp_type]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPT2ModernGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (arXiv:2002.05202); identical to Llama's."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


MLPS: dict[str, type[nn.Module]] = {
    "gelu_new": GPT2ModernMLP,
    "gelu": GPT2ModernMLP,
    "relu2": GPT2ModernMLP,
    "swiglu": GPT2ModernGatedMLP,
}


class GPT2ModernRotaryEmbedding(nn.Module):
    """cos and sin of position x frequency (RoPE, arXiv:2104.09864), for every `rope_type` of transformers.

    Identical to Llama's except that `partial_rotary_factor` holds for the default type too and that cos and sin stay
    in fp32. Class name, buffers and `compute_default_rope_parameters` are what transformers looks for when it restores
    the non-persistent frequencies of a model that was built on the meta device.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_types = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        inv_freq, self.attention_scaling = rope_types[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Frequencies theta^(-2i / rotary_dim), shape (rotary_dim / 2,), and the factor 1 for cos and sin."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Moves the frequencies but never rounds them, as `model.bfloat16()` would and `from_pretrained` does not: with
        128 dimensions per head, the angle at position 1,000 would be off by up to 1.2 radians."""

        def move(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (batch, seq_len, rotary_dim) in fp32, for position_ids of shape (batch, seq_len)."""
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first rotary_dim dimensions of query and key by position; half-split layout as in Llama.

    query: (batch, num_heads, seq_len, head_dim); key: same with num_key_value_heads; cos, sin: (batch, seq_len,
    rotary_dim), fp32, with an even rotary_dim <= head_dim. The rotation is done in fp32; both come back in their dtype.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(states.dtype), passed), dim=-1)


class FirstArgument(nn.Module):
    """nn.Identity for a part that takes two tensors: the "off" form of the residual mixes below."""

    def forward(self, states: torch.Tensor, other_states: torch.Tensor | None) -> torch.Tensor:
        return states


class ResidualMix(nn.Module):
    """Base of the mixes with learned weights, which start at `initial_weight`.

    The weights are vectors even where one number would do, because FSDP2 does not shard 0-dimensional parameters.
    """

    initial_weight: tuple[float, ...]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(self.initial_weight))


class UNetSkip(ResidualMix):
    """x + w * y, y being the output of the mirror layer in the first half."""

    initial_weight = (1.0,)

    def forward(self, hidden_states: torch.Tensor, skip_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.weight * skip_states


class EmbeddingResidual(ResidualMix):
    """a * x + b * x0, x0 being what the first layer saw."""

    initial_weight = (1.0, 0.0)

    def forward(self, hidden_states: torch.Tensor, embedding_states: torch.Tensor) -> torch.Tensor:
        return self.weight[0] * hidden_states + self.weight[1] * embedding_states


class ValueResidual(ResidualMix):
    """(1 - w) * v + w * v1, v1 being the values of the first layer (arXiv:2410.17897, with a learned w).

    Returned in the dtype of v: w is fp32 under autocast, and flash attention wants values in the dtype of the queries.
    """

    initial_weight = (0.5,)

    def forward(self, value_states: torch.Tensor, first_value_states: torch.Tensor) -> torch.Tensor:
        mixed = (1 - self.weight) * value_states + self.weight * first_value_states
        return mixed.to(value_states.dtype)


def positions_from_lengths(cu_seq_lens: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
    """position_ids (batch, seq_len) that restart with each document.

    cu_seq_lens: (documents + 1,), where each document begins and the last one ends in the flattened batch.
    """
    index = torch.arange(batch_size * seq_len, device=cu_seq_lens.device)
    document = torch.searchsorted(cu_seq_lens[1:].contiguous(), index.to(cu_seq_lens.dtype), right=True)
    return (index - cu_seq_lens[document]).view(batch_size, seq_len)


class PackedDocuments(NamedTuple):
    """Which of the tokens before it each token may see when rows hold several documents.

    Tokens are counted without padding, from the first one in the cache: a token's `rank`. A new document begins where
    the position does not grow from one token to the next; a gap in the positions, as a hole in the mask leaves it, is
    none. A document that began in the cache began `position` ranks ago, or at the first token where there are fewer.

    starts: (batch, seq_len), rank of the first token of the document of each token.
    ranks: (batch, past_length + seq_len), rank of each token, past ones included.
    """

    starts: torch.Tensor
    ranks: torch.Tensor
    past_length: int | torch.Tensor

    @classmethod
    def find(
        cls, position_ids: torch.Tensor, past_length: int | torch.Tensor, attention_mask: torch.Tensor | None
    ) -> "PackedDocuments | None":
        """None where each row is one document. That needs a look at the values, which a traced graph cannot take: there
        position_ids of more than one document are always expected.

        position_ids: (batch, seq_len); attention_mask: (batch, past_length + seq_len), 0 for padding, or None.
        """
        batch_size, seq_len = position_ids.shape
        index = torch.arange(seq_len, device=position_ids.device).expand(batch_size, -1)
        if attention_mask is None:
            ranks, query_ranks, is_token = None, index + past_length, torch.ones_like(index, dtype=torch.bool)
        else:
            attention_mask = attention_mask.to(position_ids.device)
            ranks = attention_mask.long().cumsum(-1) - 1
            query_ranks, is_token = ranks[:, -seq_len:], attention_mask[:, -seq_len:].bool()

        # Padding takes over from the token before it, or in front of the first token from that one.
        source = torch.where(is_token, index, -1).cummax(-1).values
        source = torch.where(source < 0, is_token.int().argmax(-1, keepdim=True), source)
        positions, ranks_of_tokens = (
            position_ids.expand(batch_size, -1).gather(1, source),
            query_ranks.gather(1, source),
        )
        begins = (positions[:, 1:] <= positions[:, :-1]) & (source[:, 1:] != source[:, :-1])
        first_start = (ranks_of_tokens - positions)[:, :1].clamp(min=0)
        starts = torch.cat((first_start, torch.where(begins, ranks_of_tokens[:, 1:], 0)), dim=-1)
        starts = starts.cummax(-1).values
        if is_tracing(starts) or ((starts > 0) & is_token).any():
            return cls(starts, ranks, past_length)
        return None

    def mask_function(self, batch_idx, head_idx, query_idx, key_idx) -> torch.Tensor:
        """True where a query may see a key, for the `and_mask_function` of transformers' masks."""
        start = self.starts[batch_idx, query_idx - self.past_length]
        if self.ranks is None:
            return key_idx >= start
        return self.ranks[batch_idx, key_idx.clamp(max=self.ranks.shape[1] - 1)] >= start

    def flash_arguments(self, key_length: int, key_offset: int) -> dict[str, Any]:
        """The same for flash attention, which has no masks: where each document begins in queries and keys.

        key_length: keys per row that the layer will hold; key_offset: index of the first of them, where a sliding
        window has dropped some. Keys that belong to no query, before and after the documents, become documents without
        queries. Raises ValueError if there is padding as well.
        """
        batch_size, seq_len = self.starts.shape
        if self.ranks is not None and (self.ranks[:, -1] + 1 < self.ranks.shape[1]).any():
            raise ValueError(
                "flash attention takes packed documents or padding, not both: leave out attention_mask and let the "
                "padding be a document of its own in position_ids, or use attn_implementation='sdpa'"
            )
        index = torch.arange(seq_len, device=self.starts.device).expand(batch_size, -1)
        rows = torch.arange(batch_size, device=self.starts.device).unsqueeze(1)
        zero, one = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)

        is_first = torch.cat((one, one, self.starts[:, 1:] != self.starts[:, :-1], one), dim=1)
        queries = torch.cat((zero, index, zero + seq_len), dim=1) + rows * seq_len
        first_keys = (self.starts - key_offset).clamp(min=0)
        keys = torch.cat((zero, first_keys, zero + self.past_length + seq_len - key_offset), dim=1) + rows * key_length
        query_lengths = queries[is_first].diff(append=queries.new_tensor([batch_size * seq_len]))
        key_lengths = keys[is_first].diff(append=keys.new_tensor([batch_size * key_length]))

        is_document = query_lengths + key_lengths > 0
        query_lengths, key_lengths = query_lengths[is_document], key_lengths[is_document]
        return {
            "attention_mask": None,
            "cu_seq_lens_q": F.pad(query_lengths.cumsum(0), (1, 0)).to(torch.int32),
            "cu_seq_lens_k": F.pad(key_lengths.cumsum(0), (1, 0)).to(torch.int32),
            "max_length_q": int(query_lengths.max()),
            "max_length_k": int(key_lengths.max()),
        }


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(logits / cap), which keeps logits within +-cap (arXiv:2408.00118); None caps nothing."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


# Rows of the weight gradient added up at a time. One 8,192 x 768 fp32 block is 25 MB: small enough that the allocator
# keeps it between blocks. A mixed bf16 -> fp32 `add_` over all 50,304 rows takes 9x as long on CPU.
_WEIGHT_ROWS_PER_BLOCK = 8192


def _summed_loss_and_gradients(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    z_loss_coefficient: float,
    vocab_size: int,
    ignore_index: int,
    chunk_size: int,
    compute_dtype: torch.dtype,
    needs_hidden_gradient: bool,
    needs_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss, the part of it that is z-loss, and the gradients of the loss with respect to hidden_states
    (compute_dtype) and weight (at least fp32).

    A gradient that is not needed comes back empty.
    """
    num_tokens = hidden_states.shape[0]
    loss_dtype = torch.promote_types(compute_dtype, torch.float32)
    total, z_total, hidden_gradient, weight_gradient = _empty_outputs(
        hidden_states, weight, compute_dtype, needs_hidden_gradient, needs_weight_gradient
    )
    total.zero_()
    z_total.zero_()
    weight_gradient.zero_()
    output_weight = weight[:vocab_size].to(compute_dtype)

    # Allocated once: a fresh 150 MB buffer per chunk would cost the CPU more in page faults than the softmax itself.
    buffer_shape = (min(chunk_size, num_tokens), vocab_size)
    logits_buffer = hidden_states.new_empty(buffer_shape, dtype=compute_dtype)
    scores_buffer = logits_buffer if loss_dtype == compute_dtype else torch.empty_like(logits_buffer, dtype=loss_dtype)
    log_probs_buffer = torch.empty_like(scores_buffer)

    for start in range(0, num_tokens, chunk_size):
        chunk = slice(start, min(start + chunk_size, num_tokens))
        rows = chunk.stop - chunk.start
        logits, scores, log_probs = logits_buffer[:rows], scores_buffer[:rows], log_probs_buffer[:rows]
        is_ignored = (labels[chunk] == ignore_index).unsqueeze(1)
        targets = labels[chunk].unsqueeze(1).masked_fill(is_ignored, 0)
        # A zeroed hidden state adds exactly nothing to the weight gradient: cheaper than masking (rows, vocab_size).
        inputs = hidden_states[chunk].to(compute_dtype).masked_fill(is_ignored, 0)

        torch.mm(inputs, output_weight.t(), out=logits)
        if scores is not logits:
            scores.copy_(logits)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        torch.log_softmax(scores, dim=-1, out=log_probs)
        target_log_probs = log_probs.gather(1, targets)
        total -= target_log_probs.masked_fill(is_ignored, 0).sum()
        if z_loss_coefficient:
            # A log-probability is a score minus the logarithm of the sum, which needs no second pass this way.
            log_sum = (scores.gather(1, targets) - target_log_probs).masked_fill_(is_ignored, 0)
            z_total += z_loss_coefficient * log_sum.square().sum()
        if not (needs_hidden_gradient or needs_weight_gradient):
            continue

        # d loss / d scores = softmax - one_hot. expm1 keeps p - 1 of a confident token, which bf16 would round to 0.
        gradient = log_probs.exp_()
        if z_loss_coefficient:  # d log_sum^2 / d scores = 2 log_sum softmax
            z_slope = 2 * z_loss_coefficient * log_sum
            gradient.addcmul_(gradient, z_slope)
            gradient.scatter_(1, targets, target_log_probs.expm1() + z_slope * target_log_probs.exp())
        else:
            gradient.scatter_(1, targets, target_log_probs.expm1_())
        if softcap is not None:
            gradient.addcmul_(gradient, scores.div_(softcap).square_(), value=-1)  # times 1 - (scores / softcap)^2
        if gradient.dtype != compute_dtype:
            gradient = logits.copy_(gradient)
        if needs_hidden_gradient:
            hidden_gradient[chunk] = (gradient @ output_weight).masked_fill_(is_ignored, 0)
        if needs_weight_gradient:
            for first_row in range(0, vocab_size, _WEIGHT_ROWS_PER_BLOCK):
                block = slice(first_row, min(first_row + _WEIGHT_ROWS_PER_BLOCK, vocab_size))
                weight_gradient[block] += (gradient[:, block].t() @ inputs).to(loss_dtype)

    return total.add_(z_total), z_total, hidden_gradient, weight_gradient


def _empty_outputs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    compute_dtype: torch.dtype,
    needs_hidden_gradient: bool,
    needs_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised results of the operator."""
    loss_dtype = torch.promote_types(compute_dtype, torch.float32)
    return (
        hidden_states.new_empty((), dtype=loss_dtype),
        hidden_states.new_empty((), dtype=loss_dtype),
        hidden_states.new_empty(hidden_states.shape if needs_hidden_gradient else (0,), dtype=compute_dtype),
        weight.new_empty(weight.shape if needs_weight_gradient else (0,), dtype=loss_dtype),
    )


# One opaque operator, so that torch.compile neither breaks the graph here nor unrolls the loop over chunks. Its name
# must be unique in the process: torch lets a second registration silently replace the first, and each checkpoint
# loaded with trust_remote_code brings its own copy of this file, under a module name of its own.
_linear_cross_entropy_sum = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z_]', '_', __name__)}::linear_cross_entropy_sum", _summed_loss_and_gradients, mutates_args=()
)


@_linear_cross_entropy_sum.register_fake
def _(
    hidden_states,
    weight,
    labels,
    softcap,
    z_loss_coefficient,
    vocab_size,
    ignore_index,
    chunk_size,
    compute_dtype,
    needs_hidden_gradient,
    needs_weight_gradient,
):
    return _empty_outputs(hidden_states, weight, compute_dtype, needs_hidden_gradient, needs_weight_gradient)


def _keep_gradients(ctx, inputs, output) -> None:
    hidden_states, weight, *_, needs_hidden_gradient, needs_weight_gradient = inputs
    _, z_total, hidden_gradient, weight_gradient = output
    ctx.mark_non_differentiable(z_total, hidden_gradient, weight_gradient)
    ctx.set_materialize_grads(False)  # otherwise backward is handed a (vocab_size, hidden_size) block of zeros
    ctx.save_for_backward(hidden_gradient, weight_gradient)
    ctx.dtypes = (
        hidden_states.dtype if needs_hidden_gradient else None,
        weight.dtype if needs_weight_gradient else None,
    )


def _scale_gradients(ctx, total_gradient: torch.Tensor | None, *_):
    """Chain rule: the stored gradients are those of the sum; 1 / num_items and a loss scale arrive only here."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy is differentiable once only; for create_graph=True use plain logits.")
    # Multiplied in the loss dtype, then rounded: in bf16 the factor 1 / num_items alone is off by up to 0.2%.
    hidden_gradient, weight_gradient = (
        None if dtype is None or total_gradient is None else (saved.to(total_gradient.dtype) * total_gradient).to(dtype)
        for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return hidden_gradient, weight_gradient, *(None,) * 9


_linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(softcap * tanh(hidden_states @ weight.T / softcap), labels)` that never holds all logits.

    hidden_states: (num_tokens, hidden_size), floating point; weight: (rows, hidden_size), of any floating dtype;
    labels: (num_tokens,), int64, aligned with hidden_states (the caller shifts), `ignore_index` where there is none.
    vocab_size: number of real ids; the rows of `weight` beyond it get no probability and an exactly zero gradient.
    softcap: bound of the logits (arXiv:2408.00118, section 2), applied in fp32; None for none.
    num_items_in_batch: the summed loss is divided by it; by the number of labels that are not ignored when None.
    chunk_size: tokens whose logits exist at once; by default hidden_size, and at least 512. The weight gradient is kept
    in fp32 while it adds up, and as many tokens as hidden_size make a buffer of logits no larger than that sum, on
    any vocabulary; fewer tokens only add passes over the sum.

    Returns the loss in nats per token, fp32 for every dtype of the inputs (float64 for float64). Matmuls run in the
    dtype of autocast where it is on, otherwise in that of hidden_states; softmax, loss and the sum of the weight
    gradient stay in fp32. As in `torch.nn.functional.cross_entropy`, the mean over no labels is nan with zero
    gradients. Gradients are formed in the forward pass (as in Liger Kernel, arXiv:2410.10989), so that backward only
    scales them; differentiating twice raises RuntimeError. Raises ValueError for shapes or sizes that do not fit.
    """
    loss, _ = linear_cross_entropy_and_z_loss(
        hidden_states,
        weight,
        labels,
        z_loss_coefficient=0.0,
        vocab_size=vocab_size,
        softcap=softcap,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    return loss


def linear_cross_entropy_and_z_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss_coefficient: float,
    vocab_size: int | None = None,
    softcap: float | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy` plus z-loss, and the z-loss alone, without a gradient.

    z-loss is z_loss_coefficient times the square of log(sum(exp(logits))), per token as the cross-entropy is: it keeps
    the logits from drifting away together, which a softmax does not see (PaLM, arXiv:2204.02311, section 5: 1e-4).
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check_arguments(hidden_states, weight, labels, vocab_size, softcap, chunk_size)
    device_type = hidden_states.device.type
    compute_dtype = hidden_states.dtype
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    total, z_total, _, _ = _linear_cross_entropy_sum(
        hidden_states,
        weight,
        labels,
        softcap,
        z_loss_coefficient,
        vocab_size,
        ignore_index,
        max(512, weight.shape[1]) if chunk_size is None else chunk_size,
        compute_dtype,
        torch.is_grad_enabled() and hidden_states.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return (
        _mean_over_labels(total, labels, num_items_in_batch, ignore_index),
        _mean_over_labels(z_total, labels, num_items_in_batch, ignore_index),
    )


def logits_z_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss_coefficient: float,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The z-loss of `linear_cross_entropy_and_z_loss` from all logits (..., vocab_size), with a gradient."""
    log_sum = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    total = z_loss_coefficient * log_sum.square().masked_fill(labels == ignore_index, 0).sum()
    return _mean_over_labels(total, labels, num_items_in_batch, ignore_index)


def _mean_over_labels(
    total: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    if num_items_in_batch is None:
        num_labels = (labels != ignore_index).sum()
        # Dividing by zero would give nan gradients too; nn.functional.cross_entropy gives zeros.
        return torch.where(num_labels > 0, total / num_labels.clamp(min=1), torch.nan)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _check_arguments(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden_states and weight must be (num_tokens, hidden_size) and (rows, hidden_size), got "
            f"{tuple(hidden_states.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden_states.shape[:1]:
        raise ValueError(f"labels must be (num_tokens,) = {tuple(hidden_states.shape[:1])}, got {tuple(labels.shape)}")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be between 1 and the {weight.shape[0]} rows of weight, got {vocab_size}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
