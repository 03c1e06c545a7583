"""Provide the parts of a GPT2-Modern layer: norms, MLPs, RoPE, residual weights, gates, documents, previous tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils.import_utils import is_tracing

from .configuration_gpt2modern import MLPS, GPT2ModernConfig


class GPT2ModernRMSNorm(nn.Module):
    """Compute x / sqrt(mean(x^2) + eps) over the last dimension, times a learned gain if `elementwise_affine`
    (RMSNorm, arXiv:1910.07467).

    Computes in fp32 and returns the dtype of the input. With a gain, the result is the same as that of Llama's norm.
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
    """Return a new norm over hidden_size, of the kind and with the settings of the configuration."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)


def build_activation(mlp_type: str) -> nn.Module:
    """Return a new activation function of the MLP kind `mlp_type` (a key of the table MLPS)."""
    name = MLPS[mlp_type].activation
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]  # the same function in one operation, not eight


class GPT2ModernMLP(nn.Module):
    """Compute down(activation(up(x))), the MLP without a gate that GPT-2 has."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = build_activation(config.mlp_type)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPT2ModernGatedMLP(nn.Module):
    """Compute down(activation(gate(x)) * up(x)), the gated MLP of arXiv:2002.05202 that Llama has."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.writes_residual = True
        self.act_fn = build_activation(config.mlp_type)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def build_mlp(config: GPT2ModernConfig) -> nn.Module:
    """Return a new MLP, gated or not, of the kind `config.mlp_type` (a key of the table MLPS)."""
    return GPT2ModernGatedMLP(config) if MLPS[config.mlp_type].gated else GPT2ModernMLP(config)


class GPT2ModernRotaryEmbedding(nn.Module):
    """Compute cos and sin of position x frequency (RoPE, arXiv:2104.09864), for every `rope_type` of transformers.

    Differs from Llama's module in two points: `partial_rotary_factor` applies to the default type too, and cos and sin
    stay in fp32. transformers relies on the names of the class, of its buffers and of
    `compute_default_rope_parameters` to compute the frequencies again in a model that was built on the meta device.
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
        """Return RoPE's frequencies theta^(-2i / rotary_dim), (rotary_dim / 2,), and 1.0, the factor of cos and sin."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Move the RoPE frequencies to another device, but keep them in fp32 even if `fn` converts the model to bf16.

        In bf16, with 128 dimensions per head, the angle at position 1,000 would be wrong by up to 1.2 radians.
        """

        def move(buffer: torch.Tensor) -> torch.Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cos and sin of RoPE for position_ids (batch, seq_len): two fp32 tensors (batch, seq_len,
        rotary_dim). Of hidden_states only the device is used."""
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inv_freq  # (batch, seq_len, rotary_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (batch, seq_len, rotary_dim)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key with the first rotary_dim dimensions of each head rotated according to the position of the
    token (RoPE, arXiv:2104.09864); the other dimensions do not change.

    Dimension i is paired with dimension i + rotary_dim / 2, as in Llama. query: (batch, num_heads, seq_len, head_dim);
    key: the same with num_key_value_heads; cos, sin: (batch, seq_len, rotary_dim), fp32, with an even
    rotary_dim <= head_dim. Rotates in fp32 and returns both tensors in the dtype of the input.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (batch, 1, seq_len, rotary_dim)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim < states.shape[-1]:
        return torch.cat((_rotate(states[..., :rotary_dim], cos, sin), states[..., rotary_dim:]), dim=-1)
    first, second = states.chunk(2, dim=-1)  # (batch, heads, seq_len, rotary_dim / 2) each
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


def unchanged(states: torch.Tensor, *other_states: torch.Tensor | None) -> torch.Tensor:
    """Return the first tensor as it is: takes the place of a module that the configuration turns off. It is a function,
    because calling a module costs ten times as much, which counts when a model generates single tokens."""
    return states


def build_dropout(probability: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a new dropout module, or `unchanged` if the probability is 0."""
    return nn.Dropout(probability) if probability else unchanged


class ResidualMix(nn.Module):
    """Hold the learned weights of a sum of two tensors: the base class of the modules that compute such sums.

    `initial_weight` lists the values with which training starts. A single weight is a vector of length 1, because FSDP2
    cannot shard 0-dimensional parameters.
    """

    initial_weight: tuple[float, ...]

    def __init__(self, initial_weight: tuple[float, ...] | None = None):
        super().__init__()
        self.initial_weight = self.initial_weight if initial_weight is None else initial_weight
        self.weight = nn.Parameter(torch.tensor(self.initial_weight))


class WeightedSum(ResidualMix):
    """Compute x + w * y with a learned w. In a U-Net skip connection, x is the input of a layer in the second half of
    the model and y the output of the layer at the same distance from the middle in the first half."""

    initial_weight = (1.0,)

    def forward(self, hidden_states: torch.Tensor, skip_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.weight * skip_states


class EmbeddingResidual(ResidualMix):
    """Compute a * x + b * x0 with learned a and b, where x is the input of a layer and x0 that of the first layer."""

    initial_weight = (1.0, 0.0)

    def forward(self, hidden_states: torch.Tensor, embedding_states: torch.Tensor) -> torch.Tensor:
        return self.weight[0] * hidden_states + self.weight[1] * embedding_states


class ValueResidual(ResidualMix):
    """Compute (1 - w) * v + w * v1 with a learned w, where v are the attention values of a layer and v1 those of the
    first layer (value residual, arXiv:2410.17897).

    Returns the dtype of v, although w is fp32 under autocast: flash attention needs values in the dtype of the queries.
    """

    initial_weight = (0.5,)

    def forward(self, value_states: torch.Tensor, first_value_states: torch.Tensor) -> torch.Tensor:
        mixed = (1 - self.weight) * value_states + self.weight * first_value_states
        return mixed.to(value_states.dtype)


class Gate(nn.Module):
    """Compute sigmoid(W x[:12]) from the first 12 features of x (fewer, if x has fewer), one gate per row of W.

    W starts at zero, so that twice the gate starts at 1. It is not an nn.Linear, so that LoRA and quantisers, which
    look for that class, leave these few weights alone. Source: modded-nanogpt (August 2025).
    """

    def __init__(self, hidden_size: int, num_gates: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_gates, min(12, hidden_size)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(F.linear(hidden_states[..., : self.weight.shape[1]], self.weight))


class Smear(ResidualMix):
    """Compute x + w * gate * y with a learned w, where y is the embedding of the previous token."""

    initial_weight = (0.0,)

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = Gate(hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor, other_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.weight * self.gate(hidden_states) * other_states


class ValueEmbedding(Gate):
    """Add 2 * gate * e to the attention values, where e is an embedding of the token and each key and value head has a
    gate of its own. Returns the dtype of the values."""

    def forward(self, value_states: torch.Tensor, hidden_states: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Return (batch, num_heads, seq_len, head_dim), the shape of value_states. hidden_states: the input of the
        attention, (batch, seq_len, hidden_size); embeds: (batch, seq_len, num_heads * head_dim)."""
        gate = 2 * super().forward(hidden_states).unsqueeze(-1)  # (batch, seq_len, num_heads, 1)
        added = gate * embeds.unflatten(-1, (gate.shape[2], -1))  # (batch, seq_len, num_heads, head_dim)
        return (value_states + added.transpose(1, 2)).to(value_states.dtype)


def bigram_rows(input_ids: torch.Tensor, previous_ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the row of a table of `num_rows` for each pair of token ids, by modded-nanogpt's hash; the last row is for
    tokens without a previous one, whose previous id is -1. All tensors: (batch, seq_len)."""
    rows = torch.bitwise_xor(36313 * input_ids.long(), 27191 * previous_ids.long()) % (num_rows - 1)
    return rows.masked_fill(previous_ids < 0, num_rows - 1)


class TokenHistory(DynamicLayer):
    """Keep a state of every token, to be read for the token after it: one more layer of a Cache, so that transformers
    crops, reorders and repeats it with the others."""


class LastToken(StaticLayer):
    """Keep a state of the last token only, in the same memory at every step: TokenHistory for a StaticCache."""

    def __init__(self):
        super().__init__(max_cache_len=1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states[:, :, -1:])
        self.cumulative_length.fill_(1)
        return self.keys, self.values


def add_histories(cache: Cache, num_layers: int, count: int) -> CacheLayerMixin:
    """Append `count` histories to the layers of a cache for a model of `num_layers`, unless it has them, and return the
    first of them, that of the token ids."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[-1], (TokenHistory, LastToken)):
        kind = LastToken if isinstance(cache.layers[0], StaticLayer) else TokenHistory
        cache.layers.extend(kind() for _ in range(count))
    return cache.layers[-count]


class PreviousTokens(NamedTuple):
    """Describe the token before each token: that of the same document, without padding in between.

    ids: (batch, seq_len), -1 for the first token of a document.
    source: (batch, 1 + seq_len), of the last token in the cache and each new one: the index, among these, of the
        nearest token at or before it that is not padding; None if there is no padding.
    """

    ids: torch.Tensor
    source: torch.Tensor | None

    @classmethod
    def find(
        cls, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: Any, history: CacheLayerMixin | None
    ) -> "PreviousTokens":
        """Return the previous tokens of input_ids (batch, seq_len). A position that is not higher than the one before
        it begins a document. position_ids: (batch or 1, seq_len); attention_mask: (batch, past_length + seq_len), 0 for
        padding; anything else, such as the masks of generate(), which pads on the left, is not read. history: that of
        the ids in the cache, which are kept plus 1.
        """
        source, positions = None, F.pad(position_ids, (1, 0)).expand(input_ids.shape[0], -1)
        if isinstance(attention_mask, torch.Tensor):
            is_token = F.pad(attention_mask[:, -input_ids.shape[1] :].bool(), (1, 0), value=True)
            index = torch.arange(is_token.shape[1], device=is_token.device)
            source = torch.where(is_token, index, 0).cummax(-1).values
            positions = positions.gather(1, source)
        ids = cls(input_ids, source).shift(input_ids[:, None, :, None] + 1, history)[:, 0, :, 0] - 1
        continues = positions.diff() > 0
        return cls(ids.masked_fill(~continues, -1), source)

    def shift(self, states: torch.Tensor, history: CacheLayerMixin | None) -> torch.Tensor:
        """Return for each token the state of the token before it, and append the states (batch, heads, seq_len, size)
        to the history. The first token of all gets zeros."""
        first = torch.zeros_like(states[:, :, :1])
        if history is not None and history.is_initialized and history.keys.numel():
            first = history.keys[:, :, -1:]
        row = torch.cat((first, states), dim=2)
        if self.source is not None:
            row = row.gather(2, self.source[:, None, :, None].expand(row.shape))
        if history is not None:
            history.update(row[:, :, 1:], row[:, :, 1:, :0])
        return row[:, :, :-1]


class KeyOffset(nn.Module):
    """Replace the dimensions of each key that RoPE does not rotate by those of the previous token's key (partial key
    offset, modded-nanogpt's record 49), so that a token can find in one layer what follows a token like itself."""

    def __init__(self, rotary_dim: int, history_index: int):
        super().__init__()
        self.rotary_dim, self.history_index = rotary_dim, history_index

    def forward(self, key_states: torch.Tensor, previous: PreviousTokens, cache: Cache | None) -> torch.Tensor:
        """Return the new key_states (batch, num_key_value_heads, seq_len, head_dim). Tokens without a previous one keep
        their own key."""
        rotated, own = key_states.tensor_split([self.rotary_dim], dim=-1)
        shifted = previous.shift(own, None if cache is None else cache.layers[self.history_index])
        return torch.cat((rotated, torch.where((previous.ids >= 0)[:, None, :, None], shifted, own)), dim=-1)


def positions_from_lengths(cu_seq_lens: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
    """Return position_ids (batch, seq_len) that restart at 0 at the first token of each document.

    cu_seq_lens: (documents + 1,), the index in the flattened batch at which each document starts, and then the index
    after the last token.
    """
    index = torch.arange(batch_size * seq_len, device=cu_seq_lens.device)  # (batch * seq_len,)
    document = torch.searchsorted(cu_seq_lens[1:].contiguous(), index.to(cu_seq_lens.dtype), right=True)
    return (index - cu_seq_lens[document]).view(batch_size, seq_len)


class PackedDocuments(NamedTuple):
    """Describe where documents start in rows that contain several, so that a token attends only to its own document.

    The `rank` of a token is its index in its row, counting the tokens in the cache but not the padding. A new document
    starts at each token whose position is not higher than that of the token before it; a jump to a higher position,
    which padding inside a row causes, starts no document. The document of the first new token started `position` ranks
    before that token, or at rank 0 if there are fewer ranks.

    starts: (batch, seq_len), for each token the rank of the first token of its document.
    ranks: (batch, past_length + seq_len), the rank of each token, including those in the cache; None if there is no
        padding, because the rank is then the index.
    past_length: number of tokens in the cache.
    """

    starts: torch.Tensor
    ranks: torch.Tensor | None
    past_length: int | torch.Tensor

    @classmethod
    def find(
        cls, position_ids: torch.Tensor, past_length: int | torch.Tensor, attention_mask: torch.Tensor | None
    ) -> "PackedDocuments | None":
        """Return the start of each document, found from the positions; return None if every row is a single document.

        position_ids: (batch, seq_len); attention_mask: (batch, past_length + seq_len), 0 for padding, or None if there
        is no padding. Never returns None while a graph is traced, because a graph cannot depend on values.
        """
        batch_size, seq_len = position_ids.shape
        if seq_len == 1 and not is_tracing(position_ids):  # generation: 5 operations decide, not 25
            rank = past_length
            if attention_mask is not None:
                rank = attention_mask.to(position_ids.device).sum(-1, keepdim=True) - 1
            if (position_ids >= rank).all():
                return None
        index = torch.arange(seq_len, device=position_ids.device).expand(batch_size, -1)
        if attention_mask is None:
            ranks, query_ranks, is_token = None, index + past_length, torch.ones_like(index, dtype=torch.bool)
        else:
            attention_mask = attention_mask.to(position_ids.device)
            ranks = attention_mask.long().cumsum(-1) - 1  # (batch, past_length + seq_len)
            query_ranks, is_token = ranks[:, -seq_len:], attention_mask[:, -seq_len:].bool()

        # Padding gets the position and rank of the token before it; at the start of a row, of the first token after it.
        source = torch.where(is_token, index, -1).cummax(-1).values
        source = torch.where(source < 0, is_token.int().argmax(-1, keepdim=True), source)  # (batch, seq_len)
        positions = position_ids.expand(batch_size, -1).gather(1, source)
        ranks_of_tokens = query_ranks.gather(1, source)
        # (batch, seq_len - 1): whether a new document starts at each token except the first.
        begins = (positions[:, 1:] <= positions[:, :-1]) & (source[:, 1:] != source[:, :-1])
        first_start = (ranks_of_tokens - positions)[:, :1].clamp(min=0)
        starts = torch.cat((first_start, torch.where(begins, ranks_of_tokens[:, 1:], 0)), dim=-1)
        starts = starts.cummax(-1).values  # (batch, seq_len)
        if is_tracing(starts) or ((starts > 0) & is_token).any():
            return cls(starts, ranks, past_length)
        return None

    def mask_function(self, batch_idx, head_idx, query_idx, key_idx) -> torch.Tensor:
        """Return whether the key at key_idx is in the document of the query at query_idx, or in a later one; the causal
        mask excludes the later ones. It has the signature of `and_mask_function` in transformers' masking functions."""
        start = self.starts[batch_idx, query_idx - self.past_length]
        if self.ranks is None:
            return key_idx >= start
        return self.ranks[batch_idx, key_idx.clamp(max=self.ranks.shape[1] - 1)] >= start

    def flash_arguments(self, key_length: int, key_offset: int) -> dict[str, Any]:
        """Return the keyword arguments with which flash attention separates documents: it takes the lengths of the
        documents instead of a mask.

        key_length: number of keys per row that the layer's cache will hold; key_offset: index of the first of these
        keys, above 0 if a sliding window has removed earlier ones. Keys before the first document and after the last
        one become documents without queries. Raises ValueError if the rows also contain padding.
        """
        batch_size, seq_len = self.starts.shape
        if self.ranks is not None and (self.ranks[:, -1] + 1 < self.ranks.shape[1]).any():
            raise ValueError(
                "flash attention supports several documents in a row or padding, not both; omit attention_mask and "
                "restart position_ids at 0 where padding starts, or use attn_implementation='sdpa'"
            )
        index = torch.arange(seq_len, device=self.starts.device).expand(batch_size, -1)  # (batch, seq_len)
        rows = torch.arange(batch_size, device=self.starts.device).unsqueeze(1)  # (batch, 1)
        zero, one = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)

        # (batch, seq_len + 2) each: the keys before the first document, the tokens, and the keys after the last one;
        # whether a document starts there, and its first query and key in the flattened batch.
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
