"""Stop a run on a signal or at the end of `--max_train_time`, after the same step on all processes.

After the first SIGTERM, SIGINT, SIGHUP or SIGUSR1 the running step is completed and saved. Another signal, more than
`SAME_REQUEST_S` seconds later, ends the process at once, without saving. A stopped run exits with `STOPPED_EXIT_CODE`
(torchrun and accelerate launch then exit with their own code for a failed worker), and the same command resumes it.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from gpt2modern.training.distributed import Processes

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
OUT_OF_TIME = 1 << 16  # a reason that is no signal's number
SAME_REQUEST_S = 2.0  # one request can come twice: from the scheduler, and from the launcher, which forwards its own


class StopRequest:
    """Receive requests to stop this process, from its creation to the end of a `with` block.

    deadline: the time.monotonic() value at which `--max_train_time` is over. Signals are received only if this object
    is created in the main thread; a run in another thread is stopped by its deadline only.
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
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
        self._replaced = {number: signal.signal(number, self._receive) for number in SIGNALS if number not in ignored}
        # A process that waits for another one runs no handlers: a thread sees a signal that comes during the wait.
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
            os.close(self._sent)  # this ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def _watch(self) -> None:
        while numbers := os.read(self._seen, 64):
            for number in numbers:
                if number not in self._replaced:
                    continue
                now = time.monotonic()
                if not self._received_at:
                    self._received_at = now
                elif now - self._received_at > SAME_REQUEST_S:
                    os._exit(128 + number)  # as a shell reports a process that the signal has ended
        os.close(self._seen)

    def agree(self, processes: Processes) -> bool:
        """Return whether the run stops after this step, the same on all processes. Every process must call this."""
        reason = self._received
        if not reason and time.monotonic() >= self.deadline:
            reason = OUT_OF_TIME
        self.agreed = processes.largest(reason)
        return self.agreed != 0

    def message(self, step: int, checkpoints_dir: Path, *, saved: bool) -> str:
        """Return a message that says why the run has stopped after `step`, whether that step was saved, and where."""
        where = f"saved in {checkpoints_dir}"
        if not saved:
            where = f"this step was NOT saved; earlier checkpoints are in {checkpoints_dir}"
        return f"stopped after step {step} because {describe(self.agreed)}; {where}; the same command resumes the run"


def describe(reason: int) -> str:
    """Return `reason`, a signal's number or OUT_OF_TIME, in words that follow "because"."""
    return "--max_train_time is over" if reason == OUT_OF_TIME else f"{signal.Signals(reason).name} was received"


def exit_code_of_stop() -> int:
    """Return the exit code of a stopped run: `STOPPED_EXIT_CODE`, or 0 if torchrun would restart it after any other."""
    restarts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    )
    return 0 if restarts_left > 0 else STOPPED_EXIT_CODE
