"""Speed of the trainer's step: tokens per second, MFU and peak memory, with transformers' GPT-2 beside ours.

    python -m benchmarks.throughput --model_preset gpt2 modern speedrun --optimizer adamw muon
    python -m benchmarks.throughput --config_overrides hidden_size=128,num_hidden_layers=4 --block_size 256   # a CPU

What is timed is `train_accelerate.train_step`. A row is one way to do it: model, optimizer, precision, compiled or not.
Each row has a process of its own, so that memory is its own; the rows are timed in turn, `--steps` steps each,
`--repetitions` times over, so that a machine that slows down slows all of them. All rows hold their weights at once:
name fewer of them where memory is short.
"""

import contextlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch
from accelerate.utils import patch_environment
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from benchmarks import measuring
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.batches import StepBatch
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import joined_processes
from gpt2modern.training.models import parse_config_overrides
from gpt2modern.training.optimizers import OPTIMIZERS, OptimizerChain, build_optimizers
from gpt2modern.training.speed import model_flops_per_token, peak_flops
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from train_accelerate import StepResult, train_step

PRECISIONS = ["fp32", "tf32", "bf16"]
PEER = "transformers GPT2LMHeadModel"
WARM_UP_STEPS = 3  # compilation, the allocator's first blocks, the optimizer's state
NUM_BATCHES = 8  # different ones, taken in turn


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


@dataclass(kw_only=True)
class ThroughputConfig(StepConfig):
    peer: bool = setting(True, "with a gpt2 preset and adamw, measure transformers' own model beside it")
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
    """List the rows of every preset and optimizer; peer: those of a gpt2 preset with adamw once more for the peer."""
    rows = []
    for preset, optimizer in itertools.product(dict.fromkeys(config.model_preset), dict.fromkeys(config.optimizer)):
        ours = [Row(preset, optimizer, precision) for precision in dict.fromkeys(config.precision)]
        ours += [replace(ours[-1], compiled=True)] if config.torch_compile else []
        has_peer = peer and preset.startswith("gpt2") and optimizer == "adamw"
        rows += ours + [replace(row, is_peer=True) for row in ours if has_peer]
    return rows


def model_config(row: Row, config: StepConfig) -> GPT2ModernConfig:
    """Return the preset with as many positions as a sequence has tokens; raises GPT2ModernError if it cannot be."""
    overrides = {"max_position_embeddings": config.block_size} | parse_config_overrides(config.config_overrides)
    try:
        return GPT2ModernConfig.from_preset(row.model_preset, **overrides)
    except (ValueError, TypeError) as error:
        raise GPT2ModernError(f"--model_preset {row.model_preset} / --config_overrides: {error}") from None


def build_model(row: Row, config: StepConfig) -> PreTrainedModel:
    """Make the row's model with random weights on the default device; raises GPT2ModernError if it cannot be."""
    model_class, settings = GPT2ModernForCausalLM, model_config(row, config)
    if row.is_peer:
        same = "vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads initializer_range"
        model_class, settings = (
            GPT2LMHeadModel,
            GPT2Config(
                **{name: getattr(settings, name) for name in (*same.split(), "tie_word_embeddings")},
                n_inner=settings.intermediate_size,
                activation_function=settings.mlp_type,
                embd_pdrop=settings.embedding_dropout,
                attn_pdrop=settings.attention_dropout,
                resid_pdrop=settings.hidden_dropout,
                layer_norm_epsilon=settings.norm_eps,
            ),
        )
    try:
        return model_class._from_config(settings, attn_implementation=config.attn_implementation)
    except (ValueError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise GPT2ModernError(f"{row}: the model cannot be built: {first_line(error)}") from None


def weightless_model(row: Row, config: StepConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return build_model(row, config)


def refuse_impossible_rows(rows: Sequence[Row], config: StepConfig) -> None:
    """Raise GPT2ModernError for the first row whose model cannot be built, or whose peer would have another shape."""
    if config.device == "cpu" and any(row.precision == "tf32" for row in rows):
        raise GPT2ModernError("--precision tf32: only NVIDIA GPUs from Ampere on have it")
    for row in rows:
        models = [weightless_model(each, config) for each in (row, replace(row, is_peer=False))]
        theirs, ours = (model.num_parameters() for model in models)
        if theirs != ours:
            raise GPT2ModernError(
                f"--config_overrides give {row.model_preset} {ours:,} parameters and {PEER} {theirs:,}: "
                "that is not a GPT-2 any more; add --peer false"
            )


def peer_loss(model: torch.nn.Module, batch: torch.Tensor, *, num_items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the peer's own mean loss, from labels that it shifts itself: block_size - 1 targets per sequence."""
    loss = model(input_ids=batch[:, :-1], labels=batch[:, :-1], use_cache=False).loss
    return loss, loss.detach()


@contextlib.contextmanager
def training_step(row: Row, config: StepConfig, warmup_steps: int = 0) -> Iterator[Callable]:
    """Build a row as train_accelerate.build does, and give a function of a batch that makes the next update.

    A batch is (sequences, block_size + 1) token ids on the CPU; the function returns what `train_step` does. Weights
    are drawn on the CPU: the same for every device, precision and optimizer. After its warm-up the learning rate stays.
    """
    settings = TrainConfig(
        dry_run=True,  # which needs no folders
        optimizer=row.optimizer,
        mixed_precision="bf16" if row.precision == "bf16" else "no",
        torch_compile=row.compiled,
        lr_scheduler_type="constant",
        warmup_steps=warmup_steps,
    )
    with (
        patch_environment(ACCELERATE_TORCH_DEVICE=config.device),  # also for a CPU beside a GPU
        joined_processes(settings.mixed_precision, settings.ddp_timeout) as (accelerator, processes),
    ):
        torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")  # the trainer's: high
        torch.manual_seed(settings.seed)
        model = build_model(row, config)
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


def serve(connection: Connection, row: Row, config: StepConfig) -> None:
    """Build the row, then answer each number of steps with (seconds that they took, peak memory in GiB during them).

    A row that fails answers with its error message and ends.
    """
    logging.set_verbosity_error()
    device = torch.device(config.device)
    ours = model_config(row, config)
    sizes = (NUM_BATCHES, config.per_device_train_batch_size, config.block_size + 1)
    try:
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(ours.unpadded_vocab_size or ours.vocab_size, sizes, generator=generator)
        batches = itertools.cycle(batches.pin_memory() if device.type == "cuda" else batches)
        with training_step(row, config) as step:
            while True:
                num_steps = connection.recv()
                measuring.reset_peak_memory(device)
                start = time.perf_counter()
                for batch in itertools.islice(batches, num_steps):
                    step(batch)
                measuring.synchronize(device)
                connection.send((time.perf_counter() - start, measuring.peak_memory_gib(device)))
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # leave the other rows what this one does not hold
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the benchmark has ended
    except (GPT2ModernError, RuntimeError) as error:
        connection.send("out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error))


Answers = list[tuple[float, float]]  # seconds and peak memory in GiB of each repetition


def measure(rows: Sequence[Row], config: ThroughputConfig) -> list[Answers | str]:
    """Measure every row; a row that fails is replaced by its error message."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # imported once, not per row
    connections, processes = [], []
    answers: list[Answers | str] = [[] for _ in rows]
    try:
        for row in rows:
            ours, theirs = context.Pipe()
            connections.append(ours)
            processes.append(context.Process(target=serve, args=(theirs, row, config), daemon=True))
            processes[-1].start()
            theirs.close()  # so that the end of the process is noticed
        for num_steps in [WARM_UP_STEPS] + [config.steps] * config.repetitions:
            for index, connection in enumerate(tqdm(connections, unit="row")):
                if isinstance(answers[index], str):
                    continue
                with contextlib.suppress(BrokenPipeError):  # the last words of a row are still to be read
                    connection.send(num_steps)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    answer = "its process ended"
                answers[index] = answer if isinstance(answer, str) else [*answers[index], answer]
    finally:
        for connection, process in zip(connections, processes, strict=True):
            connection.close()  # a row that waits for a number of steps ends
            process.join(2)
            process.terminate()
    return [answer if isinstance(answer, str) else answer[1:] for answer in answers]  # without the warm-up


def flops_per_token(row: Row, config: StepConfig) -> int:
    """Count training FLOPs as gpt2modern.training.speed does; the peer's are those of our model of the same shape."""
    return model_flops_per_token(weightless_model(replace(row, is_peer=False), config), config.block_size)


HEADER = (
    "model", "optimizer", "precision", "tokens/s: median (p20 to p80)", "over the peer", "MFU", "step, ms",
    "peak memory, GiB",
)  # fmt: skip


def table(rows: Sequence[Row], answers: Sequence[Answers | str], config: StepConfig, peak: float | None) -> str:
    """Write the rows in Markdown. `over the peer` divides medians, by that of the peer in the same precision.

    peak: of the device in FLOP/s; None: there is no MFU.
    """
    tokens = config.steps * config.per_device_train_batch_size * config.block_size
    results = dict(zip(rows, answers, strict=True))
    speeds = {row: [tokens / s for s, _ in each] for row, each in results.items() if not isinstance(each, str)}
    medians = {row: median(speed) for row, speed in speeds.items()}
    lines = []
    for row, answer in results.items():
        if isinstance(answer, str):
            lines.append([*row.cells, answer, "-", "-", "-", "-"])
            continue
        peers = [other for other in medians if other.is_peer and other.cells[-1] == row.cells[-1]]
        peers.sort(key=lambda other: other.model_preset != row.model_preset)  # its own, else the first
        cells = [
            measuring.median_and_spread(speeds[row], ",.0f"),
            f"{medians[row] / medians[peers[0]]:.2f}" if peers else "-",
            "-" if peak is None else f"{medians[row] * flops_per_token(row, config) / peak:.1%}",
            f"{tokens / config.steps / medians[row] * 1000:,.1f}",
            f"{max(gib for _, gib in answer):.2f}",
        ]
        lines.append([*row.cells, *cells])
    return measuring.markdown_table(HEADER, lines)


def report(config: ThroughputConfig, rows: Sequence[Row], answers: Sequence[Answers | str], source: str) -> str:
    """Write the report, Markdown. source: the lines of `provenance`."""
    device = torch.device(config.device)
    peak = peak_flops(device)
    sizes = {row.model_preset: weightless_model(row, config).num_parameters() for row in rows}
    mfu = "not given, as the peak of this device is not known"
    if peak is not None:
        mfu = f"6 N + 12 L D T over {peak / 1e12:.0f} TFLOP/s, the dense bf16 peak, in every row"
    memory = (
        "allocated on the device" if device.type == "cuda" else "resident in the row's process, libraries included,"
    )
    return f"""\
# Speed of a training step: {measuring.device_name(device)}

Question: how many tokens per second does one device train on, row by row, and how does that compare with
{PEER} in the same loop?

{source}

A step: `train_accelerate.train_step` on {config.per_device_train_batch_size} x {config.block_size} random tokens, \
{NUM_BATCHES} different batches in turn: to the device, forward,
backward, clipping, a look for NaN, update. Attention: {config.attn_implementation}.
Parameters: {", ".join(f"{name} {size:,}" for name, size in sizes.items())}.
n = {config.repetitions} repetitions of {config.steps} steps per row, in turn over the rows, after {WARM_UP_STEPS} \
steps to warm up.

{table(rows, answers, config, peak)}
MFU: {mfu}. Memory: the most
{memory} during the timed steps.

Caveats: speed only, nothing is learned from random tokens. The peer makes the same step, wrapped by the same
Accelerate, with the loss that it computes from `labels` and all logits; it has AdamW and the shape of a gpt2 preset,
other presets have other numbers of parameters. `over the peer` divides medians by that of the peer in the same
precision. Where p20 to p80 of two rows overlap, their order is not settled.
"""


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(ThroughputConfig, argv, __doc__)
        logging.set_verbosity_error()  # the special tokens of a preset mean nothing here
        device = measuring.choose_device(config.device)
        config.device = str(device)
        rows = rows_of(config, peer=config.peer)
        refuse_impossible_rows(rows, config)
        path = measuring.report_path(config.output, "throughput", device)
        source = measuring.provenance("benchmarks.throughput", sys.argv[1:] if argv is None else argv, device)
        measuring.publish(path, report(config, rows, measure(rows, config), source))


if __name__ == "__main__":
    main()
