"""Compare time and peak memory of the chunked loss and of cross-entropy over all logits, forward and backward.

    python -m benchmarks.loss [--cases fp32 bf16] [--num_tokens 8192] [--repetitions 5]

Time: the two variants alternate in one process, after one warm-up step each. Peak memory: what one step needs in
addition to its inputs, each value from a new process, because an allocator keeps the memory of earlier steps.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import measuring
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.speed import peak_memory_gib
from modeling_gpt2modern.loss_gpt2modern import linear_cross_entropy_and_z_loss, soft_cap

VARIANTS = ("logits", "chunked")
HEADER = ["case", "logits: s", "chunked: s", "time ratio", "logits: GiB", "chunked: GiB", "memory ratio"]


@dataclass(frozen=True)
class Case:
    """Hold the settings of a comparison: dtype of the inputs, bf16 autocast, soft-cap of the logits, torch.compile."""

    dtype: torch.dtype = torch.float32
    autocast: bool = False
    softcap: float | None = None
    compiled: bool = False


CASES = {
    "fp32": Case(),
    "bf16": Case(torch.bfloat16),
    "autocast": Case(autocast=True),
    "fp32_softcap": Case(softcap=30.0),
    "bf16_softcap": Case(torch.bfloat16, softcap=30.0),
    "bf16_compiled": Case(torch.bfloat16, compiled=True),
}


@dataclass
class LossBenchmarkConfig:
    num_tokens: int = setting(8192, "number of tokens in the batch", least=1)
    vocab_size: int = setting(50304, "number of rows of the head's weight", least=1)
    hidden_size: int = setting(768, "size of a hidden state", least=1)
    chunk_size: int | None = setting(None, "tokens per chunk; default: the model's chunk size", least=1)
    cases: list[str] = setting(default_factory=lambda: list(CASES), help="cases to measure", choices=list(CASES))
    repetitions: int = setting(5, "number of timed steps of each variant", least=1)
    device: str = setting("cpu", "cpu or cuda: where to measure")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)


def make_step(case: Case, variant: str, config: LossBenchmarkConfig) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a function that computes (loss, gradient of the hidden states, gradient of the head) on random inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(config.num_tokens, config.hidden_size, generator=generator)
    weight = torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.02
    labels = torch.randint(config.vocab_size, (config.num_tokens,), generator=generator).to(config.device)
    hidden_states = hidden_states.to(config.device, case.dtype).requires_grad_()
    weight = weight.to(config.device, case.dtype).requires_grad_()

    def loss_function(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if variant == "logits":
            return F.cross_entropy(soft_cap(F.linear(hidden_states, weight).float(), case.softcap), labels)
        options = {"softcap": case.softcap, "chunk_size": config.chunk_size}
        return linear_cross_entropy_and_z_loss(hidden_states, weight, labels, **options)[0]

    if case.compiled:
        loss_function = torch.compile(loss_function, fullgraph=True)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=case.autocast):
            loss = loss_function(hidden_states, weight)
        return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))

    return step


def added_memory_gib(case: Case, variant: str, config: LossBenchmarkConfig) -> float:
    """Return the peak memory in GiB that one step needs in addition to its inputs. Call it in a new process."""
    device = torch.device(config.device)
    step = make_step(case, variant, config)
    if case.compiled:
        step()  # the compiler's own memory is not counted
    measuring.reset_peak_memory(device)
    before = peak_memory_gib(device)
    step()
    return peak_memory_gib(device) - before


def measure(case: Case, config: LossBenchmarkConfig) -> tuple[list[float], list[list[float]]]:
    """Return the GiB that a step of each variant adds to its inputs, and the seconds of its timed steps, in turn."""
    memory = [measuring.in_fresh_process(added_memory_gib, case, variant, config) for variant in VARIANTS]
    steps = [make_step(case, variant, config) for variant in VARIANTS]
    seconds: list[list[float]] = [[] for _ in VARIANTS]
    for _ in range(config.repetitions + 1):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            measuring.synchronize(torch.device(config.device))
            times.append(time.perf_counter() - start)
    return memory, [times[1:] for times in seconds]  # without the warm-up step


def table_row(name: str, memory: Sequence[float], seconds: Sequence[Sequence[float]]) -> list[str]:
    """Return the report's table line for one case: medians of the seconds, the GiB, and the ratios chunked / logits."""
    logits, chunked = map(median, seconds)
    times = [measuring.median_and_spread(each, ".2f", low=0, high=1) for each in seconds]
    gib = [f"{each:.2f}" for each in memory]
    return [name, *times, f"{chunked / logits:.2f}", *gib, f"{memory[1] / memory[0]:.3f}"]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(LossBenchmarkConfig, argv, __doc__)
        report = measuring.Report("loss", config.output, measuring.choose_device(config.device), argv)
        rows = [table_row(name, *measure(CASES[name], config)) for name in tqdm(config.cases, unit="case")]
        question = f"""\
how do time and memory of `linear_cross_entropy` compare with `cross_entropy(linear(hidden_states, weight).float())`,
forward and backward, for {config.num_tokens} tokens, {config.vocab_size} rows and {config.hidden_size} dimensions?"""
        method = f"""
n = {config.repetitions} steps of each variant, in turn, after one warm-up step; CPU threads: {torch.get_num_threads()}.
Seconds: median (fastest to slowest). GiB: peak memory of one step in addition to its inputs, in a new process (n = 1).
Ratios: chunked / logits."""
        report.write("Loss without logits", question, method, [HEADER, *rows])


if __name__ == "__main__":
    main()
