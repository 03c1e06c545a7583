"""Speed is what was measured: FLOPs per token, the peak of the device, training seconds without pauses."""

import time

import pytest
import torch

from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.speed import Stopwatch, flops_per_token, model_flops_per_token, peak_flops, peak_flops_of
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from tests.support.models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("modern"))


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets what `time.perf_counter` says, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def set_clock(seconds):
        now[0] = seconds

    return set_clock


def plan_of(num_processes=1):
    """Return a plan of 8 blocks of 1024 tokens per step."""
    return BatchPlan(8, 1, num_processes, block_size=1024)


def test_flops_of_gpt2_small_are_the_published_855_million_per_token():
    assert flops_per_token(123_600_000, 12, 768, 1024) == pytest.approx(855e6, rel=1e-3)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_utilization_is_the_share_of_one_devices_peak(model, clock, num_processes):
    """Of two processes each has half of the tokens and one peak."""
    stopwatch = Stopwatch(CPU, model, plan_of(num_processes), step=0, wall_time_s=0.0)
    stopwatch.peak_flops = 1e15
    clock(4.0)
    row = stopwatch.lap(10)
    flops = flops_per_token(model.num_parameters(), 12, 768, 1024)
    assert model_flops_per_token(model, 1024) == flops
    assert row["tokens_per_second"] == 10 * 8 * 1024 / 4
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] / num_processes * flops / 1e15)


def test_tables_that_are_looked_up_cost_no_flops():
    plain, tables = (tiny_model(**flags) for flags in ({}, {"bigram_vocab_size": 50, "value_embedding_layers": [1]}))
    added = 2 + 4 * 12  # a weight of the bigrams per layer, and the gates of four heads
    assert model_flops_per_token(tables, 16) == model_flops_per_token(plain, 16) + 6 * added


def test_the_peak_of_a_cpu_is_not_invented(model, clock):
    assert peak_flops(CPU) is None
    stopwatch = Stopwatch(CPU, model, plan_of(), step=0, wall_time_s=0.0)
    clock(1.0)
    assert stopwatch.lap(1)["mfu"] is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA GH200 480GB", 989.0), ("NVIDIA H200", 989.0),
        ("NVIDIA H100 NVL", 835.0), ("NVIDIA B200", 2250.0), ("NVIDIA H20", 148.0), ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0), ("NVIDIA L40", 181.0), ("NVIDIA L40S", 362.0), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4), ("NVIDIA GeForce RTX 3080", 59.5), ("AMD Instinct MI300X", 1307.4),
        ("Tesla T4", 65.0), ("Tesla V100-SXM2-16GB", 125.0), ("Tesla V100-PCIE-16GB", 112.0),
        ("NVIDIA T400", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("cpu", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device_named_not_of_a_name_within_it(name, tflops):
    assert peak_flops_of(name) == (tflops and tflops * 1e12)


def test_paused_time_is_not_training_time(model, clock):
    stopwatch = Stopwatch(CPU, model, plan_of(), step=7, wall_time_s=100.0)
    clock(2.0)
    with stopwatch.paused():
        clock(10.0)
    clock(12.0)
    row = stopwatch.lap(9)
    assert (row["step_time_s"], stopwatch.total_s) == (2.0, 104.0)
    # Two steps take 4 s and pauses twice as much again, so ten more take 20 s and pauses of 40 s.
    assert stopwatch.remaining_s(10) == 60.0
