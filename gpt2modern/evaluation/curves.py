"""Read the log of a run and draw its curves: during training, for reports, for comparisons of runs."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gpt2modern.evaluation.tasks import PUBLISHED
from gpt2modern.files import atomic_file

CURVES_FILE = "training_curves.png"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file up to the first incomplete one, left by a crash; [] if there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def plot_training_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses (nats/token), the learning rate and the results of tasks in `rows` of metrics.jsonl over tokens
    seen, as a PNG file; the published results of GPT-2 are dashed lines. Raises OSError if it cannot be written."""
    plot_runs({"": rows}, path)


def plot_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw one run as `plot_training_curves` says, several each by its name in its own colour, with their speed."""
    alone = len(runs) == 1
    tasks = [name for name in PUBLISHED if any(name in row for rows in runs.values() for row in rows)]
    panels = {"learning_rate": "learning rate"} | ({} if alone else {"tokens_per_second": "tokens/s"})
    heights = [3, *(1 for _ in panels), *([2] if tasks else [])]
    figure = Figure(figsize=(8, 1.5 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    first_losses = []
    for number, (name, rows) in enumerate(runs.items()):
        colours = ("tab:blue", "tab:orange", "tab:gray") if alone else (f"C{number}",) * 3
        evaluated = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
        first_losses += evaluated[:1]
        label = "train, one batch" if alone else None if evaluated else name
        _draw(axes[0], rows, "loss", label, color=colours[0], alpha=0.5 if alone else 0.25, linewidth=1)
        _draw(axes[0], rows, "eval_loss", "validation" if alone else name, color=colours[1], marker="o", markersize=4)
        for axis, panel in zip(axes[1:], panels, strict=False):
            _draw(axis, rows, panel, color=colours[2])
        for position, task in enumerate(tasks):
            colour = f"C{position}" if alone else colours[0]
            _draw(
                axes[-1], rows, task, f"{task} {name}".strip(), color=colour, marker="osD^v"[position % 5], markersize=4
            )
    for position, task in enumerate(tasks):
        label, colour = f"{task} of GPT-2, 124M ({PUBLISHED[task]:.3f})", f"C{position}" if alone else "gray"
        axes[-1].axhline(PUBLISHED[task], color=colour, linestyle="--", linewidth=1, label=label)
    if not alone and first_losses:
        axes[0].set_ylim(top=1.02 * max(first_losses))  # otherwise the first steps leave no room for the differences
    for axis, label in zip(
        axes, ["loss (nats/token)", *panels.values(), *(["accuracy"] if tasks else [])], strict=True
    ):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("tokens seen")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw(axis: Axes, rows: list[dict[str, Any]], column: str, label: str | None = None, **style: Any) -> None:
    """Draw a column of metrics.jsonl over tokens seen, if a row has it; the label also gives its last value."""
    points = [(row["tokens_seen"], row[column]) for row in rows if row.get(column) is not None]
    if points:
        tokens, values = zip(*points, strict=True)
        axis.plot(tokens, values, label=label and f"{label} (last {values[-1]:.3f})", **style)
