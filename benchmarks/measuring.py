"""Functions that all benchmarks use: choose a device, run in a new process, format a median, write a report."""

import datetime
import json
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

from gpt2modern.cores import available_cores
from gpt2modern.errors import GPT2ModernError, first_line

REPOSITORY = Path(__file__).parents[1]


def choose_device(name: str | None) -> torch.device:
    """Return the device `name`; None: the GPU, else the CPU. Raises GPT2ModernError if it cannot be used."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GPT2ModernError(f"--device {name} cannot be used ({first_line(error)}); try --device cpu") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its queued work. Does nothing for a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Call `function` in a new process, which has only done imports, and return its result: for clean memory values."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # imported once for all processes
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory_gib` reads to the memory used now. Does nothing for a CPU without Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def median_and_spread(values: Sequence[float], format_spec: str, low: float = 0.2, high: float = 0.8) -> str:
    """Return 'median (p20 to p80)' as text; `low` and `high` are other quantiles. Interpolates between neighbours."""
    low, middle, high = (format(value, format_spec) for value in np.quantile(values, (low, 0.5, high)))
    return f"{middle} ({low} to {high})"


class Report:
    """Write a benchmark's result as Markdown to folder/YYYY-MM-DD_HHMMSS_topic_device.md, and its numbers as JSON.

    Created before measuring, it records command, versions and load. Raises GPT2ModernError for a missing package.
    """

    def __init__(self, topic: str, folder: str, device: torch.device, argv: list[str] | None, *packages: str):
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        device_slug = re.sub(r"[^a-z0-9]+", "-", self.device_name.lower()).strip("-")
        self.path = Path(folder, f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{topic}_{device_slug}.md")
        try:
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
        except PackageNotFoundError as error:
            raise GPT2ModernError(f"{error.name} is not installed; run python -m pip install -e '.[bench]'") from None
        # An absolute path is cut to its last part: a report does not show the folders of this machine.
        words = (Path(word).name if os.path.isabs(word) else word for word in (sys.argv[1:] if argv is None else argv))
        command = shlex.join(["python", "-m", f"benchmarks.{topic}", *words])
        git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
        failed, commit = subprocess.getstatusoutput(shlex.join(git))
        cores = available_cores(physical=True)
        cpu_info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        processor = re.search(r"^model name\s*: (.+)", cpu_info, re.MULTILINE)
        self.provenance = (
            f"Command: `{command}`, {'not a git checkout' if failed else f'at commit {commit}'}.\n"
            f"Versions: {versions}, Python {platform.python_version()}, {platform.system()}.\n"
            f"Hardware: {self.device_name}; {cores} cores of {processor[1] if processor else platform.machine()}, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB; load average at the start {os.getloadavg()[0]:.1f}."
        )

    def write(
        self,
        title: str,
        question: str,
        method: str,
        rows: Sequence[Sequence[str]],
        remarks: str = "",
        numbers: Any = None,
    ) -> None:
        """Print the report and write it to the file. `rows` are the lines of its table, the header first. numbers: what
        the file of the same name that ends in .json has under the key "results"; None: there is no such file."""
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
        parts = [f"# {title}: {self.device_name}", f"Question: {question}", self.provenance, method, table, remarks]
        text = "\n\n".join(part.strip() for part in parts).strip() + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        if numbers is not None:
            facts = {"title": title, "device": self.device_name, "provenance": self.provenance.splitlines()}
            self.path.with_suffix(".json").write_text(json.dumps(facts | {"results": numbers}, indent=1) + "\n")
        print(f"{text}\nreport written to {self.path}")
