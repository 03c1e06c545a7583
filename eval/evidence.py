"""Write reports of what was measured, and fill the tables of README.md and docs/ with their numbers.

    make report                        # python -m eval.evidence
    python -m eval.evidence --check    # which blocks are not what the reports say

A report is a JSON file in eval/reports, and a Markdown file and perhaps a picture made from it. In a page, a block is
what stands between `<!-- report: NAME -->` and `<!-- end -->`. eval/blocks.md.jinja has the template of each block; in
it, `reports` holds the newest report of each topic. How to add one: docs/extending.md.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
import psutil
import torch

from eval import pictures
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.cores import available_cores
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import write_file
from gpt2modern.settings import setting

REPOSITORY = Path(__file__).parents[1]
REPORTS, TEMPLATE = Path("eval/reports"), Path("eval/blocks.md.jinja")
BLOCK = re.compile(r"<!-- report: (?P<name>\S+) -->(?:(?!<!-- report:).)*?<!-- end -->", re.DOTALL)
NAME = re.compile(r"\d{4}-\d\d-\d\d_\d{6}_(?P<topic>[\w-]+)")
# The steps of the trainer: what the speed of training depends on, and the losses of a run.
TRAINING_CODE = ["modeling_gpt2modern", "gpt2modern/evaluation/loss.py", "train_accelerate.py:train_step"]
TRAINING_CODE += [f"gpt2modern/training/{name}.py" for name in ("models", "muon", "optimizers")]
DATA_CODE = [f"gpt2modern/data/{name}.py" for name in ("splits", "tokenizing", "packing")]


def median_and_spread(values: Sequence[float], format_spec: str, low: float = 0.2, high: float = 0.8) -> str:
    """Return 'median (p20 to p80)' as text; `low` and `high` are other quantiles. Interpolates between neighbours."""
    low, middle, high = (format(value, format_spec) for value in np.quantile(values, (low, 0.5, high)))
    return f"{middle} ({low} to {high})"


class Report:
    """Write a result as JSON to folder/YYYY-MM-DD_HHMMSS_topic_variant_device.json, and as Markdown beside it.

    Created before measuring, it records command, commit, versions, hardware and load. `measures`: what the result
    depends on, as paths from the root of this repository: files, folders, or file.py:name,name for only these
    functions and classes of a file. variant: tells apart the reports of one command. Raises GPT2ModernError for a
    missing package.
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
        variant: str = "",
    ):
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        words = "_".join(filter(None, [topic, variant, self.device_name]))
        slug = re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")
        self.path = Path(folder, f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{slug}.md")
        try:
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
        except PackageNotFoundError as error:
            raise GPT2ModernError(f"{error.name} is not installed; run python -m pip install {error.name}") from None
        # An absolute path is cut to its last part: a report does not show the folders of this machine.
        words = (re.sub(r"(?<![^\s=,])/([^\s=,]*/)?", "", word) for word in (sys.argv[1:] if argv is None else argv))
        cores = available_cores(physical=True)
        cpu_info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        processor = re.search(r"^model name\s*: (.+)", cpu_info, re.MULTILINE)
        self.provenance = {
            "command": shlex.join(["python", "-m", f"{package}.{topic}", *words]),
            "commit": current_commit(measures),
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
        drawing: dict[str, Any] | None = None,
    ) -> None:
        """Print the report and write its files. `rows` are the lines of its table, the header first. results: the
        numbers behind the table, as JSON can hold them. drawing: what `eval.pictures.draw` takes, for a picture."""
        content = {"title": f"{title}: {self.device_name}", "question": question, **self.provenance, "method": method}
        content |= {"table": [list(row) for row in rows], "remarks": remarks}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if drawing is not None:
            content |= {"picture": self.path.with_suffix(".png").name, "drawing": drawing}
            pictures.draw(drawing, self.path.with_suffix(".png"))
        text = page_of(content)
        self.path.write_text(text, encoding="utf-8")
        self.path.with_suffix(".json").write_text(json.dumps(content | {"results": results}, indent=1) + "\n")
        print(f"{text}\nreport written to {self.path}")


def page_of(report: dict[str, Any]) -> str:
    """Return a report's Markdown, from the content of its JSON file."""
    commit = "not a git checkout" if report["commit"] is None else f"at commit {report['commit']}"
    if "revalidated" in report:
        commit += "; revalidated at {commit}: {reason}".format(**report["revalidated"])
    provenance = f"""
Command: `{report["command"]}`, {commit}.
Versions: {report["versions"]}.
Hardware: {report["hardware"]}."""
    header, *rows = report["table"]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
    parts = [f"# {report['title']}", f"Question: {report['question']}", provenance, report["method"], table]
    parts += [report["remarks"], f"![{report['title']}]({report['picture']})" if "picture" in report else ""]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def git(root: Path, *words: str) -> str | None:
    """Return what a git command prints in `root`, or None if it fails or there is no git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout
    return None


def current_commit(measures: Sequence[str]) -> str | None:
    """Return the commit of this checkout, with -dirty if one of the paths in `measures` (see Report) has uncommitted
    changes; None if it is no git checkout."""
    commit = (git(REPOSITORY, "rev-parse", "--short=10", "HEAD") or "").strip()
    paths = [entry.partition(":")[0] for entry in measures]  # a report that is not committed makes nothing dirty
    return commit + "-dirty" * bool(git(REPOSITORY, "status", "--porcelain", "--", *paths)) or None


def commits_of(run: Path) -> list[str]:
    """Return the commits of the code that has trained a run of eval.ablation, by its folder; [] if it is another run,
    or was trained without git."""
    path = run / "commits.txt"
    return path.read_text().split() if path.exists() else []


def recipe_code(name: str) -> list[str]:
    """Return the path of the shipped recipe of this name, for `measures`; [] if there is none."""
    return [path for path in (f"recipes/{name}.yaml",) if (REPOSITORY / path).exists()]


def reports(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the content of the JSON file of each report, the oldest first."""
    paths = [path for path in sorted((root / REPORTS).glob("*.json")) if NAME.fullmatch(path.stem)]
    found = {}
    for path in paths:
        try:
            found[path] = json.loads(path.read_text("utf-8")) | {"name": path.stem}
        except (ValueError, TypeError) as error:
            raise GPT2ModernError(f"{path.relative_to(root)} is no report: {error}; measure again") from None
    return found


def filled_pages(root: Path) -> dict[Path, str]:
    """Return what README.md, the pages of docs/ and the Markdown of the reports should be. Raises GPT2ModernError if a
    block has no template, or a template asks for what its report does not have."""
    found = reports(root)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"spread": median_and_spread, "median": median, "tokens": "{:,}".format}
    newest = {NAME.fullmatch(path.stem)["topic"]: report for path, report in found.items()}
    try:
        pages = {path.with_suffix(".md"): page_of(report) for path, report in found.items()}
        text = environment.from_string((root / TEMPLATE).read_text("utf-8")).render(reports=newest)
        blocks = {match["name"]: match[0] for match in BLOCK.finditer(text)}
        for path in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
            page = path.read_text("utf-8")
            if len(BLOCK.findall(page)) != page.count("<!-- report:"):
                raise ValueError(f"a block of {path.name} has no end, or its end")
            pages[path] = BLOCK.sub(lambda match: blocks[match["name"]], page)
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise GPT2ModernError(f"{TEMPLATE}, {REPORTS}: {error} is missing or wrong; correct the template") from None
    return pages


def stale_pictures(root: Path) -> dict[Path, dict[str, Any]]:
    """Return what to draw for each picture of a report that is missing, or shows other numbers than its JSON file."""
    drawn = {path: each for path, each in reports(root).items() if "drawing" in each}
    shown = {path.with_name(each["picture"]): each["drawing"] for path, each in drawn.items()}
    return {path: drawing for path, drawing in shown.items() if not pictures.is_drawn_from(path, drawing)}


def differences(root: Path) -> Iterator[str]:
    """Yield a line for each block, page and picture of a report that is not what the JSON files say."""
    for path in stale_pictures(root):
        yield f"{path.relative_to(root)} does not show the numbers of its report; run make report"
    for path, filled in filled_pages(root).items():
        text = path.read_text("utf-8") if path.exists() else ""
        blocks = zip(BLOCK.finditer(text), BLOCK.finditer(filled), strict=True)
        parts = [f"the block {match['name']}" for match, other in blocks if match[0] != other[0]]
        for part in parts or ["the page"] * (text != filled):
            yield f"{path.relative_to(root)}: {part} is not what the reports say; run make report"


@dataclass
class EvidenceConfig:
    check: bool = setting(False, "write nothing; exit with 1 if a block differs from what the reports say")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(EvidenceConfig, argv, __doc__)
        found = list(differences(REPOSITORY))
        for path, text in {} if config.check else filled_pages(REPOSITORY).items():
            write_file(path, text)
        for path, drawing in {} if config.check else stale_pictures(REPOSITORY).items():
            pictures.draw(drawing, path)
        print(*found if config.check else [f"{len(found)} parts changed"], sep="\n", end="\n" * bool(found))
    if found and config.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
