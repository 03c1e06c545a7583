"""Device memory of a training step: estimated from the model's shapes, and the largest micro-batch that fits."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.models import summed_loss
from gpt2modern.training.optimizers import muon_parameters
from modeling_gpt2modern import GPT2ModernConfig

# A CPU core is busy with a few thousand tokens; more of them in one pass only take memory.
CPU_TOKENS_PER_PASS = 8192
# Width of what an MLP keeps for its backward pass, in units of intermediate_size: gelu, before and after it; gelu_new,
# also its three factors; relu2, also between relu and square; swiglu, the gate, its silu, up and their product.
MLP_WIDTHS = {"gelu_new": 5, "gelu": 2, "relu2": 3, "swiglu": 4}
FORMULA = (
    "memory: weights 4 N (under autocast 6 N, with copies), gradients 4 P, optimizer 8 P (Muon: 4 per weight); "
    "activations per token L (8 D + a (i D + 2 Q + 2 K + m F)) + 8 D, and for the loss 4 V (D + C); N parameters, P "
    "of them trained, L layers, D hidden_size, Q and K widths of queries and keys, F intermediate_size, V vocab_size, "
    "a bytes per number, i inputs of matrix products (2; under autocast a copy for each: 4, gated 5), m 2 gelu, "
    "5 gelu_new, 3 relu2, 4 swiglu, C tokens whose logits exist at once; checkpointed: 4 D per layer and "
    "all of one layer"
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device; no fragmentation, no compiler's savings."""

    weights: int
    gradients: int
    optimizer_states: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_states + self.activations


def estimate_memory(
    model: PreTrainedModel,
    *,
    optimizer: str,
    mixed_precision: str,
    micro_batch_size: int,
    block_size: int,
    gradient_checkpointing: bool,
    shards: int = 1,
) -> MemoryEstimate:
    """By FORMULA; `model` may be on the meta device.

    shards: processes over which all but the activations is divided. The activations are within 20 % of what autograd
    was seen to keep for gpt2, modern and speedrun on a CPU.
    """
    parameters = model.num_parameters()
    return MemoryEstimate(
        weights=(4 if mixed_precision == "no" else 6) * parameters // shards,
        gradients=4 * model.num_parameters(only_trainable=True) // shards,
        optimizer_states=optimizer_state_bytes(model, optimizer) // shards,
        activations=activation_bytes(
            model.config,
            attn_implementation=model.config._attn_implementation,
            bytes_per_number=4 if mixed_precision == "no" else 2,
            tokens=micro_batch_size * block_size,
            block_size=block_size,
            gradient_checkpointing=gradient_checkpointing,
        ),
    )


def optimizer_state_bytes(model: nn.Module, optimizer: str) -> int:
    """Two fp32 averages per parameter for AdamW, one for each of Muon's."""
    by_muon = sum(parameter.numel() for parameter in muon_parameters(model)) if optimizer == "muon" else 0
    return 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - 4 * by_muon


def activation_bytes(
    config: GPT2ModernConfig,
    *,
    attn_implementation: str,
    bytes_per_number: int,
    tokens: int,
    block_size: int,
    gradient_checkpointing: bool,
) -> int:
    """What autograd keeps for the backward pass of one micro-batch, and the buffers of the loss."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    mlp = MLP_WIDTHS[config.mlp_type] * config.intermediate_size
    scores = 2 * config.num_attention_heads * block_size if attn_implementation == "eager" else 0
    inputs = 2 if bytes_per_number == 4 else 5 if config.mlp_type == "swiglu" else 4
    layer = 8 * width + bytes_per_number * (inputs * width + 2 * queries + 2 * keys + mlp + scores)
    layers = config.num_hidden_layers
    kept = 4 * width * layers + layer if gradient_checkpointing else layer * layers
    chunk = min(tokens, max(512, width))
    return tokens * (kept + 8 * width) + 4 * config.vocab_size * (width + chunk)


def largest_micro_batch_size(
    accelerator: Accelerator, model: PreTrainedModel, sizes: Sequence[int], **needs: Any
) -> int:
    """The largest of `sizes` (ascending) that fits on the device of every process.

    On an accelerator each is tried. On a CPU, where running out of memory ends the process, the estimate decides.
    needs: the keywords of `fits_by_trying`. `model` is not wrapped yet; its weights, its gradients and the random state
    are left as they are. Raises GPT2ModernError if not even the first fits, and under FSDP or DeepSpeed, where no process
    holds a whole model.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise GPT2ModernError(
            "--per_device_train_batch_size auto does not go with a model divided over devices; give it"
        )
    fits = fits_by_estimate if accelerator.device.type == "cpu" else fits_by_trying
    found = largest_that_fits(sizes, lambda size: fits(accelerator, model, size, **needs))
    agreed = accelerator.gather(torch.tensor([found], device=accelerator.device)).min().item()
    if agreed == 0:
        raise GPT2ModernError(
            f"one sequence of {needs['block_size']} tokens does not fit in the memory of {accelerator.device}: use "
            f"--gradient_checkpointing true, a smaller --block_size or a smaller model"
        )
    return agreed


def fits_by_estimate(
    accelerator: Accelerator, model: PreTrainedModel, size: int, *, block_size: int, optimizer: str, **needs: Any
) -> bool:
    """At most half of the memory that is available, and CPU_TOKENS_PER_PASS tokens."""
    estimate = estimate_memory(
        model,
        optimizer=optimizer,
        mixed_precision=accelerator.mixed_precision,
        micro_batch_size=size,
        block_size=block_size,
        gradient_checkpointing=model.is_gradient_checkpointing,
    )
    available = psutil.virtual_memory().available / 2 / accelerator.num_processes
    return estimate.total <= available and size * block_size <= max(CPU_TOKENS_PER_PASS, block_size)


def fits_by_trying(
    accelerator: Accelerator,
    model: PreTrainedModel,
    size: int,
    *,
    block_size: int,
    optimizer: str,
    separator: int | None,
) -> bool:
    """A forward and a backward pass beside a block of memory as large as what comes later: the optimizer's state, and
    the buckets in which several processes sum their gradients."""
    later_bytes = optimizer_state_bytes(model, optimizer)
    later_bytes += 4 * model.num_parameters() if accelerator.num_processes > 1 else 0
    try:
        try_training_pass(accelerator, model, size, block_size, later_bytes, separator)
        return True
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def try_training_pass(
    accelerator: Accelerator,
    model: PreTrainedModel,
    size: int,
    block_size: int,
    later_bytes: int,
    separator: int | None,
) -> None:
    """Forward and backward on `size` made-up sequences while `later_bytes` are taken; no update."""
    device = accelerator.device
    was_training = model.training
    with torch.random.fork_rng([device] if device.type != "cpu" else []):
        model.to(device).train()
        taken = torch.empty(later_bytes, dtype=torch.uint8, device=device)
        batch = torch.zeros(size, block_size + 1, dtype=torch.int64, device=device)
        with accelerator.autocast():
            loss = summed_loss(model, batch, num_items=batch.numel(), separator=separator)
        loss.backward()
        del taken
    model.train(was_training)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of ascending `sizes` before the first that does not fit; 0 if there is none."""
    largest = 0
    for size in sizes:
        if not fits(size):
            break
        largest = size
    return largest
