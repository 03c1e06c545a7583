"""Compare finished or running trainings on one HTML page: losses, speed, samples, the settings that differ.

python -m eval.compare out/a out/b [--output comparison.html]

The runs are output folders of train_accelerate.py. The curves are also written as a PNG file beside the page.
"""

import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.evidence import median_and_spread
from eval.generate import by_prompt
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.evaluation.curves import plot_runs, read_rows
from gpt2modern.evaluation.loss import METRICS
from gpt2modern.files import check_writable_file, public_name, write_file
from gpt2modern.pages import render
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.models import parse_config_overrides
from gpt2modern.training.records import SETTINGS_FILE

OF_ONE_RUN = ("output_dir", "run_name", "hub_model_id")  # differ without an effect on the training


@dataclass
class CompareConfig:
    """Hold the flags of eval.compare. Raises ValueError if a value is invalid."""

    run: list[str] = setting(help="output folders of train_accelerate.py; the flag may be left out")
    output: str = setting("comparison.html", "page to write; the curves stand beside it, with the suffix .png")

    def __post_init__(self):
        check_ranges(self)
        if Path(self.output).suffix != ".html":
            raise ValueError(f"--output {self.output} must end in .html")
        check_writable_file("--output", self.output)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        argv = sys.argv[1:] if argv is None else argv
        named = argv and not argv[0].startswith("-")
        config = parse_arguments(CompareConfig, ["--run", *argv] if named else argv, __doc__)
        curves = Path(config.output).with_suffix(".png")
        found = compared(config.run, curves)
        write_file(
            Path(config.output), render("comparison.html", title=f"Comparison of {len(config.run)} runs", **found)
        )
        for run, values in found["results"].items():
            print(run, *(f"{name} {value}" for name, value in values.items()), sep=", ")
        print(f"written: {config.output}, {curves}")


def compared(folders: Sequence[str], curves: Path) -> dict[str, Any]:
    """Draw the curves of runs as the PNG file `curves`, and return the values of the template runs.html.jinja. Raises
    GPT2ModernError if a folder is not that of a run, or has damaged files."""
    names = [public_name(folder) for folder in folders]
    if len(set(names)) < len(names):  # out/a/run and out/b/run
        common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
        names = [os.path.relpath(folder, common) for folder in folders]
    logs, settings, samples = {}, {}, []
    for name, folder in zip(names, map(Path, folders), strict=True):
        try:
            logs[name], texts = read_rows(folder / "metrics.jsonl"), read_rows(folder / "samples.jsonl")
            if not logs[name] or any(row.get("tokens_seen") is None for row in logs[name]):
                raise ValueError("its metrics.jsonl has no rows, or rows without tokens_seen")
            last = [(each["prompt"], each["text"]) for each in texts if each["step"] == texts[-1]["step"]]
            keys = ("model", "seed", "prompt", "text")
            samples += [dict(zip(keys, (name, number, *each), strict=True)) for number, each in enumerate(last, 1)]
            path = folder / SETTINGS_FILE
            settings[name] = dict(yaml.safe_load(path.read_text("utf-8"))) if path.exists() else {}
            settings[name] |= parse_config_overrides(settings[name].pop("config_overrides", None))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
            problem = f"{folder} is not the output folder of a training run ({first_line(error)})"
            raise GPT2ModernError(f"{problem}; name one that train_accelerate.py has written") from None
    plot_runs(logs, curves)
    values = {
        key: [each.get(key, "not set") for each in settings.values()] for each in settings.values() for key in each
    }
    return {
        "models": dict.fromkeys(each["model"] for each in samples),
        "curves": base64.b64encode(curves.read_bytes()).decode(),
        "results": {name: results(rows) for name, rows in logs.items()},
        "differing": {
            key: each for key, each in values.items() if key not in OF_ONE_RUN and each.count(each[0]) < len(each)
        },
        "texts": by_prompt(samples),
        "label": "sample",
    }


def results(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the last results, tokens, speed and memory of a run, as texts, from the rows of its metrics.jsonl."""
    columns = (*METRICS, "tokens_seen", "tokens_per_second", "peak_memory_gib")
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in columns}
    shown = {METRICS[key].label: f"{found[key][-1]:.4f}" if found[key] else "not measured" for key in METRICS}
    speed, memory = found["tokens_per_second"], found["peak_memory_gib"]
    shown["tokens seen"] = f"{found['tokens_seen'][-1]:,}"
    shown["tokens/s (p20 to p80)"] = median_and_spread(speed, ",.0f") if speed else "not measured"
    return shown | {"peak GiB": f"{max(memory):.2f}" if memory else "not measured"}


if __name__ == "__main__":
    main()
