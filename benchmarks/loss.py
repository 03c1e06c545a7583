"""Time and peak memory of the chunked loss against logits + cross-entropy, forward and backward, side by side.

python -m benchmarks.loss [--cases fp32 bf16] [--num_tokens 8192] [--repetitions 5] [--output FILE.md]

Time: the two variants alternate in one process after one step each to warm up; median, fastest and slowest in seconds.
Peak memory: what one step adds to the resident set over its inputs, each figure in a fresh process, because an
allocator that has once been full hides what comes after. On a CUDA device (--device cuda) both are the device's own.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.measuring import process_status_kib
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError

if TYPE_CHECKING:
    import torch

VARIANTS = ("logits", "chunked")


@dataclass(frozen=True)
class Case:
    """What both variants compute: dtypes by name, soft-cap of the logits, torch.compile around the whole loss."""

    hidden_dtype: str = "float32"
    weight_dtype: str = "float32"
    autocast: bool = False
    softcap: float | None = None
    compiled: bool = False


CASES = {
    "fp32": Case(),
    "bf16": Case("bfloat16", "bfloat16"),
    "autocast": Case(autocast=True),
    "fp32_softcap": Case(softcap=30.0),
    "bf16_softcap": Case("bfloat16", "bfloat16", softcap=30.0),
    "bf16_compiled": Case("bfloat16", "bfloat16", compiled=True),
}


@dataclass
class LossBenchmarkConfig:
    num_tokens: int = field(default=8192, metadata={"help": "tokens in the batch"})
    vocab_size: int = field(default=50304, metadata={"help": "rows of the head"})
    hidden_size: int = field(default=768, metadata={"help": "dimensions of the hidden states"})
    chunk_size: int | None = field(default=None, metadata={"help": "tokens per chunk; default: that of the model"})
    cases: list[str] = field(
        default_factory=lambda: list(CASES), metadata={"help": "what to measure", "choices": list(CASES)}
    )
    repetitions: int = field(default=5, metadata={"help": "timed steps per variant"})
    num_threads: int = field(default=2, metadata={"help": "threads of the CPU"})
    device: str = field(default="cpu", metadata={"help": "cpu, or a CUDA device"})
    output: str | None = field(default=None, metadata={"help": "also write the table to this Markdown file"})
    memory_of: str | None = field(
        default=None, metadata={"help": "measure only the memory of this variant, here", "choices": list(VARIANTS)}
    )

    def __post_init__(self):
        for name in ("num_tokens", "vocab_size", "hidden_size", "repetitions", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"--chunk_size {self.chunk_size}: must be at least 1")


@dataclass(frozen=True)
class Measurement:
    """Of one variant in one case; memory in GiB over the inputs, seconds of each repetition."""

    peak_memory_gib: float
    seconds: list[float]


def make_step(case: Case, variant: str, config: LossBenchmarkConfig) -> Callable[[], tuple["torch.Tensor", ...]]:
    """A function that returns loss and gradients of fixed random inputs, made once and before it runs."""
    import torch
    from torch.nn import functional as F

    from modeling_gpt2modern.loss_gpt2modern import linear_cross_entropy, soft_cap

    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(config.num_tokens, config.hidden_size, generator=generator)
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.02
    labels = torch.randint(config.vocab_size, (config.num_tokens,), generator=generator).to(config.device)
    hidden_states = hidden_states.to(config.device, getattr(torch, case.hidden_dtype)).requires_grad_()
    weight = weight.to(config.device, getattr(torch, case.weight_dtype)).requires_grad_()

    def logits_loss(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(soft_cap(F.linear(hidden_states, weight).float(), case.softcap), labels)

    def chunked_loss(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden_states, weight, labels, softcap=case.softcap, chunk_size=config.chunk_size)

    loss_function = {"logits": logits_loss, "chunked": chunked_loss}[variant]
    if case.compiled:
        loss_function = torch.compile(loss_function, fullgraph=True)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=case.autocast):
            loss = loss_function(hidden_states, weight)
        return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))

    return step


def measure_peak_memory(case: Case, variant: str, config: LossBenchmarkConfig) -> float:
    """GiB that one step needs on top of its inputs. Meant for a process that has done nothing else."""
    import torch

    step = make_step(case, variant, config)
    if case.compiled:
        step()  # what the compiler needs is none of the loss
    if torch.device(config.device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = process_status_kib("VmRSS")
    if case.compiled:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which the compilation has moved
    step()
    return (process_status_kib("VmHWM") - before) / 2**20


def measure_seconds(case: Case, config: LossBenchmarkConfig) -> dict[str, list[float]]:
    """Seconds of every repetition per variant, one of each in turn, so that a busy machine slows both."""
    import torch

    steps = {variant: make_step(case, variant, config) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    synchronize = torch.cuda.synchronize if torch.device(config.device).type == "cuda" else lambda: None
    for repetition in range(config.repetitions + 1):
        for variant, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if repetition > 0:
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def measure(name: str, config: LossBenchmarkConfig) -> dict[str, Measurement]:
    """Both variants of the case called `name`."""
    flags = [f"--{key}={getattr(config, key)}" for key in ("num_tokens", "vocab_size", "hidden_size", "num_threads")]
    flags += [f"--device={config.device}", "--cases", name]
    flags += [] if config.chunk_size is None else [f"--chunk_size={config.chunk_size}"]
    memory = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.loss", *flags, f"--memory_of={variant}"]
        memory[variant] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = measure_seconds(CASES[name], config)
    return {variant: Measurement(memory[variant], seconds[variant]) for variant in VARIANTS}


HEADER = (
    "| case | logits: s | chunked: s | time ratio | logits: GiB | chunked: GiB | memory ratio |\n"
    "|---|---|---|---|---|---|---|"
)


def table_row(name: str, logits: Measurement, chunked: Measurement) -> str:
    """One line of the table: medians with (fastest to slowest), ratios chunked / logits of medians and of peaks."""

    def spread(seconds: list[float]) -> str:
        return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"

    return (
        f"| {name} | {spread(logits.seconds)} | {spread(chunked.seconds)} "
        f"| {median(chunked.seconds) / median(logits.seconds):.2f} "
        f"| {logits.peak_memory_gib:.2f} | {chunked.peak_memory_gib:.2f} "
        f"| {chunked.peak_memory_gib / logits.peak_memory_gib:.3f} |"
    )


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    config = parse_arguments(LossBenchmarkConfig, argv, __doc__)
    if config.device == "cpu" and not Path("/proc/self/status").exists():
        raise GPT2ModernError("--device cpu: peak memory is read from /proc, which only Linux has")

    import torch

    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise GPT2ModernError(f"--device {config.device}: no CUDA device was found; use --device cpu")
    torch.set_num_threads(config.num_threads)
    if config.memory_of:
        print(measure_peak_memory(CASES[config.cases[0]], config.memory_of, config))
        return
    lines = [
        f"{config.num_tokens} tokens, vocabulary {config.vocab_size}, hidden size {config.hidden_size}, "
        f"{config.device} ({config.num_threads} threads), torch {torch.__version__}, n = {config.repetitions}",
        "",
        HEADER,
    ]
    print("\n".join(lines), flush=True)
    for name in config.cases:
        lines.append(table_row(name, **measure(name, config)))
        print(lines[-1], flush=True)
    if config.output:
        Path(config.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
