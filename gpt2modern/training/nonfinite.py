"""Handle losses that look wrong: record NaN or infinite ones, then skip the update or end the run; warn of others."""

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
from modeling_gpt2modern import GPT2ModernConfig

NONFINITE_LOG = "nonfinite_steps.jsonl"
SPIKE_WINDOW = 20  # logged losses that a new one is compared with
SPIKE_DEVIATIONS, SPIKE_NATS = 6.0, 0.2  # a spike is above their median by more than either of these
FIRST_LOSS_NATS = 0.5  # the presets start at most 0.2 above ln(V)


def handle_nonfinite(
    config: TrainConfig,
    accelerator: Accelerator,
    plan: BatchPlan,
    state: TrainState,
    samples: np.ndarray,
    loss: torch.Tensor,
    grad_norm: torch.Tensor,
) -> None:
    """Record an update whose loss or gradient norm is NaN or infinite, and print a warning that it is skipped.

    Every process must call this. samples: (samples_of_step,), the block indices of the update over all processes.
    Raises GPT2ModernError under --on_nonfinite stop, and after more than --max_nonfinite_steps such updates in a row.
    """
    log = Path(config.output_dir) / NONFINITE_LOG
    worst = _record(log, accelerator, plan, state.step + 1, samples, float(loss), float(grad_norm))
    what = (
        f"the loss is {worst['loss']} and the gradient norm is {worst['grad_norm']} at step {state.step + 1} on "
        f"process {worst['process']} (the blocks of the step are listed in {log})"
    )
    if config.on_nonfinite == "stop":
        raise GPT2ModernError(
            f"{what}; resume from the newest checkpoint with a lower --learning_rate or --max_grad_norm, or skip such "
            "updates with --on_nonfinite skip"
        )
    if state.nonfinite_steps + 1 > config.max_nonfinite_steps:
        raise GPT2ModernError(
            f"{what}; {state.nonfinite_steps + 1} such steps in a row are more than --max_nonfinite_steps "
            f"{config.max_nonfinite_steps}; resume from an earlier checkpoint with a lower --learning_rate"
        )
    accelerator.print(f"warning: {what}; this update is skipped")


def _record(
    log: Path,
    accelerator: Accelerator,
    plan: BatchPlan,
    step: int,
    samples: np.ndarray,
    loss: float,
    grad_norm: float,
) -> dict[str, Any]:
    """Append loss, gradient norm and block indices of each process to nonfinite_steps.jsonl, and return those of the
    first process whose loss, or otherwise gradient norm, is NaN or infinite. Warns if the file cannot be written."""
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
            warn(f"{log} cannot be written ({error.strerror}); this row is missing there: {row}")
    # NaN and infinity are strings here. The gradient norm is NaN on all processes, the loss only where it occurred.
    return max(everybody, key=lambda seen: (isinstance(seen["loss"], str), isinstance(seen["grad_norm"], str)))


def json_number(value: float) -> float | str:
    """Return a finite number unchanged, and NaN or infinity, which JSON cannot represent, as a string."""
    return value if math.isfinite(value) else str(value)


def spike_warning(rows: list[dict[str, Any]], loss: float) -> str | None:
    """Return a warning if `loss` is far above the last `SPIKE_WINDOW` losses of `rows`; otherwise return None.

    rows: those of metrics.jsonl. The spread is 1.4826 times the median absolute deviation, a robust estimate of the
    standard deviation, so that one spike does not hide the next.
    """
    recent = [row["loss"] for row in rows if row.get("loss") is not None][-SPIKE_WINDOW:]
    if len(recent) < SPIKE_WINDOW or not math.isfinite(loss):
        return None
    median = float(np.median(recent))
    deviation = 1.4826 * float(np.median(np.abs(np.array(recent) - median)))
    if loss <= median + max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS):
        return None
    return (
        f"warning: the loss jumped to {loss:.3f}; the median of the last {SPIKE_WINDOW} logged losses is {median:.3f}"
    )


def first_loss_message(loss: float, config: GPT2ModernConfig) -> str:
    """Return a line that compares the first loss of a new model with ln(V), that of V equally likely tokens: a warning
    if they differ and the initialisation that `config` describes does not explain it."""
    vocab_size = config.unpadded_vocab_size or config.vocab_size
    expected = math.log(vocab_size)
    line = f"the first loss is {loss:.3f}; that of {vocab_size:,} equally likely tokens is ln(V) = {expected:.3f}"
    if abs(loss - expected) <= FIRST_LOSS_NATS:
        return line
    if loss < expected:
        return f"warning: {line}. A new model cannot know so much: check that the labels are not in its inputs"
    embedding_std = config.embedding_initializer_range or config.initializer_range
    if config.tie_word_embeddings and (config.zero_init_projections or embedding_std > 0.05):
        return f"{line}. It is higher because the head is the embedding, so that each token first predicts itself"
    if config.initializer_range > 0.05:
        return f"{line}. It is higher because of initializer_range {config.initializer_range}"
    return f"warning: {line}. Nothing in the configuration explains the difference: check the data and its tokenizer"
