"""Compute what changes during a run from the step alone, so that a checkpoint need not save any schedule state."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

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
    """Represent what changes during a run: the fraction of the peak learning rate, weights of losses, averaging.

    cosine and linear decay over all updates after the warm-up; constant does not decay. warmup_stable_decay (WSD,
    arXiv:2404.06395) keeps the peak until the last `decay_steps` updates, then decays by `decay_type`: "1-sqrt" was
    best in arXiv:2405.18392, the GPT-2 speedrun uses "linear". Its stable part does not depend on `max_steps`, so a run
    can be extended from there to any length. Raises ValueError if settings contradict each other.
    """

    lr_scheduler_type: str
    max_steps: int
    warmup_steps: int = 0
    decay_steps: int | None = None  # only for warmup_stable_decay
    decay_type: str | None = None  # only for warmup_stable_decay; None: "1-sqrt"
    min_lr_ratio: float = 0.0
    multi_token_prediction: list[float] | None = None  # first weights of the losses of later tokens
    average_last: float | None = None  # last fraction of the updates whose weights are averaged
    batch_size_ramp: list[float] | None = None  # tokens per step in equal parts of the run, relative to each other
    sliding_window_ramp: list[float] | None = None  # sliding windows, likewise

    def __post_init__(self):
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}; lower it")
        if self.decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(
                f"--decay_steps and --decay_ratio are only for --lr_scheduler_type warmup_stable_decay, not for "
                f"{self.lr_scheduler_type}; remove them"
            )
        if self.decay_type is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(
                f"--decay_type {self.decay_type} is only for --lr_scheduler_type warmup_stable_decay, not for "
                f"{self.lr_scheduler_type}; remove it"
            )
        if self.warmup_steps + (self.decay_steps or 0) > self.max_steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up steps and {self.decay_steps} decay steps are in total more than "
                f"--max_steps {self.max_steps}; lower one of them"
            )

    def gave_the_same(self, other: "Schedule", steps: int) -> bool:
        """Return whether the first `steps` updates are the same under this schedule and `other`.

        Compares only the first and the last of them. This is enough if the two differ only in `max_steps` and in the
        warm-up and decay lengths computed from it; weights of losses and ramps depend on `max_steps` itself.
        """
        in_parts = self.multi_token_prediction or self.batch_size_ramp or self.sliding_window_ramp
        values = [[(s.factor(step), s.average_weight(step)) for step in (0, steps - 1)] for s in (self, other)]
        return values[0] == values[1] and (not in_parts or self.max_steps == other.max_steps)

    def factor(self, step: int) -> float:
        """Return the fraction of the peak learning rate that update `step` uses (the first update is step 0).

        It grows linearly during the warm-up and reaches 1 at update `warmup_steps - 1`. The decay would reach
        `min_lr_ratio` at update `max_steps`, one after the last. A smaller batch lowers all by the root of its share.
        """
        root = math.sqrt(self.batch_share(step))
        if step < self.warmup_steps:
            return root * (step + 1) / self.warmup_steps
        if self.lr_scheduler_type == "warmup_stable_decay":
            length, decay = self.decay_steps or 0, DECAYS[self.decay_type or "1-sqrt"]
        else:
            length, decay = self.max_steps - self.warmup_steps, DECAYS[self.lr_scheduler_type]
        progress = (step - (self.max_steps - length)) / max(1, length)
        return root * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * decay(min(1.0, max(0.0, progress))))

    def batch_share(self, step: int) -> float:
        """Return the tokens of update `step` as a fraction of those of the last update: 1 without a ramp."""
        return self.share(self.batch_size_ramp, step)

    def share(self, ramp: list[float] | None, step: int) -> float:
        """Return the value of `ramp` for update `step` as a fraction of its last value: 1 without a ramp."""
        return (ramp := ramp or [1.0])[min(len(ramp) - 1, step * len(ramp) // self.max_steps)] / ramp[-1]

    def average_weight(self, step: int) -> float:
        """Return by which fraction update `step` moves the mean of the weights towards its own: 1/n in the n-th of the
        last updates that are averaged, and 0 before."""
        averaged = max(1, round(self.average_last * self.max_steps)) if self.average_last else 0
        number = step - (self.max_steps - averaged) + 1
        return 1 / number if averaged and number > 0 else 0.0

    def later_weights(self, step: int) -> list[float]:
        """Return the weights that the losses of the tokens after the next one have in update `step`.

        n of them divide the run into n + 1 equal parts. In each part but the last one of them falls linearly to 0, the
        one furthest ahead first (modded-nanogpt, record 53).
        """
        weights = self.multi_token_prediction or []
        passed = (len(weights) + 1) * step / self.max_steps
        return [w * min(1.0, max(0.0, len(weights) - i - passed)) for i, w in enumerate(weights)]


@contextlib.contextmanager
def scaled_windows(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the windows of the sliding layers of `model` by `factor` in this block; RoPE does not change with it."""
    modules = model.modules() if factor != 1 else ()
    windows = {layer: layer.sliding_window for layer in modules if getattr(layer, "sliding_window", None)}
    try:
        for layer, window in windows.items():
            layer.sliding_window = layer.config.sliding_window = max(1, round(factor * window))
        yield
    finally:
        for layer, window in windows.items():
            layer.sliding_window = layer.config.sliding_window = window


def steps_from(name: str, steps: int | None, ratio: float | None, max_steps: int) -> int | None:
    """Return `steps`, or `ratio` times `max_steps` rounded, or None if both are None. Raises ValueError, which names
    the flags --{name}_steps and --{name}_ratio, if both are given."""
    if steps is not None and ratio is not None:
        raise ValueError(f"--{name}_steps {steps} and --{name}_ratio {ratio} set the same value; give only one of them")
    return round(ratio * max_steps) if ratio is not None else steps
