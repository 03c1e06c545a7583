"""Measure tokens per second, MFU and peak memory of the trainer's step, also with the GPT-2 model of transformers.

    python -m benchmarks.throughput --model_preset gpt2 modern speedrun --optimizer adamw muon
    python -m benchmarks.throughput --config_overrides hidden_size=128,num_hidden_layers=4 --block_size 256   # a CPU

A row of the report is one way to run `train_accelerate.train_step`: model, optimizer, precision, compiled or not. Rows
are timed in turn, --steps steps each, and this is repeated --repetitions times, so that a slower machine slows all of
them. Every measurement has its own process. The peer is transformers' GPT-2, timed next to presets of the same shape.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from accelerate.utils import patch_environment
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from benchmarks import measuring
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training import models
from gpt2modern.training.batches import StepBatch
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import joined_processes
from gpt2modern.training.optimizers import OPTIMIZERS, OptimizerChain, build_optimizers
from gpt2modern.training.speed import model_flops_per_token, peak_flops, peak_memory_gib
from train_accelerate import StepResult, train_step

PRECISIONS = ["fp32", "tf32", "bf16"]
PEER = "transformers GPT2LMHeadModel"
GPT2_VOCAB_SIZE = 50257
LEARNING_RATE_WARM_UP = 10  # steps
WARM_UP_STEPS = 3  # for compilation, the allocator's first blocks, the optimizer's state
HEADER = ["model", "optimizer", "precision", "tokens/s (p20 to p80)", "over the peer", "MFU", "step, ms", "peak GiB"]


@dataclass(kw_only=True)
class StepConfig:
    """Hold the flags that the throughput and the precision benchmark share: models, optimizers, precisions, sizes."""

    model_preset: list[str] = setting(default_factory=lambda: ["gpt2", "modern"], help="model presets to measure")
    config_overrides: str | None = setting(None, "settings to change in every preset: hidden_size=64,head_dim=32")
    block_size: int = setting(1024, "tokens per sequence", least=1)
    per_device_train_batch_size: int = setting(8, "number of sequences in a step", least=1)
    optimizer: list[str] = setting(default_factory=lambda: ["adamw"], help="optimizers", choices=list(OPTIMIZERS))
    precision: list[str] = setting(
        default_factory=lambda: ["fp32", "bf16"], help="bf16: autocast with fp32 weights", choices=PRECISIONS
    )
    torch_compile: bool = setting(True, "also measure with torch.compile, in the last of --precision")
    attn_implementation: str = setting("sdpa", "attention implementation of all models")
    device: str | None = setting(None, "cpu or cuda; default: the GPU if there is one")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        self.device = str(measuring.choose_device(self.device))
        if self.device == "cpu" and "tf32" in self.precision:
            raise ValueError("--precision tf32 needs an NVIDIA GPU (Ampere or newer), but --device is cpu; omit tf32")


@dataclass(kw_only=True)
class ThroughputConfig(StepConfig):
    steps: int = setting(10, "number of steps in one measurement", least=1)
    repetitions: int = setting(3, "number of measurements of each model and setting", least=3)


@dataclass(frozen=True)
class Row:
    """Represent one way to run a training step: one line of the report. is_peer: the model is transformers' GPT-2."""

    model_preset: str
    optimizer: str = "adamw"
    precision: str = "fp32"
    compiled: bool = False
    is_peer: bool = False

    @property
    def cells(self) -> list[str]:
        model = f"{PEER} ({self.model_preset})" if self.is_peer else self.model_preset
        return [model, self.optimizer, self.precision + " compiled" * self.compiled]

    def __str__(self) -> str:
        return ", ".join(self.cells)


def rows_of(config: StepConfig, *, peer: bool) -> list[Row]:
    """Return the training steps to compare; peer: those with adamw also with transformers' GPT-2, if it `has_peer`."""
    rows = []
    for preset, optimizer in itertools.product(dict.fromkeys(config.model_preset), dict.fromkeys(config.optimizer)):
        ours = [Row(preset, optimizer, precision) for precision in dict.fromkeys(config.precision)]
        ours += [replace(ours[-1], compiled=True)] if config.torch_compile else []
        theirs = [replace(row, is_peer=True) for row in ours]
        rows += ours + theirs * (peer and optimizer == "adamw" and has_peer(preset, config))
    return rows


def has_peer(preset: str, config: StepConfig) -> bool:
    """Return whether `preset` is a gpt2 preset with, after --config_overrides, as many weights as the stock GPT-2."""
    rows = (Row(preset), Row(preset, is_peer=True))
    return preset.startswith("gpt2") and len({weightless_model(row, config).num_parameters() for row in rows}) == 1


def settings_of(row: Row, config: StepConfig) -> TrainConfig:
    """Return the trainer's settings for a row. The learning rate is constant after its warm-up."""
    return TrainConfig(
        dry_run=True,  # so no folders are needed
        model_preset=row.model_preset,
        config_overrides=config.config_overrides,
        attn_implementation=config.attn_implementation,
        optimizer=row.optimizer,
        mixed_precision="bf16" if row.precision == "bf16" else "no",
        torch_compile=row.compiled,
        lr_scheduler_type="constant",
        warmup_steps=LEARNING_RATE_WARM_UP,
    )


def build_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> PreTrainedModel:
    """Build the row's model on the default device, with random weights and the vocabulary of `data` (None: GPT-2's)."""
    shape = data or models.DataShape(GPT2_VOCAB_SIZE, eos_token_id=0, block_size=config.block_size)
    if not row.is_peer:
        return models.build_model(settings_of(row, config), shape)
    ours = weightless_model(replace(row, is_peer=False), config, data).config
    same = "vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads initializer_range"
    peer = GPT2Config(
        **{name: getattr(ours, name) for name in (*same.split(), "tie_word_embeddings")},
        n_inner=ours.intermediate_size,
        activation_function=ours.mlp_type,
        embd_pdrop=ours.embedding_dropout,
        attn_pdrop=ours.attention_dropout,
        resid_pdrop=ours.hidden_dropout,
        layer_norm_epsilon=ours.norm_eps,
    )
    return GPT2LMHeadModel._from_config(peer, attn_implementation=config.attn_implementation)


def weightless_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> PreTrainedModel:
    with torch.device("meta"):
        return build_model(row, config, data)


def peer_loss(model: torch.nn.Module, batch: torch.Tensor, *, num_items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the mean loss of transformers' GPT-2 twice, second detached: block_size - 1 targets per sequence."""
    loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1], use_cache=False).loss
    return loss, loss.detach()


@contextlib.contextmanager
def training_step(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> Iterator[Callable]:
    """Build the row's model and optimizer as the trainer does, and yield a function that trains on one batch.

    The function takes token ids (sequences, block_size + 1) on the CPU and returns the StepResult of `train_step`. The
    initial weights are drawn on the CPU, so they are the same for every device, precision and optimizer.
    """
    settings = settings_of(row, config)
    with (
        patch_environment(ACCELERATE_TORCH_DEVICE=config.device),  # also for cpu on a machine with a GPU
        joined_processes(settings.mixed_precision, settings.ddp_timeout) as (accelerator, processes),
    ):
        torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")  # the trainer's: high
        torch.manual_seed(settings.seed)
        model = build_model(row, config, data)
        optimizers = build_optimizers(model, settings)
        model = accelerator.prepare(model)
        model = torch.compile(model) if settings.torch_compile else model
        optimizer = accelerator.prepare_optimizer(OptimizerChain(optimizers), device_placement=False)
        objective = peer_loss if row.is_peer else batch_loss
        count = itertools.count()

        def step(batch: torch.Tensor) -> StepResult:
            num_targets = int((batch[:, 1:] >= 0).sum())
            one_pass = StepBatch(np.arange(len(batch)), num_targets, grad_accum_steps=1, micro_batches=iter([batch]))
            return train_step(settings, accelerator, processes, model, optimizer, one_pass, objective, next(count))

        yield step


def time_steps(row: Row, config: ThroughputConfig) -> tuple[float, float]:
    """Return (seconds, peak memory in GiB) of --steps steps of a row, after warm-up steps. Call it in a new process."""
    logging.set_verbosity_error()
    device = torch.device(config.device)
    vocab_size = min(weightless_model(row, config).config.vocab_size, GPT2_VOCAB_SIZE)
    sizes = (WARM_UP_STEPS + config.steps, config.per_device_train_batch_size, config.block_size + 1)
    batches = torch.randint(vocab_size, sizes, generator=torch.Generator().manual_seed(0))
    batches = batches.pin_memory() if device.type == "cuda" else batches
    with training_step(row, config) as step:
        for part in batches.split([WARM_UP_STEPS, config.steps]):
            measuring.reset_peak_memory(device)
            start = time.perf_counter()
            for batch in part:
                step(batch)
            measuring.synchronize(device)
            seconds = time.perf_counter() - start
    return seconds, peak_memory_gib(device)


Results = dict[Row, list[tuple[float, float]] | str]  # (seconds, peak GiB) of each repetition, or an error message


def measure(rows: Sequence[Row], config: ThroughputConfig) -> Results:
    """Time the rows in turn, --repetitions times each. A row that fails keeps its error message and is not retried."""
    results: Results = {row: [] for row in rows}
    for row in tqdm([*rows] * config.repetitions, unit="row"):
        if not isinstance(results[row], str):
            try:
                results[row].append(measuring.in_fresh_process(time_steps, row, config))
            except (GPT2ModernError, RuntimeError, ValueError) as error:  # also out of memory, or a process that died
                results[row] = first_line(error)
    return results


def table(results: Results, config: ThroughputConfig, peak: float | None) -> list[list[str]]:
    """Return the report's table line for each row. `peak` is the device's peak in FLOP/s; if it is None, MFU is '-'."""
    tokens = config.steps * config.per_device_train_batch_size * config.block_size
    speeds = {row: [tokens / s for s, _ in each] for row, each in results.items() if not isinstance(each, str)}
    medians = {row: median(speed) for row, speed in speeds.items()}
    lines = []
    for row, result in results.items():
        cells = [result, "-", "-", "-", "-"]
        if row in medians:
            peers = [other for other in medians if other.is_peer and other.cells[-1] == row.cells[-1]]
            peers.sort(key=lambda other: other.model_preset != row.model_preset)  # the same preset first
            ours = weightless_model(replace(row, is_peer=False), config)  # the peer needs the same FLOPs
            cells = [
                measuring.median_and_spread(speeds[row], ",.0f"),
                f"{medians[row] / medians[peers[0]]:.2f}" if peers else "-",
                "-" if peak is None else f"{medians[row] * model_flops_per_token(ours, config.block_size) / peak:.1%}",
                f"{tokens / config.steps / medians[row] * 1000:,.1f}",
                f"{max(gib for _, gib in result):.2f}",
            ]
        lines.append([*row.cells, *cells])
    return lines


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(ThroughputConfig, argv, __doc__)
        logging.set_verbosity_error()  # hides warnings about special tokens, which are not used
        device = torch.device(config.device)
        rows = rows_of(config, peer=True)
        parameters = {row.model_preset: weightless_model(row, config).num_parameters() for row in rows}
        report = measuring.Report("throughput", config.output, device, argv)
        results = measure(rows, config)
        peak = peak_flops(device)
        peak_words = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown"
        method = f"""
A step: `train_accelerate.train_step` on {config.per_device_train_batch_size} x {config.block_size} random tokens: copy
to the device, forward, backward, clipping, check for NaN, update. Attention: {config.attn_implementation}.
Parameters: {", ".join(f"{name} {number:,}" for name, number in parameters.items())}.
n = {config.repetitions} repetitions of {config.steps} steps per row, rows in turn, each in a new process after \
{WARM_UP_STEPS} warm-up steps."""
        remarks = f"""
MFU: (6 N + 12 L D T) x tokens/s / the device's dense bf16 peak, in every row ({peak_words}).
Peak GiB: the largest during the timed steps, allocated on a GPU, or resident in the process on a CPU.

The peer is {PEER} in the shape of a gpt2 preset; it computes its own loss from `labels` and all logits. Other presets
have other numbers of parameters. `over the peer`: the row's median tokens/s divided by the peer's in the same
precision. Where p20 to p80 of two rows overlap, their order is uncertain."""
        question = f"on how many tokens per second does one device train, compared with {PEER}?"
        report.write("Speed of a training step", question, method, [HEADER, *table(results, config, peak)], remarks)


if __name__ == "__main__":
    main()
