"""Check that training on another device, in another precision or compiled reaches the losses of fp32 on a CPU.

    python -m benchmarks.precision --data DATA [--model_preset gpt2 modern] [--optimizer adamw muon] [--steps 50]

A row is one way to train: model, optimizer, precision, compiled or not. Every row makes the trainer's steps from the
same weights, on the same batches of real text, without dropout. DATA is a folder that prepare_data.py wrote. The exit
code is 1 if the mean of a row's last losses differs by more than --tolerance from that of fp32 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from benchmarks import measuring
from benchmarks.throughput import LEARNING_RATE_WARM_UP, PRECISIONS, Row, StepConfig, rows_of, training_step
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import setting

LAST_STEPS = 10
NO_DROPOUT = "embedding_dropout=0.0,attention_dropout=0.0,hidden_dropout=0.0"
HEADER = ["model", "optimizer", "precision", "device", "first loss", f"mean of the last {LAST_STEPS}", "difference"]
HEADER += ["largest difference of a step"]


@dataclass(kw_only=True)
class PrecisionCheckConfig(StepConfig):
    data: str = setting(help="folder that prepare_data.py wrote")
    precision: list[str] = setting(default_factory=lambda: ["bf16"], help="to compare with fp32", choices=PRECISIONS)
    torch_compile: bool = setting(False, "also train with torch.compile, in the last of --precision")
    steps: int = setting(50, "number of optimizer steps", least=LAST_STEPS)
    tolerance: float = setting(0.05, f"allowed difference of the mean of the last {LAST_STEPS} losses", least=0)


def train(row: Row, config: PrecisionCheckConfig, blocks: PackedBlocks) -> list[float]:
    """Train one row and return the loss of each step before its update, in nats/token. All rows see the same blocks."""
    chosen = np.random.default_rng(0).permutation(len(blocks))[: config.steps * config.per_device_train_batch_size]
    chosen = chosen.reshape(config.steps, -1).tolist()
    with training_step(row, config, blocks) as step:
        progress = tqdm(chosen, desc=f"{row} on {config.device}", unit="step", leave=False)
        return [step(blocks.__getitems__(indices)).loss.item() for indices in progress]


def compare(rows: Sequence[Row], config: PrecisionCheckConfig, blocks: PackedBlocks) -> tuple[list, list[str]]:
    """Train every row, and fp32 on the CPU for it; return the table's lines and the rows that exceed --tolerance."""
    on_cpu = replace(config, device="cpu", precision=["fp32"], attn_implementation="sdpa")
    expected: dict[Row, list[float]] = {}
    lines, failures = [], []
    for row in rows:
        reference = Row(row.model_preset, row.optimizer)
        runs = [(row, config)] if reference in expected else [(reference, on_cpu), (row, config)]
        for each, settings in runs:
            losses = train(each, settings, blocks)
            differences = np.subtract(losses, expected.setdefault(reference, losses))
            off_by = differences[-LAST_STEPS:].mean()
            numbers = [f"{losses[0]:.4f}", f"{np.mean(losses[-LAST_STEPS:]):.4f}", f"{off_by:+.4f}"]
            lines.append([*each.cells, settings.device, *numbers, f"{np.abs(differences).max():.4f}"])
            if not abs(off_by) <= config.tolerance:  # so NaN fails, too
                failures.append(str(each))
    return lines, failures


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PrecisionCheckConfig, argv, __doc__)
        logging.set_verbosity_error()  # hides warnings about special tokens, which are not used
        config.config_overrides = ",".join(filter(None, [config.config_overrides, NO_DROPOUT]))
        blocks = PackedBlocks(config.data, "train", config.block_size)
        needed = config.steps * config.per_device_train_batch_size
        if len(blocks) < needed:
            have = f"--data {config.data} has {len(blocks)} blocks of --block_size {config.block_size}"
            need = f"--steps {config.steps} x --per_device_train_batch_size {config.per_device_train_batch_size}"
            raise GPT2ModernError(f"{have}, but {need} need {needed}; lower one of the two")
        report = measuring.Report("precision", config.output, torch.device(config.device), argv)
        lines, failures = compare(rows_of(config, peer=False), config, blocks)
        method = f"""
Data: {blocks.data_dir.name}, {config.steps} batches of {config.per_device_train_batch_size} x {config.block_size} \
tokens, the same for every row, and the same initial weights.
A step: `train_accelerate.train_step`; the learning rate rises for {LEARNING_RATE_WARM_UP} steps, then is constant
(AdamW 6e-4, Muon 0.02); gradients clipped at 1, no dropout, one seed. Losses in nats/token, before the update;
differences from the fp32 row above."""
        verdict = f"too far from fp32: {'; '.join(failures)}" if failures else "every row ends where fp32 ends"
        remarks = f"Verdict: {verdict} (mean of the last {LAST_STEPS} losses, within {config.tolerance} nats/token)."
        question = f"do {config.steps} training steps on real text reach the same loss as fp32 on a CPU?"
        report.write("Training in other precisions", question, method, [HEADER, *lines], remarks)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
