"""Estimate the memory of a training step and find the largest micro-batch that fits."""

import contextlib
import ctypes
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.optimizers import state_bytes
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from modeling_gpt2modern.loss_gpt2modern import default_chunk_size

# A few thousand tokens keep a CPU core busy; more of them in one pass only take memory.
CPU_TOKENS_PER_PASS = 8192
# Parameters of glibc's mallopt, with their defaults.
M_TRIM_THRESHOLD, M_MMAP_MAX = (-1, 128 * 1024), (-4, 65536)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep memory that is freed in this block for the next allocation, instead of returning it to the kernel, which
    would fill each page with zeros again: a tenth of the time of a small step. Without effect unless libc is glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_TRIM_THRESHOLD[0], 2**31 - 1)
    mallopt(M_MMAP_MAX[0], 0)
    try:
        yield
    finally:
        mallopt(*M_TRIM_THRESHOLD)
        mallopt(*M_MMAP_MAX)
        ctypes.CDLL(None).malloc_trim(0)


def estimate_memory(
    config: TrainConfig, model: PreTrainedModel, plan: BatchPlan, *, autocast: bool, fsdp2: bool = False
) -> dict[str, int]:
    """Return an estimate of the bytes that a training step holds on each device, by purpose (weights, gradients, ...).

    model: may be on the meta device. Weights are fp32, with 16-bit copies under autocast. FSDP2 divides them over the
    processes, gradients only in the last of a step's passes. Fragmentation by the allocator and savings by a compiler
    are not counted.
    """
    parameters = model.num_parameters()
    shards = plan.num_processes if fsdp2 else 1
    accumulates = plan.grad_accum_steps(config.max_steps) > 1
    return {
        "weights": (6 if autocast else 4) * parameters // shards,
        "gradients": 4 * model.num_parameters(only_trainable=True) // (1 if accumulates else shards),
        "optimizer states": state_bytes(model, config) // shards,
        **({"average of weights": _mean_bytes(config, model) // shards} if config.average_last else {}),
        "activations": activation_bytes(
            model.config,
            autocast=autocast,
            micro_batch_size=plan.micro_batch_size,
            block_size=plan.block_size,
            gradient_checkpointing=config.gradient_checkpointing,
        ),
    }


def _mean_bytes(config: TrainConfig, model: PreTrainedModel) -> int:
    return 4 * model.num_parameters(only_trainable=True) if config.average_last else 0


def activation_bytes(
    config: GPT2ModernConfig, *, autocast: bool, micro_batch_size: int, block_size: int, gradient_checkpointing: bool
) -> int:
    """Return the bytes that autograd keeps for the backward pass of one micro-batch, plus the buffers of the loss.

    The layers run on fake tensors, which have shapes but no data. With gradient checkpointing the activations of one
    layer are added, because layers are recomputed one at a time.
    """
    kept = _kept_by_autograd(config, autocast, micro_batch_size, block_size, gradient_checkpointing=False)
    if gradient_checkpointing:
        one_layer = kept // config.num_hidden_layers
        kept = _kept_by_autograd(config, autocast, micro_batch_size, block_size, gradient_checkpointing=True)
        kept += one_layer
    width, tokens = config.hidden_size, micro_batch_size * block_size
    dtype = torch.bfloat16 if autocast else torch.float32
    logits = dtype.itemsize * min(tokens, default_chunk_size(width, "cuda", dtype)) * config.vocab_size
    return kept + 4 * tokens * width + 4 * config.vocab_size * width + logits


def _kept_by_autograd(
    config: GPT2ModernConfig, autocast: bool, micro_batch_size: int, block_size: int, *, gradient_checkpointing: bool
) -> int:
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        model = GPT2ModernForCausalLM._from_config(config, attn_implementation=config._attn_implementation).train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # A weight's bf16 copy is counted with the weights; it is recognised by its shape.
        of_weights = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) not in of_weights:
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage
            return tensor

        input_ids = torch.zeros(micro_batch_size, block_size, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model.model(input_ids=input_ids, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


def fit_micro_batch(
    config: TrainConfig, accelerator: Accelerator, model: PreTrainedModel, plan: BatchPlan, separator: int | None
) -> BatchPlan:
    """Return the plan with the largest micro-batch size that fits in the memory of every process's device.

    On an accelerator, sizes are tried from small to large. On a CPU, where running out of memory ends the process, the
    estimate decides. `model` must not be wrapped yet; its weights and the random state do not change. Raises
    GPT2ModernError if not even one sequence fits, and under FSDP, where no process holds the unsharded model.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise GPT2ModernError("--per_device_train_batch_size auto cannot be used with FSDP2; give a number")

    def fits(size: int) -> bool:
        if accelerator.device.type == "cpu":
            return fits_by_estimate(config, accelerator, model, size, plan.block_size)
        return fits_by_trying(config, accelerator, model, size, plan.block_size, separator)

    found = largest_that_fits(plan.micro_batch_sizes(), fits)
    agreed = accelerator.gather(torch.tensor([found], device=accelerator.device)).min().item()
    if agreed == 0:
        raise GPT2ModernError(
            f"one sequence of {plan.block_size} tokens does not fit in the memory of device {accelerator.device}; use "
            "--gradient_checkpointing true, a smaller --block_size or a smaller model"
        )
    return replace(plan, micro_batch_size=agreed)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Return the last of the ascending `sizes` before the first one that does not fit, or 0 if no size fits."""
    return max(itertools.takewhile(fits, sizes), default=0)


def fits_by_estimate(
    config: TrainConfig, accelerator: Accelerator, model: PreTrainedModel, size: int, block_size: int
) -> bool:
    """Return whether micro-batches of `size` sequences suit the CPU: a step is estimated to take at most half of the
    available memory (divided by the processes), and a pass has one sequence or at most CPU_TOKENS_PER_PASS tokens."""
    if size * block_size > max(CPU_TOKENS_PER_PASS, block_size):
        return False
    one_pass, autocast = BatchPlan(size, size, 1, block_size), accelerator.mixed_precision != "no"
    needed = sum(estimate_memory(config, model, one_pass, autocast=autocast).values())
    return needed <= psutil.virtual_memory().available / 2 / accelerator.num_processes


def fits_by_trying(
    config: TrainConfig,
    accelerator: Accelerator,
    model: PreTrainedModel,
    size: int,
    block_size: int,
    separator: int | None,
) -> bool:
    """Return whether a forward and a backward pass of `size` sequences fit in memory together with a reserved block as
    large as what is allocated later: the optimizer state and, with several processes, the gradient buckets."""
    device, was_training = accelerator.device, model.training
    later_bytes = state_bytes(model, config) + _mean_bytes(config, model)
    later_bytes += 4 * model.num_parameters() if accelerator.num_processes > 1 else 0
    devices = [device] if device.type != "cpu" else []
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            model.to(device).train()
            taken = torch.empty(later_bytes, dtype=torch.uint8, device=device)
            batch = torch.zeros(size, block_size + 1, dtype=torch.int64, device=device)
            with accelerator.autocast():
                loss, _ = batch_loss(model, batch, num_items=batch.numel(), separator=separator)
            loss.backward()
            del taken, loss
        return True
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        return False
    finally:
        model.train(was_training).zero_grad(set_to_none=True)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
