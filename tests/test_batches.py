"""The data order depends on (seed, epoch, consumed samples) alone, however the work is divided."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.batches import (
    BatchPlan,
    micro_batch_indices,
    plan_batches,
    refuse_too_few_blocks,
    samples_in_order,
    step_batches,
)
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.schedules import Schedule


def plan_of(samples_per_step, micro_batch_size, num_processes, **warmup):
    return BatchPlan(samples_per_step, micro_batch_size, num_processes, block_size=4, **warmup)


def planned(*, num_processes=2, per_device_train_batch_size=8, **settings):
    """Return the plan for these settings and blocks of 64 tokens."""
    config = TrainConfig(
        data_dir="data", output_dir="out", per_device_train_batch_size=per_device_train_batch_size, **settings
    )
    return plan_batches(config, block_size=64, num_processes=num_processes)


class CountedBlocks(torch.utils.data.Dataset):
    """Blocks of 4 tokens that remember which of them were read."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        self.read += indices
        return torch.tensor(indices)[:, None].expand(-1, 5)

    def num_targets(self, indices):
        return 4 * len(indices)


def read_steps(blocks, plan, *, first_step=0, max_steps, process_index=0):
    """Return (samples, blocks read by this process) of each of the steps from `first_step` on."""
    config = TrainConfig(data_dir="data", output_dir="out", seed=1, max_steps=max_steps)
    accelerator = SimpleNamespace(process_index=process_index, device=torch.device("cpu"))
    with contextlib.closing(step_batches(config, accelerator, blocks, plan, first_step=first_step)) as batches:
        return [(batch.samples.tolist(), [block[:, 0].tolist() for block in batch.micro_batches]) for batch in batches]


def steps(num_blocks, plan, count, *, consumed_samples=0, seed=1):
    """Return the samples of each of `count` steps, gathered over all processes, in global order."""
    samplers = [
        (micro_batch_indices(num_blocks, plan, seed=seed, consumed_samples=consumed_samples, process_index=rank))
        for rank in range(plan.num_processes)
    ]
    result = []
    for _ in range(count):
        passes = [[next(sampler) for sampler in samplers] for _ in range(plan.grad_accum_steps(plan.warmup_steps))]
        result.append(list(itertools.chain.from_iterable(itertools.chain.from_iterable(passes))))
    return result


RAMP = Schedule("constant", max_steps=20, batch_size_ramp=[1, 2, 4])


@pytest.mark.fault("F3 an epoch has every block once")
def test_an_epoch_visits_every_block_of_whole_batches_once():
    seen = list(itertools.chain.from_iterable(steps(50, plan_of(8, 2, 2), 6)))
    assert len(seen) == 48 == len(set(seen)) and set(seen) <= set(range(50))


def test_epochs_are_different_permutations():
    first, second = np.split(np.array(steps(48, plan_of(8, 8, 1), 12)), 2)
    assert sorted(first.ravel()) == sorted(second.ravel()) and (first != second).any()


@pytest.mark.fault("F2 another number of processes or micro-batch")
@pytest.mark.parametrize("plan", [plan_of(8, 8, 1), plan_of(8, 2, 1), plan_of(8, 2, 2), plan_of(8, 1, 4)])
def test_the_global_order_does_not_depend_on_processes_or_micro_batches(plan):
    assert steps(50, plan, 15) == steps(50, plan_of(8, 4, 1), 15)


@pytest.mark.parametrize("consumed_steps", [1, 5, 6, 7, 13])
def test_seeking_gives_the_order_of_an_uninterrupted_run(consumed_steps):
    plan = plan_of(8, 2, 2)
    resumed = steps(50, plan, 15 - consumed_steps, consumed_samples=8 * consumed_steps)
    assert resumed == steps(50, plan, 15)[consumed_steps:]


@pytest.mark.fault("F3 an epoch has every block once")
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 5, "first_samples": 2}, {"warmup_steps": 14, "ramp": RAMP}])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_samples_of_a_step_are_what_all_processes_read_in_it(warmup, num_processes):
    plan = plan_of(8, 2 // num_processes, num_processes, **warmup)
    count = 20  # steps: more than three epochs
    of_processes = [
        read_steps(CountedBlocks(50), plan, max_steps=count, process_index=rank) for rank in range(num_processes)
    ]
    for step, of_step in enumerate(zip(*of_processes, strict=True)):
        passes = zip(*(micro_batches for _, micro_batches in of_step), strict=True)
        read = list(itertools.chain.from_iterable(itertools.chain.from_iterable(passes)))
        assert len(read) == plan.samples_at(step)
        assert all(samples == read for samples, _ in of_step)


def test_another_seed_gives_another_order():
    assert steps(50, plan_of(8, 8, 1), 1, seed=1) != steps(50, plan_of(8, 8, 1), 1, seed=2)


def test_accumulation_follows_from_tokens_per_step():
    plan = planned(total_batch_size=4096)
    assert (plan.samples_per_step, plan.grad_accum_steps(0)) == (64, 4)


def test_without_a_total_there_is_no_accumulation():
    plan = planned()
    assert (plan.samples_per_step, plan.grad_accum_steps(0)) == (16, 1)


def test_an_automatic_micro_batch_is_planned_as_single_sequences():
    plan = planned(total_batch_size=4096, per_device_train_batch_size="auto")
    assert (plan.samples_per_step, plan.micro_batch_size) == (64, 1)
    assert plan.micro_batch_sizes() == [1, 2, 4, 8, 16, 32]


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
@pytest.mark.parametrize(("total", "choices"), [(1500, "use 1024 or 2048"), (100, "use 1024")])
def test_a_total_that_does_not_divide_is_refused_with_the_nearest_ones(total, choices):
    with pytest.raises(GPT2ModernError, match=choices):
        planned(total_batch_size=total)


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
def test_a_total_of_zero_is_refused():
    with pytest.raises(ValueError, match="--total_batch_size 0 must be at least 1"):
        planned(total_batch_size=0)


def test_fewer_blocks_than_one_step_takes_are_refused():
    with pytest.raises(GPT2ModernError, match="has 7 blocks but one step takes 8"):
        refuse_too_few_blocks(CountedBlocks(7), plan_of(8, 8, 1))
    refuse_too_few_blocks(CountedBlocks(8), plan_of(8, 8, 1))


# Batch-size warm-up


def warm_plan(micro_batch_size=2, num_processes=1):
    return planned(
        total_batch_size=1024,
        per_device_train_batch_size=micro_batch_size,
        num_processes=num_processes,
        batch_size_warmup_steps=6,
        initial_total_batch_size=256,
    )


def test_the_batch_grows_in_multiples_of_the_first_one_and_stays_at_the_total():
    plan = warm_plan()
    assert [plan.samples_at(step) for step in range(9)] == [4, 4, 8, 8, 12, 12, 16, 16, 16]
    assert [plan.grad_accum_steps(step) for step in range(9)] == [2, 2, 4, 4, 6, 6, 8, 8, 8]


def test_the_position_is_the_sum_of_all_steps_before():
    plan = warm_plan()
    assert all(plan.consumed_samples(step) == sum(map(plan.samples_at, range(step))) for step in range(12))


def test_the_growth_does_not_depend_on_processes_or_micro_batches():
    courses = [[plan.samples_at(step) for step in range(9)] for plan in (warm_plan(), warm_plan(1, 2), warm_plan(1, 4))]
    assert courses[0] == courses[1] == courses[2]


def test_a_first_batch_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(GPT2ModernError, match=r"from 256 tokens .* multiple of 512 tokens .* 1024; use 512"):
        warm_plan(micro_batch_size=8)


# Batch-size ramp


def ramp_plan(micro_batch_size=2, num_processes=1, ramp=(1, 2, 4), **settings):
    return planned(
        total_batch_size=1024,
        per_device_train_batch_size=micro_batch_size,
        num_processes=num_processes,
        batch_size_ramp=list(ramp),
        max_steps=8,
        **settings,
    )


def test_equal_parts_of_the_run_have_their_batches():
    """1024 tokens are 16 samples; the thirds of eight steps begin at 0, 3 and 6."""
    plan = ramp_plan()
    assert [plan.samples_at(step) for step in range(9)] == [4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert [plan.grad_accum_steps(step) for step in range(9)] == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert all(plan.consumed_samples(step) == sum(map(plan.samples_at, range(step))) for step in range(12))
    assert plan.tokens_seen(8) == 64 * (12 + 24 + 32)
    assert ramp_plan(1, ramp=(0.25, 0.5, 1)).samples_at(4) == 8 == ramp_plan(2, 2).samples_at(4)


def test_micro_batches_divide_the_steps_of_every_part():
    plan = ramp_plan("auto", ramp=(2, 3, 4))
    assert [plan.samples_at(step) for step in (0, 3, 6)] == [8, 12, 16] and plan.micro_batch_sizes() == [1, 2, 4]
    assert ramp_plan("auto").micro_batch_sizes() == [1, 2, 4]


def test_a_ramp_that_does_not_divide_is_refused():
    with pytest.raises(GPT2ModernError, match=r"\[1, 2, 3\] of --total_batch_size 1024 .* multiples of 128 tokens"):
        ramp_plan(ramp=(1, 2, 3))


# Seeking


def test_a_resumed_run_reads_nothing_before_its_position():
    blocks, plan = CountedBlocks(1_000_000), plan_of(8, 4, 1)
    read_steps(blocks, plan, first_step=10**9, max_steps=10**9 + 1)
    assert blocks.read == samples_in_order(len(blocks), plan, seed=1, first=8 * 10**9, count=8).tolist()
