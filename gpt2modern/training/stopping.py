"""Stops that were asked for: a signal, or the end of the allotted time. All processes stop after the same step.

The first SIGTERM, SIGINT or SIGUSR1 lets the step that runs end and be saved; another one, at least `SAME_REQUEST_S`
later, ends the process at once: the newest whole checkpoint is then the one before. `--max_train_time` is a signal that
comes by itself. A run that stopped so exits with `STOPPED_EXIT_CODE` (torchrun and accelerate launch answer with their
own code for a failed worker), and goes on when the same command is given again.
"""

import os
import re
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator

if TYPE_CHECKING:
    from gpt2modern.training.run import Run

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
OUT_OF_TIME = 1 << 16  # a reason beside the numbers of signals
SAME_REQUEST_S = 2.0  # a scheduler signals launcher and processes, and the launcher hands its own on: one request


class StopRequest:
    """What has asked this process to stop: a signal's number, OUT_OF_TIME, or 0 for nothing.

    It listens from its creation on until it is closed, at the end of a `with` block.
    max_train_time: as `parse_duration` takes it, from `started` (a time.monotonic()) on; None: no limit.
    """

    def __init__(self, max_train_time: str | None, started: float):
        self.deadline = None if max_train_time is None else started + parse_duration(max_train_time)
        self.received = 0
        self._received_at = 0.0
        self._replaced = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # A process that waits for another one runs no handlers: what it is sent then is seen by a thread.
        self._seen, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        self._replaced_wakeup = signal.set_wakeup_fd(self._sent)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._replaced_wakeup)
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        os.close(self._sent)  # which ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _watch(self) -> None:
        while numbers := os.read(self._seen, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                if not self._received_at:
                    self._received_at = now
                elif now - self._received_at > SAME_REQUEST_S:
                    os._exit(128 + number)  # as a shell reports a process that the signal has ended
        os.close(self._seen)

    @property
    def reason(self) -> int:
        if not self.received and self.deadline is not None and time.monotonic() >= self.deadline:
            return OUT_OF_TIME
        return self.received


def describe(reason: int) -> str:
    """`reason` of a StopRequest in words."""
    return "--max_train_time is over" if reason == OUT_OF_TIME else f"{signal.Signals(reason).name} was received"


def ignore_signals(worker_id: int) -> None:
    """For processes that read data: the signal goes to the whole group, and the training process needs them to finish
    its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def parse_duration(text: str) -> float:
    """Seconds of '5400', '90:00' or '1:30:00'; ValueError for anything else, and for nothing at all."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise ValueError(f"--max_train_time {text}: expected seconds, or hours:minutes:seconds such as 11:50:00")
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    if not seconds:
        raise ValueError(f"--max_train_time {text}: must be more than nothing")
    return seconds


def leave(run: "Run") -> NoReturn:
    """End a run that was asked to stop and has saved its step: say so, and exit.

    The exit code is 0 where torchrun would answer any other by starting the run again.
    """
    print = run.accelerator.print
    saved = (run.checkpoints_dir / f"step_{run.step:07d}").is_dir()
    where = (
        f"saved in {run.checkpoints_dir}" if saved else f"NOT saved; {run.checkpoints_dir} has what was saved before"
    )
    print(f"stopped after step {run.step} as {describe(run.stopping)}; {where}; the same command goes on")
    run.accelerator.wait_for_everyone()
    run.model = None  # DistributedDataParallel must be gone before the process group it reduces over
    run.accelerator.free_memory()
    run.accelerator.end_training()
    restarts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    )
    raise SystemExit(0 if restarts_left > 0 else STOPPED_EXIT_CODE)


def agree_to_stop(run: "Run") -> int:
    """Set `run.stopping`, on all processes alike; called by all of them."""
    (run.stopping,) = run.agreement.largest(run.stop_request.reason)
    return run.stopping


class Agreement:
    """What all processes have to decide alike, in one small message per step.

    It goes over a group of its own between the CPUs, so that asking does not make one wait for its GPU.
    ddp_timeout: seconds.
    """

    def __init__(self, accelerator: Accelerator, ddp_timeout: int):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=ddp_timeout))

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.group is None:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(message, torch.distributed.ReduceOp.MAX, group=self.group)
        return message.tolist()
