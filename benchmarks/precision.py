"""Does a device, a precision, a compiler learn what fp32 on a CPU learns? Real training on real text, step by step.

    python -m benchmarks.precision --data DATA [--model_preset gpt2 modern] [--optimizer adamw muon] [--steps 50]

Every row makes the trainer's steps, as in benchmarks.throughput, from the same weights on the same batches in the same
order, without dropout; its losses are compared with those of fp32 on the CPU. DATA is a folder that prepare_data.py
wrote, or a text file, whose UTF-8 bytes then are the tokens. Exit code 1 if a row's last losses are further off than
--tolerance.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from benchmarks import measuring
from benchmarks.throughput import (
    PRECISIONS,
    Row,
    StepConfig,
    model_config,
    refuse_impossible_rows,
    rows_of,
    training_step,
)
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import setting

WARMUP_STEPS = 10
LAST_STEPS = 10
NO_DROPOUT = "embedding_dropout=0.0,attention_dropout=0.0,hidden_dropout=0.0"


@dataclass(kw_only=True)
class PrecisionCheckConfig(StepConfig):
    data: str = setting(help="folder written by prepare_data.py, or a text file")
    precision: list[str] = setting(
        default_factory=lambda: ["bf16"], help="of matrix products, compared with fp32", choices=PRECISIONS
    )
    torch_compile: bool = setting(False, "add a compiled row in the last --precision")
    steps: int = setting(50, "optimizer steps", least=LAST_STEPS)
    tolerance: float = setting(0.05, f"nats/token that the mean of the last {LAST_STEPS} losses may be off by", least=0)


def read_batches(config: PrecisionCheckConfig) -> torch.Tensor:
    """Read (steps, batch_size, block_size + 1) token ids: a fixed choice of blocks, none twice."""
    block_size, batch_size = config.block_size, config.per_device_train_batch_size
    if Path(config.data).is_dir():
        blocks = PackedBlocks(config.data, "train", block_size)
    else:
        try:
            tokens = np.fromfile(config.data, dtype=np.uint8)
        except OSError as error:
            raise GPT2ModernError(f"--data {config.data}: {error.strerror}") from None
        starts = torch.arange(max(0, len(tokens) - 1) // block_size).unsqueeze(1) * block_size
        blocks = torch.from_numpy(tokens).long()[starts + torch.arange(block_size + 1)]
    count = config.steps * batch_size
    if len(blocks) < count:
        raise GPT2ModernError(
            f"--data {config.data} has {len(blocks)} blocks of --block_size {block_size}, but --steps {config.steps} x "
            f"--per_device_train_batch_size {batch_size} are {count}; lower one of them"
        )
    chosen = np.random.default_rng(0).permutation(len(blocks))[:count].tolist()
    batches = blocks[chosen] if isinstance(blocks, torch.Tensor) else blocks.__getitems__(chosen)
    return batches.view(config.steps, batch_size, -1)


def train(row: Row, config: StepConfig, batches: torch.Tensor) -> list[float]:
    """Return the loss of each step (nats/token) before its update; the same first weights for every row of a preset."""
    with training_step(row, config, WARMUP_STEPS) as step:
        progress = tqdm(batches, desc=f"{row} on {config.device}", unit="step", leave=False)
        return [step(batch).loss.item() for batch in progress]


HEADER = ("model", "optimizer", "precision", "device", "first loss", f"mean of the last {LAST_STEPS}", "off by")
HEADER += ("largest difference of a step",)


def compare(rows: Sequence[Row], config: PrecisionCheckConfig, batches: torch.Tensor) -> tuple[list, list[str]]:
    """Train every row and its fp32 row on the CPU; return the lines of the table, and the rows that ended off."""
    expected: dict[Row, list[float]] = {}
    lines, failures = [], []

    def add(row: Row, device: str, losses: list[float], reference: list[float]) -> float:
        differences = np.subtract(losses, reference)
        off_by = differences[-LAST_STEPS:].mean()
        numbers = [f"{losses[0]:.4f}", f"{np.mean(losses[-LAST_STEPS:]):.4f}", f"{off_by:+.4f}"]
        lines.append([*row.cells, device, *numbers, f"{np.abs(differences).max():.4f}"])
        return off_by

    for row in rows:
        reference = Row(row.model_preset, row.optimizer)
        if reference not in expected:
            losses = train(reference, replace(config, device="cpu", attn_implementation="sdpa"), batches)
            expected[reference] = losses
            add(reference, "cpu", losses, losses)
        off_by = add(row, config.device, train(row, config, batches), expected[reference])
        if not abs(off_by) <= config.tolerance:  # NaN is off too
            failures.append(str(row))
    return lines, failures


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PrecisionCheckConfig, argv, __doc__)
        logging.set_verbosity_error()  # the special tokens of a preset mean nothing here
        device = measuring.choose_device(config.device)
        overrides = ",".join(filter(None, [config.config_overrides, NO_DROPOUT]))
        config = replace(config, device=str(device), config_overrides=overrides)
        rows = rows_of(config, peer=False)
        refuse_impossible_rows(rows, config)
        batches = read_batches(config)
        for row in rows:
            known = model_config(row, config).vocab_size
            if batches.max() >= known:
                raise GPT2ModernError(
                    f"--data {config.data} has token id {batches.max()}, {row.model_preset} only {known}"
                )
        path = measuring.report_path(config.output, "precision", device)
        source = measuring.provenance("benchmarks.precision", sys.argv[1:] if argv is None else argv, device)
        lines, failures = compare(rows, config, batches)
        verdict = f"off: {'; '.join(failures)}" if failures else "every row ends where fp32 ends"
        text = f"""\
# Training in other precisions against fp32 on a CPU: {measuring.device_name(device)}

Question: do {config.steps} steps of real training on real text end where fp32 on a CPU ends?

{source}

Data: {Path(config.data).name}, {config.steps} batches of {config.per_device_train_batch_size} x {config.block_size} \
tokens, the same for every row, as are the first weights.
A step: `train_accelerate.train_step`. Learning rate: linear over {WARMUP_STEPS} steps, then constant (AdamW 6e-4, Muon
0.02); gradient norm clipped at 1; no dropout; one seed. Losses in nats/token, before the update; differences are to the
fp32 row above.

{measuring.markdown_table(HEADER, lines)}
Verdict: {verdict} (tolerance {config.tolerance} nats/token on the mean of the last {LAST_STEPS} losses).
"""
        measuring.publish(path, text)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
