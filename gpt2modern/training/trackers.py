"""Send the rows of metrics.jsonl to experiment trackers too: trackio, tensorboard, wandb, through Accelerate's classes.

A tracker is a convenience: what it raises while training is one warning, and it is not called again.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from gpt2modern.errors import GPT2ModernError, warn

TRACKERS = {"trackio": TrackioTracker, "tensorboard": TensorBoardTracker, "wandb": WandBTracker}


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise GPT2ModernError for a tracker of --report_to that is unknown or not installed, with the way out."""
    for name in report_to:
        if name not in ("none", *TRACKERS):
            raise GPT2ModernError(f"--report_to {name} is unknown; choose from none, {', '.join(TRACKERS)}")
        if name != "none" and importlib.util.find_spec(name) is None:
            raise GPT2ModernError(f"--report_to {name}: it is not installed; python -m pip install {name}")


class Trackers:
    """The trackers of one run, on the main process.

    A resumed run continues under its name. trackio and wandb cannot delete rows, so steps that were logged before the
    interruption and are repeated now are not sent to them; tensorboard replaces the old rows.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        *,
        project: str,
        run_name: str,
        run_id: str,
        tensorboard_dir: Path,
        settings: dict[str, Any],
        resumed_step: int,
        logged_step: int,
    ):
        """resumed_step: 0 for a new run. logged_step: the highest step that the run has logged before."""
        self.logged_step = logged_step
        self._open: dict[str, GeneralTracker] = {}
        resumes = "allow" if resumed_step else "never"
        arguments = {
            "trackio": (project, {"name": run_name, "resume": resumes, "embed": False}),
            "wandb": (project, {"name": run_name, "resume": resumes, "id": run_id}),
            "tensorboard": (run_name, {"logging_dir": tensorboard_dir, "purge_step": resumed_step + 1}),
        }
        for name in dict.fromkeys(report_to):
            if name != "none":
                first, keywords = arguments[name]
                self._open[name] = TRACKERS[name](first, **keywords)
                self._call(name, self._open[name].start)
        if resumed_step == 0:
            self._call_all(lambda tracker: tracker.store_init_configuration(flat_settings(settings)))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers and texts of one step; None is left out."""
        values = {key: value for key, value in values.items() if value is not None}
        again = step <= self.logged_step
        self._call_all(lambda tracker: tracker.log(values, step=step), except_for={"trackio", "wandb"} if again else ())

    def close(self) -> None:
        self._call_all(lambda tracker: tracker.finish())
        self._open.clear()

    def _call_all(self, call: Callable[[GeneralTracker], None], except_for: Sequence[str] = ()) -> None:
        for name, tracker in list(self._open.items()):
            if name not in except_for:
                self._call(name, lambda tracker=tracker: call(tracker))

    def _call(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            del self._open[name]
            warn(f"--report_to {name} failed and is left out from here on: {type(error).__name__}: {error}")


def flat_settings(settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Turn settings that are not numbers, texts or booleans, which tensorboard refuses, into JSON."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in settings.items()
    }
