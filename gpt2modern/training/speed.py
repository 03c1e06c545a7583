"""Measure the training time, tokens per second, model FLOPs utilization (MFU) and peak memory of a run."""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from gpt2modern.training.batches import BatchPlan

# Dense bf16 peak in TFLOP/s with fp32 accumulation, from the vendors' data sheets (fp16 for V100 and T4, which have no
# bf16). Names as torch reports them, without vendor and memory size; MI250X and MI250 count one of their two dies.
PEAK_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0,
    "GH200": 989.0, "H200 NVL": 835.0, "H200": 989.0, "H20": 148.0,
    "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "H800 PCIe": 756.0, "H800": 989.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX PRO 6000 Blackwell Server Edition": 503.8, "RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "RTX 6000 Ada Generation": 364.2, "RTX 5000 Ada Generation": 261.1,
    "RTX A6000": 154.8, "RTX A5000": 111.1, "RTX A4500": 94.6, "RTX A4000": 76.7,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165.2, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2, "RTX 4070 Ti": 80.2,
    "RTX 4070 SUPER": 71.0, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80.0, "RTX 3090": 71.0, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070 Ti": 43.5, "RTX 3070": 40.6,
    "RTX 3060 Ti": 32.4, "RTX 3060": 25.5,
    "V100 PCIE": 112.0, "V100": 125.0, "T4": 65.0,
    "MI325X": 1307.4, "MI300X": 1307.4, "MI300A": 980.6, "MI250X": 191.5, "MI250": 181.0, "MI210": 181.0,
}  # fmt: skip
# Words in a device's name that do not change its peak. Any other word (Laptop GPU, MIG 1g.5gb, D) means another device.
WORDS_WITHOUT_EFFECT = r"nvidia|geforce|tesla|amd|instinct|\d+gb?|sxm\d?|hbm\d?e?|pcie|oam"


def flops_per_token(
    num_matmul_parameters: int,
    num_hidden_layers: int,
    attention_width: int,
    seq_len: int,
    num_frozen_parameters: int = 0,
) -> int:
    """Return the FLOPs per token of forward and backward pass: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

    N: num_matmul_parameters, all but those of tables looked up by token, with the output head. L:
    num_hidden_layers. D: attention_width = num_attention_heads x head_dim. T: seq_len, counted fully although attention
    is causal. A frozen parameter counts 4 instead of 6, because its own gradient is not computed.
    """
    per_parameter = 6 * num_matmul_parameters - 2 * num_frozen_parameters
    return per_parameter + 12 * num_hidden_layers * attention_width * seq_len


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 peak of `device` in FLOP/s. Returns None for CPUs and for GPUs missing in PEAK_TFLOPS."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Return the bf16 peak in FLOP/s of the GPU that torch calls `name`; None unless every word of `name` is known."""
    return (tflops := find_device(name, PEAK_TFLOPS)) and tflops * 1e12


def find_device(name: str, table: dict[str, Any]) -> Any:
    """Return the value of `table` for the GPU that torch calls `name`; None unless every word of `name` is known."""
    words = re.split(r"[\s/-]+", name.lower())
    words = [word for word in words if word == "pcie" or not re.fullmatch(WORDS_WITHOUT_EFFECT, word)]
    entries = {tuple(key.lower().split()): entry for key, entry in table.items()}
    # Some names have PCIe because that form is slower; in others it comes before or after the memory, without effect.
    without_pcie = [word for word in words if word != "pcie"]
    exact = (*without_pcie, "pcie") if "pcie" in words else tuple(without_pcie)
    return entries.get(exact, entries.get(tuple(without_pcie)))


def model_flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """Return the training FLOPs per token (forward and backward) of `model` on sequences of `seq_len` tokens."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if config.tie_word_embeddings else embedding.numel()
    tables = ("value_embeddings.", "embed_bigrams.")
    looked_up += sum(table.numel() for name, table in model.named_parameters() if any(key in name for key in tables))
    frozen = model.num_parameters() - model.num_parameters(only_trainable=True)
    return flops_per_token(
        model.num_parameters() - looked_up,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
        seq_len,
        num_frozen_parameters=frozen if embedding.requires_grad else frozen - looked_up,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GiB: allocated on a CUDA device, or resident if on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Stopwatch:
    """Measure the seconds spent on training steps, without evaluation and saving, and the speed computed from them.

    step, wall_time_s: step and training seconds at which the run starts: 0, or the values of its checkpoint.
    """

    def __init__(self, device: torch.device, model: PreTrainedModel, plan: BatchPlan, *, step: int, wall_time_s: float):
        self.device = device
        self.plan = plan
        self.flops_per_token = model_flops_per_token(model, plan.block_size)
        self.peak_flops = peak_flops(device)
        self.total_s = wall_time_s
        self._first_s = wall_time_s
        self._paused_s = 0.0
        self._lap_s, self._lap_step = 0.0, step
        self._token_time_s = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent in this `with` block as training time."""
        self._count()
        try:
            yield
        finally:
            now = time.perf_counter()
            self._paused_s += now - self._since
            self._since = now

    def _count(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # kernels still queued belong to the time before
        now = time.perf_counter()
        self.total_s += now - self._since
        self._lap_s += now - self._since
        self._since = now

    def lap(self, step: int) -> dict[str, float | None]:
        """Return the speed between the last call (or the start) and `step`, and the peak memory, as in metrics.jsonl.
        mfu is None if the peak FLOP/s of the device is unknown."""
        self._count()
        seconds, steps = self._lap_s, step - self._lap_step
        tokens = self.plan.tokens_seen(step) - self.plan.tokens_seen(self._lap_step)
        self._lap_s, self._lap_step, self._token_time_s = 0.0, step, seconds / tokens
        per_device = tokens / seconds / self.plan.num_processes
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": self.peak_flops and per_device * self.flops_per_token / self.peak_flops,
            "step_time_s": seconds / steps,
            "peak_memory_gib": peak_memory_gib(self.device),
        }

    def remaining_s(self, steps: int) -> float:
        """Estimate the seconds that `steps` further steps take, at the tokens/s of the last `lap`, including evaluation
        and saving in the proportion of time that these have taken so far."""
        tokens = self.plan.tokens_seen(self._lap_step + steps) - self.plan.tokens_seen(self._lap_step)
        return tokens * self._token_time_s * (1 + self._paused_s / (self.total_s - self._first_s))


def step_metrics(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
) -> dict[str, float | None]:
    """Return the mean loss over all processes, the learning rate and the gradient norm of a step, as in metrics.jsonl.
    Every process must call this. A NaN or infinite value is returned as None."""
    loss = accelerator.reduce(loss, reduction="mean").item()
    return {
        "loss": loss if math.isfinite(loss) else None,
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
    }
