"""benchmarks.gpu on a CPU, with a tiny model: all parts run without `datasets`, and a row that fails loses no other."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import gpu
from benchmarks.throughput import Row, ladder
from gpt2modern.training.speed import PEAK_TFLOPS

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
# What a machine with torch and transformers may not have.
MISSING = ("datasets", "evaluate", "gigatoken", "xxhash", "awkward", "multiprocess", "peft", "trackio", "tensorboard")


def flags(data_dir, output, *more: str) -> list[str]:
    sizes = f"--config_overrides {TINY} --block_size 4 --per_device_train_batch_size 4 --steps 1 --torch_compile false"
    sizes += " --attn_implementation sdpa --vocab_size 300"
    return f"--data {data_dir} --output {output} --device cpu {sizes}".split() + list(more)


@pytest.fixture(scope="module")
def reports(data_dir, tmp_path_factory):
    """Run everything in an environment without MISSING; return Markdown and JSON."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}."}
    command = [sys.executable, "-m", "benchmarks.gpu", *flags(data_dir, folder / "reports", "--minutes", "20")]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "Traceback" not in run.stderr, run.stderr
    (page,) = (folder / "reports").glob("*_gpu_cpu.md")
    assert page.read_text() in run.stdout
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())["results"]


@pytest.mark.slow
def test_every_row_is_measured_without_datasets(reports):
    text, results = reports
    rows = results["rows"]
    assert "Not measured: nothing." in text and results["not_measured"] == []
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert all(name in rows for name in gpu.TARGETS if "flex" not in name and "flash" not in name)
    assert {
        "tests",
        "nanoGPT",
        "GPT2LMHeadModel",
        "trainer, masked, sdpa",
        *(f"ladder, {name}" for name in ladder()),
        "ladder, modern muon",
    } <= set(rows)
    assert "2 passed" in rows["tests"]["facts"]
    assert len(rows["gpt2 adamw"]["rates"]) == gpu.WINDOWS and rows["gpt2 adamw"]["breaks"] == 0


def test_time_is_divided_into_families(reports):
    families = reports[1]["rows"]["gpt2 muon"]["families_ms"]
    assert {gpu.OPTIMIZER, gpu.LOSS, gpu.PRODUCTS, gpu.OTHER, "attention", "idle"} <= set(families)
    assert all(families[name] > 0 for name in (gpu.OPTIMIZER, gpu.LOSS, gpu.PRODUCTS, gpu.OTHER))


def test_the_resumed_run_ends_with_the_same_loss(reports):
    rows = reports[1]["rows"]
    assert rows["trainer, resumed"]["facts"] == rows["trainer"]["facts"] != rows["trainer, masked, sdpa"]["facts"]


def event(name: str, *kernels: tuple[str, float], parent: FunctionEvent | None = None) -> FunctionEvent:
    """Make what torch's profiler returns for an operator of the CPU that launches kernels, (name, microseconds)."""
    result = FunctionEvent(0, name, thread=1, start_us=0, end_us=9, device_type=DeviceType.CPU)
    for kernel, microseconds in kernels:
        result.append_kernel(kernel, 0, microseconds)
    if parent is not None:
        result.set_cpu_parent(parent)
    return result


def test_a_kernel_belongs_to_its_name_except_in_an_optimizer_or_the_loss():
    products, flash = "nvjet_tst_128x256_64x4_v_bz_coopA_TNN", "void pytorch_flash::flash_fwd_kernel<...>"
    norm, elementwise = "triton_red_fused_native_layer_norm_0", "void at::native::vectorized_elementwise_kernel<4, ...>"
    inputs = "triton_poi_fused__scaled_dot_product_flash_attention_clone_3"
    muon, loss = event("Optimizer.step#Muon.step"), event("loss_gpt2modern::linear_cross_entropy_sum")
    kernel = FunctionEvent(0, elementwise, thread=1, start_us=0, end_us=67_000, device_type=DeviceType.CUDA)
    events = [
        kernel,  # 67 ms of kernels, of which 55 ms are known to the operators
        event("CompiledFunction", (products, 1000), (norm, 2000), (inputs, 3000), (flash, 4000)),
        event("aten::mm", (products, 5000), parent=event("aten::matmul", parent=muon)),
        event("aten::mm", (products, 6000), parent=loss),
        event("aten::exp_", (elementwise, 7000), parent=loss),
        event("aten::_foreach_norm", ("void at::native::multi_tensor_apply_kernel<...>", 8000)),
        event("aten::copy_", ("Memcpy HtoD (Pinned -> Device)", 9000)),
        event("aten::add", (elementwise, 10_000)),
    ]
    assert gpu.family_times(events, on_cpu=False) == {
        gpu.PRODUCTS: 7, gpu.OTHER: 15, "attention": 4, gpu.OPTIMIZER: 13, gpu.LOSS: 7, "copies": 9,
        "unattributed": pytest.approx(12),
    }  # fmt: skip


def test_targets_are_for_an_h200_or_a_ratio():
    rates = {"gpt2 adamw": 500_000, "modern adamw": 530_000, "gpt2 muon": 460_000, "trainer, resumed": 1}
    on_h200, elsewhere = (
        {name: gpu.target_of(name, rates, 65_536, device) for name in [*rates, "trainer", "nanoGPT"]}
        for device in ("NVIDIA H200", "NVIDIA A100")
    )
    assert "H200" in PEAK_TFLOPS
    assert on_h200["gpt2 adamw"] == ("at least 520,000: **missed**", False) and on_h200["modern adamw"][1]
    for not_measured in (elsewhere["gpt2 adamw"], on_h200["trainer"], on_h200["trainer, resumed"], on_h200["nanoGPT"]):
        assert not_measured == ("-", True)
    # A step of 524,288 tokens takes 1.049 s with AdamW, and with Muon 0.0114 s more.
    assert elsewhere["gpt2 muon"] == ("0.989 of gpt2 adamw, at least 0.97: reached", True)


def test_a_job_that_fails_dies_or_is_late_is_an_error():
    ample = time.monotonic() + 600
    assert gpu.run_job(partial(int, "x"), ample)["error"].startswith("invalid literal")
    assert "terminated" in gpu.run_job(partial(os._exit, 3), ample)["error"]
    start = time.monotonic()
    assert gpu.run_job(partial(time.sleep, 600), start + 2)["error"] == "not finished in the 2 s that were left"
    assert gpu.run_job(partial(int, "1"), start) == {}
    assert time.monotonic() - start < 300


def test_what_does_not_fit_is_listed_as_not_measured(data_dir, tmp_path):
    with pytest.raises(SystemExit) as caught:
        gpu.main(flags(data_dir, tmp_path, "--minutes", "0.1"))
    text = next(tmp_path.glob("*.md")).read_text()
    assert caught.value.code == 1
    assert "ladder, modern adamw; ladder, modern muon" in text.split("Not measured: ")[1]


def test_another_loss_than_that_of_fp32_is_an_error(data_dir, tmp_path, monkeypatch):
    config = gpu.parse_arguments(gpu.GPUBenchmarkConfig, flags(data_dir, tmp_path))
    monkeypatch.setattr(gpu, "TOLERANCE", 0.0)
    monkeypatch.setattr(gpu, "PRECISION_STEPS", 12)
    with pytest.raises(ValueError, match="from fp32, allowed is 0"):
        gpu.compare_losses(Row("modern", precision="bf16"), config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_in_one_line(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--data", str(data_dir), "--output", str(tmp_path / "reports")])
    assert caught.value.code == 2 and not (tmp_path / "reports").exists()
    assert capsys.readouterr().err.startswith("error: --device cuda cannot be used")
