"""Check that training on another device, in another precision or compiled reaches the losses of fp32 on a CPU.

    python -m benchmarks.precision --data DATA [--model_preset gpt2 modern] [--optimizer adamw muon] [--steps 50]

A row is one way to train: model, optimizer, precision, compiled or not. Every row makes the trainer's steps from the
same weights, on the same batches of real text, without dropout. DATA is a folder that prepare_data.py wrote. The exit
code is 1 if the mean of a row's last losses differs by more than --tolerance from that of fp32 on the CPU.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from benchmarks import throughput
from benchmarks.throughput import LEARNING_RATE_WARM_UP, Row, StepConfig
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.settings import setting
from gpt2modern.training.optimizers import OPTIMIZERS

LAST_STEPS = 10
PRECISIONS = ["fp32", "tf32", "bf16"]
HEADER = ["model", "optimizer", "precision", "device", "first loss", f"mean of the last {LAST_STEPS}", "difference"]
HEADER += ["largest difference of a step"]


@dataclass(kw_only=True)
class PrecisionCheckConfig(StepConfig):
    data: str = setting(help="folder that prepare_data.py wrote")
    model_preset: list[str] = setting(default_factory=lambda: ["gpt2", "modern"], help="model presets to check")
    optimizer: list[str] = setting(default_factory=lambda: ["adamw"], help="optimizers", choices=list(OPTIMIZERS))
    precision: list[str] = setting(default_factory=lambda: ["bf16"], help="to compare with fp32", choices=PRECISIONS)
    torch_compile: bool = setting(False, "also train with torch.compile, in the last of --precision")
    steps: int = setting(50, "number of optimizer steps", least=LAST_STEPS)
    tolerance: float = setting(0.05, f"allowed difference of the mean of the last {LAST_STEPS} losses", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.device == "cpu" and "tf32" in self.precision:
            raise ValueError("--precision tf32 needs an NVIDIA GPU (Ampere or newer), but --device is cpu; omit tf32")


def rows_of(config: PrecisionCheckConfig) -> list[Row]:
    """Return the rows to compare with fp32: every precision, and with --torch_compile the last one also compiled."""
    rows = []
    for preset, optimizer in itertools.product(dict.fromkeys(config.model_preset), dict.fromkeys(config.optimizer)):
        rows += [Row(preset, optimizer, precision) for precision in dict.fromkeys(config.precision)]
        rows += [replace(rows[-1], compiled=True)] if config.torch_compile else []
    return rows


def train(row: Row, config: PrecisionCheckConfig, blocks: PackedBlocks) -> list[float]:
    """Train one row and return the loss of each step before its update, in nats/token. All rows see the same blocks."""
    with throughput.training_step(row, config, blocks) as step:
        batches = throughput.batches_of(blocks, config, config.steps)
        progress = tqdm(batches, f"{row} on {config.device}", config.steps, unit="step", leave=False)
        return [step(batch).loss.item() for batch in progress]


def compare(rows: Sequence[Row], config: PrecisionCheckConfig, blocks: PackedBlocks) -> tuple[list, list, list[str]]:
    """Train every row, and fp32 on the CPU for it; return the table's lines, the numbers behind them, and the rows that
    exceed --tolerance."""
    on_cpu = replace(config, device="cpu", precision=["fp32"], attn_implementation="sdpa")
    expected: dict[Row, list[float]] = {}
    lines, results, failures = [], [], []
    for row in rows:
        reference = Row(row.model_preset, row.optimizer)
        runs = [(row, config)] if reference in expected else [(reference, on_cpu), (row, config)]
        for each, settings in runs:
            losses = train(each, settings, blocks)
            differences = np.subtract(losses, expected.setdefault(reference, losses))
            off_by = differences[-LAST_STEPS:].mean().item()
            results.append({"row": each.cells, "device": settings.device, "losses": losses, "off_by": off_by})
            numbers = [f"{losses[0]:.4f}", f"{np.mean(losses[-LAST_STEPS:]):.4f}", f"{off_by:+.4f}"]
            lines.append([*each.cells, settings.device, *numbers, f"{np.abs(differences).max():.4f}"])
            if not abs(off_by) <= config.tolerance:  # so NaN fails, too
                failures.append(str(each))
    return lines, results, failures


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PrecisionCheckConfig, argv, __doc__)
        logging.set_verbosity_error()  # hides warnings about special tokens, which are not used
        blocks = throughput.read_blocks(config, config.data, config.steps)
        measures = [*evidence.TRAINING_CODE, "benchmarks/throughput.py:settings_of,training_step,batches_of"]
        report = evidence.Report("precision", config.output, torch.device(config.device), argv, measures=measures)
        lines, results, failures = compare(rows_of(config), config, blocks)
        method = f"""
Data: {blocks.data_dir.name}, {config.steps} batches of {config.per_device_train_batch_size} x {config.block_size} \
tokens, the same for every row, and the same initial weights.
A step: `train_accelerate.train_step`; the learning rate rises for {LEARNING_RATE_WARM_UP} steps, then is constant
(AdamW 6e-4, Muon 0.02); gradients clipped at 1, no dropout, one seed. Losses in nats/token, before the update;
differences from the fp32 row above."""
        verdict = f"too far from fp32: {'; '.join(failures)}" if failures else "every row ends where fp32 ends"
        remarks = f"Verdict: {verdict} (mean of the last {LAST_STEPS} losses, within {config.tolerance} nats/token)."
        question = f"do {config.steps} training steps on real text reach the same loss as fp32 on a CPU?"
        report.write("Training in other precisions", question, method, [HEADER, *lines], remarks, results)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
