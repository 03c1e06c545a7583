"""Does a device, a precision, a compiler learn what fp32 on a CPU learns? Real training on real text, step by step.

    python -m benchmarks.precision --data DATA [--model_preset gpt2 modern] [--optimizer adamw muon] [--steps 50]

Every row makes the trainer's steps, as in benchmarks.throughput, from the same weights on the same batches in the same
order, without dropout; its losses are compared with those of fp32 on the CPU. DATA is a folder that prepare_data.py
wrote. Exit code 1 if a row's last losses are further off than --tolerance.
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


@dataclass(kw_only=True)
class PrecisionCheckConfig(StepConfig):
    data: str = setting(help="folder written by prepare_data.py")
    precision: list[str] = setting(
        default_factory=lambda: ["bf16"], help="of matrix products, compared with fp32", choices=PRECISIONS
    )
    torch_compile: bool = setting(False, "add a compiled row in the last --precision")
    steps: int = setting(50, "optimizer steps", least=LAST_STEPS)
    tolerance: float = setting(0.05, f"nats/token that the mean of the last {LAST_STEPS} losses may be off by", least=0)


def train(row: Row, config: PrecisionCheckConfig, blocks: PackedBlocks) -> list[float]:
    """Return the loss of each step (nats/token) before its update, on the same blocks for every row, none twice."""
    chosen = np.random.default_rng(0).permutation(len(blocks))[: config.steps * config.per_device_train_batch_size]
    chosen = chosen.reshape(config.steps, -1).tolist()
    with training_step(row, config, blocks) as step:
        progress = tqdm(chosen, desc=f"{row} on {config.device}", unit="step", leave=False)
        return [step(blocks.__getitems__(indices)).loss.item() for indices in progress]


HEADER = ["model", "optimizer", "precision", "device", "first loss", f"mean of the last {LAST_STEPS}", "off by"]
HEADER += ["largest difference of a step"]


def compare(rows: Sequence[Row], config: PrecisionCheckConfig, blocks: PackedBlocks) -> tuple[list, list[str]]:
    """Train every row and its fp32 row on the CPU; return the lines of the table, and the rows that ended off."""
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
            if not abs(off_by) <= config.tolerance:  # NaN is off too
                failures.append(str(each))
    return lines, failures


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PrecisionCheckConfig, argv, __doc__)
        logging.set_verbosity_error()  # the special tokens of a preset mean nothing here
        config.config_overrides = ",".join(filter(None, [config.config_overrides, NO_DROPOUT]))
        blocks = PackedBlocks(config.data, "train", config.block_size)
        needed = config.steps * config.per_device_train_batch_size
        if len(blocks) < needed:
            raise GPT2ModernError(
                f"--data {config.data} has {len(blocks)} blocks of --block_size {config.block_size}, but --steps x "
                f"--per_device_train_batch_size are {needed}; lower one of them"
            )
        report = measuring.Report("precision", config.output, torch.device(config.device), argv)
        lines, failures = compare(rows_of(config, peer=False), config, blocks)
        method = f"""
Data: {blocks.data_dir.name}, {config.steps} batches of {config.per_device_train_batch_size} x {config.block_size} \
tokens, the same for every row, as are the first weights.
A step: `train_accelerate.train_step`, with a learning rate linear over {LEARNING_RATE_WARM_UP} steps, then constant
(AdamW 6e-4, Muon 0.02), clipping at 1, no dropout, one seed. Losses in nats/token, before the update; differences are
to the fp32 row above."""
        verdict = f"off: {'; '.join(failures)}" if failures else "every row ends where fp32 ends"
        remarks = f"Verdict: {verdict} (the mean of the last {LAST_STEPS} losses, by {config.tolerance} nats/token)."
        question = f"do {config.steps} steps of real training on real text end where fp32 on a CPU ends?"
        report.write("Training in other precisions", question, method, [HEADER, *lines], remarks)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
