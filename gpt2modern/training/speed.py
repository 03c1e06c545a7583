"""Measure a run: training seconds, tokens per second, model FLOPs utilization (MFU), peak memory."""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from gpt2modern.training.batches import BatchPlan

# Dense bf16 peak of the tensor cores in TFLOP/s with fp32 sums, from the vendors' data sheets (fp16 for V100 and T4,
# which have no bf16). Names as torch reports them, without vendor and memory; MI250X and MI250 count one of two dies.
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
# Words in a device's name that leave its peak as it is. Any other (Laptop GPU, MIG 1g.5gb, D) makes another device.
WORDS_WITHOUT_EFFECT = r"nvidia|geforce|tesla|amd|instinct|\d+gb?|sxm\d?|hbm\d?e?|pcie|oam"


def flops_per_token(
    num_matmul_parameters: int,
    num_hidden_layers: int,
    attention_width: int,
    seq_len: int,
    num_frozen_parameters: int = 0,
) -> int:
    """Count the training FLOPs per token, forward and backward: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

    N counts the parameters that are multiplied with every token (the head included, the embedding look-up not);
    attention_width = num_attention_heads x head_dim. The causal half of attention is not discounted. A frozen
    parameter passes gradients on but has none itself: 4 in place of 6.
    """
    per_parameter = 6 * num_matmul_parameters - 2 * num_frozen_parameters
    return per_parameter + 12 * num_hidden_layers * attention_width * seq_len


def peak_flops(device: torch.device) -> float | None:
    """Return the device's bf16 peak in FLOP/s, or None where it is not known (CPUs, uncommon GPUs)."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Return the bf16 peak in FLOP/s of a GPU by the name torch gives it; None unless every word of it is known."""
    words = re.split(r"[\s/-]+", name.lower())
    words = [word for word in words if word == "pcie" or not re.fullmatch(WORDS_WITHOUT_EFFECT, word)]
    peaks = {tuple(key.lower().split()): tflops * 1e12 for key, tflops in PEAK_TFLOPS.items()}
    # PCIe is part of some names, where that form is slower, and stands before or after the memory in others.
    without_pcie = [word for word in words if word != "pcie"]
    exact = (*without_pcie, "pcie") if "pcie" in words else tuple(without_pcie)
    return peaks.get(exact, peaks.get(tuple(without_pcie)))


def model_flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """Count the training FLOPs per token of `model` on sequences of `seq_len` tokens."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if config.tie_word_embeddings else embedding.numel()
    frozen = model.num_parameters() - model.num_parameters(only_trainable=True)
    return flops_per_token(
        model.num_parameters() - looked_up,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
        seq_len,
        num_frozen_parameters=frozen if embedding.requires_grad else frozen - looked_up,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest memory held so far: allocated on the device, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Stopwatch:
    """Measures the seconds spent training, without evaluation and saving, and what follows from them.

    step, wall_time_s: where the run begins, 0 or those of its checkpoint.
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
        self._step_time_s = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
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
        """Return the speed since the last lap, by the names in metrics.jsonl; mfu is None on an unknown device."""
        self._count()
        seconds, steps = self._lap_s, step - self._lap_step
        tokens = self.plan.tokens_seen(step) - self.plan.tokens_seen(self._lap_step)
        self._lap_s, self._lap_step, self._step_time_s = 0.0, step, seconds / steps
        per_device = tokens / seconds / self.plan.num_processes
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": self.peak_flops and per_device * self.flops_per_token / self.peak_flops,
            "step_time_s": seconds / steps,
            "peak_memory_gib": peak_memory_gib(self.device),
        }

    def remaining_s(self, steps: int) -> float:
        """Estimate the seconds of `steps` more at the last lap's pace, pauses included at the share they have had."""
        return steps * self._step_time_s * (1 + self._paused_s / (self.total_s - self._first_s))


def step_metrics(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
) -> dict[str, float | None]:
    """Return a step's part of a row of metrics.jsonl; every process has to call it. What is not finite is None."""
    loss = accelerator.reduce(loss, reduction="mean").item()
    return {
        "loss": loss if math.isfinite(loss) else None,
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
    }
