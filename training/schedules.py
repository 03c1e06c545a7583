"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Callable


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def learning_rate_at(
    step: int,
    *,
    lr_scheduler_type: str,
    learning_rate: float,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
) -> float:
    """Learning rate of update number `step` (the first update is step 0).

    Linear warm-up over `warmup_steps` updates, so that update `warmup_steps - 1` already has the peak; then the
    schedule's fall from 1 at `warmup_steps` to 0 at `max_steps`, rescaled to end at `min_lr_ratio` times the peak.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    share = SCHEDULES[lr_scheduler_type](progress)
    return learning_rate * (min_lr_ratio + (1.0 - min_lr_ratio) * share)
