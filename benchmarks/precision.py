"""Does a device, a precision, a compiler learn what fp32 on a CPU learns? Real training on real text, step by step.

    python -m benchmarks.precision --data DATA [--model_preset gpt2 modern] [--optimizer adamw muon] [--steps 50]

Every row of benchmarks.throughput starts from the same weights and sees the same batches in the same order, without dropout;
its losses are compared with those of fp32 on the CPU. DATA is a folder that prepare_data.py wrote, or a text file,
whose UTF-8 bytes then are the tokens. Exit code 1 if a row's last losses are further off than --tolerance.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measuring import markdown_table, provenance, report_path
from benchmarks.throughput import (
    OPTIMIZERS,
    PRECISIONS,
    Row,
    Shape,
    choose_device,
    make_training_step,
    model_config,
    refuse_rows_that_cannot_be,
)
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import check_range

if TYPE_CHECKING:
    import torch

WARMUP_STEPS = 10
LAST_STEPS = 10
NO_DROPOUT = dict.fromkeys(("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0)


@dataclass
class PrecisionCheckConfig:
    data: str = field(metadata={"help": "folder written by prepare_data.py, or a text file"})
    model_preset: list[str] = field(default_factory=lambda: ["gpt2", "modern"], metadata={"help": "models to train"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "model settings over each preset's: hidden_size=64,num_hidden_layers=2"}
    )
    block_size: int = field(default=1024, metadata={"help": "tokens per sequence"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "sequences per step"})
    optimizer: list[str] = field(
        default_factory=lambda: ["adamw"], metadata={"help": "optimizers to train with", "choices": list(OPTIMIZERS)}
    )
    precision: list[str] = field(
        default_factory=lambda: ["bf16"], metadata={"help": "compared with fp32", "choices": list(PRECISIONS)}
    )
    torch_compile: bool = field(default=False, metadata={"help": "add a compiled row in the last --precision"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernel on the device"})
    steps: int = field(default=50, metadata={"help": "optimizer steps"})
    tolerance: float = field(
        default=0.05, metadata={"help": f"nats/token that the mean of the last {LAST_STEPS} losses may be off by"}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: the best there is"})
    output: str = field(default="eval/reports", metadata={"help": "folder for the report"})

    def __post_init__(self):
        for name in ("block_size", "per_device_train_batch_size"):
            check_range(f"--{name}", getattr(self, name), 1)
        check_range("--steps", self.steps, LAST_STEPS)
        check_range("--tolerance", self.tolerance, 0)


def read_batches(data: str, *, steps: int, batch_size: int, block_size: int) -> "torch.Tensor":
    """(steps, batch_size, block_size + 1) token ids: a fixed choice of blocks, none twice."""
    import numpy as np
    import torch

    if Path(data).is_dir():
        from gpt2modern.data.blocks import PackedBlocks

        blocks = PackedBlocks(data, "train", block_size)
    else:
        try:
            tokens = np.fromfile(data, dtype=np.uint8)
        except OSError as error:
            raise GPT2ModernError(f"--data {data}: {error.strerror}") from None
        count = max(0, len(tokens) - 1) // block_size
        starts = torch.arange(count).unsqueeze(1) * block_size
        blocks = torch.from_numpy(tokens).long()[starts + torch.arange(block_size + 1)]
    if len(blocks) < steps * batch_size:
        raise GPT2ModernError(
            f"--data {data} has {len(blocks)} blocks of --block_size {block_size}, but --steps {steps} x "
            f"--per_device_train_batch_size {batch_size} are {steps * batch_size}; lower one of them"
        )
    chosen = np.random.default_rng(0).permutation(len(blocks))[: steps * batch_size].tolist()
    batches = blocks[chosen] if isinstance(blocks, torch.Tensor) else blocks.__getitems__(chosen)
    return batches.view(steps, batch_size, -1)


def train(row: Row, shape: Shape, batches: "torch.Tensor") -> list[float]:
    """Loss of each step (nats/token) before its update; the same first weights for every row of a preset."""
    import torch
    from tqdm import tqdm

    torch.manual_seed(0)
    step = make_training_step(row, shape)
    losses = []
    for index, batch in enumerate(tqdm(batches, desc=f"{row} on {shape.device}", unit="step", leave=False)):
        losses.append(step(batch.to(shape.device), min(1.0, (index + 1) / WARMUP_STEPS)).item())
    return losses


HEADER = (
    "model", "optimizer", "precision", "device", "first loss", f"mean of the last {LAST_STEPS}", "off by",
    "largest difference of a step",
)  # fmt: skip


def table_row(row: Row, device: str, losses: list[float], reference: list[float]) -> list[str]:
    differences = [loss - expected for loss, expected in zip(losses, reference, strict=True)]
    return [
        row.model_preset,
        row.optimizer,
        row.precision_words,
        device,
        f"{losses[0]:.4f}",
        f"{mean_of_the_last(losses):.4f}",
        f"{mean_of_the_last(differences):+.4f}",
        f"{max(map(abs, differences)):.4f}",
    ]


def mean_of_the_last(values: list[float]) -> float:
    return sum(values[-LAST_STEPS:]) / LAST_STEPS


REPORT = """\
# Training in other precisions against fp32 on a CPU: {device}

Question: do {steps} steps of real training on real text end where fp32 on a CPU ends?

{provenance}
Data: {data}, {steps} batches of {batch_size} x {block_size} tokens, the same for every row, as are the first weights.
Learning rate: linear over {warmup} steps, then constant (AdamW 6e-4, Muon 0.02); gradient norm clipped at 1; no
dropout; one seed. Losses in nats/token, before the update; differences are to the fp32 row above.

{table}
Verdict: {verdict} (tolerance {tolerance} nats/token on the mean of the last {last} losses).
"""


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    config = parse_arguments(PrecisionCheckConfig, argv, __doc__)

    from transformers.utils import logging as transformers_logging

    from benchmarks.measuring import device_words
    from gpt2modern.training.models import parse_config_overrides

    transformers_logging.set_verbosity_error()
    device = choose_device(config.device)
    shape = Shape(
        config_overrides=parse_config_overrides(config.config_overrides) | NO_DROPOUT,
        block_size=config.block_size,
        batch_size=config.per_device_train_batch_size,
        attn_implementation=config.attn_implementation,
        device=str(device),
    )
    references = [Row(preset, optimizer) for preset in config.model_preset for optimizer in config.optimizer]
    refuse_rows_that_cannot_be(references, shape)
    batches = read_batches(config.data, steps=config.steps, batch_size=shape.batch_size, block_size=shape.block_size)
    for row in references:
        vocab_size = model_config(row.model_preset, shape).vocab_size
        if batches.max() >= vocab_size:
            raise GPT2ModernError(
                f"--data {config.data} has token id {batches.max()}, {row.model_preset} only {vocab_size}"
            )
    path = report_path(config.output, "precision", device)
    source = provenance("benchmarks.precision", sys.argv[1:] if argv is None else argv, device)

    lines, failures = [], []
    for reference in references:
        expected = train(reference, replace(shape, device="cpu", attn_implementation="sdpa"), batches)
        lines.append(table_row(reference, "cpu", expected, expected))
        rows = [replace(reference, precision=precision) for precision in config.precision]
        rows += [replace(rows[-1], compiled=True)] if config.torch_compile else []
        for row in rows:
            losses = train(row, shape, batches)
            lines.append(table_row(row, shape.device, losses, expected))
            if not abs(mean_of_the_last(losses) - mean_of_the_last(expected)) <= config.tolerance:  # nan is off too
                failures.append(str(row))
    text = REPORT.format(
        device=device_words(device),
        steps=config.steps,
        provenance=source,
        data=Path(config.data).name,
        batch_size=shape.batch_size,
        block_size=shape.block_size,
        warmup=WARMUP_STEPS,
        table=markdown_table(HEADER, lines),
        verdict=f"off: {'; '.join(failures)}" if failures else "every row ends where fp32 ends",
        tolerance=config.tolerance,
        last=LAST_STEPS,
    )
    path.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {path}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
