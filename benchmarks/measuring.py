"""What benchmarks share: peak memory of this process, medians with their spread, and the file of a report."""

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
from typing import TYPE_CHECKING

from gpt2modern.errors import GPT2ModernError

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).parents[1]


def process_status_kib(field_name: str) -> int:
    """A field of /proc/self/status, which only Linux has. Its VmHWM is not ru_maxrss, which begins with the size of the
    process that started this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field_name))


def reset_peak_memory(device: "torch.device") -> None:
    """Begin the peak of `peak_memory_gib` anew; on a CPU of another system than Linux it cannot be."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_memory_gib(device: "torch.device") -> float:
    """Most that this process held since `reset_peak_memory`: allocated on a CUDA device, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        return process_status_kib("VmHWM") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated between neighbours; 0.5 is the median."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median_and_spread(values: Sequence[float], format_spec: str) -> str:
    """'median (p20 to p80)'."""
    low, middle, high = (format(percentile(values, share), format_spec) for share in (0.2, 0.5, 0.8))
    return f"{middle} ({low} to {high})"


def device_words(device: "torch.device") -> str:
    """'NVIDIA H200' or 'CPU, 2 of 4 cores': what a report says that it was measured on."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    used, present = torch.get_num_threads(), len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"CPU, {used} cores" if used == present else f"CPU, {used} of {present} cores"


def provenance(module: str, argv: Sequence[str], device: "torch.device") -> str:
    """The lines that say how to measure again: command, commit, versions, hardware."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return (
        f"Command: `{shlex.join(['python', '-m', module, *argv])}`, {commit()}.\n"
        f"Versions: {versions}, Python {platform.python_version()}, {platform.system()}.\n"
        f"Hardware: {device_words(device)}.\n"
    )


def commit() -> str:
    """'at commit abc1234', and whether the files differ from it; 'not a git checkout' where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"at commit {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def report_path(folder: str, topic: str, device: "torch.device") -> Path:
    """folder/YYYY-MM-DD_topic_device.md, numbered where there is one already; the folder is made.

    Asked for before anything is measured: raises GPT2ModernError if nothing can be written there.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    stem = f"{datetime.date.today()}_{topic}_{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GPT2ModernError(f"--output {folder}: cannot be created ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise GPT2ModernError(f"--output {folder}: cannot be written to")
    taken = sum(1 for _ in Path(folder).glob(f"{stem}*.md"))
    return Path(folder) / (f"{stem}_{taken + 1}.md" if taken else f"{stem}.md")
