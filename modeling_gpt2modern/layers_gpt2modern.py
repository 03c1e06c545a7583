"""Provide the parts of GPT2-Modern: norms, MLPs, rotary embedding, residual mixes and packed documents."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils.import_utils import is_tracing

from .configuration_gpt2modern import MLPS, GPT2ModernConfig


class GPT2ModernRMSNorm(nn.Module):
    """Normalise to x / sqrt(mean(x^2) + eps), times a learned gain if `elementwise_affine` (arXiv:1910.07467).

    Computes in fp32 and returns the dtype of the input; with a gain identical to Llama's.
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


def build_norm(config: GPT2ModernConfig) -> nn.Module:
    """Build a norm of the residual stream."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)


class GPT2ModernMLP(nn.Module):
    """Compute down(activation(up(x))), as in GPT-2."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[MLPS[config.mlp_type].activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPT2ModernGatedMLP(nn.Module):
    """Compute down(activation(gate(x)) * up(x)) (arXiv:2002.05202); identical to Llama's."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[MLPS[config.mlp_type].activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def build_mlp(config: GPT2ModernConfig) -> nn.Module:
    """Build the MLP that `config.mlp_type` names in MLPS."""
    return GPT2ModernGatedMLP(config) if MLPS[config.mlp_type].gated else GPT2ModernMLP(config)


class GPT2ModernRotaryEmbedding(nn.Module):
    """Compute cos and sin of position x frequency (RoPE, arXiv:2104.09864), for every `rope_type` of transformers.

    Identical to Llama's except that `partial_rotary_factor` applies to the default type too, and that cos and sin stay
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
        """Return the frequencies theta^(-2i / rotary_dim), (rotary_dim / 2,), and the factor 1 of cos and sin."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Move the frequencies to another device but keep them in fp32, even in `model.bfloat16()`.

        Rounded to bf16, with 128 dimensions per head, the angle at position 1,000 would be wrong by up to 1.2 radians.
        """

        def move(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (batch, seq_len, rotary_dim) in fp32, for position_ids of shape (batch, seq_len)."""
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq  # (batch, seq_len, rotary_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (batch, seq_len, rotary_dim)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first rotary_dim dimensions of query and key by their position (RoPE, arXiv:2104.09864).

    The layout is half-split as in Llama: dimension i is paired with i + rotary_dim / 2.
    query: (batch, num_heads, seq_len, head_dim); key: same with num_key_value_heads; cos, sin: (batch, seq_len,
    rotary_dim), fp32, with an even rotary_dim <= head_dim. Rotates in fp32 and returns both in their input dtype.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (batch, 1, seq_len, rotary_dim)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    rotated, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)  # (batch, heads, seq_len, rotary_dim / 2) each
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(states.dtype), passed), dim=-1)


class FirstArgument(nn.Module):
    """Return the first of two tensors: stands in for a residual mix that is switched off, as nn.Identity would."""

    def forward(self, states: torch.Tensor, other_states: torch.Tensor | None) -> torch.Tensor:
        return states


class ResidualMix(nn.Module):
    """Hold the learned weights of a mix of two tensors; they start at `initial_weight`.

    A single weight is a vector of length 1, because FSDP2 does not shard 0-dimensional parameters.
    """

    initial_weight: tuple[float, ...]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(self.initial_weight))


class UNetSkip(ResidualMix):
    """Compute x + w * y, where y is the output of the mirror layer in the first half of the model."""

    initial_weight = (1.0,)

    def forward(self, hidden_states: torch.Tensor, skip_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.weight * skip_states


class EmbeddingResidual(ResidualMix):
    """Compute a * x + b * x0, where x0 is the input of the first layer."""

    initial_weight = (1.0, 0.0)

    def forward(self, hidden_states: torch.Tensor, embedding_states: torch.Tensor) -> torch.Tensor:
        return self.weight[0] * hidden_states + self.weight[1] * embedding_states


class ValueResidual(ResidualMix):
    """Compute (1 - w) * v + w * v1, where v1 are the values of the first layer (arXiv:2410.17897, with a learned w).

    Returns the dtype of v: w is fp32 under autocast, and flash attention needs values in the dtype of the queries.
    """

    initial_weight = (0.5,)

    def forward(self, value_states: torch.Tensor, first_value_states: torch.Tensor) -> torch.Tensor:
        mixed = (1 - self.weight) * value_states + self.weight * first_value_states
        return mixed.to(value_states.dtype)


def positions_from_lengths(cu_seq_lens: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
    """Return position_ids (batch, seq_len) that restart at 0 with each document.

    cu_seq_lens: (documents + 1,), the index in the flattened batch at which each document begins and the last one ends.
    """
    index = torch.arange(batch_size * seq_len, device=cu_seq_lens.device)  # (batch * seq_len,)
    document = torch.searchsorted(cu_seq_lens[1:].contiguous(), index.to(cu_seq_lens.dtype), right=True)
    return (index - cu_seq_lens[document]).view(batch_size, seq_len)


class PackedDocuments(NamedTuple):
    """Describe rows that hold several documents, so that a token attends only to tokens of its own document.

    The `rank` of a token is its index among the tokens of its row, without padding and including those in the cache.
    A new document begins where the position does not increase from one token to the next; a jump to a higher position,
    which padding inside a row leaves, begins none. The document of the first new token began `position` ranks before
    it, or at rank 0 where there are fewer.

    starts: (batch, seq_len), rank of the first token of each token's document.
    ranks: (batch, past_length + seq_len), rank of each token, including those in the cache; None without padding, where
        the rank is the index.
    past_length: number of tokens in the cache.
    """

    starts: torch.Tensor
    ranks: torch.Tensor | None
    past_length: int | torch.Tensor

    @classmethod
    def find(
        cls, position_ids: torch.Tensor, past_length: int | torch.Tensor, attention_mask: torch.Tensor | None
    ) -> "PackedDocuments | None":
        """Find the documents in each row; return None where every row is one document.

        position_ids: (batch, seq_len); attention_mask: (batch, past_length + seq_len), 0 for padding, or None.
        A traced graph cannot depend on values, so that tracing never returns None.
        """
        batch_size, seq_len = position_ids.shape
        index = torch.arange(seq_len, device=position_ids.device).expand(batch_size, -1)
        if attention_mask is None:
            ranks, query_ranks, is_token = None, index + past_length, torch.ones_like(index, dtype=torch.bool)
        else:
            attention_mask = attention_mask.to(position_ids.device)
            ranks = attention_mask.long().cumsum(-1) - 1  # (batch, past_length + seq_len)
            query_ranks, is_token = ranks[:, -seq_len:], attention_mask[:, -seq_len:].bool()

        # Padding gets position and rank of the token before it, or at the start of a row of the first token after it.
        source = torch.where(is_token, index, -1).cummax(-1).values
        source = torch.where(source < 0, is_token.int().argmax(-1, keepdim=True), source)  # (batch, seq_len)
        positions = position_ids.expand(batch_size, -1).gather(1, source)
        ranks_of_tokens = query_ranks.gather(1, source)
        # (batch, seq_len - 1): whether a new document begins at each token but the first.
        begins = (positions[:, 1:] <= positions[:, :-1]) & (source[:, 1:] != source[:, :-1])
        first_start = (ranks_of_tokens - positions)[:, :1].clamp(min=0)
        starts = torch.cat((first_start, torch.where(begins, ranks_of_tokens[:, 1:], 0)), dim=-1)
        starts = starts.cummax(-1).values  # (batch, seq_len)
        if is_tracing(starts) or ((starts > 0) & is_token).any():
            return cls(starts, ranks, past_length)
        return None

    def mask_function(self, batch_idx, head_idx, query_idx, key_idx) -> torch.Tensor:
        """Say whether a query and a key are in the same document; the `and_mask_function` of transformers' masks."""
        start = self.starts[batch_idx, query_idx - self.past_length]
        if self.ranks is None:
            return key_idx >= start
        return self.ranks[batch_idx, key_idx.clamp(max=self.ranks.shape[1] - 1)] >= start

    def flash_arguments(self, key_length: int, key_offset: int) -> dict[str, Any]:
        """Return the arguments of flash attention, which takes lengths of documents instead of a mask.

        key_length: keys per row that the layer's cache will hold; key_offset: index of the first of them, above 0 where
        a sliding window has dropped some. Keys without a query, before the first document and after the last, become
        documents without queries. Raises ValueError if there is padding as well.
        """
        batch_size, seq_len = self.starts.shape
        if self.ranks is not None and (self.ranks[:, -1] + 1 < self.ranks.shape[1]).any():
            raise ValueError(
                "flash attention takes packed documents or padding, not both: leave out attention_mask and let the "
                "padding be a document of its own in position_ids, or use attn_implementation='sdpa'"
            )
        index = torch.arange(seq_len, device=self.starts.device).expand(batch_size, -1)  # (batch, seq_len)
        rows = torch.arange(batch_size, device=self.starts.device).unsqueeze(1)  # (batch, 1)
        zero, one = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)

        # (batch, seq_len + 2) each: the keys before the first document, the tokens, and the keys after the last one;
        # whether a document begins there, and its first query and key in the flattened batch.
        is_first = torch.cat((one, one, self.starts[:, 1:] != self.starts[:, :-1], one), dim=1)
        queries = torch.cat((zero, index, zero + seq_len), dim=1) + rows * seq_len
        first_keys = (self.starts - key_offset).clamp(min=0)
        keys = torch.cat((zero, first_keys, zero + self.past_length + seq_len - key_offset), dim=1) + rows * key_length
        query_lengths = queries[is_first].diff(append=queries.new_tensor([batch_size * seq_len]))  # (documents,)
        key_lengths = keys[is_first].diff(append=keys.new_tensor([batch_size * key_length]))  # (documents,)

        is_document = query_lengths + key_lengths > 0
        query_lengths, key_lengths = query_lengths[is_document], key_lengths[is_document]
        return {
            "attention_mask": None,
            "cu_seq_lens_q": F.pad(query_lengths.cumsum(0), (1, 0)).to(torch.int32),
            "cu_seq_lens_k": F.pad(key_lengths.cumsum(0), (1, 0)).to(torch.int32),
            "max_length_q": int(query_lengths.max()),
            "max_length_k": int(key_lengths.max()),
        }
