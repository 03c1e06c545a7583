"""Speed of a training step: tokens per second, MFU and peak memory, with transformers' GPT-2 beside ours.

    python -m benchmarks.throughput --model_preset gpt2 modern speedrun --optimizer adamw muon
    python -m benchmarks.throughput --config_overrides hidden_size=128,num_hidden_layers=4 --block_size 256   # a CPU

A step is forward, backward, clipping and update of one batch of random tokens. A row is one way to do it: model,
optimizer, precision, compiled or not. Each row lives in a process of its own, so that memory is its own; the rows are
timed in turn, `--steps` steps each, `--repetitions` times over, so that a machine that slows down slows all of them.
All rows hold their weights at once: name fewer of them where memory is short.
"""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import (
    markdown_table,
    median_and_spread,
    peak_memory_gib,
    percentile,
    provenance,
    report_path,
    reset_peak_memory,
)
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import check_range

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from modeling_gpt2modern import GPT2ModernConfig

PRECISIONS = ("fp32", "tf32", "bf16")
OPTIMIZERS = ("adamw", "muon")
PEER = "transformers GPT2LMHeadModel"
WARM_UP_STEPS = 3  # compilation, the allocator's first blocks, the optimizer's state


@dataclass
class ThroughputConfig:
    model_preset: list[str] = field(default_factory=lambda: ["gpt2", "modern"], metadata={"help": "models to measure"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "model settings over each preset's: hidden_size=64,num_hidden_layers=2"}
    )
    block_size: int = field(default=1024, metadata={"help": "tokens per sequence"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "sequences per step"})
    optimizer: list[str] = field(
        default_factory=lambda: ["adamw"], metadata={"help": "optimizers to measure", "choices": list(OPTIMIZERS)}
    )
    precision: list[str] = field(
        default_factory=lambda: ["fp32", "bf16"],
        metadata={"help": "of matrix products; bf16 is autocast over fp32 weights", "choices": list(PRECISIONS)},
    )
    torch_compile: bool = field(default=True, metadata={"help": "add a compiled row in the last --precision"})
    peer: bool = field(
        default=True, metadata={"help": "with a gpt2 preset and adamw, measure transformers' own model beside it"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernel of every row"})
    steps: int = field(default=10, metadata={"help": "steps timed together"})
    repetitions: int = field(default=3, metadata={"help": "times that each row is timed"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: the best there is"})
    output: str = field(default="eval/reports", metadata={"help": "folder for the report"})

    def __post_init__(self):
        for name in ("block_size", "per_device_train_batch_size", "steps"):
            check_range(f"--{name}", getattr(self, name), 1)
        check_range("--repetitions", self.repetitions, 3)


@dataclass(frozen=True)
class Row:
    """One way to do a training step."""

    model_preset: str
    optimizer: str = "adamw"
    precision: str = "fp32"
    compiled: bool = False
    is_peer: bool = False

    @property
    def model_words(self) -> str:
        return f"{PEER} ({self.model_preset})" if self.is_peer else self.model_preset

    @property
    def precision_words(self) -> str:
        return self.precision + " compiled" * self.compiled

    def __str__(self) -> str:
        return f"{self.model_words}, {self.optimizer}, {self.precision_words}"


@dataclass(frozen=True)
class Shape:
    """What every row has in common."""

    config_overrides: dict[str, Any]
    block_size: int
    batch_size: int
    attn_implementation: str
    device: str


@dataclass(frozen=True)
class Measurement:
    """Of one row. tokens_per_second: one value per repetition; flops_per_token: of the model's own arithmetic."""

    tokens_per_second: list[float]
    peak_memory_gib: float
    flops_per_token: int


def rows_of(config: ThroughputConfig) -> list[Row]:
    rows = []
    for preset in dict.fromkeys(config.model_preset):
        for optimizer in dict.fromkeys(config.optimizer):
            ours = [Row(preset, optimizer, precision) for precision in dict.fromkeys(config.precision)]
            if config.torch_compile:
                ours.append(replace(ours[-1], compiled=True))
            rows += ours
            if config.peer and preset.startswith("gpt2") and optimizer == "adamw":
                rows += [replace(row, is_peer=True) for row in ours]
    return rows


def model_config(model_preset: str, shape: Shape) -> "GPT2ModernConfig":
    """The preset with as many positions as a sequence has tokens; raises GPT2ModernError where the overrides do not fit."""
    from modeling_gpt2modern import GPT2ModernConfig

    fitted = {"max_position_embeddings": shape.block_size} | shape.config_overrides
    try:
        return GPT2ModernConfig.from_preset(model_preset, **fitted)
    except (ValueError, TypeError) as error:
        raise GPT2ModernError(f"--model_preset {model_preset} / --config_overrides: {error}") from None


def build_model(row: Row, shape: Shape) -> "PreTrainedModel":
    """The model of a row with random weights, on the default device."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_gpt2modern import GPT2ModernForCausalLM

    config = model_config(row.model_preset, shape)
    model_class = GPT2ModernForCausalLM
    if row.is_peer:
        model_class = GPT2LMHeadModel
        config = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.intermediate_size,
            activation_function=config.mlp_type,
            embd_pdrop=config.embedding_dropout,
            attn_pdrop=config.attention_dropout,
            resid_pdrop=config.hidden_dropout,
            layer_norm_epsilon=config.norm_eps,
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    try:
        return model_class._from_config(config, attn_implementation=shape.attn_implementation)
    except (ValueError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        raise GPT2ModernError(f"{row}: the model cannot be built: {str(error).splitlines()[0]}") from None


def make_training_step(row: Row, shape: Shape) -> "Callable[[torch.Tensor, float], torch.Tensor]":
    """A function of a batch (sequences, block_size + 1) and a share of the peak learning rate that does one update, as
    train_accelerate.py does it with one forward pass, and returns the loss (nats/token) before it.

    The weights are drawn on the CPU, so that a seed gives the same ones on every device.
    """
    import torch

    from gpt2modern.training.models import summed_loss
    from gpt2modern.training.optimizers import build_optimizers, set_schedule

    torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")
    device = torch.device(shape.device)
    model = build_model(row, shape).to(device).train()
    parameters = list(model.parameters())
    optimizers = build_optimizers(
        model,
        optimizer=row.optimizer,
        learning_rate=6e-4,
        embedding_learning_rate=None,
        scalar_learning_rate=None,
        muon_learning_rate=0.02,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    forward = torch.compile(model) if row.compiled else model

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        if row.is_peer:  # it shifts the labels itself
            return forward(input_ids=batch[:, :-1], labels=batch[:, :-1], use_cache=False).loss
        return summed_loss(forward, batch, num_items=(batch[:, 1:] >= 0).sum())

    def step(batch: torch.Tensor, learning_rate_factor: float) -> torch.Tensor:
        set_schedule(optimizers, step=0, learning_rate_factor=learning_rate_factor, muon_momentum_warmup_steps=300)
        with torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bf16"):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def serve(connection: Connection, row: Row, shape: Shape) -> None:
    """Body of a row's process: build, then answer each number of steps with the seconds that they took, and 0 with the
    peak memory. A row that cannot be measured answers with the reason, a string, and ends."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    device = torch.device(shape.device)
    try:
        torch.manual_seed(0)
        step = make_training_step(row, shape)
        vocab_size = model_config(row.model_preset, shape).vocab_size
        batch = torch.randint(vocab_size, (shape.batch_size, shape.block_size + 1)).to(device)
        connection.send(None)
        is_warm = False
        while (num_steps := connection.recv()) is not None:
            if num_steps == 0:
                connection.send(peak_memory_gib(device))
                continue
            start = time.perf_counter()
            for _ in range(num_steps):
                step(batch, 1.0)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            connection.send(time.perf_counter() - start)
            if not is_warm:
                reset_peak_memory(device)  # what the compiler needs is none of the step
                is_warm = True
            if device.type == "cuda":
                torch.cuda.empty_cache()  # leave the other rows what this one does not hold
    except (GPT2ModernError, torch.OutOfMemoryError) as error:
        connection.send("out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the benchmark was stopped


def process_context() -> multiprocessing.context.BaseContext:
    """Where rows' processes come from: copies of one that has imported what they need but has touched no device."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gpt2modern.training.models", "gpt2modern.training.optimizers", "transformers.models.gpt2.modeling_gpt2"]
    )
    return context


class RowProcess:
    """The process of one row, as `measure` talks to it."""

    def __init__(self, row: Row, shape: Shape, context: multiprocessing.context.BaseContext):
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, row, shape), daemon=True)
        self._process.start()
        theirs.close()
        self.problem: str | None = None

    def ask(self, num_steps: int) -> float | None:
        """Seconds of so many steps (0: the peak memory); None if the row has failed, now or before."""
        if self.problem is None:
            with contextlib.suppress(BrokenPipeError):  # its last words are still to be read
                self._connection.send(num_steps)
        return self.answer()

    def answer(self) -> float | None:
        if self.problem is not None:
            return None
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            answer = f"its process ended (exit code {self._process.exitcode})"
        if isinstance(answer, str):
            self.problem = answer
            return None
        return answer

    def close(self) -> None:
        """Let it end by itself, as it does where it waits for a number of steps; one that is in a step is ended."""
        self._connection.close()
        self._process.join(2)
        self._process.terminate()
        self._process.join()


def measure(rows: Sequence[Row], shape: Shape, *, steps: int, repetitions: int) -> "list[Measurement | str]":
    """Of each row its measurement, or why there is none."""
    from tqdm import tqdm

    context = process_context()
    processes = [RowProcess(row, shape, context) for row in rows]
    seconds: list[list[float]] = [[] for _ in rows]
    try:
        with tqdm(total=len(rows) * (repetitions + 1), desc="measuring", unit="row") as bar:
            for process in processes:
                process.answer()  # it is built
            for repetition in range(repetitions + 1):
                for row, process, of_row in zip(rows, processes, seconds, strict=True):
                    bar.set_postfix_str(f"{row}: {'warm-up' if repetition == 0 else f'{repetition}/{repetitions}'}")
                    answer = process.ask(steps if repetition else WARM_UP_STEPS)
                    if repetition and answer is not None:
                        of_row.append(answer)
                    bar.update()
        peaks = [process.ask(0) for process in processes]
    finally:
        for process in processes:
            process.close()
    tokens = steps * shape.batch_size * shape.block_size
    return [
        process.problem or Measurement([tokens / one for one in of_row], peak, flops_per_token(row, shape))
        for row, process, of_row, peak in zip(rows, processes, seconds, peaks, strict=True)
    ]


def flops_per_token(row: Row, shape: Shape) -> int:
    """Of training, by the convention of gpt2modern.training.metrics; the peer's are those of the same shape of ours."""
    import torch

    from gpt2modern.training.speed import model_flops_per_token

    with torch.device("meta"):
        return model_flops_per_token(build_model(replace(row, is_peer=False), shape), shape.block_size)


def refuse_rows_that_cannot_be(rows: Sequence[Row], shape: Shape) -> None:
    """Raise GPT2ModernError for the first row whose model cannot be built, or whose peer would have another shape."""
    import torch

    if shape.device == "cpu" and any(row.precision == "tf32" for row in rows):
        raise GPT2ModernError("--precision tf32: only NVIDIA GPUs from Ampere on have it")
    for row in rows:
        with torch.device("meta"):
            parameters = build_model(row, shape).num_parameters()
            ours = build_model(replace(row, is_peer=False), shape).num_parameters()
        if parameters != ours:
            raise GPT2ModernError(
                f"--config_overrides give {row.model_preset} {ours:,} parameters and {PEER} {parameters:,}: "
                f"that is no GPT-2 any more; add --peer false"
            )


HEADER = (
    "model", "optimizer", "precision", "tokens/s: median (p20 to p80)", "over the peer", "MFU", "step, ms",
    "peak memory, GiB",
)  # fmt: skip


def table(rows: Sequence[Row], results: "Sequence[Measurement | str]", shape: Shape, peak_flops: float | None) -> str:
    """The rows in Markdown. `over the peer` divides medians, by that of the peer in the same precision."""
    medians = {
        row: percentile(result.tokens_per_second, 0.5)
        for row, result in zip(rows, results, strict=True)
        if isinstance(result, Measurement)
    }
    lines = []
    for row, result in zip(rows, results, strict=True):
        cells = [row.model_words, row.optimizer, row.precision_words]
        if isinstance(result, Measurement):
            peers = [other for other in medians if other.is_peer and other.precision_words == row.precision_words]
            peers.sort(key=lambda other: other.model_preset != row.model_preset)  # its own, else the first
            peer = medians[peers[0]] if peers else None
            cells += [
                median_and_spread(result.tokens_per_second, ",.0f"),
                "-" if peer is None else f"{medians[row] / peer:.2f}",
                "-" if peak_flops is None else f"{medians[row] * result.flops_per_token / peak_flops:.1%}",
                f"{shape.batch_size * shape.block_size / medians[row] * 1000:,.1f}",
                f"{result.peak_memory_gib:.2f}",
            ]
        else:
            cells += [result, "-", "-", "-", "-"]
        lines.append(cells)
    return markdown_table(HEADER, lines)


REPORT = """\
# Speed of a training step: {hardware}

Question: how many tokens per second does one device train on, row by row, and how does that compare with
{peer} trained the same way?

{provenance}
A step: forward, backward, clipping, update of {batch_size} x {block_size} random tokens, {attention} attention.
{models}.
n = {repetitions} repetitions of {steps} steps per row, in turn over the rows, after {warm_up} steps to warm up.

{table}
{mfu}. Memory is
{memory}.

Caveats: speed only, nothing is learned here. `over the peer` divides medians by that of the peer in the same precision;
the peer has AdamW and the shape of a gpt2 preset, other presets have other numbers of parameters. Where p20 to p80 of
two rows overlap, their order is not settled.
"""


def report(
    config: ThroughputConfig, rows: Sequence[Row], shape: Shape, results: "Sequence[Measurement | str]", source: str
) -> str:
    import torch

    from benchmarks.measuring import device_words
    from gpt2modern.training.speed import peak_flops

    device = torch.device(shape.device)
    peak = peak_flops(device)
    parameters = {}
    for row in rows:
        with torch.device("meta"):
            parameters[row.model_preset] = build_model(replace(row, is_peer=False), shape).num_parameters()
    return REPORT.format(
        hardware=device_words(device),
        peer=PEER,
        provenance=source,
        batch_size=shape.batch_size,
        block_size=shape.block_size,
        attention=shape.attn_implementation,
        models="Parameters: " + ", ".join(f"{name} {count:,}" for name, count in parameters.items()),
        repetitions=config.repetitions,
        steps=config.steps,
        warm_up=WARM_UP_STEPS,
        table=table(rows, results, shape, peak),
        mfu="MFU is not given: this device's peak is not known"
        if peak is None
        else f"MFU: 6 N + 12 L D T over {peak / 1e12:.0f} TFLOP/s, the dense bf16 peak, in every row",
        memory="the most allocated on the device during the timed steps"
        if device.type == "cuda"
        else "the most resident in the row's process during the timed steps, libraries included",
    )


def choose_device(name: str | None) -> "torch.device":
    """The device called `name`, or the best there is; raises GPT2ModernError if it is not there."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GPT2ModernError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    config = parse_arguments(ThroughputConfig, argv, __doc__)

    from transformers.utils import logging as transformers_logging

    from gpt2modern.training.models import parse_config_overrides

    transformers_logging.set_verbosity_error()  # token ids of the presets' tokenizer mean nothing here
    device = choose_device(config.device)
    shape = Shape(
        config_overrides=parse_config_overrides(config.config_overrides),
        block_size=config.block_size,
        batch_size=config.per_device_train_batch_size,
        attn_implementation=config.attn_implementation,
        device=str(device),
    )
    rows = rows_of(config)
    refuse_rows_that_cannot_be(rows, shape)
    path = report_path(config.output, "throughput", device)
    source = provenance("benchmarks.throughput", sys.argv[1:] if argv is None else argv, device)
    results = measure(rows, shape, steps=config.steps, repetitions=config.repetitions)
    text = report(config, rows, shape, results, source)
    path.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
