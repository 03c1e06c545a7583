"""What the benchmarks share: the device and its memory, medians with their spread, the report and its provenance."""

import datetime
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from gpt2modern.errors import GPT2ModernError, first_line

REPOSITORY = Path(__file__).parents[1]


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, or the best there is; raises GPT2ModernError if it is not there."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GPT2ModernError(f"--device {name}: {first_line(error)}") from None
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_gib(device: torch.device) -> float:
    """Return what this process holds now: allocated on a CUDA device, resident on a CPU."""
    return (
        torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    ) / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gib` begin anew; outside of Linux a CPU's peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_memory_gib(device: torch.device) -> float:
    """Return the most that this process held since `reset_peak_memory`: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":  # whose ru_maxrss begins with the size of the process that started this one
        return proc_fields_kib(Path("/proc/self/status"))["VmHWM"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def proc_fields_kib(path: Path) -> dict[str, int]:
    """Read the fields of a file such as /proc/self/status that are numbers of KiB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


def median_and_spread(values: Sequence[float], format_spec: str, low: float = 0.2, high: float = 0.8) -> str:
    """Write 'median (p20 to p80)', interpolated between neighbours; low=0, high=1 for 'median (least to most)'."""
    low, middle, high = (format(value, format_spec) for value in np.quantile(values, (low, 0.5, high)))
    return f"{middle} ({low} to {high})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def provenance(
    module: str, argv: Sequence[str], device: torch.device, packages: Sequence[str] = ("torch", "transformers")
) -> str:
    """Say how to measure again: command, commit, versions, hardware. An absolute path is cut to its last part."""
    words = (Path(word).name if os.path.isabs(word) else word for word in argv)
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    processor = next((line.split(":")[1].strip() for line in cpu_info if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    return (
        f"Command: `{shlex.join(['python', '-m', module, *words])}`, {commit()}.\n"
        f"Versions: {versions}, Python {platform.python_version()}, {platform.system()}.\n"
        f"Hardware: {'' if device.type == 'cpu' else f'{device_name(device)}; '}{cores} cores of {processor}, "
        f"{memory}; load average {os.getloadavg()[0]:.1f} at the start."
    )


def commit() -> str:
    """Return 'at commit abc1234', and whether the files differ from it; 'not a git checkout' where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"at commit {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def report_path(folder: str, topic: str, device: torch.device) -> Path:
    """Return folder/YYYY-MM-DD_topic_device.md, numbered where there is one already; the folder is made.

    Asked for before anything is measured: raises GPT2ModernError if nothing can be written there.
    """
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    stem = f"{datetime.date.today()}_{topic}_{name}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GPT2ModernError(f"--output {folder}: cannot be created ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise GPT2ModernError(f"--output {folder}: cannot be written to")
    taken = sum(1 for _ in Path(folder).glob(f"{stem}*.md"))
    return Path(folder) / (f"{stem}_{taken + 1}.md" if taken else f"{stem}.md")


def publish(path: Path, text: str) -> None:
    """Print a report and write it to `path`."""
    path.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {path}", file=sys.stderr)
