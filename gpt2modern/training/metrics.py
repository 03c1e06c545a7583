"""What a run measures and writes: metrics.jsonl, summary.json, training_curves.png."""

import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gpt2modern.errors import GPT2ModernError, warn

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
    """Training FLOPs per token, forward and backward: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

    N counts the parameters that are multiplied with every token (the head included, the embedding look-up not);
    attention_width = num_attention_heads x head_dim. The causal half of attention is not discounted. A frozen
    parameter passes gradients on but has none itself: 4 in place of 6.
    """
    per_parameter = 6 * num_matmul_parameters - 2 * num_frozen_parameters
    return per_parameter + 12 * num_hidden_layers * attention_width * seq_len


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s, or None where it is not known (CPUs, uncommon GPUs)."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """The same for the name that torch gives a device; None unless every word of it is understood."""
    words = re.split(r"[\s/-]+", name.lower())
    words = [word for word in words if word == "pcie" or not re.fullmatch(WORDS_WITHOUT_EFFECT, word)]
    peaks = {tuple(key.lower().split()): tflops * 1e12 for key, tflops in PEAK_TFLOPS.items()}
    # PCIe is part of some names, where that form is slower, and stands before or after the memory in others.
    without_pcie = [word for word in words if word != "pcie"]
    exact = (*without_pcie, "pcie") if "pcie" in words else tuple(without_pcie)
    return peaks.get(exact, peaks.get(tuple(without_pcie)))


def model_flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """`flops_per_token` of `model` on sequences of `seq_len` tokens."""
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


def model_flops_utilization(
    model: PreTrainedModel, *, seq_len: int, tokens_per_second: float, peak_flops: float | None
) -> float | None:
    """Share of one device's peak that the model's own arithmetic amounts to; None where the peak is not known."""
    if peak_flops is None:
        return None
    return tokens_per_second * model_flops_per_token(model, seq_len) / peak_flops


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far: allocated on the device, or resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Stopwatch:
    """Seconds spent training; evaluation and saving are taken out with `pause()` and `resume()`."""

    def __init__(self, device: torch.device, step: int):
        self.device = device
        self.total_s = 0.0
        self.paused_s = 0.0
        self._lap_s, self._lap_step = 0.0, step
        self._step_time_s = 0.0
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # kernels still queued belong to the time before
        now = time.perf_counter()
        self.total_s += now - self._since
        self._lap_s += now - self._since
        self._since = now

    def resume(self) -> None:
        now = time.perf_counter()
        self.paused_s += now - self._since
        self._since = now

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and training seconds since the last lap."""
        self.pause()
        lap = step - self._lap_step, self._lap_s
        self._lap_s, self._lap_step = 0.0, step
        self._step_time_s = lap[1] / lap[0]
        return lap

    def remaining_s(self, steps: int) -> float:
        """Seconds that `steps` more will take at the last lap's pace, pauses included at the share they have had."""
        return steps * self._step_time_s * (1 + self.paused_s / self.total_s)


class MetricsLog:
    """metrics.jsonl: one JSON object per logged step, in order, without repeats after a resume.

    `last_step` is the highest step that the file had before, which may lie beyond `resumed_step`. A disk that takes no
    row is one warning: the rows are kept, and written as soon as it takes them.
    """

    def __init__(self, path: Path, *, resumed_step: int):
        self.path = path
        try:
            rows = read_metrics(path)
            self.last_step = max((row["step"] for row in rows), default=0)
            self.rows = [row for row in rows if row["step"] <= resumed_step]
            self._write_all()
        except OSError as error:
            raise GPT2ModernError(f"{path}: cannot be written ({error.strerror})") from None
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise GPT2ModernError(f"{path}: is not a log of metrics ({error!r}); move it away") from None
        self.is_behind = False

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write(rewrite=self.is_behind)  # the last row in the file may be a part of one

    def amend(self, row: dict[str, Any]) -> None:
        """Add to the last row, which is of the same step."""
        self.rows[-1] |= row
        self._write(rewrite=True)

    def _write(self, *, rewrite: bool) -> None:
        try:
            if rewrite:
                self._write_all()
            else:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")
            self.is_behind = False
        except OSError as error:
            if not self.is_behind:
                warn(f"{self.path} cannot be written ({error.strerror}); its rows are kept until it can")
            self.is_behind = True

    def _write_all(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut short by a crash is left out. A missing file has no rows."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to a file that appears whole or not at all; raises GPT2ModernError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise GPT2ModernError(f"{path}: cannot be written ({error.strerror})") from None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Tokenizer-independent loss: nats/token -> bits per UTF-8 byte of the evaluated text."""
    return loss / math.log(2) / bytes_per_token


def plot_training_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw train and evaluation loss (nats/token) and the learning rate over tokens seen."""
    os.environ["MPLBACKEND"] = "Agg"  # one of the user's that is not there would stop the import
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(row["tokens_seen"], row["loss"], row["learning_rate"]) for row in rows if row.get("loss") is not None]
    evaluated = [(row["tokens_seen"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, (loss_axis, rate_axis) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    if train:
        tokens, losses, rates = zip(*train, strict=True)
        loss_axis.plot(tokens, losses, color="tab:blue", alpha=0.5, linewidth=1, label="train (one batch)")
        rate_axis.plot(tokens, rates, color="tab:gray")
    if evaluated:
        tokens, losses = zip(*evaluated, strict=True)
        loss_axis.plot(
            tokens, losses, color="tab:orange", marker="o", markersize=4, label=f"validation (last {losses[-1]:.3f})"
        )
    loss_axis.set_ylabel("loss (nats/token)")
    if train or evaluated:
        loss_axis.legend()
    loss_axis.grid(alpha=0.3)
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_xlabel("tokens seen")
    rate_axis.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, path)
