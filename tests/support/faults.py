"""Trainers to which something happens: forked from a process that has imported everything, so that one starts at once.

A fault acts from inside, before a chosen update or at a chosen file operation, where nothing from outside could be
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

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401

import gpt2modern.training.dry_run  # noqa: F401
import modeling_gpt2modern  # noqa: F401
import train_accelerate
from eval import generate, perplexity  # noqa: F401
from gpt2modern.training import faults, progress, resume, stopping  # noqa: F401

SIZE_LIMIT = 20_000  # bytes of a file: a checkpoint of the tiny model has larger ones, the logs are smaller


def before_update(step, action):
    """`action(run, loss, grad_norm)` before update number `step`, the first is 1, is judged. What it returns replaces
    loss and norm; so it does not before any other update."""
    may_update = faults.may_update

    def wrapped(run, loss, grad_norm, samples):
        if run.step + 1 == step:
            loss, grad_norm = action(run, loss, grad_norm) or (loss, grad_norm)
        return may_update(run, loss, grad_norm, samples)

    faults.may_update = wrapped


def send(number):
    return lambda step: before_update(int(step), lambda *_: os.kill(os.getpid(), number))


def two_signals(step):
    """SIGTERM twice, the second not taken for the same request."""

    def action(*_):
        stopping.SAME_REQUEST_S = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before_update(int(step), action)


def handed_on(step):
    """SIGTERM twice, as if a scheduler had signalled launcher and process."""
    before_update(int(step), lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)] and None)


def raise_error(step):
    def action(*_):
        raise ValueError("this process is broken")

    before_update(int(step), action)


def nonfinite(step, loss=float("nan"), grad_norm=None):
    """The loss of this process and the gradient of all of them are no number, as after an overflow in one."""

    def action(run, its_loss, its_norm):
        for parameter in run.unwrapped_model.parameters():
            parameter.grad.fill_(float("nan"))
        its_loss.detach().mul_(loss)  # in place: it is also what is logged
        return its_loss, its_norm * (loss if grad_norm is None else grad_norm)

    before_update(int(step), action)


def infinite_norm(step):
    nonfinite(step, loss=1.0, grad_norm=float("inf"))


def left_out(step):
    """An update that is not made, as if its gradient had been refused."""
    may_update = faults.may_update
    faults.may_update = lambda run, *seen: may_update(run, *seen) and run.step + 1 != int(step)


def kill_at_operation(number):
    """SIGKILL at file operation `number` on checkpoints: of a resume, of saves, of rotation."""
    left = iter(range(int(number)))

    def hook(event, arguments):
        counts = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir")
        if counts and "/checkpoints/" in str(arguments[0]) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def signal_in_save(name):
    """The signal, in the middle of the first save."""
    save_model_folder = resume.save_model_folder

    def wrapped(*arguments, **keywords):
        os.kill(os.getpid(), getattr(signal, name))
        save_model_folder(*arguments, **keywords)
        resume.save_model_folder = save_model_folder

    resume.save_model_folder = wrapped


def signal_in_evaluation(name):
    """The signal, while the first evaluation runs; it would run for minutes."""
    evaluate_loss = perplexity.evaluate_loss

    def wrapped(*arguments, should_stop, **keywords):
        def slow_answer():
            os.kill(os.getpid(), getattr(signal, name))
            return should_stop()

        perplexity.evaluate_loss = evaluate_loss
        return evaluate_loss(*arguments, should_stop=slow_answer, **keywords)

    perplexity.evaluate_loss = wrapped


def between(steps, begin, end):
    """`begin(run)` before update `first`, `end(run)` before update `last`; steps: first-last, or first alone."""
    first, _, last = steps.partition("-")
    before_update(int(first), lambda run, *_: begin(run))
    if last:
        before_update(int(last), lambda run, *_: end(run))


def file_size_limit(steps):
    """No file can grow beyond SIZE_LIMIT: writing it breaks off in its middle, as on a disk that fills up."""
    unlimited = resource.RLIM_INFINITY
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))  # noqa: E731
    between(steps, lambda run: limit(SIZE_LIMIT), lambda run: limit(unlimited))


def few_bytes_free(steps):
    """The file system says that it has 1000 bytes left."""
    disk_usage = shutil.disk_usage

    def say(free):
        shutil.disk_usage = lambda path: disk_usage(path)._replace(free=free) if free else disk_usage(path)

    between(steps, lambda run: say(1000), lambda run: say(None))


def unwritable_folder(steps):
    """The run's folders take no new file. Root gives up its powers first: modes would not bind it."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))

    def set_mode(run, mode):
        for folder in (run.output_dir, run.checkpoints_dir):
            folder.chmod(mode)

    between(steps, lambda run: set_mode(run, 0o555), lambda run: set_mode(run, 0o755))


def records_refused(steps):
    """Every record of the run is a folder of that name, which cannot be opened as a file."""

    def begin(run):
        for name in ("metrics.jsonl", "training_curves.png", "samples.jsonl", "nonfinite_steps.jsonl"):
            (run.output_dir / name).unlink(missing_ok=True)
            (run.output_dir / name).mkdir()

    def end(run):
        for path in run.output_dir.iterdir():
            if path.is_dir() and path.suffix:
                path.rmdir()

    between(steps, begin, end)


def vanished_folder(step):
    before_update(int(step), lambda run, *_: shutil.rmtree(run.output_dir))


FAULTS = {
    "kill": send(signal.SIGKILL),
    "freeze": send(signal.SIGSTOP),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "SIGUSR1": send(signal.SIGUSR1),
    "two_signals": two_signals,
    "handed_on": handed_on,
    "error": raise_error,
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


def prepare(given):
    for fault in given.split():
        name, _, argument = fault.partition("@")
        FAULTS[name](argument)


def train_in_child(argv, environment, given, log):
    """The target of a forked process."""
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a trainer that a shell starts
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what was said before a kill is to be read
    prepare(given)
    train_accelerate.main(argv)


def main():
    if os.environ["FAULT_RANK"] == os.environ["RANK"]:
        with contextlib.suppress(FileExistsError):
            Path(os.environ["FAULT_ONCE"]).touch(exist_ok=False)
            prepare(os.environ["FAULT"])
    train_accelerate.main()


if __name__ == "__main__":
    main()
