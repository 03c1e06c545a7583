"""Divide the training blocks (token sequences of one length) into steps, micro-batches and processes, in a fixed order.

The order depends only on seed, epoch and the number of consumed samples, so that one integer is a run's position in its
data. A resumed run, even with another number of processes or micro-batch size, continues with the same blocks.
"""

import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.schedules import Schedule


@dataclass(frozen=True)
class BatchPlan:
    """Describe how the samples (blocks) of each optimizer step are divided over micro-batches and processes.

    With a batch-size warm-up (arXiv:2005.14165, appendix B) step 0 takes `first_samples` samples; their number then
    grows linearly, in multiples of `first_samples`, to `samples_per_step` at step `warmup_steps`. With a `ramp` its
    `batch_share` decides until then.
    """

    samples_per_step: int
    micro_batch_size: int  # samples per process and forward pass
    num_processes: int
    block_size: int  # tokens per sample
    warmup_steps: int = 0
    first_samples: int | None = None  # None: there is no warm-up
    ramp: Schedule | None = None

    def samples_at(self, step: int) -> int:
        """Return the number of samples that update `step` alone takes (the first is 0), over all processes."""
        if step >= self.warmup_steps:
            return self.samples_per_step
        if self.ramp is not None:
            return round(self.ramp.batch_share(step) * self.samples_per_step)
        growth = self.samples_per_step // self.first_samples - 1
        return self.first_samples * (1 + growth * step // self.warmup_steps)

    def consumed_samples(self, step: int) -> int:
        """Return the number of samples that all updates before `step` take in total, over all processes."""
        return self._consumed_in_warmup[min(step, self.warmup_steps)] + (
            max(0, step - self.warmup_steps) * self.samples_per_step
        )

    def tokens_seen(self, step: int) -> int:
        """Return the number of tokens in all updates before `step`, over all processes; padding is counted too."""
        return self.consumed_samples(step) * self.block_size

    @functools.cached_property
    def _consumed_in_warmup(self) -> list[int]:
        return list(itertools.accumulate(map(self.samples_at, range(self.warmup_steps)), initial=0))

    def micro_batch_sizes(self) -> list[int]:
        """Return, in ascending order, the micro-batch sizes (samples per process and forward pass) that divide each
        process's share of every step without remainder."""
        sizes = {self.samples_at(step) for step in range(self.warmup_steps + 1)}
        per_process = math.gcd(*sizes) // self.num_processes
        return [size for size in range(1, per_process + 1) if per_process % size == 0]

    def grad_accum_steps(self, step: int) -> int:
        return self.samples_at(step) // (self.micro_batch_size * self.num_processes)


def plan_batches(config: TrainConfig, *, block_size: int, num_processes: int) -> BatchPlan:
    """Return the BatchPlan of the flags; without --total_batch_size a step is one forward pass on every process.

    With --per_device_train_batch_size auto the plan has micro-batches of one sequence, until `fit_micro_batch` replaces
    them. Raises GPT2ModernError if a step cannot be divided into equal micro-batches on every process.
    """
    size = 1 if config.per_device_train_batch_size == "auto" else config.per_device_train_batch_size
    tokens_per_pass = size * block_size * num_processes
    total = tokens_per_pass if config.total_batch_size is None else config.total_batch_size
    if total % tokens_per_pass:
        below = total // tokens_per_pass * tokens_per_pass
        choices = " or ".join(str(tokens) for tokens in (below, below + tokens_per_pass) if tokens > 0)
        raise GPT2ModernError(
            f"--total_batch_size {total} is not a multiple of --per_device_train_batch_size "
            f"{size} x --block_size {block_size} x {num_processes} processes = {tokens_per_pass} tokens; use {choices}"
        )
    plan = BatchPlan(total // block_size, size, num_processes, block_size)
    if ramp := config.batch_size_ramp:
        passes = [total / tokens_per_pass * part / ramp[-1] for part in ramp]
        if any(abs(number - max(1, round(number))) > 1e-6 for number in passes):
            raise GPT2ModernError(
                f"--batch_size_ramp {ramp} of --total_batch_size {total} gives steps that are not multiples of "
                f"{tokens_per_pass} tokens (one forward pass on every process); use other numbers, such as 1 2 4, or "
                "lower --per_device_train_batch_size"
            )
        return replace(plan, warmup_steps=-(-config.max_steps * (len(ramp) - 1) // len(ramp)), ramp=config.schedule)
    if not config.batch_size_warmup_steps:
        return plan
    first = total // 8 if config.initial_total_batch_size is None else config.initial_total_batch_size
    if first <= 0 or first % tokens_per_pass or total % first:
        passes = total // tokens_per_pass
        choices = [str(tokens_per_pass * n) for n in range(1, passes) if passes % n == 0]
        raise GPT2ModernError(
            f"the batch-size warm-up cannot start from {first} tokens (--initial_total_batch_size): this number must "
            f"be a multiple of {tokens_per_pass} tokens (one forward pass on every process) and divide "
            f"--total_batch_size {total}; "
            + (f"use {' or '.join(choices[-4:])}" if choices else "lower --per_device_train_batch_size")
        )
    return replace(plan, warmup_steps=config.batch_size_warmup_steps, first_samples=first // block_size)


def refuse_too_few_blocks(blocks: PackedBlocks, plan: BatchPlan) -> None:
    """Raise GPT2ModernError if the training split has fewer blocks than a full step takes."""
    if len(blocks) < plan.samples_per_step:
        raise GPT2ModernError(
            f"the training split has {len(blocks)} blocks but one step takes {plan.samples_per_step} "
            "(--total_batch_size / --block_size); prepare more text or lower --total_batch_size"
        )


def samples_in_order(num_blocks: int, plan: BatchPlan, *, seed: int, first: int, count: int) -> np.ndarray:
    """Return the block indices (count,) at positions first, ..., first + count - 1 of the endless order of the data,
    which all processes share.

    Every epoch is a new permutation of the blocks, cut to a multiple of samples_per_step. The cut thus does not depend
    on the number of processes, and no step mixes two epochs (except after a batch-size warm-up).
    """
    samples_per_epoch = num_blocks // plan.samples_per_step * plan.samples_per_step
    epoch, position = np.divmod(np.arange(first, first + count), samples_per_epoch)
    return np.concatenate(
        [_permutation(num_blocks, seed, each)[position[epoch == each]] for each in np.unique(epoch).tolist()]
    )


def hash_seed(*numbers: int) -> int:
    """Return a 64-bit seed computed from `numbers`; similar numbers give unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)  # two epochs: a sampler that reads ahead may already be in the next one
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


@dataclass(frozen=True)
class StepBatch:
    """Hold the data of one optimizer update.

    samples: (samples_of_step,) block indices, over all processes. num_targets: number of their targets (without
    padding), over all processes. grad_accum_steps: number of this process's micro-batches. micro_batches: reads them
    on demand as int64 (micro_batch_size, block_size + 1) with padding as -100.
    """

    samples: np.ndarray
    num_targets: int
    grad_accum_steps: int
    micro_batches: Iterator[torch.Tensor]


def step_batches(
    config: TrainConfig, accelerator: Accelerator, blocks: PackedBlocks, plan: BatchPlan, *, first_step: int
) -> Iterator[StepBatch]:
    """Yield one StepBatch for each of the updates first_step, ..., max_steps - 1, with this process's micro-batches.

    Close or exhaust the generator: --dataloader_num_workers threads read data ahead until then.
    """
    indices = micro_batch_indices(
        len(blocks),
        plan,
        seed=config.seed,
        consumed_samples=plan.consumed_samples(first_step),
        process_index=accelerator.process_index,
    )

    def read(batch: list[int]) -> torch.Tensor:
        tokens = blocks.__getitems__(batch)
        return tokens.pin_memory() if accelerator.device.type == "cuda" else tokens

    with contextlib.closing(read_ahead(read, indices, num_threads=config.dataloader_num_workers)) as micro_batches:
        for step in range(first_step, config.max_steps):
            samples = samples_in_order(
                len(blocks), plan, seed=config.seed, first=plan.consumed_samples(step), count=plan.samples_at(step)
            )
            count = plan.grad_accum_steps(step)
            yield StepBatch(samples, blocks.num_targets(samples), count, itertools.islice(micro_batches, count))


def micro_batch_indices(
    num_blocks: int, plan: BatchPlan, *, seed: int, consumed_samples: int, process_index: int
) -> Iterator[list[int]]:
    """Yield, without end, the list of block indices of each micro-batch of one process, after the first
    `consumed_samples` samples of the data order."""
    size = plan.micro_batch_size
    for first in itertools.count(consumed_samples + process_index * size, size * plan.num_processes):
        yield samples_in_order(num_blocks, plan, seed=seed, first=first, count=size).tolist()


def read_ahead(
    read: Callable[[list[int]], torch.Tensor], indices: Iterator[list[int]], *, num_threads: int
) -> Iterator[torch.Tensor]:
    """Yield `read(batch)` for each batch of the endless `indices`, in their order. Each thread reads two batches ahead;
    without threads each batch is read when it is needed.

    Threads, not the processes of a DataLoader: reading waits for the disk or copies, both without Python's lock, and
    a thread needs no shared memory, cannot be killed alone, and ends with its process.
    """
    if num_threads == 0:
        yield from map(read, indices)
        return
    pool = ThreadPoolExecutor(num_threads, "read_ahead")
    try:
        pending = deque(pool.submit(read, batch) for batch in itertools.islice(indices, 2 * num_threads))
        while True:
            batch = pending.popleft().result()
            pending.append(pool.submit(read, next(indices)))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
