"""Which blocks are trained on, in which order, by which process.

The order is a pure function of (seed, epoch, consumed samples). A run that resumes, or goes on with another number of
processes or another micro-batch, therefore sees exactly the blocks it would have seen: the position is one integer.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.stopping import ignore_signals


@dataclass(frozen=True)
class BatchPlan:
    """How many samples (blocks) each optimizer step takes, divided over micro-batches and processes.

    With a warm-up (arXiv:2005.14165, appendix B) step 0 takes `first_samples`, and steps take ever larger multiples of
    them in a straight line, until `samples_per_step` are reached at step `warmup_steps`.
    """

    samples_per_step: int
    micro_batch_size: int  # samples per process and forward pass
    num_processes: int
    warmup_steps: int = 0
    first_samples: int | None = None  # None: there is no warm-up

    def samples_at(self, step: int) -> int:
        """Samples of update number `step` (the first is 0), over all processes."""
        if step >= self.warmup_steps:
            return self.samples_per_step
        growth = self.samples_per_step // self.first_samples - 1
        return self.first_samples * (1 + growth * step // self.warmup_steps)

    def consumed_samples(self, step: int) -> int:
        """Samples of all updates before `step`: the position in the order of the data."""
        return self._consumed_in_warmup[min(step, self.warmup_steps)] + (
            max(0, step - self.warmup_steps) * self.samples_per_step
        )

    @functools.cached_property
    def _consumed_in_warmup(self) -> list[int]:
        return list(itertools.accumulate(map(self.samples_at, range(self.warmup_steps)), initial=0))

    def micro_batch_sizes(self) -> list[int]:
        """Every size, ascending, in which whole micro-batches on every process make up each step of this plan."""
        per_process = self.samples_at(0) // self.num_processes
        return [size for size in range(1, per_process + 1) if per_process % size == 0]

    def grad_accum_steps(self, step: int) -> int:
        return self.samples_at(step) // (self.micro_batch_size * self.num_processes)


def plan_batches(
    *,
    total_batch_size: int | None,
    block_size: int,
    per_device_train_batch_size: int,
    num_processes: int,
    batch_size_warmup_steps: int = 0,
    initial_total_batch_size: int | None = None,
) -> BatchPlan:
    """Derive the accumulation count from `total_batch_size` (tokens per optimizer step; None: no accumulation).

    initial_total_batch_size: tokens of step 0 of a warm-up; None: an eighth of the total.
    Raises GPT2ModernError if the tokens are not a whole number of micro-batches on every process.
    """
    tokens_per_pass = per_device_train_batch_size * block_size * num_processes
    total_batch_size = tokens_per_pass if total_batch_size is None else total_batch_size
    if total_batch_size <= 0 or total_batch_size % tokens_per_pass:
        below = total_batch_size // tokens_per_pass * tokens_per_pass
        choices = " or ".join(str(tokens) for tokens in (below, below + tokens_per_pass) if tokens > 0)
        raise GPT2ModernError(
            f"--total_batch_size {total_batch_size} is not a multiple of --per_device_train_batch_size "
            f"{per_device_train_batch_size} x --block_size {block_size} x {num_processes} processes = "
            f"{tokens_per_pass} tokens; use {choices}"
        )
    plan = BatchPlan(total_batch_size // block_size, per_device_train_batch_size, num_processes)
    if not batch_size_warmup_steps:
        return plan
    first = total_batch_size // 8 if initial_total_batch_size is None else initial_total_batch_size
    if first <= 0 or first % tokens_per_pass or total_batch_size % first:
        passes = total_batch_size // tokens_per_pass
        choices = [str(tokens_per_pass * n) for n in range(1, passes) if passes % n == 0]
        raise GPT2ModernError(
            f"a batch-size warm-up from {first} tokens (--initial_total_batch_size) must go from a multiple of "
            f"{tokens_per_pass}, one forward pass of all processes, to a multiple of itself, --total_batch_size "
            f"{total_batch_size}; "
            + (f"use {' or '.join(choices[-4:])}" if choices else "lower --per_device_train_batch_size")
        )
    return replace(plan, warmup_steps=batch_size_warmup_steps, first_samples=first // block_size)


def samples_in_order(num_blocks: int, plan: BatchPlan, *, seed: int, first: int, count: int) -> np.ndarray:
    """Blocks number first, first + 1, ... of the endless order that all processes share: (count,).

    Every epoch is a fresh permutation of the blocks, cut to a multiple of the global batch: the cut must not depend on
    the number of processes, and a step must not mix two epochs (after a batch-size warm-up it may).
    """
    samples_per_epoch = num_blocks // plan.samples_per_step * plan.samples_per_step
    epoch, position = np.divmod(np.arange(first, first + count), samples_per_epoch)
    return np.concatenate(
        [_permutation(num_blocks, seed, each)[position[epoch == each]] for each in np.unique(epoch).tolist()]
    )


@functools.lru_cache(maxsize=2)  # two epochs: a sampler that reads ahead may have begun the next one
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_blocks)


def samples_of_step(num_blocks: int, plan: BatchPlan, *, seed: int, step: int) -> np.ndarray:
    """The blocks that update number `step` (the first is 0) takes on all processes together."""
    return samples_in_order(num_blocks, plan, seed=seed, first=plan.consumed_samples(step), count=plan.samples_at(step))


class MicroBatchSampler(Sampler[list[int]]):
    """Endless index lists, one per micro-batch of this process, from `consumed_samples` on."""

    def __init__(self, num_blocks: int, plan: BatchPlan, *, seed: int, consumed_samples: int, process_index: int):
        if num_blocks < plan.samples_per_step:
            raise GPT2ModernError(
                f"the training split has {num_blocks} blocks but one step takes {plan.samples_per_step} "
                f"(--total_batch_size / --block_size); prepare more text or lower --total_batch_size"
            )
        self.num_blocks = num_blocks
        self.plan = plan
        self.seed = seed
        self.consumed_samples = consumed_samples
        self.process_index = process_index

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        mine = self.consumed_samples + self.process_index * plan.micro_batch_size
        for first in itertools.count(mine, plan.micro_batch_size * plan.num_processes):
            samples = samples_in_order(self.num_blocks, plan, seed=self.seed, first=first, count=plan.micro_batch_size)
            yield samples.tolist()


def training_batches(
    blocks: PackedBlocks,
    plan: BatchPlan,
    *,
    seed: int,
    consumed_samples: int,
    process_index: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[torch.Tensor]:
    """Endless iterator over this process's micro-batches: int64 tensors (micro_batch_size, block_size + 1), padding as
    -100."""
    sampler = MicroBatchSampler(
        len(blocks), plan, seed=seed, consumed_samples=consumed_samples, process_index=process_index
    )
    loader = DataLoader(
        blocks,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator: a loader without one draws a base seed from the global stream when it is created.
        generator=torch.Generator(),
        worker_init_fn=ignore_signals,
    )
    return _in_one_line(iter(loader))


def _in_one_line(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same batches; a GPT2ModernError of a worker without the traceback that the loader puts before its message."""
    while True:
        try:
            batch = next(batches)
        except GPT2ModernError as error:
            raise GPT2ModernError(
                str(error).strip().splitlines()[-1].removeprefix("gpt2modern.errors.GPT2ModernError: ")
            ) from None
        yield batch


def _as_is(batch: torch.Tensor) -> torch.Tensor:
    return batch
