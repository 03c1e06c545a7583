"""Provide the attention functions that transformers does not have: plain PyTorch, and blocks of queries for a CPU.

Importing this file adds "blockwise" to the names that `attn_implementation` accepts.
"""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

BLOCKWISE_QUERIES = 128  # 48 heads x 128 queries x 512 keys in bf16 are 6 MB, which stay in a CPU's cache
BLOCKWISE_LONGEST_ROW = 1024  # tokens; in longer rows the saved weights take much memory, and the gain is gone


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention, softmax(query @ key.T * scaling + mask) @ value, in plain PyTorch. All others must match it.

    query: (batch, num_heads, query_len, head_dim); key, value: (batch, num_key_value_heads, key_len, head_dim).
    Returns the output (batch, query_len, num_heads, head_dim) and the weights (batch, num_heads, query_len, key_len).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (batch, num_heads, key_len, head_dim)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (batch, num_heads, query_len, key_len)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention for blocks of queries, each with the keys that the block can see: the fastest way to
    train on a CPU in bf16, where torch's own kernel multiplies far below the speed of a matrix product.

    query: (batch, num_heads, seq_len, head_dim); key, value: (batch, num_key_value_heads, seq_len, head_dim);
    attention_mask: bool, (batch or 1, 1, seq_len, seq_len), or None for the causal mask alone. Scores are rounded to
    the dtype of query, as in "eager"; the softmax is computed in fp32. Returns the output (batch, seq_len, num_heads,
    head_dim) and None. Rows of more than 1,024 tokens, rows of a length unknown when a graph is traced, queries that
    read a cache and masks with numbers get "sdpa". Raises ValueError for a mask that is not causal, except in a traced
    graph, which cannot look at values.
    """
    batch_size, num_heads, seq_len, _ = query.shape
    is_fixed = isinstance(seq_len, int) and key.shape[2] == seq_len <= BLOCKWISE_LONGEST_ROW
    if not is_fixed or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and not is_tracing(attention_mask) and attention_mask.triu(1).any():
        raise ValueError("blockwise attention is causal, but attention_mask shows later tokens; use 'sdpa'")
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    query, key, value = (states.flatten(0, 1) for states in (query * scaling, key, value))
    outputs = []
    for start in range(0, seq_len, BLOCKWISE_QUERIES):
        end = min(start + BLOCKWISE_QUERIES, seq_len)
        first = 0 if sliding_window is None else max(0, start + 1 - sliding_window)
        scores = query[:, start:end] @ key[:, first:end].transpose(1, 2)  # (batch * num_heads, queries, keys)
        if attention_mask is None:
            seen = torch.ones(end - start, end - first, dtype=torch.bool, device=query.device).tril(start - first)
        else:
            seen = attention_mask[:, :, start:end, first:end]
        scores = scores.unflatten(0, (batch_size, num_heads)).masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.flatten(0, 1).softmax(dim=-1)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        outputs.append(weights @ value[:, first:end])
    output = torch.cat(outputs, dim=1)  # (batch * num_heads, seq_len, head_dim)
    return output.unflatten(0, (batch_size, num_heads)).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("blockwise", blockwise_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("blockwise", sdpa_mask)
