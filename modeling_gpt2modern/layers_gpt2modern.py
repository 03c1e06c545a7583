"""Norms, MLPs, rotary embedding, residual mixes and the loss of GPT2-Modern: parts that know nothing of each other."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


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
        return hidden_states if self.weight is None else self.weight * hidden_states

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
    """(1 - w) * v + w * v1, v1 being the values of the first layer (arXiv:2410.17897, with a learned w)."""

    initial_weight = (0.5,)

    def forward(self, value_states: torch.Tensor, first_value_states: torch.Tensor) -> torch.Tensor:
        return (1 - self.weight) * value_states + self.weight * first_value_states


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(logits / cap), which keeps logits within +-cap (arXiv:2408.00118); None caps nothing."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Cross-entropy of softmax(hidden_states @ weight.T) against labels, a scalar in fp32 (nats/token).

    hidden_states: (tokens, hidden_size); weight: (rows, hidden_size); labels: (tokens,), aligned with hidden_states.
    vocab_size: rows that are real ids; the rows beyond get no probability. softcap: see `soft_cap`.
    num_items_in_batch: divisor of the summed loss; None means the number of labels that are not ignore_index.
    """
    logits = soft_cap(F.linear(hidden_states, weight)[:, :vocab_size].float(), softcap)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return loss / ((labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)
