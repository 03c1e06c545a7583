"""TrainState: what a checkpoint saves in addition to weights, optimizer state and loss scale."""

import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Hold the progress of a run. Data order, learning rate and dropout are functions of (seed, step): not saved.

    step: number of updates so far. wall_time_s: seconds spent training, without evaluation and saving, including the
    time before a resume. run_id: identifies the run to trackers. evaluation: results of the last evaluation by name,
    which was made at `evaluated_step`. nonfinite_steps: number of updates skipped in a row just before this step.
    """

    step: int = 0
    wall_time_s: float = 0.0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    evaluated_step: int | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    nonfinite_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Return the state that `to_json` wrote, also by an earlier version, which saved only a field `eval_loss`."""
        known = {name.name: values[name.name] for name in fields(cls) if name.name in values}
        if values.get("eval_loss") is not None and "evaluation" not in values:
            known["evaluation"] = {"eval_loss": values["eval_loss"]}
        return cls(**known)
