"""What the benchmarks share: the device, processes of their own, medians with their spread, reports with provenance."""

import datetime
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from gpt2modern.errors import GPT2ModernError, first_line

REPOSITORY = Path(__file__).parents[1]


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, or the best there is; raises GPT2ModernError if it is not there."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GPT2ModernError(f"--device {name}: {first_line(error)}") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Return what `function` returns in a process that has done nothing but import: its memory is its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # imported once, not per process
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gib` begin anew at what a fresh process holds now; not for a CPU outside of Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def median_and_spread(values: Sequence[float], format_spec: str, low: float = 0.2, high: float = 0.8) -> str:
    """Write 'median (p20 to p80)', interpolated between neighbours; low=0, high=1 for 'median (least to most)'."""
    low, middle, high = (format(value, format_spec) for value in np.quantile(values, (low, 0.5, high)))
    return f"{middle} ({low} to {high})"


class Report:
    """What a benchmark found, as Markdown in folder/YYYY-MM-DD_HHMMSS_topic_device.md.

    Made before anything is measured, to record the machine at the start. Raises GPT2ModernError for a missing package.
    """

    def __init__(self, topic: str, folder: str, device: torch.device, argv: list[str] | None, *packages: str):
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        device_slug = re.sub(r"[^a-z0-9]+", "-", self.device_name.lower()).strip("-")
        self.path = Path(folder, f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{topic}_{device_slug}.md")
        try:
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
        except PackageNotFoundError as error:
            raise GPT2ModernError(f"{error.name} is not installed: python -m pip install -e '.[bench]'") from None
        # An absolute path is cut to its last part: where things lie on a disk is not part of a report.
        words = (Path(word).name if os.path.isabs(word) else word for word in (sys.argv[1:] if argv is None else argv))
        command = shlex.join(["python", "-m", f"benchmarks.{topic}", *words])
        git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
        failed, commit = subprocess.getstatusoutput(shlex.join(git))
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        cpu_info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        processor = re.search(r"^model name\s*: (.+)", cpu_info, re.MULTILINE)
        self.provenance = (
            f"Command: `{command}`, {'not a git checkout' if failed else f'at commit {commit}'}.\n"
            f"Versions: {versions}, Python {platform.python_version()}, {platform.system()}.\n"
            f"Hardware: {self.device_name}; {cores} cores of {processor[1] if processor else platform.machine()}, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB; load average at the start {os.getloadavg()[0]:.1f}."
        )

    def write(self, title: str, question: str, method: str, rows: Sequence[Sequence[str]], remarks: str = "") -> None:
        """Print the report and write it. method: how, and with which n; rows: of its table, the header first."""
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
        parts = [f"# {title}: {self.device_name}", f"Question: {question}", self.provenance, method, table, remarks]
        text = "\n\n".join(part.strip() for part in parts).strip() + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        print(f"{text}\nwritten to {self.path}")
