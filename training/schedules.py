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


def learning_rate_factor(
    step: int, *, lr_scheduler_type: str, warmup_steps: int, max_steps: int, min_lr_ratio: float
) -> float:
    """Share of the peak learning rate at update number `step` (the first update is step 0).

    Linear warm-up over `warmup_steps` updates, so that update `warmup_steps - 1` already has the peak; then the
    schedule's fall from 1 at `warmup_steps` to `min_lr_ratio` at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * SCHEDULES[lr_scheduler_type](progress)
