"""TrainState: what of a run is saved besides weights, optimizer state and loss scale."""

import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """The position of a run. Nothing else is needed to resume it: data order, learning rate and dropout are functions
    of (seed, step).

    wall_time_s: seconds spent training, over all resumed parts, without evaluation and saving. run_id: by which
    trackers recognise the run. evaluation: results of the last evaluation by name, made at `evaluated_step`.
    nonfinite_steps: updates skipped in a row up to this step.
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
        """Read what `to_json` gave, or the same of an earlier version, whose only evaluation was a loss."""
        known = {name.name: values[name.name] for name in fields(cls) if name.name in values}
        if values.get("eval_loss") is not None and "evaluation" not in values:
            known["evaluation"] = {"eval_loss": values["eval_loss"]}
        return cls(**known)
