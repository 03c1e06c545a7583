"""What a run holds while it trains: the parts that train_accelerate.py builds, and the position that is saved."""

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.hub import HubUploader
from gpt2modern.training.launch import RollCall
from gpt2modern.training.metrics import MetricsLog, Stopwatch
from gpt2modern.training.schedules import Schedule
from gpt2modern.training.stopping import Agreement, StopRequest
from gpt2modern.training.trackers import Trackers
from modeling_gpt2modern import GPT2ModernForCausalLM


@dataclass
class Run:
    """Everything the loop holds. `step`, `wall_time_s`, `run_id` and the last evaluation are saved; what else a run's
    position needs follows from the step: data order, learning rate and dropout are functions of (seed, step)."""

    config: Any  # TrainConfig of train_accelerate.py
    accelerator: Accelerator
    model: torch.nn.Module  # wrapped and maybe compiled: what is trained
    unwrapped_model: GPT2ModernForCausalLM  # the same weights: what is evaluated, sampled from and saved
    optimizers: list[torch.optim.Optimizer]
    optimizer: torch.optim.Optimizer  # all of them as one, under Accelerate: what steps
    train_blocks: PackedBlocks
    eval_blocks: PackedBlocks
    plan: BatchPlan
    schedule: Schedule
    device_flops: float | None  # peak FLOP/s of one device, where it is known
    step: int = 0
    wall_time_s: float = 0.0  # of earlier processes of this run
    evaluated_step: int | None = None  # the last one that was evaluated, with its validation loss
    eval_loss: float | None = None
    batches: Iterator[torch.Tensor] = None
    stopwatch: Stopwatch = None
    roll_call: RollCall = None
    agreement: Agreement = None
    stop_request: StopRequest = None
    stopping: int = 0  # why all processes stop after this step, as `StopRequest.reason`
    nonfinite_steps: int = 0  # in a row, up to this step
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # by which trackers know the run again
    # On the main process:
    log: MetricsLog = None
    sample_log: MetricsLog = None
    samples: list[dict[str, Any]] = field(default_factory=list)  # of the last evaluation: step, prompt, text
    trackers: Trackers = None
    uploader: HubUploader = None

    @property
    def tokens_seen(self) -> int:
        return self.tokens_before(self.step)

    def tokens_before(self, step: int) -> int:
        """Positions of all updates before `step`, over all processes. Padding counts in what is reported per token
        (tokens_seen, speed), but has no loss."""
        return self.plan.consumed_samples(step) * self.train_blocks.block_size

    @property
    def num_eval_blocks(self) -> int:
        return min(self.config.eval_blocks or len(self.eval_blocks), len(self.eval_blocks))

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def checkpoints_dir(self) -> Path:
        return self.output_dir / "checkpoints"


NOT_A_RUNS = ("config", "dry_run")  # arguments of the command, not of the run that a recipe describes


def chosen_settings(config: Any) -> dict[str, Any]:
    """The settings of a TrainConfig that have a value, as a recipe would give them."""
    return {name: value for name, value in asdict(config).items() if value is not None and name not in NOT_A_RUNS}


def stop_if_not_finite(run: Run, name: str, value: float) -> None:
    """Raise GPT2ModernError, on every process alike, before a broken model is saved or exported."""
    if not math.isfinite(value):
        raise GPT2ModernError(
            f"the {name} is {value} at step {run.step}: lower the learning rate or --max_grad_norm, and go on from an "
            f"earlier checkpoint of {run.checkpoints_dir}"
        )


def on_main_process(run: Run, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main process, on every process; a GPT2ModernError that it raises is raised on all."""
    answer, problem = None, None
    if run.accelerator.is_main_process:
        try:
            answer = action()
        except GPT2ModernError as error:
            problem = str(error)
    answer, problem = broadcast_object_list([answer, problem])
    if problem is not None:
        raise GPT2ModernError(problem)
    return answer


@contextlib.contextmanager
def closed_batches(run: Run) -> Iterator[None]:
    """End the processes that read data at the end of the block, for whatever reason.

    They ignore signals, also the one that Python ends child processes with: were the run still held by a traceback when
    the process exits, it would wait for them for ever.
    """
    try:
        yield
    finally:
        run.batches = None


def hash_seed(*numbers: int) -> int:
    """A 64-bit seed in which neighbouring numbers give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
