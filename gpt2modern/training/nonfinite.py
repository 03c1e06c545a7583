"""Record the NaN and infinite losses and gradients for which an update is skipped; warn of loss spikes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.state import TrainState

NONFINITE_LOG = "nonfinite_steps.jsonl"
SPIKE_WINDOW = 20  # logged losses that a new one is compared with
SPIKE_DEVIATIONS, SPIKE_NATS = 6.0, 0.2  # above their median, in robust standard deviations and at least


def handle_nonfinite(
    config: TrainConfig,
    accelerator: Accelerator,
    plan: BatchPlan,
    state: TrainState,
    samples: np.ndarray,
    loss: torch.Tensor,
    grad_norm: torch.Tensor,
) -> None:
    """Record an update that was skipped for its NaN or infinite loss or gradient. Called on all processes.

    samples: (samples_of_step,) block indices, over all processes. Raises GPT2ModernError where --on_nonfinite or
    --max_nonfinite_steps says that the run ends here.
    """
    log = Path(config.output_dir) / NONFINITE_LOG
    worst = _record(log, accelerator, plan, state.step + 1, samples, float(loss), float(grad_norm))
    what = (
        f"the loss is {worst['loss']} and the gradient norm is {worst['grad_norm']} at step {state.step + 1} on "
        f"process {worst['process']} (its blocks: {log})"
    )
    if config.on_nonfinite == "stop":
        raise GPT2ModernError(
            f"{what}: resume from the newest checkpoint with a lower learning rate or --max_grad_norm, or skip such "
            "updates with --on_nonfinite skip"
        )
    if state.nonfinite_steps + 1 > config.max_nonfinite_steps:
        raise GPT2ModernError(
            f"{what}; steps in a row: {state.nonfinite_steps + 1}, --max_nonfinite_steps {config.max_nonfinite_steps}: "
            "the weights themselves may be broken; resume from an earlier checkpoint with a lower learning rate"
        )
    accelerator.print(f"warning: {what}: update skipped")


def _record(
    log: Path,
    accelerator: Accelerator,
    plan: BatchPlan,
    step: int,
    samples: np.ndarray,
    loss: float,
    grad_norm: float,
) -> dict[str, Any]:
    """Append to nonfinite_steps.jsonl what each process saw and which blocks it had; return what the first process saw
    whose loss, or else whose gradient, is not finite."""
    # A step's blocks are divided into passes, a pass into the processes' micro-batches.
    mine = samples.reshape(-1, plan.num_processes, plan.micro_batch_size)[:, accelerator.process_index]
    seen = {
        "process": accelerator.process_index,
        "loss": json_number(loss),
        "grad_norm": json_number(grad_norm),
        "blocks": mine.ravel().tolist(),
    }
    everybody = gather_object([seen])
    if accelerator.is_main_process:
        row = json.dumps({"step": step, "processes": everybody})
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except OSError as error:
            warn(f"{log} cannot be written ({error.strerror}): {row}")
    # NaN and infinity are strings here. A sum over processes is broken on all of them, the loss of one only there.
    return max(everybody, key=lambda seen: (isinstance(seen["loss"], str), isinstance(seen["grad_norm"], str)))


def json_number(value: float) -> float | str:
    """Return a finite number as it is, and NaN or infinity, which JSON does not have, as a string."""
    return value if math.isfinite(value) else str(value)


def spike_warning(rows: list[dict[str, Any]], loss: float) -> str | None:
    """Describe a loss far above those of the last rows of metrics.jsonl; None for any other.

    Robust, since one spike must not hide the next: 1.4826 x median absolute deviation is a standard deviation.
    """
    recent = [row["loss"] for row in rows if row.get("loss") is not None][-SPIKE_WINDOW:]
    if len(recent) < SPIKE_WINDOW or not math.isfinite(loss):
        return None
    median = float(np.median(recent))
    deviation = 1.4826 * float(np.median(np.abs(np.array(recent) - median)))
    if loss <= median + max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS):
        return None
    return f"warning: the loss jumped to {loss:.3f}; the median of the {SPIKE_WINDOW} logged before is {median:.3f}"
