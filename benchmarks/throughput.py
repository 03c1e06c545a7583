"""Speed of the trainer's step: tokens per second, MFU and peak memory, with transformers' GPT-2 beside ours.

    python -m benchmarks.throughput --model_preset gpt2 modern speedrun --optimizer adamw muon
    python -m benchmarks.throughput --config_overrides hidden_size=128,num_hidden_layers=4 --block_size 256   # a CPU

What is timed is `train_accelerate.train_step`. A row is one way to do it: model, optimizer, precision, compiled or not.
The rows are timed in turn, `--steps` steps each, `--repetitions` times over, so that a machine that slows down slows
all of them. Each time has a process of its own, so that memory is its own.
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
WARM_UP_STEPS = 3  # compilation, the allocator's first blocks, the optimizer's state


@dataclass(kw_only=True)
class StepConfig:
    """What benchmarks of the training step measure; throughput and precision add to it."""

    model_preset: list[str] = setting(default_factory=lambda: ["gpt2", "modern"], help="models to measure")
    config_overrides: str | None = setting(None, "model settings over each preset's: hidden_size=64,head_dim=32")
    block_size: int = setting(1024, "tokens per sequence", least=1)
    per_device_train_batch_size: int = setting(8, "sequences per step", least=1)
    optimizer: list[str] = setting(default_factory=lambda: ["adamw"], help="optimizers", choices=list(OPTIMIZERS))
    precision: list[str] = setting(
        default_factory=lambda: ["fp32", "bf16"], help="bf16 is autocast over fp32 weights", choices=PRECISIONS
    )
    torch_compile: bool = setting(True, "add a compiled row in the last --precision")
    attn_implementation: str = setting("sdpa", "attention kernel of every row")
    device: str | None = setting(None, "cpu or cuda; default: the best there is")
    output: str = setting("eval/reports", "folder for the report")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        self.device = str(measuring.choose_device(self.device))
        if self.device == "cpu" and "tf32" in self.precision:
            raise ValueError("--precision tf32: only NVIDIA GPUs from Ampere on have it")


@dataclass(kw_only=True)
class ThroughputConfig(StepConfig):
    steps: int = setting(10, "steps timed together", least=1)
    repetitions: int = setting(3, "times that each row is timed", least=3)


@dataclass(frozen=True)
class Row:
    """One way to do a training step."""

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
    """List the rows of every preset and optimizer; peer: those with adamw once more for the peer, where it has one."""
    rows = []
    for preset, optimizer in itertools.product(dict.fromkeys(config.model_preset), dict.fromkeys(config.optimizer)):
        ours = [Row(preset, optimizer, precision) for precision in dict.fromkeys(config.precision)]
        ours += [replace(ours[-1], compiled=True)] if config.torch_compile else []
        theirs = [replace(row, is_peer=True) for row in ours]
        rows += ours + theirs * (peer and optimizer == "adamw" and has_peer(preset, config))
    return rows


def has_peer(preset: str, config: StepConfig) -> bool:
    """Say whether the preset is a GPT-2 and --config_overrides leave it so: the peer has as many parameters."""
    rows = (Row(preset), Row(preset, is_peer=True))
    return preset.startswith("gpt2") and len({weightless_model(row, config).num_parameters() for row in rows}) == 1


def settings_of(row: Row, config: StepConfig) -> TrainConfig:
    """Return what a trainer of the row would be started with; after its warm-up the learning rate stays."""
    return TrainConfig(
        dry_run=True,  # which needs no folders
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
    """Make the row's model with random weights on the default device, fitted to `data`, else to GPT-2's vocabulary."""
    shape = data or models.DataShape(GPT2_VOCAB_SIZE, eos_token_id=0, block_size=config.block_size)
    if not row.is_peer:
        return models.build_model(settings_of(row, config), shape)
    with torch.device("meta"):
        ours = models.build_model(settings_of(row, config), shape).config
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


def weightless_model(row: Row, config: StepConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return build_model(row, config)


def peer_loss(model: torch.nn.Module, batch: torch.Tensor, *, num_items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the peer's own mean loss, from labels that it shifts itself: block_size - 1 targets per sequence."""
    loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1], use_cache=False).loss
    return loss, loss.detach()


@contextlib.contextmanager
def training_step(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> Iterator[Callable]:
    """Build a row as train_accelerate.build does, and give a function of a batch that makes the next update.

    A batch is (sequences, block_size + 1) token ids on the CPU; the function returns what `train_step` does. Weights
    are drawn on the CPU: the same for every device, precision and optimizer.
    """
    settings = settings_of(row, config)
    with (
        patch_environment(ACCELERATE_TORCH_DEVICE=config.device),  # also for a CPU beside a GPU
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
    """Return (seconds, peak memory in GiB) of the row's steps after some to warm up; for a process of its own."""
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


# Seconds and peak memory in GiB of each repetition of a row, or the error message of one that failed.
Results = dict[Row, list[tuple[float, float]] | str]


def measure(rows: Sequence[Row], config: ThroughputConfig) -> Results:
    """Time every row in turn, `config.repetitions` times over; one that fails is not tried again."""
    results: Results = {row: [] for row in rows}
    for row in tqdm([*rows] * config.repetitions, unit="row"):
        if not isinstance(results[row], str):
            try:
                results[row].append(measuring.in_fresh_process(time_steps, row, config))
            except (GPT2ModernError, RuntimeError, ValueError) as error:  # out of memory, too, and a process that dies
                results[row] = first_line(error)
    return results


HEADER = ["model", "optimizer", "precision", "tokens/s (p20 to p80)", "over the peer", "MFU", "step, ms", "peak GiB"]


def table(results: Results, config: ThroughputConfig, peak: float | None) -> list[list[str]]:
    """Return the cells of the rows under HEADER. peak: of the device in FLOP/s; None: there is no MFU."""
    tokens = config.steps * config.per_device_train_batch_size * config.block_size
    speeds = {row: [tokens / s for s, _ in each] for row, each in results.items() if not isinstance(each, str)}
    medians = {row: median(speed) for row, speed in speeds.items()}
    lines = []
    for row, result in results.items():
        cells = [result, "-", "-", "-", "-"]
        if row in medians:
            peers = [other for other in medians if other.is_peer and other.cells[-1] == row.cells[-1]]
            peers.sort(key=lambda other: other.model_preset != row.model_preset)  # its own, else the first
            ours = weightless_model(replace(row, is_peer=False), config)  # has as many FLOPs as the peer of its shape
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
        logging.set_verbosity_error()  # the special tokens of a preset mean nothing here
        device = torch.device(config.device)
        rows = rows_of(config, peer=True)
        parameters = {row.model_preset: weightless_model(row, config).num_parameters() for row in rows}
        report = measuring.Report("throughput", config.output, device, argv)
        results = measure(rows, config)
        peak = peak_flops(device)
        peak_words = f"{peak / 1e12:.0f} TFLOP/s" if peak else "not known"
        method = f"""
A step: `train_accelerate.train_step` on {config.per_device_train_batch_size} x {config.block_size} random tokens: to
the device, forward, backward, clipping, a look for NaN, update. Attention: {config.attn_implementation}.
Parameters: {", ".join(f"{name} {number:,}" for name, number in parameters.items())}.
n = {config.repetitions} repetitions of {config.steps} steps per row, in turn over the rows, each in a process of its
own after {WARM_UP_STEPS} steps to warm up."""
        remarks = f"""
MFU: 6 N + 12 L D T over the device's dense bf16 peak in every row ({peak_words}).
Memory: the most during the timed steps, allocated on a GPU, or resident in the process on a CPU.

The peer makes the same step with the loss that it computes from `labels` and all logits; it has the shape of a gpt2
preset, other presets have other numbers of parameters. `over the peer` divides medians by that of the peer in the same
precision. Where p20 to p80 of two rows overlap, their order is not settled."""
        question = f"how many tokens per second does one device train on, and how does that compare with {PEER}?"
        report.write("Speed of a training step", question, method, [HEADER, *table(results, config, peak)], remarks)


if __name__ == "__main__":
    main()
