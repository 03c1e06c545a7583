"""Write what was measured: a report as Markdown for people, and as JSON for `make report`."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from gpt2modern.cores import available_cores
from gpt2modern.errors import GPT2ModernError

REPOSITORY = Path(__file__).parents[1]


def median_and_spread(values: Sequence[float], format_spec: str, low: float = 0.2, high: float = 0.8) -> str:
    """Return 'median (p20 to p80)' as text; `low` and `high` are other quantiles. Interpolates between neighbours."""
    low, middle, high = (format(value, format_spec) for value in np.quantile(values, (low, 0.5, high)))
    return f"{middle} ({low} to {high})"


class Report:
    """Write a result as Markdown to folder/YYYY-MM-DD_HHMMSS_topic_device.md, and as JSON to the same name with .json.

    Created before measuring, it records command, commit, versions, hardware and load. `measures`: files and folders of
    this repository whose code the result depends on, as paths from its root. Raises GPT2ModernError for a missing
    package.
    """

    def __init__(
        self,
        topic: str,
        folder: str,
        device: torch.device,
        argv: list[str] | None,
        *packages: str,
        package: str = "benchmarks",
        measures: Sequence[str] = (),
    ):
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        device_slug = re.sub(r"[^a-z0-9]+", "-", self.device_name.lower()).strip("-")
        self.path = Path(folder, f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{topic}_{device_slug}.md")
        try:
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
        except PackageNotFoundError as error:
            raise GPT2ModernError(f"{error.name} is not installed; run python -m pip install -e '.[bench]'") from None
        # An absolute path is cut to its last part: a report does not show the folders of this machine.
        words = (Path(word).name if os.path.isabs(word) else word for word in (sys.argv[1:] if argv is None else argv))
        git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
        failed, commit = subprocess.getstatusoutput(shlex.join(git))
        cores = available_cores(physical=True)
        cpu_info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        processor = re.search(r"^model name\s*: (.+)", cpu_info, re.MULTILINE)
        self.provenance = {
            "command": shlex.join(["python", "-m", f"{package}.{topic}", *words]),
            "commit": None if failed else commit,
            "versions": f"{versions}, Python {platform.python_version()}, {platform.system()}",
            "hardware": (
                f"{self.device_name}; {cores} cores of {processor[1] if processor else platform.machine()}, "
                f"{psutil.virtual_memory().total / 2**30:.0f} GiB; load average at the start {os.getloadavg()[0]:.1f}"
            ),
            "measures": list(measures),
        }

    def write(
        self,
        title: str,
        question: str,
        method: str,
        rows: Sequence[Sequence[str]],
        remarks: str = "",
        results: Any = None,
    ) -> None:
        """Print the report and write both files. `rows` are the lines of its table, the header first. results: the
        numbers behind the table, as JSON can hold them."""
        facts = self.provenance
        provenance = (
            f"Command: `{facts['command']}`, "
            f"{'not a git checkout' if facts['commit'] is None else 'at commit ' + facts['commit']}.\n"
            f"Versions: {facts['versions']}.\nHardware: {facts['hardware']}."
        )
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
        parts = [f"# {title}: {self.device_name}", f"Question: {question}", provenance, method, table, remarks]
        text = "\n\n".join(part.strip() for part in parts).strip() + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        content = {"title": title, "question": question, **facts, "table": [list(row) for row in rows]}
        self.path.with_suffix(".json").write_text(json.dumps(content | {"results": results}, indent=1) + "\n")
        print(f"{text}\nreport written to {self.path}")
