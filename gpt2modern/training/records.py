"""Record a run while it trains: metrics.jsonl, samples.jsonl, training_curves.png, trackers, the progress bar."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import write_file
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.checkpoints import checkpoints_dir, list_checkpoints, set_aside_later_checkpoints
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.nonfinite import spike_warning
from gpt2modern.training.state import TrainState
from gpt2modern.training.trackers import Trackers

SETTINGS_FILE, CURVES_FILE = "resolved_config.yaml", "training_curves.png"


def open_output_dir(config: TrainConfig, state: TrainState, *, num_processes: int) -> None:
    """Make the folder of a run, with the settings it runs under; nothing in it may lie beyond the step it begins at.

    Raises GPT2ModernError if the folder holds files of somebody else that the run would replace.
    """
    output_dir, checkpoints = Path(config.output_dir), checkpoints_dir(config)
    if not (output_dir / SETTINGS_FILE).exists() and not list_checkpoints(checkpoints):
        for name in ("README.md", "config.json", "model.safetensors", "metrics.jsonl"):
            if (output_dir / name).exists():
                raise GPT2ModernError(
                    f"--output_dir {output_dir}: has a {name} that no run has written; name another folder"
                )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        set_aside_later_checkpoints(checkpoints, state.step)
        _write_settings(output_dir / SETTINGS_FILE, config.chosen(), num_processes)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {output_dir}: cannot be written to ({error.strerror})") from None


def _write_settings(path: Path, settings: dict[str, Any], num_processes: int) -> None:
    """Write every setting as a recipe that `--config` takes, with the versions, processes and command of the run."""
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    header = {"python": platform.python_version(), **versions, "num_processes": num_processes}
    header["command"] = " ".join(sys.argv)
    comments = "".join(f"# {name}: {value}\n" for name, value in header.items())
    write_file(path, comments + yaml.safe_dump(settings, sort_keys=False))


class Records:
    """The records of one run, from the step it begins at. Does nothing on processes other than the main one.

    Close it at the end, for whatever reason the run ends. Raises GPT2ModernError for a disk that cannot be written and
    for files that are not records.
    """

    def __init__(self, config: TrainConfig, state: TrainState, plan: BatchPlan, *, is_main: bool):
        self.output_dir = Path(config.output_dir)
        self.plan = plan
        self.is_main = is_main
        if is_main:
            open_output_dir(config, state, num_processes=plan.num_processes)
        self.metrics = RowLog(self.output_dir / "metrics.jsonl", resumed_step=state.step, is_on=is_main)
        self.samples = RowLog(
            self.output_dir / "samples.jsonl", resumed_step=state.step, is_on=is_main and bool(config.sample_prompts)
        )
        self.trackers = Trackers(
            config.report_to if is_main else [],
            project=config.project,
            run_name=config.run_name or f"{self.output_dir.resolve().name}-{state.run_id}",
            run_id=state.run_id,
            tensorboard_dir=self.output_dir / "tensorboard",
            settings=config.chosen(),
            resumed_step=state.step,
            logged_step=self.metrics.last_step if state.step else 0,
        )
        # The remaining time is ours: tqdm takes one step with an evaluation in it for the pace of all steps.
        self.bar = tqdm(
            total=config.max_steps,
            initial=state.step,
            desc="training",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # seconds; a log file keeps every redrawing
            disable=not is_main,
        )

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        self.trackers.close()

    def log(self, step: int, row: dict[str, Any], samples: list[dict[str, Any]], *, remaining_s: float) -> None:
        """Append a row of a step to metrics.jsonl and its samples, tell the trackers, show it; redraw the curves after
        an evaluation. An empty row is none."""
        if not self.is_main or not row:
            return
        if row.get("loss") is not None and (warning := spike_warning(self.metrics.rows, row["loss"])):
            self.bar.write(f"step {step}: {warning}")
        row = {"tokens_seen": self.plan.tokens_seen(step)} | row
        self.metrics.add({"step": step} | row)
        if "eval_loss" in row:
            self.draw_curves()
            self.bar.write(f"step {step}: validation loss {row['eval_loss']:.4f}")
        for sample in samples:
            self.bar.write(f"  {on_one_line(sample)}")
            if not any(known == sample for known in self.samples.rows):
                self.samples.add(sample, amend=False)
        texts = {f"sample_{number}": sample["prompt"] + sample["text"] for number, sample in enumerate(samples)}
        self.trackers.log(step, row | texts)
        if row.get("loss") is not None:
            self.bar.set_postfix_str(bar_numbers(row, remaining_s), refresh=False)

    def draw_curves(self) -> None:
        """Draw training_curves.png; a disk that does not take it is a warning."""
        try:
            plot_training_curves(self.metrics.rows, self.output_dir / CURVES_FILE)
        except OSError as error:
            warn(f"{self.output_dir / CURVES_FILE} cannot be written ({error.strerror})")


class RowLog:
    """A file of JSON lines, one per step, in order, without repeated steps after a resume.

    `last_step` is the highest step that the file had before, which may lie beyond `resumed_step`. A disk that takes no
    row is one warning: the rows are kept, and written as soon as it takes them. is_on: False reads and writes nothing.
    """

    def __init__(self, path: Path, *, resumed_step: int, is_on: bool = True):
        self.path = path
        self.is_on = is_on
        self.rows: list[dict[str, Any]] = []
        self.last_step = 0
        self.is_behind = False
        if is_on:
            self._read(resumed_step)

    def _read(self, resumed_step: int) -> None:
        try:
            rows = read_rows(self.path)
            self.last_step = max((row["step"] for row in rows), default=0)
            self.rows = [row for row in rows if row["step"] <= resumed_step]
            self._write_all()
        except OSError as error:
            raise GPT2ModernError(f"{self.path}: cannot be written ({error.strerror})") from None
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise GPT2ModernError(f"{self.path}: is not a log of metrics ({error!r}); move it away") from None

    def add(self, row: dict[str, Any], *, amend: bool = True) -> None:
        """Append a row; with `amend`, add its values to the last row if that is of the same step."""
        if not self.is_on:
            return
        amended = amend and bool(self.rows) and self.rows[-1]["step"] == row["step"]
        if amended:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        try:
            if amended or self.is_behind:  # the last row in the file may be a part of one
                self._write_all()
            else:
                with self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self.is_behind = False
        except OSError as error:
            if not self.is_behind:
                warn(f"{self.path} cannot be written ({error.strerror}); its rows are kept until it can")
            self.is_behind = True

    def _write_all(self) -> None:
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines up to a line cut short by a crash. A missing file has no rows."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def bar_numbers(row: dict[str, Any], remaining_s: float) -> str:
    """Format the text beside the bar; the most important first, since a narrow terminal cuts it."""
    numbers = [
        f"{tqdm.format_interval(remaining_s)} left",
        f"loss {row['loss']:.3f}",
        f"lr {row['learning_rate']:.1e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"{row['peak_memory_gib']:.1f} GiB",
    ]
    if row["mfu"] is not None:
        numbers.insert(-1, f"MFU {row['mfu']:.1%}")
    return ", ".join(numbers)


def on_one_line(sample: dict[str, Any], width: int = 100) -> str:
    """Show prompt and text as Python would write them, cut to `width` characters."""
    shown = repr(sample["prompt"] + sample["text"])
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def plot_training_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw train and evaluation loss (nats/token) and the learning rate over tokens seen."""
    train = [(row["tokens_seen"], row["loss"], row["learning_rate"]) for row in rows if row.get("loss") is not None]
    evaluated = [(row["tokens_seen"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axis, rate_axis = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if train:
        tokens, losses, rates = zip(*train, strict=True)
        loss_axis.plot(tokens, losses, color="tab:blue", alpha=0.5, linewidth=1, label="train (one batch)")
        rate_axis.plot(tokens, rates, color="tab:gray")
    if evaluated:
        tokens, losses = zip(*evaluated, strict=True)
        loss_axis.plot(
            tokens, losses, color="tab:orange", marker="o", markersize=4, label=f"validation (last {losses[-1]:.3f})"
        )
    loss_axis.set_ylabel("loss (nats/token)")
    if train or evaluated:
        loss_axis.legend()
    loss_axis.grid(alpha=0.3)
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_xlabel("tokens seen")
    rate_axis.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
