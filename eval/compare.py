"""Compare finished or running trainings on one HTML page: losses, speed, samples, the settings that differ.

python -m eval.compare out/a out/b [--output comparison.html]

The runs are output folders of train_accelerate.py. The curves are also written as a PNG file beside the page.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.evidence import median_and_spread
from eval.generate import side_by_side
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.evaluation.curves import plot_runs, read_rows
from gpt2modern.evaluation.loss import METRICS
from gpt2modern.files import check_writable_file, public_name, write_file
from gpt2modern.pages import heading, page, picture, table
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.models import parse_config_overrides
from gpt2modern.training.records import SETTINGS_FILE

OF_ONE_RUN = ("output_dir", "run_name", "hub_model_id")  # differ without an effect on the training
COLUMNS = (*METRICS, "tokens_seen", "tokens_per_second", "peak_memory_gib")


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
        names = [public_name(folder) for folder in config.run]
        if len(set(names)) < len(names):  # out/a/run and out/b/run
            common = os.path.commonpath([os.path.abspath(folder) for folder in config.run])
            names = [os.path.relpath(folder, common) for folder in config.run]
        runs = {name: read_run(Path(folder)) for name, folder in zip(names, config.run, strict=True)}
        logs = {name: rows for name, (rows, _, _) in runs.items()}
        samples = [{"model": name, **each} for name, (_, samples, _) in runs.items() for each in samples]
        curves, table_of_results = Path(config.output).with_suffix(".png"), results(logs)
        plot_runs(logs, curves)
        parts = [picture(curves, "losses, learning rate and speed over tokens"), heading("Results")]
        parts += [
            table(table_of_results),
            heading("Settings that differ"),
            table(differing({name: settings for name, (_, _, settings) in runs.items()}), "texts"),
        ]
        if samples:
            parts += [heading("Samples of the last step, not selected"), side_by_side(samples, "sample {}")]
        write_file(Path(config.output), page(f"Comparison of {len(runs)} runs", *parts))
        print(*("   ".join(row) for row in table_of_results), f"written: {config.output}, {curves}", sep="\n")


def read_run(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl, its samples of the last step with their numbers as seeds, and its
    settings. Raises GPT2ModernError if `folder` is not that of a run, or has damaged files."""
    try:
        settings = dict(yaml.safe_load((folder / SETTINGS_FILE).read_text("utf-8")))
        settings |= parse_config_overrides(settings.pop("config_overrides", None))
        rows, texts = read_rows(folder / "metrics.jsonl"), read_rows(folder / "samples.jsonl")
        last = [each for each in texts if each["step"] == texts[-1]["step"]]
        if not rows or any(row.get("tokens_seen") is None for row in rows):
            raise ValueError("its metrics.jsonl has no rows, or rows without tokens_seen")
        samples = [
            {"seed": number, "prompt": each["prompt"], "text": each["text"]} for number, each in enumerate(last, 1)
        ]
        return rows, samples, settings
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        problem = f"--run {folder} is not the output folder of a training run ({first_line(error)})"
        raise GPT2ModernError(f"{problem}; name one that train_accelerate.py has written") from None


def results(logs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return the rows of a table: the last results, tokens, speed and memory of each run, from its metrics.jsonl."""
    table = [
        ["run", *(metric.label for metric in METRICS.values()), "tokens seen", "tokens/s (p20 to p80)", "peak GiB"]
    ]
    for name, rows in logs.items():
        column = {key: [row[key] for row in rows if row.get(key) is not None] for key in COLUMNS}
        last = [f"{column[key][-1]:.4f}" if column[key] else "not measured" for key in METRICS]
        speed = column["tokens_per_second"]
        table.append([name, *last, f"{column['tokens_seen'][-1]:,}"])
        table[-1].append(median_and_spread(speed, ",.0f") if speed else "not measured")
        table[-1].append(f"{max(column['peak_memory_gib'], default=0):.2f}")
    return table


def differing(settings: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of a table: the settings that are not the same in all runs. settings: those of each run."""
    rows = [["setting", *settings]]
    for name in dict.fromkeys(key for each in settings.values() for key in each if key not in OF_ONE_RUN):
        values = [each.get(name, "not set") for each in settings.values()]
        if any(value != values[0] for value in values):
            rows.append([name, *map(str, values)])
    return rows


if __name__ == "__main__":
    main()
