"""What is reported is what was measured."""

import json
import math

import pytest
import torch

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.metrics import (
    MetricsLog,
    Stopwatch,
    bits_per_byte,
    flops_per_token,
    model_flops_utilization,
    peak_flops,
    peak_flops_of,
    plot_training_curves,
    read_metrics,
)


def test_flops_of_gpt2_small_are_the_published_855_million_per_token():
    assert flops_per_token(123_600_000, 12, 768, 1024) == pytest.approx(855e6, rel=1e-3)


def test_utilization_is_the_share_of_the_peak():
    from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

    with torch.device("meta"):
        model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("modern"))
    flops = flops_per_token(model.num_parameters(), 12, 768, 1024)
    share = model_flops_utilization(model, seq_len=1024, tokens_per_second=1e5, peak_flops=1e15)
    assert share == pytest.approx(1e5 * flops / 1e15)
    assert model_flops_utilization(model, seq_len=1024, tokens_per_second=1e5, peak_flops=None) is None


def test_the_peak_of_a_cpu_is_not_invented():
    assert peak_flops(torch.device("cpu")) is None


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


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]"])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(GPT2ModernError, match="is not a log of metrics"):
        MetricsLog(tmp_path / "metrics.jsonl", resumed_step=0)


def test_one_bit_per_byte_is_ln_2_nats_over_one_byte_tokens():
    assert bits_per_byte(math.log(2), bytes_per_token=1.0) == pytest.approx(1.0)
    assert bits_per_byte(math.log(2), bytes_per_token=4.0) == pytest.approx(0.25)


@pytest.mark.fault("F20 a log with a step twice or half a line")
def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resumed_step=0)
    for step in range(1, 6):
        log.append({"step": step})
    resumed = MetricsLog(path, resumed_step=3)
    assert resumed.last_step == 5
    resumed.append({"step": 4})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


@pytest.mark.fault("F20 a log with a step twice or half a line")
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_paused_time_is_not_training_time(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 12.0])  # start; pause after 2 s; go on at 10 s; look at 12 s
    monkeypatch.setattr("gpt2modern.training.metrics.time.perf_counter", lambda: next(now))
    stopwatch = Stopwatch(torch.device("cpu"), step=7)
    stopwatch.pause()
    stopwatch.resume()
    assert stopwatch.lap(9) == (2, 4.0) and stopwatch.total_s == 4.0
    # Two steps take 4 s and pauses twice as much again, so ten more take 20 s and pauses of 40 s.
    assert stopwatch.remaining_s(10) == 60.0


def test_the_curves_are_a_png_also_before_the_first_evaluation(tmp_path):
    rows = [{"step": 1, "tokens_seen": 10, "loss": 3.0, "learning_rate": 0.1}]
    plot_training_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_bar_names_every_number_and_leaves_out_what_is_not_known():
    from gpt2modern.training.progress import bar_numbers

    metrics = {"loss": 3.21, "learning_rate": 6e-4, "tokens_per_second": 12345.6, "peak_memory_gib": 1.25, "mfu": 0.414}
    known = "02:05 left, loss 3.210, lr 6.0e-04, 12,346 tok/s, MFU 41.4%, 1.2 GiB"
    assert bar_numbers(metrics, remaining_s=125) == known
    assert bar_numbers(metrics | {"mfu": None}, remaining_s=125) == known.replace("MFU 41.4%, ", "")
