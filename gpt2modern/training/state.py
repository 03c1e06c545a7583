"""TrainState: what a checkpoint saves in addition to weights, optimizer state and loss scale."""

import math
import re
import uuid
from dataclasses import dataclass, field, fields
from typing import Any

from gpt2modern.settings import check_ranges, setting

FORMAT_VERSION = 1  # of checkpoints; 0: those of earlier versions, which do not state it


@dataclass
class TrainState:
    """Hold the progress of a run. Data order, learning rate and dropout are functions of (seed, step): not saved.

    step: number of updates so far. wall_time_s: seconds spent training, without evaluation and saving, including the
    time before a resume. run_id: identifies the run to trackers. evaluation: results of the last evaluation by name,
    which was made at `evaluated_step`. nonfinite_steps: number of updates skipped in a row just before this step.
    """

    step: int = setting(0, least=0)
    wall_time_s: float = setting(0.0, least=0, most=1e10)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    evaluated_step: int | None = setting(None, least=1)
    evaluation: dict[str, float | None] = field(default_factory=dict)
    nonfinite_steps: int = setting(0, least=0)

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(TrainState)}


@dataclass
class SavedState(TrainState):
    """Define the content of trainer_state.json. has_optimizer_state: False if every update so far was skipped.
    settings, schedule: those that the run had. grad_scaler: state of the loss scaler, None without one."""

    format_version: int = setting(0, least=0, most=FORMAT_VERSION)
    has_optimizer_state: bool = True
    grad_scaler: dict[str, float] | None = None
    settings: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SavedState":
        """Return the saved state, also of an earlier version, which may have only `eval_loss` of the evaluation.

        Raises ValueError that names a value which is missing, unknown, of another type, or contradicts another one.
        """
        if values.get("eval_loss") is not None and "evaluation" not in values:
            values = values | {"evaluation": {"eval_loss": values["eval_loss"]}}
        names = {field.name for field in fields(cls)}
        state = cls(**{name: values[name] for name in names & values.keys()})
        check_ranges(state, prefix="")
        if state.format_version and (odd := sorted(names ^ values.keys())):
            raise ValueError(f"{odd[0]} is {'missing' if odd[0] in names else 'unknown'}")
        if not (
            0 < state.step >= max(state.nonfinite_steps, state.evaluated_step or 0)
            and state.wall_time_s > 0
            and re.fullmatch("[0-9a-f]{8}", state.run_id)
            and (state.evaluated_step is None) == (state.evaluation.get("eval_loss") is None)
            and all(math.isfinite(result or 0) for result in state.evaluation.values())
        ):
            raise ValueError(f"its values contradict each other: {state.to_json()}")
        return state
