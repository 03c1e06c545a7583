"""What a step does with a loss or a gradient that is no number, and how a spike of the loss is told."""

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt2modern.errors import GPT2ModernError, warn

if TYPE_CHECKING:
    from gpt2modern.training.run import Run

NONFINITE_LOG = "nonfinite_steps.jsonl"
SPIKE_WINDOW = 20  # logged losses that a new one is compared with
SPIKE_DEVIATIONS, SPIKE_NATS = 6.0, 0.2  # above their median, in robust standard deviations and at least


def may_update(run: "Run", loss: torch.Tensor, grad_norm: torch.Tensor, samples: np.ndarray) -> bool:
    """Whether this step's gradients may be applied; all processes answer alike, before any of them does.

    loss: this process's part of the step's loss; grad_norm: of the whole gradient; samples: global indices of the
    step's blocks, for the record. In the same message the processes agree on `run.stopping`.
    With a loss scale (fp16) an infinite gradient is left to it: it skips the step and lowers itself.
    Raises GPT2ModernError, on every process, where --on_nonfinite or --max_nonfinite_steps says that the run ends here.
    """
    # The step's one wait for the device.
    loss_value, norm_value = torch.stack((loss.float(), grad_norm.float())).tolist()
    scaled = run.accelerator.scaler is not None
    finite = math.isfinite(loss_value) and (scaled or math.isfinite(norm_value))
    nonfinite, run.stopping = run.agreement.largest(int(not finite), run.stop_request.reason)
    if not nonfinite:
        run.nonfinite_steps = 0
        return True
    run.nonfinite_steps += 1
    config = run.config
    broken = record_nonfinite(run, loss_value, norm_value, samples)
    what = f"the loss is {broken['loss']} and the gradient norm is {broken['grad_norm']} at step {run.step + 1}"
    what += f" on process {broken['process']} (its blocks: {run.output_dir / NONFINITE_LOG})"
    if config.on_nonfinite == "stop":
        raise GPT2ModernError(
            f"{what}: go on from the newest checkpoint with a lower learning rate or --max_grad_norm, or leave such "
            "steps out with --on_nonfinite skip"
        )
    if run.nonfinite_steps > config.max_nonfinite_steps:
        raise GPT2ModernError(
            f"{what}; steps in a row: {run.nonfinite_steps}, --max_nonfinite_steps {config.max_nonfinite_steps}: "
            "the weights themselves may be broken; go on from an earlier checkpoint with a lower learning rate"
        )
    run.accelerator.print(f"warning: {what}: left out")
    return scaled


def record_nonfinite(run: "Run", loss: float, grad_norm: float, samples: np.ndarray) -> dict[str, Any]:
    """Append to nonfinite_steps.jsonl what each process saw and which blocks it had. Called on all processes; returns
    what the first one saw whose loss, or else whose gradient, is not finite."""
    from accelerate.utils import gather_object

    plan = run.plan
    # A step's blocks are divided into passes, a pass into the processes' micro-batches.
    mine = samples.reshape(-1, plan.num_processes, plan.micro_batch_size)[:, run.accelerator.process_index]
    seen = {
        "process": run.accelerator.process_index,
        "loss": json_number(loss),
        "grad_norm": json_number(grad_norm),
        "blocks": mine.ravel().tolist(),
    }
    everybody = gather_object([seen])
    if run.accelerator.is_main_process:
        row = json.dumps({"step": run.step + 1, "processes": everybody})
        try:
            with (run.output_dir / NONFINITE_LOG).open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except OSError as error:
            warn(f"{run.output_dir / NONFINITE_LOG} cannot be written ({error.strerror}): {row}")
    # What is not finite is a word here; a sum over processes is broken on all of them, the loss of one only there.
    return max(everybody, key=lambda seen: (isinstance(seen["loss"], str), isinstance(seen["grad_norm"], str)))


def json_number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


def spike_warning(rows: list[dict[str, Any]], loss: float) -> str | None:
    """A line about a loss far above those of the last rows of metrics.jsonl; None if it is not.

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
