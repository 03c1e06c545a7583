"""Check training on a GPU, then measure it, in at most --minutes: for a machine that is at hand for a short time.

    python prepare_data.py --dataset_name stdlib --train_tokenizer 4096 --output_dir data/stdlib     # on any machine
    python -m benchmarks.gpu --data data/stdlib [--minutes 3 --parts checks]

It downloads nothing and does not need `datasets`. Parts run in the order of their importance, each row in a process of
its own, which ends when the time is over. Markdown and JSON are written after each row; what does not fit is listed as
not measured. The exit code is 1 if a row fails or a target is missed. --device cpu, with a tiny model, tries it out.
"""

import contextlib
import io
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import profile
from transformers.utils import is_flash_attn_2_available

from benchmarks import measuring, precision, throughput
from benchmarks.peers import PEERS
from benchmarks.throughput import Row
from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import first_line
from gpt2modern.settings import setting
from gpt2modern.training.speed import peak_memory_gib

PARTS = ["checks", "speed", "peers", "trainer", "ladder"]
PRESETS = ["gpt2", "modern", "speedrun"]
WARM_UP_STEPS, WINDOWS, PRECISION_STEPS, TRAINER_STEPS = 5, 5, 50, 40
TOLERANCE = 0.05  # nats/token
LEAST_SECONDS = 2  # in which nothing can be measured
RECIPE_TOKENS = 2**19  # per step
# Row -> the least tokens/s on an H200, or the row with whose tokens/s it is compared and the least ratio.
TARGETS: dict[str, tuple[str | None, float]] = {
    **{name: (None, 520_000) for name in ("gpt2 adamw", "modern adamw", "trainer")},
    **{f"{preset} muon": (f"{preset} adamw", 0.97) for preset in PRESETS},
    **{f"trainer, masked, {name}": ("trainer", 0.95) for name in ("flex_attention", "flash_attention_2")},
    "trainer, resumed": ("trainer", 0.97),
}
OTHER, OPTIMIZER, LOSS, PRODUCTS = "norms and elementwise", "optimizer and clipping", "softmax and loss", "products"
# Words in a kernel's or operator's name -> its family; the first match counts. Inductor names a kernel after all that
# it contains: one with "attention" in its name only prepares the inputs of the attention kernel.
FAMILIES = {
    r"softmax|nll_loss|cross_entropy|logsumexp": LOSS,
    r"^triton_(poi|red|per)_": OTHER,
    r"flash|fmha|attention|sdpa|flex": "attention",
    r"gemm|nvjet|cutlass|cublas|xmma|splitk|addmm|(^|\W)b?mm($|\W)|^triton_tem": PRODUCTS,
    r"adam|multi_tensor|foreach": OPTIMIZER,
    r"memcpy|memset|copy|catarray|aten::cat$": "copies",
    "": OTHER,
}


@dataclass(kw_only=True)
class GPUBenchmarkConfig(throughput.StepConfig):
    data: str = setting(help="folder that prepare_data.py wrote, of a million tokens or more")
    minutes: float = setting(8.0, "time for everything", least=0.1)
    parts: list[str] = setting(default_factory=lambda: list(PARTS), help="what to check and measure", choices=PARTS)
    vocab_size: int = setting(throughput.GPT2_VOCAB_SIZE, "number of token ids of every model", least=1)
    per_device_train_batch_size: int = setting(64, "sequences in a step; in the ladder a quarter of them", least=4)
    steps: int = setting(10, f"steps in each of the {WINDOWS} timings of a row", least=1)
    torch_compile: bool = setting(True, "compile all rows but the first ones of the ladder")
    device: str = setting("cuda", "cuda, or cpu to try the command")


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU, several at a time; on a CPU, those of the chunked loss. Raises RuntimeError."""
    chosen = ["-m", "gpu", "-n", "4"] if device == "cuda" else ["-k", "chunked_loss and cpu"]
    # Without conftest.py, which prepares data and so needs `datasets`.
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/test_cuda.py", *chosen]
    run = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)
    summary = run.stdout.strip().rpartition("\n")[-1]
    if run.returncode or "passed" not in summary:
        raise RuntimeError(f"{summary}\n{run.stdout}\n{run.stderr}")
    return {"facts": summary}


def compare_losses(row: Row, config: GPUBenchmarkConfig) -> dict[str, Any]:
    """Compare the losses (nats/token) of training in fp32 and as `row` says. Raises ValueError if they differ."""
    config = replace(config, steps=PRECISION_STEPS, per_device_train_batch_size=4)
    blocks = throughput.read_blocks(config, config.data, config.steps)
    rows = row, replace(row, precision="fp32", compiled=False)
    differences = np.subtract(*(precision.train(each, config, blocks) for each in rows))
    text = f"the last losses differ by {differences[-precision.LAST_STEPS :].mean():+.4f} from fp32"
    if not abs(differences[-precision.LAST_STEPS :].mean()) <= TOLERANCE:  # so NaN fails, too
        raise ValueError(f"{text}, allowed is {TOLERANCE}")
    return {"facts": f"{text}, of a single step by up to {np.abs(differences).max():.4f}"}


def measure_row(row: Row, config: GPUBenchmarkConfig) -> dict[str, Any]:
    """Time training steps in WINDOWS windows, then profile one."""
    device, counters = torch.device(config.device), torch._dynamo.utils.counters
    blocks = throughput.read_blocks(config, config.data, WARM_UP_STEPS + config.steps)
    batches = list(throughput.batches_of(blocks, config, WARM_UP_STEPS + config.steps))
    batches = [batch.pin_memory() if device.type == "cuda" else batch for batch in batches]
    with throughput.training_step(row, config, blocks) as step:

        def seconds_per_step(part: list[torch.Tensor]) -> float:
            start = time.perf_counter()
            for batch in part:
                step(batch)
            measuring.synchronize(device)
            return (time.perf_counter() - start) / len(part)

        seconds_per_step(batches[:WARM_UP_STEPS])
        measuring.reset_peak_memory(device)
        seconds = [seconds_per_step(batches[WARM_UP_STEPS:]) for _ in range(WINDOWS)]
        peak_gib, step_ms = peak_memory_gib(device), median(seconds) * 1e3
        with profile() as profiler:
            seconds_per_step(batches[-1:])
    families = family_times(profiler.events(), on_cpu=device.type == "cpu")
    families["idle"] = max(0.0, step_ms - sum(families.values()))
    rates = [batches[0][:, 1:].numel() / each for each in seconds]
    mfu = throughput.mfu(row, config, blocks, median(rates))
    breaks = counters["graph_break"].total() + counters["stats"]["unique_graphs"] - row.compiled
    facts = f"MFU {mfu:.1%}, " if mfu else ""
    facts += f"{peak_gib:.2f} GiB, {breaks} graph breaks, {step_ms:.1f} ms per step: "
    facts += ", ".join(f"{family} {milliseconds:.1f}" for family, milliseconds in families.items())
    numbers = {"mfu": mfu, "peak_gib": peak_gib, "breaks": breaks, "families_ms": families}
    return {"facts": facts, "rates": rates} | numbers


def family_times(events: Any, *, on_cpu: bool) -> dict[str, float]:
    """Sum the milliseconds of a profile by family. What an optimizer launches belongs to it, and what the loss launches
    to the loss, except matrix products. On a CPU operators are counted instead of kernels. Unattributed: kernels of
    which the profiler does not know the operator."""
    times: Counter = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times["unattributed"] += event.time_range.elapsed_us() / 1e3
        callers, caller = "", event
        while caller is not None:
            callers, caller = f"{callers} {caller.name}", caller.cpu_parent
        own = [(event.name, event.self_cpu_time_total)] if on_cpu else [(k.name, k.duration) for k in event.kernels]
        for name, microseconds in own:
            family = next(family for words, family in FAMILIES.items() if re.search(words, name, re.IGNORECASE))
            family = LOSS if "cross_entropy" in callers and family != PRODUCTS else family
            times[OPTIMIZER if "Optimizer.step" in callers else family] += microseconds / 1e3
            times["unattributed"] -= 0 if on_cpu else microseconds / 1e3
    return {name: milliseconds for name, milliseconds in times.most_common() if milliseconds > 1e-6}


def run_trainer(config: GPUBenchmarkConfig, folder: Path, **settings: Any) -> dict[str, Any]:
    """Run train_accelerate.py's `train` on the prepared data and return its rates, peak memory and last loss."""
    row = Row("modern", precision="bf16", compiled=config.torch_compile)
    rows = throughput.run_trainer(
        row, config, config.data, output_dir=folder, eval_blocks=4, max_steps=TRAINER_STEPS, logging_steps=5,
        eval_steps=0, save_steps=TRAINER_STEPS // 2, **settings,
    )  # fmt: skip
    rates = [row["tokens_per_second"] for row in rows[2:]]  # without compilation
    breaks = torch._dynamo.utils.counters["graph_break"].total()
    peak_gib, loss = rows[-1]["peak_memory_gib"], rows[-1]["loss"]
    return {"facts": f"{peak_gib:.2f} GiB, {breaks} graph breaks, loss {loss:.4f}", "rates": rates}


def jobs_of(config: GPUBenchmarkConfig, folder: Path) -> dict[str, dict[str, Callable[[], dict[str, Any]]]]:
    """Return for each part the names of its rows and the calls that measure them, the most important first."""
    fast, on_gpu = {"precision": "bf16", "compiled": config.torch_compile}, config.device == "cuda"
    speed = {f"{p} {o}": Row(p, o, **fast) for o, p in product(("adamw", "muon"), PRESETS)}
    peers = {name: Row("modern" if "Llama" in name else "gpt2", peer=name, **fast) for name in PEERS}
    ladder = throughput.ladder() | {name: speed[name] for name in ("modern adamw", "modern muon")}
    ladder = {name: replace(row, compiled=row.compiled and config.torch_compile) for name, row in ladder.items()}
    small = replace(config, per_device_train_batch_size=max(4, config.per_device_train_batch_size // 4))
    compared = ("gpt2 adamw", "modern adamw", "speedrun muon")
    checks = {f"loss, {name}": partial(compare_losses, speed[name], config) for name in compared}
    trainer = {"trainer": partial(run_trainer, config, folder / "0")}
    for name in ["flex_attention"] * on_gpu + ["flash_attention_2"] * is_flash_attn_2_available() + ["sdpa"]:
        masked = partial(run_trainer, config, folder / name, document_masking=True, attn_implementation=name)
        trainer[f"trainer, masked, {name}"] = masked
    middle = str(folder / f"0/checkpoints/step_{TRAINER_STEPS // 2:07d}")
    trainer["trainer, resumed"] = partial(run_trainer, config, folder / "1", resume_from_checkpoint=middle)
    return {
        "checks": checks | {"tests": partial(run_tests, config.device, 0.4 * 60 * config.minutes)},
        "speed": {name: partial(measure_row, row, config) for name, row in speed.items()},
        "peers": {name: partial(measure_row, row, config) for name, row in peers.items()},
        "trainer": trainer,
        "ladder": {f"ladder, {name}": partial(measure_row, row, small) for name, row in ladder.items()},
    }


def run_job(job: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """Call `job` in a new process, which ends at `deadline` (time.monotonic); return its result, {"error": ...} if it
    failed, or {} if there was no time for it."""
    seconds = math.ceil(deadline - time.monotonic())
    try:
        return measuring.in_fresh_process(call_in_time, seconds, job) if seconds >= LEAST_SECONDS else {}
    except Exception as error:  # of any kind: the other rows are still to be measured
        late = f"not finished in the {seconds} s that were left" if time.monotonic() > deadline - 1 else None
        return {"error": late or first_line(error), "traceback": str(error.__cause__)}


def call_in_time(seconds: int, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    signal.alarm(seconds)  # ends the process
    return job()


def target_of(name: str, rates: dict[str, float], step_tokens: int, device_name: str) -> tuple[str, bool]:
    """Return what the report says about the target of a row, and False if it is missed. rates: tokens/s of all rows."""
    other, least = TARGETS.get(name, (None, 0))
    if name not in rates or (other not in rates if other else not (least and "H200" in device_name)):
        return "-", True
    value = rates[name] / rates[other] if other else rates[name]
    if name.endswith("muon"):  # in the recipes' steps: an update takes as long in a step of any size
        value = 1 / (1 + (1 / value - 1) * step_tokens / RECIPE_TOKENS)
    text = f"{value:.3f} of {other}, at least {least}" if other else f"at least {least:,}"
    return f"{text}: {'reached' if value >= least else '**missed**'}", value >= least


def write_report(report: evidence.Report, config: GPUBenchmarkConfig, found: dict, waiting: list[str]) -> bool:
    """Write the results so far as Markdown and JSON; waiting: names of rows without one. Return False
    if a row failed, or a target is missed or was not measured."""
    rates = {name: median(row["rates"]) for name, row in found.items() if "rates" in row}
    step_tokens = config.per_device_train_batch_size * config.block_size
    targets = {name: target_of(name, rates, step_tokens, report.device_name) for name in found}
    table = [["row", "tokens/s (p20 to p80)", "target", "more"]]
    for name, row in found.items():
        rate = evidence.median_and_spread(row["rates"], ",.0f") if "rates" in row else "-"
        table.append([name, rate, targets[name][0], row.get("error") or row["facts"]])
    method = f"""
{config.per_device_train_batch_size} x {config.block_size} tokens in a step, in the ladder a quarter of them; bf16
autocast, attention {config.attn_implementation or "sdpa"} except where a row names another; {config.config_overrides}.
n = {WINDOWS} windows of {config.steps} steps after {WARM_UP_STEPS}; each row in a new process."""
    remarks = f"""
Not measured: {"; ".join(waiting) or "nothing"}.

The rows `trainer` are `train_accelerate.train` on the prepared data, the last one resumed in the middle; all others are
its `train_step`. The ladder is that of `benchmarks.throughput`; each row adds one change.
Muon's targets are for steps of {RECIPE_TOKENS:,} tokens. MFU: (6 N + 12 L D T) x tokens/s / the bf16 peak. The kernels
are of one profiled step; idle is the rest of an unprofiled one. Graph breaks include recompilations."""
    question = "does training give the right results on this device, and how fast is it?"
    report.write("Training on a GPU", question, method, table, remarks, {"rows": found, "not_measured": waiting})
    failed = [name for name, row in found.items() if name not in PEERS and ("error" in row or row.get("breaks"))]
    return not failed and not TARGETS.keys() & set(waiting) and all(reached for _, reached in targets.values())


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        config = parse_arguments(GPUBenchmarkConfig, argv, __doc__)
        deadline = time.monotonic() + 60 * config.minutes
        blocks = throughput.read_blocks(config, config.data, WARM_UP_STEPS + config.steps)
        for preset in PRESETS:  # raises if the settings or the data do not fit
            throughput.weightless_model(Row(preset), config, blocks)
        measures = [*throughput.MEASURES, "train_accelerate.py", "benchmarks/gpu.py:measure_row,run_trainer,jobs_of"]
        report = evidence.Report("gpu", config.output, torch.device(config.device), argv, measures=measures)
        parts = {part: jobs for part, jobs in jobs_of(config, Path(folder)).items() if part in config.parts}
        found, waiting = {}, [name for jobs in parts.values() for name in jobs]
        for part, jobs in parts.items():
            with ThreadPoolExecutor(len(jobs) if part == "checks" else 1) as pool:  # only checks are not timed
                results = pool.map(partial(run_job, deadline=deadline), jobs.values())
                for name, result in zip(jobs, results, strict=True):
                    if result:
                        waiting.remove(name)
                        found[name] = result
                    with contextlib.redirect_stdout(io.StringIO()):
                        write_report(report, config, found, waiting)
        passed = write_report(report, config, found, waiting)
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
