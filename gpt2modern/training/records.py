"""Record a run during training: metrics.jsonl, samples.jsonl, curves, trackers, the progress bar."""

import contextlib
import json
import math
import os
import platform
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.evaluation.curves import CURVES_FILE, plot_training_curves, read_rows
from gpt2modern.evaluation.tasks import PUBLISHED
from gpt2modern.files import locked, remove_leftovers, sha256_of, write_file
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.card import EVALUATION_FILE, WEIGHTS_FILE, public_settings, with_evaluation
from gpt2modern.training.checkpoints import checkpoints_dir, list_checkpoints, set_aside_later_checkpoints
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.nonfinite import first_loss_message, spike_warning
from gpt2modern.training.state import TrainState
from gpt2modern.training.trackers import Trackers
from modeling_gpt2modern import GPT2ModernConfig

SETTINGS_FILE = "resolved_config.yaml"


@contextlib.contextmanager
def reserved_output_dir(output_dir: Path) -> Iterator[None]:
    """Keep other runs, also those on other machines, out of `output_dir` until the `with` block ends.

    A missing folder is created, and removed in the end if it is empty. Its file `.in_use` says who uses it; what counts
    is the lock on that file, which the kernel removes when the process ends. Raises GPT2ModernError that names the
    process that uses the folder, or if it cannot be written.
    """
    path, missing = output_dir / ".in_use", [each for each in (output_dir, *output_dir.parents) if not each.exists()]
    with contextlib.ExitStack() as held:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path, seconds=0))
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        except BlockingIOError:
            raise GPT2ModernError(
                f"--output_dir {output_dir} is in use by another run ({path.read_text(errors='replace')}); wait until "
                "it ends, stop it, or choose another folder"
            ) from None
        except OSError as error:
            raise _unwritable(output_dir, error) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in missing:
                    folder.rmdir()


def _unwritable(output_dir: Path, error: OSError) -> GPT2ModernError:
    return GPT2ModernError(f"--output_dir {output_dir} cannot be written ({error.strerror}); choose another folder")


def open_output_dir(config: TrainConfig, state: TrainState, *, num_processes: int) -> None:
    """Create --output_dir if needed, write resolved_config.yaml, and move checkpoints later than `state.step` aside.

    Raises GPT2ModernError if it cannot be written, or has files of another program that this run would overwrite.
    """
    output_dir, checkpoints = Path(config.output_dir), checkpoints_dir(config)
    if not (output_dir / SETTINGS_FILE).exists() and not list_checkpoints(checkpoints):
        for name in ("README.md", "config.json", "model.safetensors", "metrics.jsonl", "stock"):
            if (output_dir / name).exists():
                raise GPT2ModernError(
                    f"--output_dir {output_dir} contains a {name} that was not written by a training run and would be "
                    "overwritten; choose another folder"
                )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (output_dir, checkpoints):
            remove_leftovers(folder)
        set_aside_later_checkpoints(checkpoints, state.step)
        settings = settings_text(config.chosen(), num_processes, command=" ".join(sys.argv))
        write_file(output_dir / SETTINGS_FILE, settings)
    except OSError as error:
        raise _unwritable(output_dir, error) from None


def settings_text(settings: dict[str, Any], num_processes: int, **facts: str) -> str:
    """Return all settings as YAML for `--config`; comments give package versions, processes and the given facts."""
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    header = {"python": platform.python_version(), **versions, "num_processes": num_processes, **facts}
    comments = "".join(f"# {name}: {value}\n" for name, value in header.items())
    return comments + yaml.safe_dump(settings, sort_keys=False)


class Records:
    """Write the metrics, samples, curves, tracker rows and progress bar of one run, from the step where it starts.

    Does nothing on processes other than the main one. Use it in a `with` block, which closes trackers and bar. Raises
    GPT2ModernError when it is created if --output_dir cannot be written or has a file that is not a log of a run.
    new_model: configuration of a model that starts with random weights, else None.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        plan: BatchPlan,
        *,
        is_main: bool,
        new_model: GPT2ModernConfig | None = None,
    ):
        self.output_dir = Path(config.output_dir)
        self.new_model = new_model
        self.plan = plan
        self.is_main = is_main
        if is_main:
            open_output_dir(config, state, num_processes=plan.num_processes)
        metrics, samples = (self.output_dir / name for name in ("metrics.jsonl", "samples.jsonl"))
        self.metrics = RowLog(metrics, {"tokens_seen": int}, resumed_step=state.step, is_on=is_main)
        is_on = is_main and bool(config.sample_prompts)
        self.samples = RowLog(samples, {"prompt": str, "text": str}, resumed_step=state.step, is_on=is_on)
        self.trackers = Trackers(
            config.report_to if is_main else [],
            project=config.project,
            run_name=config.run_name or f"{self.output_dir.resolve().name}-{state.run_id}",
            run_id=state.run_id,
            tensorboard_dir=self.output_dir / "tensorboard",
            settings=public_settings(config),
            resumed_step=state.step,
            logged_step=self.metrics.last_step if state.step else 0,
        )
        # The remaining time is computed here: tqdm takes one step with an evaluation in it for the pace of all steps.
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
        """Write the metrics `row` and the `samples` of a step to the files, the trackers and the progress bar.

        Redraws the curves if the row has an evaluation; does nothing if it is empty. remaining_s: seconds still needed.
        """
        if not self.is_main or not row:
            return
        if row.get("loss") is not None and (warning := spike_warning(self.metrics.rows, row["loss"])):
            self.bar.write(f"step {step}: {warning}")
        if step == 1 and self.new_model is not None and row.get("loss") is not None:
            self.bar.write(first_loss_message(row["loss"], self.new_model))
        row = {"tokens_seen": self.plan.tokens_seen(step)} | row
        self.metrics.add({"step": step} | row)
        if "eval_loss" in row:
            self.draw_curves()
            tasks = "".join(f", {name} {row[name]:.4f}" for name in PUBLISHED if name in row)
            self.bar.write(f"step {step}: validation loss {row['eval_loss']:.4f}{tasks}")
        for sample in samples:
            self.bar.write(f"  {on_one_line(sample)}")
            if not any(known == sample for known in self.samples.rows):
                self.samples.add(sample, amend=False)
        texts = {f"sample_{number}": sample["prompt"] + sample["text"] for number, sample in enumerate(samples)}
        self.trackers.log(step, row | texts)
        if row.get("loss") is not None:
            self.bar.set_postfix_str(bar_numbers(row, remaining_s), refresh=False)

    def draw_curves(self) -> None:
        """Draw training_curves.png. Warns if the file cannot be written."""
        try:
            plot_training_curves(self.metrics.rows, self.output_dir / CURVES_FILE)
        except OSError as error:
            warn(f"{self.output_dir / CURVES_FILE} cannot be written ({error.strerror})")


class RowLog:
    """Write a file of JSON lines in the order of steps; rows later than `resumed_step` are removed at the start.

    needed: type of each value that all rows have, besides `step`; their other values are numbers. `last_step` is
    the highest step in the file before later rows were removed. If the file cannot be written later on, one warning is
    printed, and the rows are kept in memory until it can. is_on: if False, nothing is read or written.
    """

    def __init__(self, path: Path, needed: dict[str, type], *, resumed_step: int, is_on: bool = True):
        self.path = path
        self.needed = {"step": int} | needed
        self.is_on = is_on
        self.rows: list[dict[str, Any]] = []
        self.last_step = 0
        self.is_behind = False
        if is_on:
            self._read(resumed_step)

    def _read(self, resumed_step: int) -> None:
        try:
            rows = read_rows(self.path)
            for row in rows:
                self._check(row)
            self.last_step = max((row["step"] for row in rows), default=0)
            self.rows = [row for row in rows if row["step"] <= resumed_step]
            self._write_all()
        except OSError as error:
            raise GPT2ModernError(f"{self.path} cannot be written ({error.strerror}); make it writable") from None
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise GPT2ModernError(f"{self.path} is not a log of a training run ({error!r}); move it away") from None

    def _check(self, row: dict[str, Any]) -> None:
        for name in self.needed.keys() | row.keys():
            value, kind = row[name], self.needed.get(name)
            is_number = value is None or (type(value) in (int, float) and math.isfinite(value))
            if not (is_number if kind is None else type(value) is kind):
                raise TypeError(f"{name} is {value!r}")

    def add(self, row: dict[str, Any], *, amend: bool = True) -> None:
        """Append `row` to the file, or add its values to the last row if `amend` and that row has the same step."""
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
                warn(
                    f"{self.path} cannot be written ({error.strerror}); its rows stay in memory until it can be written"
                )
            self.is_behind = True

    def _write_all(self) -> None:
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def bar_numbers(row: dict[str, Any], remaining_s: float) -> str:
    """Return the text to the right of the progress bar, the most important numbers first: a narrow terminal cuts it."""
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
    """Return the prompt and text of a sample as one Python string literal, cut to `width` characters."""
    shown = repr(sample["prompt"] + sample["text"])
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def show_evaluation(folder: Path) -> None:
    """Show eval.json of a model folder, a report of eval.run, in its card and curves, if it has them. Does nothing if
    there is no report, or if it is about other weights."""
    try:
        report = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        if report["weights_sha256"] != sha256_of(folder / WEIGHTS_FILE):
            return
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if (card := folder / "README.md").is_file():
        write_file(card, with_evaluation(card.read_text(encoding="utf-8"), report))
    if rows := read_rows(folder / "metrics.jsonl"):
        last = {"tokens_seen": rows[-1]["tokens_seen"]}
        plot_training_curves([*rows, last | report["results"]], folder / CURVES_FILE)
