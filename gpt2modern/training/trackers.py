"""Send the rows of metrics.jsonl to experiment trackers (trackio, tensorboard, wandb) through Accelerate's classes.

A tracker that raises an exception during training causes one warning and is disabled for the rest of the run.
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
    """Raise GPT2ModernError if a tracker named in --report_to is unknown or not installed."""
    for name in report_to:
        if name not in ("none", *TRACKERS):
            raise GPT2ModernError(f"--report_to {name} is unknown; choose from none, {', '.join(TRACKERS)}")
        if name != "none" and importlib.util.find_spec(name) is None:
            raise GPT2ModernError(f"--report_to {name}: {name} is not installed; run: python -m pip install {name}")


class Trackers:
    """Send the metrics of one run to its trackers. To be used on the main process only.

    A resumed run continues under its name. trackio and wandb cannot delete rows: steps that a resumed run repeats are
    not sent to them again. tensorboard replaces the old rows.
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
        """Start the trackers in `report_to` ("none" is skipped), and send them the settings if the run is new.

        resumed_step: the step at which the run starts, 0 for a new one. logged_step: the highest step already logged.
        """
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
        """Send the numbers and texts of one step to the trackers. Values that are None are not sent."""
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
            warn(f"--report_to {name} failed and is disabled for the rest of the run: {type(error).__name__}: {error}")


def flat_settings(settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Return `settings` with every value that is not a number, string or boolean as JSON text, as tensorboard needs."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in settings.items()
    }
