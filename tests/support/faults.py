"""Trainers to which something happens: forked from a process that has imported everything, so that one starts at once.

A fault acts from inside, at an event of the run (see `train_accelerate.train`), where nothing from outside could be
aimed. `FAULTS` lists them; a text such as `kill@7` names one and its argument. As a script, this is train_accelerate.py
with the fault of the environment variable FAULT in the process of rank FAULT_RANK; the file that FAULT_ONCE names is
made first, and where it exists already, in a process that was started again, there is no fault.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import train_accelerate
from eval import generate, perplexity  # noqa: F401  so that forked processes have them
from gpt2modern.cli import parse_arguments
from gpt2modern.training.stopping import SAME_REQUEST_S
from train_accelerate import TrainConfig

SIZE_LIMIT = 20_000  # bytes of a file: a checkpoint of the tiny model has larger ones, the logs are smaller


def before_update(number, action):
    """Make a callback that calls action(model=..., loss=..., grad_norm=...) before update `number`; the first is 1."""

    def callback(event, step, **details):
        if event == "before_update" and step == number:
            action(**details)

    return callback


def first_time(wanted, action):
    """Make a callback that calls `action()` at the first event `wanted`."""
    left = [action]

    def callback(event, **details):
        if event == wanted and left:
            left.pop()()

    return callback


def send(*numbers, pause_s=0.0):
    """Signal this process, with each of `numbers`, `pause_s` after the one before."""

    def fault(step, output_dir):
        def action(**details):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause_s)

        return before_update(int(step), action)

    return fault


def raise_error(step, output_dir):
    def action(**details):
        raise ValueError("this process is broken")

    return before_update(int(step), action)


def broken_forward(step, output_dir):
    """Raise in the first forward pass after update `step`, in the middle of a batch: as when memory runs out."""

    def hook(*arguments):
        raise ValueError("this process is broken")

    return before_update(int(step), lambda model, **details: model.register_forward_pre_hook(hook))


def cut_data(step, output_dir):
    """Cut the prepared data next to the run's folder, as a copy that is started again does."""

    def action(**details):
        for path in output_dir.with_name("data").rglob("*.arrow"):
            os.truncate(path, 0)

    return before_update(int(step), action)


def ignored_hangup(step, output_dir):
    """Send SIGHUP to a process that nohup has started."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return send(signal.SIGHUP)(step, output_dir)


def nonfinite(step, output_dir, loss_factor=float("nan"), norm_factor=float("nan")):
    """Break the loss of this process and the gradient, as after an overflow."""

    def action(model, loss, grad_norm):
        for parameter in model.parameters():
            parameter.grad.fill_(float("nan"))
        loss.mul_(loss_factor)
        grad_norm.mul_(norm_factor)

    return before_update(int(step), action)


def infinite_norm(step, output_dir):
    return nonfinite(step, output_dir, loss_factor=1.0, norm_factor=float("inf"))


def left_out(step, output_dir):
    """Leave an update out, as if its gradient had been refused."""

    def action(model, **details):
        for parameter in model.parameters():
            parameter.grad = None

    return before_update(int(step), action)


def kill_at_operation(number, output_dir):
    """SIGKILL at file operation `number` on checkpoints: of a resume, of saves, of rotation."""
    left = iter(range(int(number)))

    def hook(event, arguments):
        counts = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir")
        if counts and "/checkpoints/" in str(arguments[0]) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return train_accelerate.no_callback


def signal_in_save(name, output_dir):
    """Signal this process in the middle of the first save."""
    return first_time("saving", lambda: os.kill(os.getpid(), getattr(signal, name)))


def signal_in_evaluation(name, output_dir):
    """Signal this process as the first evaluation begins."""
    return first_time("evaluating", lambda: os.kill(os.getpid(), getattr(signal, name)))


def between(steps, begin, end):
    """Call `begin()` before the first update and `end()` before the last of `steps`: first-last, or first alone."""
    first, _, last = steps.partition("-")
    callbacks = [before_update(int(first), lambda **details: begin())]
    if last:
        callbacks.append(before_update(int(last), lambda **details: end()))
    return together(callbacks)


def file_size_limit(steps, output_dir):
    """No file can grow beyond SIZE_LIMIT: writing it breaks off in its middle, as on a disk that fills up."""

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return between(steps, lambda: limit(SIZE_LIMIT), lambda: limit(resource.RLIM_INFINITY))


def few_bytes_free(steps, output_dir):
    """The file system says that it has 1000 bytes left."""
    disk_usage = shutil.disk_usage

    def begin():
        shutil.disk_usage = lambda path: disk_usage(path)._replace(free=1000)

    def end():
        shutil.disk_usage = disk_usage

    return between(steps, begin, end)


def unwritable_folder(steps, output_dir):
    """The run's folders take no new file. Root gives up its powers first: modes would not bind it."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))

    def set_mode(mode):
        for folder in (output_dir, output_dir / "checkpoints"):
            folder.chmod(mode)

    return between(steps, lambda: set_mode(0o555), lambda: set_mode(0o755))


def records_refused(steps, output_dir):
    """Every record of the run is a folder of that name, which cannot be opened as a file."""

    def begin():
        for name in ("metrics.jsonl", "training_curves.png", "samples.jsonl", "nonfinite_steps.jsonl"):
            (output_dir / name).unlink(missing_ok=True)
            (output_dir / name).mkdir()

    def end():
        for path in output_dir.iterdir():
            if path.is_dir() and path.suffix:
                path.rmdir()

    return between(steps, begin, end)


def vanished_folder(step, output_dir):
    return before_update(int(step), lambda **details: shutil.rmtree(output_dir))


# Each takes the text after @ and the run's folder, and returns a callback for `train`.
FAULTS = {
    "kill": send(signal.SIGKILL),
    "freeze": send(signal.SIGSTOP),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "SIGUSR1": send(signal.SIGUSR1),
    "SIGHUP": send(signal.SIGHUP),
    "ignored_hangup": ignored_hangup,
    "two_signals": send(signal.SIGTERM, signal.SIGTERM, pause_s=SAME_REQUEST_S + 0.1),
    "handed_on": send(signal.SIGTERM, signal.SIGTERM),  # as by a scheduler that signals launcher and process
    "error": raise_error,
    "broken_forward": broken_forward,
    "cut_data": cut_data,
    "nonfinite": nonfinite,
    "infinite_norm": infinite_norm,
    "left_out": left_out,
    "kill_at_operation": kill_at_operation,
    "signal_in_save": signal_in_save,
    "signal_in_evaluation": signal_in_evaluation,
    "file_size_limit": file_size_limit,
    "few_bytes_free": few_bytes_free,
    "unwritable_folder": unwritable_folder,
    "records_refused": records_refused,
    "vanished_folder": vanished_folder,
}


def together(callbacks):
    """Make one callback of several."""

    def callback(event, **details):
        for each in callbacks:
            each(event, **details)

    return callback


def train_with(faults, argv):
    """Run train_accelerate.py with `argv` and the faults that a text such as `kill@7 nonfinite@3` names."""
    output_dir = Path(parse_arguments(TrainConfig, argv).output_dir)
    named = [fault.partition("@") for fault in faults.split()]
    train_accelerate.main(argv, together([FAULTS[name](argument, output_dir) for name, _, argument in named]))


def train_in_child(argv, environment, faults, log):
    """The target of a forked process."""
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a trainer that a shell starts
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what was said before a kill is to be read
    train_with(faults, argv)


def main():
    faults = ""
    if os.environ["FAULT_RANK"] == os.environ["RANK"]:
        with contextlib.suppress(FileExistsError):
            Path(os.environ["FAULT_ONCE"]).touch(exist_ok=False)
            faults = os.environ["FAULT"]
    train_with(faults, sys.argv[1:])


if __name__ == "__main__":
    main()
