"""Train a model as the benchmarks do: by the trainer's step, by the trainer as a whole, or in a plain loop of PyTorch.

    python -m benchmarks.throughput --data DATA
    # on two CPU cores, in about half an hour:
    python -m benchmarks.throughput --data DATA --per_device_train_batch_size 2 --larger_batches 4 8 --steps 1

A row is one way to train: the model, which may be a peer, the optimizer, the precision, compiled or not, the loop. The
ladder starts with GPT-2 in fp32 as one writes it first, and adds one optimisation in each rung. DATA is a folder that
prepare_data.py wrote; the model has GPT-2's vocabulary whatever that of DATA is.
"""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import torch
from accelerate.utils import patch_environment
from torch import nn
from transformers.utils import logging

from benchmarks import measuring
from benchmarks.peers import PEERS, peer_loss
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training import models
from gpt2modern.training.batches import StepBatch
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import joined_processes
from gpt2modern.training.memory import freed_memory_kept
from gpt2modern.training.optimizers import OptimizerChain, build_optimizers
from gpt2modern.training.speed import model_flops_per_token, peak_flops, peak_memory_gib
from train_accelerate import train, train_step

GPT2_VOCAB_SIZE = 50257
LEARNING_RATE_WARM_UP = 10  # steps
WARM_UP_STEPS = 2  # for compilation, the allocator's first blocks, the optimizer's state
NO_DROPOUT = "embedding_dropout=0.0,attention_dropout=0.0,hidden_dropout=0.0"
# Of every report on the speed of training.
MEASURES = [*evidence.TRAINING_CODE, "gpt2modern/training/memory.py:freed_memory_kept", "benchmarks/peers.py"]
MEASURES += [
    "benchmarks/throughput.py:settings_of,build_model,loss_from_logits,training_step,measure_training,ladder,batches_of,"
    "compare_rungs,WARM_UP_STEPS,LEARNING_RATE_WARM_UP"
]
HEADER = ["rung", "sequences", "tokens/s (p20 to p80)", "MFU", "peak GiB", "over the rung before", "over the first"]


@dataclass(kw_only=True)
class StepConfig:
    """Hold the flags that all benchmarks of training share: sizes, attention, device."""

    config_overrides: str | None = setting(None, "settings to change in every model: hidden_size=64,head_dim=32")
    block_size: int = setting(1024, "tokens per sequence", least=1)
    per_device_train_batch_size: int = setting(8, "number of sequences in a step", least=1)
    attn_implementation: str | None = setting(None, "attention of the presets; default: as in train_accelerate.py")
    vocab_size: int | None = setting(None, "number of token ids of the model; default: of the data", least=1)
    device: str | None = setting(None, "cpu or cuda; default: the GPU if there is one")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        self.device = str(measuring.choose_device(self.device))


@dataclass(frozen=True)
class Row:
    """Represent one way to train a preset or, if `peer` is a key of PEERS, that model in the preset's sizes.

    loop: the trainer's step in a loop of the benchmark; train_accelerate.py as a whole; or a plain loop with autocast.
    keeps_logits: the preset's loss is computed from all logits. attention: instead of that in the benchmark's settings.
    fused: AdamW in one kernel. padded: with --vocab_size, rows of the vocabulary are padded to a multiple of 64.
    """

    model_preset: str
    optimizer: str = "adamw"
    precision: str = "fp32"
    compiled: bool = False
    peer: str | None = None
    gradient_checkpointing: bool = False
    loop: Literal["trainer's step", "train_accelerate.py", "plain loop"] = "trainer's step"
    keeps_logits: bool = False
    attention: str | None = None
    fused: bool = True
    padded: bool = True

    @property
    def cells(self) -> list[str]:
        return [self.peer or self.model_preset, self.optimizer, self.precision + " compiled" * self.compiled]

    def __str__(self) -> str:
        return ", ".join(self.cells)


GPT2_PEER = Row("gpt2", peer="GPT2LMHeadModel", loop="plain loop", padded=False)
LADDER_PEERS = {
    "transformers' GPT-2, fp32": GPT2_PEER,
    "transformers' GPT-2, bf16, compiled": replace(GPT2_PEER, precision="bf16", compiled=True),
}


def ladder() -> dict[str, Row]:
    """Return the rungs of the ladder by name, each with one change more than the rung before, at the same batch."""
    row = Row("gpt2", keeps_logits=True, attention="eager", fused=False, padded=False, loop="plain loop")
    rungs = {"fp32, eager attention, loss from all logits": row}
    changes = {
        "fused AdamW, TF32 on a GPU": {"fused": True, "precision": "tf32"},
        "sdpa": {"attention": "sdpa"},
        "bf16 autocast": {"precision": "bf16"},
        "torch.compile": {"compiled": True},
        "vocabulary padded to a multiple of 64": {"padded": True},
        "loss in chunks": {"keeps_logits": False},
        "the trainer's step, with its attention and allocator": {"loop": "trainer's step", "attention": None},
    }
    for name, change in changes.items():
        rungs[f"+ {name}"] = row = replace(row, **change)
    return rungs


def read_blocks(config: StepConfig, data: str, steps: int) -> PackedBlocks:
    """Open the prepared folder `data`. Raises GPT2ModernError if it has too few blocks for `steps` steps."""
    blocks = PackedBlocks(data, "train", config.block_size)
    if len(blocks) < steps * config.per_device_train_batch_size:
        have = f"--data {data} has {len(blocks)} blocks of --block_size {config.block_size}"
        need = f"{steps} steps of {config.per_device_train_batch_size} sequences need"
        raise GPT2ModernError(f"{have}, but {need} {steps * config.per_device_train_batch_size}; lower one of them")
    return blocks


def batches_of(blocks: PackedBlocks, config: StepConfig, steps: int) -> Iterator[torch.Tensor]:
    """Yield the batches of `steps` steps, (sequences, block_size + 1) token ids, always the same and all distinct."""
    size = config.per_device_train_batch_size
    for indices in np.random.default_rng(0).permutation(len(blocks))[: steps * size].reshape(steps, size).tolist():
        yield blocks.__getitems__(indices)


def settings_of(row: Row, config: StepConfig) -> TrainConfig:
    """Return the trainer's settings for a row. The learning rate is constant after its warm-up."""
    precision = "bf16" if row.precision == "bf16" else "no"
    attention = row.attention or config.attn_implementation
    attention = attention or models.fastest_attention(torch.device(config.device), precision)
    overrides = [config.config_overrides, NO_DROPOUT]
    if config.vocab_size:
        rows = -(-config.vocab_size // 64) * 64 if row.padded else config.vocab_size  # GPT-2's 50,257 become 50,304
        overrides.append(f"vocab_size={rows},unpadded_vocab_size={config.vocab_size}")
    return TrainConfig(
        dry_run=True,  # so no folders are needed
        model_preset=row.model_preset,
        config_overrides=",".join(filter(None, overrides)),
        attn_implementation=attention,
        gradient_checkpointing=row.gradient_checkpointing,
        optimizer=row.optimizer,
        mixed_precision=precision,
        torch_compile=row.compiled,
        lr_scheduler_type="constant",
        warmup_steps=LEARNING_RATE_WARM_UP,
    )


def build_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> nn.Module:
    """Build the row's model on the default device, with random weights and the vocabulary of `data` (None: GPT-2's)."""
    shape = data or models.DataShape(GPT2_VOCAB_SIZE, eos_token_id=0, block_size=config.block_size)
    if row.peer is None:
        return models.build_model(settings_of(row, config), shape)
    return PEERS[row.peer](weightless_model(replace(row, peer=None), config, data).config)


def weightless_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> nn.Module:
    with torch.device("meta"):
        return build_model(row, config, data)


def loss_from_logits(model: nn.Module, batch: torch.Tensor, *, num_items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a preset's loss as `batch_loss` does, computed from all logits."""
    inputs, labels = batch[:, :-1].clamp(min=0), batch[:, 1:]
    loss = model(
        input_ids=inputs, shift_labels=labels, labels=labels, num_items_in_batch=num_items, use_cache=False
    ).loss
    return loss, loss.detach()


@contextlib.contextmanager
def training_step(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> Iterator[Callable]:
    """Build the row's model and optimizer as the trainer does, and yield a function that trains on one batch.

    The function takes token ids (sequences, block_size + 1) on the CPU and returns the StepResult of `train_step`, or
    in a plain loop the loss. The initial weights are drawn on the CPU, so they are the same for every device,
    precision and optimizer.
    """
    settings = settings_of(row, config)
    with (
        patch_environment(ACCELERATE_TORCH_DEVICE=config.device),  # also for cpu on a machine with a GPU
        joined_processes(settings.mixed_precision, settings.ddp_timeout) as (accelerator, processes),
        contextlib.nullcontext() if row.peer or row.loop == "plain loop" else freed_memory_kept(),
    ):
        torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")  # the trainer's: high
        torch.manual_seed(settings.seed)
        is_plain = row.loop == "plain loop"
        model = build_model(row, config, data).train()
        optimizers = build_optimizers(model, settings)
        for group in [] if row.fused else optimizers[0].param_groups:
            group["fused"] = None  # what torch chooses: on a GPU groups of tensors, on a CPU one tensor after another
        model = model.to(config.device) if is_plain else accelerator.prepare(model)
        model = (
            torch.compile(model, options=None if row.peer else models.COMPILE_OPTIONS)
            if settings.torch_compile
            else model
        )
        optimizer = accelerator.prepare_optimizer(OptimizerChain(optimizers), device_placement=False)
        objective = batch_loss if row.peer is None else peer_loss
        objective = loss_from_logits if row.keeps_logits else objective
        count = itertools.count()

        def step(batch: torch.Tensor):
            num_targets = int((batch[:, 1:] >= 0).sum())
            one_pass = StepBatch(np.arange(len(batch)), num_targets, grad_accum_steps=1, micro_batches=iter([batch]))
            return train_step(settings, accelerator, processes, model, optimizer, one_pass, objective, next(count))

        def plain_step(batch: torch.Tensor) -> torch.Tensor:
            batch = batch.to(config.device)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=row.precision == "bf16"):
                loss, _ = objective(model, batch, num_items=torch.tensor(float(batch[:, 1:].numel())))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
            return loss.detach()

        yield plain_step if is_plain else step


def measure_training(row: Row, config: StepConfig, blocks: PackedBlocks, steps: int) -> dict[str, float]:
    """Train on `steps` batches after warm-up steps; return tokens/s, seconds per step, MFU (None: unknown peak), and
    the process's peak memory in GiB, absolute and above what it had when this was called. Call it in a new process."""
    logging.set_verbosity_error()
    device = torch.device(config.device)
    before = psutil.Process().memory_info().rss / 2**30 if device.type == "cpu" else 0.0
    tokens = config.per_device_train_batch_size * config.block_size
    if row.loop == "train_accelerate.py":
        run = {"max_steps": 2 * steps, "logging_steps": steps, "warmup_steps": None, "eval_blocks": 1, "save_steps": 0}
        with tempfile.TemporaryDirectory() as folder:
            rows = run_trainer(row, config, blocks.data_dir, output_dir=str(Path(folder, "run")), **run)
        seconds = tokens / rows[-1]["tokens_per_second"]  # of the last half of the steps
    else:
        batches = [*batches_of(blocks, config, WARM_UP_STEPS + steps)]
        with training_step(row, config, blocks) as step:
            for part in batches[:WARM_UP_STEPS], batches[WARM_UP_STEPS:]:
                measuring.synchronize(device)
                start = time.perf_counter()
                for batch in part:
                    step(batch)
                measuring.synchronize(device)
                seconds = (time.perf_counter() - start) / steps
    peak = peak_memory_gib(device)
    speed = {"tokens/s": tokens / seconds, "s per step": seconds, "MFU": mfu(row, config, blocks, tokens / seconds)}
    return speed | {"peak GiB": peak, "GiB above imports": peak - before}


def mfu(row: Row, config: StepConfig, blocks: PackedBlocks, tokens_per_second: float) -> float | None:
    """Return the model FLOPs utilization of a row at this speed; None if the peak of the device is unknown."""
    model, peak = weightless_model(replace(row, peer=None), config, blocks), peak_flops(torch.device(config.device))
    return peak and tokens_per_second * model_flops_per_token(model, config.block_size) / peak


def run_trainer(row: Row, config: StepConfig, data_dir: Path, **settings: Any) -> list[dict[str, Any]]:
    """Run train_accelerate.py's `train` on the prepared folder and return the rows that it logs. settings: of its own,
    such as output_dir."""
    rows = []
    run = replace(
        settings_of(row, config), dry_run=False, data_dir=str(data_dir), block_size=config.block_size,
        per_device_train_batch_size=str(config.per_device_train_batch_size), **settings,
    )  # fmt: skip
    with patch_environment(ACCELERATE_TORCH_DEVICE=config.device):
        train(run, lambda event, **details: rows.append(details["row"]) if event == "logged" else None)
    return rows


@dataclass(kw_only=True)
class LadderConfig(StepConfig):
    data: str = setting(help="folder that prepare_data.py wrote")
    vocab_size: int = setting(GPT2_VOCAB_SIZE, "number of token ids of the model", least=1)
    per_device_train_batch_size: int = setting(4, "number of sequences in a step", least=1)
    larger_batches: list[int] = setting(default_factory=lambda: [8, 16, 32, 64], help="of the last rungs", least=1)
    steps: int = setting(2, "number of timed steps in one measurement", least=1)
    repetitions: int = setting(3, "number of measurements of each rung, in turn", least=1)


Results = dict[tuple[str, Row, int], list[dict[str, Any]] | str]  # of each (rung, row, sequences): turns, or an error


def compare_rungs(results: Results) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Return the numbers of each rung and peer, and their table lines. Ratios are medians of those of each turn."""
    numbers, lines = [], []
    first = before = None
    for (name, row, sequences), found in results.items():
        numbers.append({"rung": name, "sequences": sequences})
        if isinstance(found, str):
            numbers[-1]["error"] = found
            lines.append([name, str(sequences), found, *["-"] * (len(HEADER) - 3)])
            continue
        rates = [each["tokens/s"] for each in found]
        bases = None if row.peer else before, first or rates
        step_up, total = (base and median(np.divide(rates, base).tolist()) for base in bases)
        first, before = first or rates, before if row.peer else rates
        mfu, peak_gib = found[0]["MFU"], max(each["peak GiB"] for each in found)
        numbers[-1] |= {"tokens_per_s": rates, "mfu": mfu, "peak_gib": peak_gib, "step_up": step_up, "total": total}
        cells = [mfu and f"{mfu:.1%}", f"{peak_gib:.2f}", step_up and f"{step_up:.2f}", f"{total:.2f}"]
        lines.append(
            [name, str(sequences), evidence.median_and_spread(rates, ",.0f"), *(cell or "-" for cell in cells)]
        )
    if first is None:
        raise GPT2ModernError(f"no rung could be measured: {numbers[0]['error']}")
    return numbers, lines


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(LadderConfig, argv, __doc__)
        logging.set_verbosity_error()
        usual, last = config.per_device_train_batch_size, [*ladder().values()][-1]
        rows = [(name, row, usual) for name, row in ladder().items()]
        rows += [(f"+ {size} sequences in a step", last, size) for size in config.larger_batches]
        rows += [(name, row, usual) for name, row in LADDER_PEERS.items()]
        sized = {size: replace(config, per_device_train_batch_size=size) for _, _, size in rows}
        blocks = read_blocks(sized[max(sized)], config.data, WARM_UP_STEPS + config.steps)
        parameters = sum(each.numel() for each in weightless_model(last, config, blocks).parameters())
        device = torch.device(config.device)
        report = evidence.Report("throughput", config.output, device, argv, measures=MEASURES, variant="ladder")
        calls = {key: partial(measure_training, key[1], sized[key[2]], blocks, config.steps) for key in rows}
        found = measuring.in_turn({key: (config.repetitions, call) for key, call in calls.items()})
        numbers, lines = compare_rungs(found)
        total = [each["total"] for each in numbers if "total" in each and each["rung"] not in LADDER_PEERS][-1]
        method = f"""
gpt2, {parameters:,} parameters, {config.block_size} tokens in a sequence, no dropout. n = {config.repetitions}
measurements of each row, in turn, each in a new process: {config.steps} steps after {WARM_UP_STEPS}. CPU threads:
{torch.get_num_threads()}. Each rung has one change more than the rung before. The loop is forward, backward, clipping
and update in plain PyTorch, also for transformers' GPT-2, and from the rung that says so on the trainer's step."""
        remarks = f"""
The last rung makes {total:.2f} times the tokens/s of the first. Ratios are medians of those of each turn. MFU: of the
device's peak, where it is known. A CPU has no TF32, and its kernel terminates a process that takes too much memory."""
        question, results = "what is each optimisation of training worth?", {"rungs": numbers, "total": total}
        measured = {each["rung"]: each for each in numbers if "total" in each}
        bars = {"unit": "tokens/s", "names": [*measured]} | {
            "values": [each["tokens_per_s"] for each in measured.values()],
            "notes": [f"{each['total']:.2f} times the first" for each in measured.values()],
        }
        drawing = {"kind": "bars", "numbers": bars}
        report.write("The ladder", question, method, [HEADER, *lines], remarks, results, drawing)


if __name__ == "__main__":
    main()
