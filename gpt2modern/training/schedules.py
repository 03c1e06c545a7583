"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# From 1 at progress 0 to 0 at progress 1. The names are those of transformers' decay types.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "constant": lambda progress: 1.0,
}
DEFAULT_DECAY_RATIO = 0.2  # longer gained little in arXiv:2405.18392


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update as a share of its peak.

    cosine, linear: decay over all updates after the warm-up; constant: no decay; warmup_stable_decay (WSD,
    arXiv:2404.06395): the peak until the last `decay_steps` updates, then a decay of `decay_type`; "1-sqrt" did best in
    arXiv:2405.18392, "linear" is the GPT-2 speedrun's. The stable part does not depend on `max_steps`, so that a
    checkpoint of it can be continued to any length. Raises ValueError for parts that contradict each other.
    """

    lr_scheduler_type: str
    max_steps: int
    warmup_steps: int = 0
    decay_steps: int | None = None  # of warmup_stable_decay alone
    decay_type: str | None = None  # of warmup_stable_decay alone; None: "1-sqrt"
    min_lr_ratio: float = 0.0

    def __post_init__(self):
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}")
        if self.decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(
                f"--decay_steps and --decay_ratio belong to --lr_scheduler_type warmup_stable_decay; "
                f"{self.lr_scheduler_type} has no stable part"
            )
        if self.decay_type is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(f"--decay_type {self.decay_type} is the shape of warmup_stable_decay's decay; remove it")
        if self.warmup_steps + (self.decay_steps or 0) > self.max_steps:
            raise ValueError(
                f"{self.warmup_steps} steps of warm-up and {self.decay_steps} of decay are more than --max_steps "
                f"{self.max_steps}"
            )

    def gave_the_same(self, other: "Schedule", steps: int) -> bool:
        """Tell whether the first `steps` updates have the same learning rates under `other`, which differs in its
        length and what follows from it: then the warm-up shows at the first update, and the decay at the last."""
        return all(self.factor(step) == other.factor(step) for step in (0, steps - 1))

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at update number `step` (the first update is step 0).

        Linear warm-up over `warmup_steps` updates, so that update `warmup_steps - 1` already has the peak; the decay
        would reach `min_lr_ratio` at update `max_steps`, one after the last.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_scheduler_type == "warmup_stable_decay":
            length, decay = self.decay_steps or 0, DECAYS[self.decay_type or "1-sqrt"]
        else:
            length, decay = self.max_steps - self.warmup_steps, DECAYS[self.lr_scheduler_type]
        progress = (step - (self.max_steps - length)) / max(1, length)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * decay(min(1.0, max(0.0, progress)))


def steps_from(name: str, steps: int | None, ratio: float | None, max_steps: int) -> int | None:
    """Return steps given as a number or as a share of `max_steps`; None if neither is; ValueError if both are."""
    if steps is not None and ratio is not None:
        raise ValueError(f"--{name}_steps {steps} and --{name}_ratio {ratio} say the same thing twice; give one")
    return round(ratio * max_steps) if ratio is not None else steps
