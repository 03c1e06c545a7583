"""Stop a run in order: on a signal, or at the end of the allotted time, after the same step on all processes.

The first SIGTERM, SIGINT or SIGUSR1 lets the running step end and be saved; another one, at least `SAME_REQUEST_S`
later, ends the process at once: the newest valid checkpoint is then the one before. `--max_train_time` is a request
that comes by itself. A run that stopped so exits with `STOPPED_EXIT_CODE` (torchrun and accelerate launch answer with
their own code for a failed worker), and resumes when the same command is given again.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from gpt2modern.training.distributed import Processes

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
OUT_OF_TIME = 1 << 16  # a reason beside the numbers of signals
SAME_REQUEST_S = 2.0  # a scheduler signals launcher and processes, and the launcher passes its own on: one request


class StopRequest:
    """Listens for what asks this process to stop, from its creation to the end of a `with` block.

    deadline: time.monotonic() at which the allotted time is over. Signals are received in the main thread only: a run
    in another thread is stopped by its deadline.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.agreed = 0  # why all processes stop after this step: a signal's number, OUT_OF_TIME, or 0 for nothing
        self._received = 0
        self._received_at = 0.0
        self._replaced: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            self._listen()

    def _listen(self) -> None:
        self._replaced = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # A process that waits for another one runs no handlers: a signal that comes then is seen by a thread.
        self._seen, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        self._replaced_wakeup = signal.set_wakeup_fd(self._sent)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *exception) -> None:
        if self._replaced:
            signal.set_wakeup_fd(self._replaced_wakeup)
            for number, handler in self._replaced.items():
                signal.signal(number, handler)
            os.close(self._sent)  # which ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

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

    def agree(self, processes: Processes) -> bool:
        """Decide with all processes whether to stop after this step; every process has to call it."""
        reason = self._received
        if not reason and time.monotonic() >= self.deadline:
            reason = OUT_OF_TIME
        self.agreed = processes.largest(reason)
        return self.agreed != 0

    def message(self, step: int, checkpoints_dir: Path, *, saved: bool) -> str:
        """Say why the run has stopped after `step` and where it is saved."""
        where = f"saved in {checkpoints_dir}"
        if not saved:
            where = f"NOT saved; {checkpoints_dir} has what was saved before"
        return f"stopped after step {step} as {describe(self.agreed)}; {where}; the same command resumes it"


def describe(reason: int) -> str:
    """Name the reason of a stop: `StopRequest.agreed` in words."""
    return "--max_train_time is over" if reason == OUT_OF_TIME else f"{signal.Signals(reason).name} was received"


def exit_code_of_stop() -> int:
    """Return the exit code of a run that was asked to stop: 0 where torchrun would restart it for any other."""
    restarts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    )
    return 0 if restarts_left > 0 else STOPPED_EXIT_CODE


def ignore_signals(worker_id: int) -> None:
    """Make a process that reads data ignore signals: they go to the whole process group, and the training process needs
    it to finish its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
