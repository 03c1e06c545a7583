"""Build models of other projects in the sizes of a GPT2-Modern configuration, to measure them beside it.

Two are classes of transformers. The third has the form of nanoGPT (github.com/karpathy/nanoGPT): GPT-2 in plain torch.
All are called like models of transformers and have as many parameters as the configuration's own model. They know no
padding rows: each row of the vocabulary is a token to them.
"""

import functools
import math
from collections.abc import Callable

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gpt2modern.conversion import ARCHITECTURES
from modeling_gpt2modern import GPT2ModernConfig


def build_stock(architecture: str, config: GPT2ModernConfig) -> PreTrainedModel:
    """Build a transformers model (its class's name) with random weights, and sizes and dropout of `config`; sdpa."""
    settings = {
        key: value for trait in ARCHITECTURES[architecture] for key, value in trait.stock_settings(config).items()
    }
    stock_class = getattr(transformers, architecture)
    return stock_class._from_config(stock_class.config_class(**settings), attn_implementation="sdpa")


class NanoGPTBlock(nn.Module):
    """Add causal attention, with queries, keys and values from one matrix, and an MLP to the residual stream."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attn_norm = nn.LayerNorm(size, config.norm_eps)
        self.qkv = nn.Linear(size, 3 * size)
        self.attn_out = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size, config.norm_eps)
        self.mlp_in = nn.Linear(size, config.intermediate_size)
        self.activation = nn.GELU()  # the exact form, as in nanoGPT
        self.mlp_out = nn.Linear(config.intermediate_size, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, seq_len, size = hidden_states.shape
        parts = self.qkv(self.attn_norm(hidden_states)).split(size, dim=2)
        heads = (part.view(batch, seq_len, self.num_heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)  # (batch, num_heads, seq_len, head_dim)
        hidden_states = hidden_states + self.attn_out(attended.transpose(1, 2).reshape(batch, seq_len, size))
        return hidden_states + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(hidden_states))))


class NanoGPT(nn.Module):
    """Predict the next token as nanoGPT does: learned positions, tied head, loss from all logits. Has no dropout."""

    def __init__(self, config: GPT2ModernConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(NanoGPTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = 2 * config.num_hidden_layers if "_out." in name else 1
                nn.init.normal_(parameter, std=config.initializer_range / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def get_output_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **ignored) -> CausalLMOutput:
        """Return `logits` (batch, seq_len, vocab_size) and, with labels (which are shifted here), the mean `loss`."""
        hidden_states = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        logits, loss = self.lm_head(self.norm(hidden_states)), None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # as transformers does, so that no logits are copied
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(logits=logits, loss=loss)


# Each is called with a GPT2ModernConfig and returns a model with random weights.
PEERS: dict[str, Callable[..., nn.Module]] = {
    "GPT2LMHeadModel": functools.partial(build_stock, "GPT2LMHeadModel"),  # for the gpt2 presets
    "nanoGPT": NanoGPT,  # for the gpt2 presets
    "LlamaForCausalLM": functools.partial(build_stock, "LlamaForCausalLM"),  # for the modern presets
}


def peer_loss(model: nn.Module, batch: torch.Tensor, **ignored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a peer's own mean loss twice, the second detached: an objective for `train_step`.

    batch: (sequences, block_size + 1) token ids; a peer shifts the labels itself, so it has block_size - 1 targets.
    """
    loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1], use_cache=False).loss
    return loss, loss.detach()
