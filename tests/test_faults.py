"""A run stops or continues after a fault as it says, and its weights end as if nothing had happened.

The rows F1 to F26 of the table that `make test-faults` prints are tested all over this folder; here are those of the
trainer. Its processes are forked from one that has imported everything (tests/support/faults.py).
"""

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from eval import generate
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_model, load_tokenizer
from gpt2modern.training.batches import BatchPlan, samples_in_order
from gpt2modern.training.checkpoints import choose_checkpoint, find_problem, list_checkpoints
from gpt2modern.training.distributed import all_finite, joined_processes
from gpt2modern.training.nonfinite import handle_nonfinite, spike_warning
from gpt2modern.training.state import TrainState
from gpt2modern.training.stopping import SAME_REQUEST_S, STOPPED_EXIT_CODE
from tests.support import faults
from tests.support.trainer import (
    REPOSITORY,
    TORCHRUN,
    assert_same_weights,
    command,
    damage,
    environment,
    flags_for,
    losses,
    metrics,
)
from train_accelerate import TrainConfig

pytestmark = pytest.mark.fault
SLOW = {"marks": pytest.mark.slow}  # not slow alone, but together: `make test` has one of each kind
SETTINGS = {"max_steps": 24, "save_steps": 5, "save_total_limit": 3, "eval_steps": 0, "eval_blocks": 4}
SETTINGS |= {"dataloader_num_workers": 0, "ddp_timeout": 30, "per_device_train_batch_size": 2}
PROCESS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


class Trainer:
    """Processes that train together into `output_dir`; given: the faults of each, as `faults.train_with` takes them."""

    def __init__(self, context, data_dir, output_dir, *given, **changes):
        output_dir.parent.mkdir(exist_ok=True)
        self.log = output_dir.with_name(f"{output_dir.name}.log")
        self.log.write_text("")
        variables = [PROCESS] * len(given)
        if len(given) > 1:  # this process is the launcher's agent: it holds the store, and survives
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            together |= {"WORLD_SIZE": str(len(given)), "LOCAL_WORLD_SIZE": str(len(given))}
            together |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            variables = [PROCESS | together | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(len(given))]
        arguments = flags_for(data_dir, output_dir, **(SETTINGS | changes))
        self.processes = [
            context.Process(target=faults.train_in_child, args=(arguments, its_variables, fault, self.log))
            for its_variables, fault in zip(variables, given, strict=True)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=100):
        """Wait for all processes and return their exit codes; that of a signal is its negative number."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"still running: {codes}, {self.output}"
        return codes

    @property
    def output(self):
        return self.log.read_text()


@pytest.fixture(scope="session")
def context():
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([faults.__name__])
    return context


@pytest.fixture
def start(context, data_dir):
    """Start a trainer: `start(output_dir, faults of rank 0, of rank 1, ..., flag=value)`; kill it in the end."""
    trainers = []

    def begin(output_dir, *given, **changes):
        trainers.append(Trainer(context, changes.pop("data_dir", data_dir), output_dir, *(given or [""]), **changes))
        return trainers[-1]

    yield begin
    for trainer in trainers:
        for process in trainer.processes:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="session")
def undisturbed(context, data_dir, tmp_path_factory):
    """Make a finished run without a fault, once: `undisturbed(number of processes, flag=value)`."""
    made = {}

    def run(num_processes=1, left_out="", **changes):
        key = (num_processes, left_out, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            trainer = Trainer(context, data_dir, made[key], *[left_out] * num_processes, **changes)
            assert trainer.wait(400) == [0] * num_processes, trainer.output
        return made[key]

    return run


def saved_steps(run):
    return [int(path.name[5:]) for path in reversed(list_checkpoints(run / "checkpoints"))]


def assert_ends_like(run, expected):
    assert_same_weights(run, expected)
    assert losses(run) == losses(expected)
    evaluated = [
        [(row["step"], row["eval_loss"]) for row in metrics(each) if "eval_loss" in row] for each in (run, expected)
    ]
    assert evaluated[0] == evaluated[1] and evaluated[0]
    assert [row["step"] for row in metrics(run)] == list(range(1, len(metrics(expected)) + 1))
    left = {path.name for path in [*run.iterdir(), *(run / "checkpoints").iterdir()] if path.name.startswith(".")}
    assert not left


def newest_valid(run):
    """Return the step of the newest valid checkpoint, 0 if there is none."""
    if not (run / "checkpoints").is_dir():
        return 0
    checkpoint = choose_checkpoint("auto", run / "checkpoints", report=lambda line: None)
    return 0 if checkpoint is None else int(checkpoint.name[5:])


def last_logged(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)


def kill_during_a_save(trainer, run, delay_s):
    """SIGKILL a little after a save has begun, if the process lives so long."""
    process = trainer.processes[0]
    left_by_a_kill = set(run.glob("checkpoints/.step_*.tmp"))  # one save is enough to remove them
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        found = list(run.glob("checkpoints/.step_*.tmp"))
        if found and not left_by_a_kill & set(found):
            time.sleep(delay_s)
            process.kill()
            break
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("times", "max_steps"), [(4, 150), pytest.param(30, 800, marks=pytest.mark.slow)], ids=["4 times", "30 times"]
)
def test_a_killed_run_loses_one_interval_at_most(start, undisturbed, tmp_path, fault_log, times, max_steps):
    """In turn before an update, at a file operation of a save, a rotation or a resume, and from outside in a save."""
    numbers, run, again = random.Random(0), tmp_path / "run", []
    settings = {"max_steps": max_steps, "save_steps": 10, "save_total_limit": 2}
    expected = undisturbed(**settings | {"save_steps": 0})
    for count in range(times):
        begin = newest_valid(run)
        kind = count % 3
        fault = [f"kill@{begin + numbers.randint(1, 25)}", f"kill_at_operation@{numbers.randint(0, 150)}", ""][kind]
        trainer = start(run, fault, **settings)
        if kind == 2:
            kill_during_a_save(trainer, run, numbers.uniform(0, 0.1))
        assert trainer.wait() == [-signal.SIGKILL], trainer.output
        assert f"resumed from {run}/checkpoints/step_{begin:07d}" in trainer.output or begin == 0 or kind == 1
        again.append(last_logged(run) - newest_valid(run))
        assert 0 <= again[-1] <= settings["save_steps"]
    assert start(run, **settings).wait(300) == [0]
    assert_ends_like(run, expected)
    fault_log("F4 kill -9 while training, saving, resuming", times, max(again))


@pytest.mark.parametrize(
    ("fault", "rank"),
    [("kill@7", 1), ("error@7", 0), pytest.param("kill@7", 0, **SLOW), pytest.param("error@7", 1, **SLOW)],
)
def test_when_one_of_two_fails_the_other_ends_and_names_it(start, undisturbed, tmp_path, fault_log, fault, rank):
    run, given = tmp_path / "run", ["", ""]
    given[rank] = fault
    trainer = start(run, *given, ddp_timeout=30 if fault == "kill@7" else 1800)  # nobody waits for one that has failed
    codes = trainer.wait(60)
    assert codes[rank] == (-signal.SIGKILL if fault == "kill@7" else 1) and codes[1 - rank] == 2, trainer.output
    assert f"of 2 processes these have ended or do not answer: {rank} on " in trainer.output
    assert ("this process is broken" in trainer.output) == (fault == "error@7")
    if fault == "kill@7":
        assert start(run, "", "").wait() == [0, 0]
        assert_ends_like(run, undisturbed(2))
    fault_log("F5 one process of two is killed or raises", steps_again=2)


def launched(data_dir, run, *launcher, **variables):
    arguments = command(data_dir, run, *launcher, **SETTINGS)
    arguments[arguments.index(str(REPOSITORY / "train_accelerate.py"))] = faults.__file__
    variables = environment(PYTHONPATH=str(REPOSITORY), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="30", **variables)
    return subprocess.Popen(
        arguments, env=variables, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill@7", "SIGUSR1@7"])
def test_torchrun_restarts_a_killed_run_not_a_stopped_one(data_dir, start, undisturbed, tmp_path, fault_log, fault):
    run = tmp_path / "run"
    launcher = (*TORCHRUN, "2", "--max_restarts", "2")
    process = launched(data_dir, run, *launcher, FAULT=fault, FAULT_RANK="1", FAULT_ONCE=str(tmp_path / "once"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("resumed from") == (fault == "kill@7")
    if fault == "SIGUSR1@7":
        assert "stopped after step 7 because SIGUSR1 was received" in output
        assert saved_steps(run) == [5, 7] and not (run / "model.safetensors").exists()
        assert start(run, "", "").wait() == [0, 0]
    assert_ends_like(run, undisturbed(2))
    fault_log("F5 torchrun --max_restarts after a kill, after a stop", steps_again=2 * (fault == "kill@7"))


@pytest.mark.slow
def test_torchrun_passes_sigterm_on(data_dir, start, undisturbed, tmp_path, fault_log):
    run = tmp_path / "run"
    process = launched(data_dir, run, *TORCHRUN, "2", "--", FAULT="", FAULT_RANK="0", FAULT_ONCE=str(tmp_path / "once"))
    deadline = time.monotonic() + 120
    while last_logged(run) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    stopped = re.search(r"stopped after step (\d+) because SIGTERM was received; saved in", output)
    assert stopped and process.returncode != 0, output[-3000:]
    assert saved_steps(run)[-1] == int(stopped[1])
    assert start(run, "", "").wait() == [0, 0]
    assert_ends_like(run, undisturbed(2))
    fault_log("F6 SIGTERM, SIGINT, SIGUSR1, with data-loader workers")


STOPPED = "stopped after step {} because {} was received; saved in"


@pytest.mark.parametrize(
    ("name", "num_processes"),
    [
        ("SIGTERM", 1),
        ("SIGHUP", 1),
        pytest.param("SIGINT", 1, **SLOW),
        pytest.param("SIGUSR1", 1, **SLOW),
        pytest.param("SIGTERM", 2, **SLOW),
        ("SIGUSR1", 2),
    ],
)
def test_a_signal_stops_all_processes_after_the_same_step(start, undisturbed, tmp_path, fault_log, name, num_processes):
    """Only the last process receives it; threads read ahead."""
    run, workers = tmp_path / "run", {"dataloader_num_workers": 2 if num_processes == 1 else 1}
    trainer = start(run, *[""] * (num_processes - 1), f"{name}@7", **workers)
    assert trainer.wait() == [STOPPED_EXIT_CODE] * num_processes, trainer.output
    assert trainer.output.count(STOPPED.format(7, name)) == 1 and "Traceback" not in trainer.output
    assert saved_steps(run) == [5, 7] and last_logged(run) == 7
    assert start(run, *[""] * num_processes, **workers).wait() == [0] * num_processes
    assert_ends_like(run, undisturbed(num_processes))
    fault_log("F6 SIGTERM, SIGINT, SIGUSR1, with data-loader workers")


def test_a_hangup_that_nohup_ignores_stays_ignored(start, undisturbed, tmp_path, fault_log):
    run = tmp_path / "run"
    trainer = start(run, "ignored_hangup@7")
    assert trainer.wait() == [0], trainer.output
    assert_ends_like(run, undisturbed())
    fault_log("F6 SIGHUP under nohup")


def wait_until_frozen(process):
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ")[1][0] != "T":
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["broken_forward@7", "error@7"])
def test_an_error_ends_the_process_while_data_is_read_ahead(start, tmp_path, fault_log, fault):
    """There is no other process that could be killed alone or outlive it: threads read."""
    trainer = start(tmp_path / "run", f"{fault} freeze@3", dataloader_num_workers=2)
    (process,) = trainer.processes
    wait_until_frozen(process)
    assert not any(file.read_text() for file in Path(f"/proc/{process.pid}/task").glob("*/children"))
    os.kill(process.pid, signal.SIGCONT)
    assert trainer.wait(30) == [1], trainer.output
    assert "ValueError: this process is broken" in trainer.output
    fault_log("F5 an error while data is read ahead")


@pytest.mark.parametrize("num_threads", [0, 2])
def test_data_that_is_cut_while_training_is_one_line(start, data_dir, tmp_path, fault_log, num_threads):
    data = shutil.copytree(data_dir, tmp_path / "data")
    trainer = start(tmp_path / "run", "cut_data@7", data_dir=data, dataloader_num_workers=num_threads)
    assert trainer.wait() == [2], trainer.output
    (line,) = [line for line in trainer.output.splitlines() if "error" in line.lower()]
    assert line.startswith(f"error: {data}/train/") and "Traceback" not in trainer.output
    fault_log("F26 data cut while training")


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(start, undisturbed, tmp_path, fault_log):
    """The holder is frozen, so that it holds the folder and writes nothing; then it is killed."""
    run = tmp_path / "run"
    first = start(run, "freeze@7")
    wait_until_frozen(first.processes[0])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    second = start(run, "", "")
    assert second.wait(60) == [2, 2], second.output
    holder = f"process {first.processes[0].pid} on {socket.gethostname()} since 20"
    assert f"error: --output_dir {run} is in use by another run ({holder}" in second.output
    assert "Traceback" not in second.output and before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    first.processes[0].kill()
    first.wait()
    assert start(run).wait() == [0]
    assert_ends_like(run, undisturbed())
    assert start(run).wait() == [0]  # the finished run, started again
    fault_log("F25 two runs in one folder", steps_again=2)


@pytest.fixture
def in_a_shell(data_dir, tmp_path):
    """Start a process as a shell does, by default the trainer; stdout is stderr, too."""
    started = []

    def begin(stdout, *script, unbuffered="", changes=(), **popen):
        trainer = ("train_accelerate.py", *flags_for(data_dir, tmp_path / "run", **(SETTINGS | dict(changes))))
        name, *flags = script or trainer
        variables = environment(PYTHONPATH=str(REPOSITORY), PYTHONUNBUFFERED=unbuffered)
        arguments = [sys.executable, REPOSITORY / name, *flags]
        started.append(subprocess.Popen(arguments, stdout=stdout, stderr=subprocess.STDOUT, env=variables, **popen))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", **SLOW)])
def test_a_full_disk_under_the_log_costs_only_the_log(in_a_shell, undisturbed, tmp_path, fault_log, unbuffered):
    with open("/dev/full", "w") as full:
        assert in_a_shell(full, unbuffered=unbuffered).wait(100) == 0
    assert_ends_like(tmp_path / "run", undisturbed())
    fault_log("F8 full disk under the log")


@pytest.mark.parametrize("unbuffered", ["1", pytest.param("", **SLOW)])
def test_a_reader_that_leaves_costs_only_the_log(in_a_shell, undisturbed, tmp_path, fault_log, unbuffered):
    process = in_a_shell(subprocess.PIPE, unbuffered=unbuffered)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0
    assert_ends_like(tmp_path / "run", undisturbed())
    fault_log("F8 the reader of the log has gone")


def test_a_terminal_that_is_closed_stops_the_run(in_a_shell, tmp_path, fault_log):
    """Its programs get SIGHUP, and what they print to it is an error."""
    run, (terminal, inside) = tmp_path / "run", os.openpty()
    os.set_blocking(terminal, False)
    controls = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0)}
    process = in_a_shell(inside, changes={"max_steps": 100_000, "save_steps": 0}, **controls)
    os.close(inside)
    while last_logged(run) < 2 and process.poll() is None:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        time.sleep(0.01)
    os.close(terminal)
    assert process.wait(60) == STOPPED_EXIT_CODE
    assert saved_steps(run) == [last_logged(run)]
    fault_log("F6 the terminal is closed")


def test_prepare_data_ends_well_without_a_reader(in_a_shell, data_dir, tmp_path, fault_log):
    flags = f"--train_file {REPOSITORY / 'README.md'} --tokenizer_name {data_dir / 'tokenizer'} --block_size 32".split()
    with open("/dev/full", "w") as full:
        assert in_a_shell(full, "prepare_data.py", *flags, "--output_dir", tmp_path / "data").wait(100) == 0
        assert in_a_shell(full, "prepare_data.py", "verify", tmp_path / "data").wait(100) == 0
    fault_log("F8 full disk under the log")


@pytest.mark.parametrize(
    ("fault", "stops_after", "saved"),
    [
        ("signal_in_save@SIGTERM", 6, [5, 6]),
        ("signal_in_evaluation@SIGTERM", 8, [5, 8]),
        ("SIGTERM@5", 5, [5]),
        ("SIGTERM@24", 24, [15, 20, 24]),
        ("handed_on@7", 7, [5, 7]),
    ],
)
def test_a_signal_at_an_awkward_moment_stops_in_order(
    start, undisturbed, tmp_path, fault_log, fault, stops_after, saved
):
    """In a save; in an evaluation, which is broken off; at a step that is saved anyway; at the last; twice at once."""
    run, changes = tmp_path / "run", {"eval_steps": 8, "per_device_eval_batch_size": 1}
    trainer = start(run, fault, **changes)
    assert trainer.wait() == [STOPPED_EXIT_CODE], trainer.output
    assert STOPPED.format(stops_after, "SIGTERM") in trainer.output and saved_steps(run) == saved
    assert not (run / "model.safetensors").exists()
    if fault.startswith("signal_in_evaluation"):
        again = start(run, fault, **changes)  # repeats the evaluation, which is broken off as well
        assert again.wait() == [STOPPED_EXIT_CODE] and STOPPED.format(stops_after, "SIGTERM") in again.output
        assert saved_steps(run) == saved and not any("eval_loss" in row for row in metrics(run))
    assert start(run, **changes).wait() == [0]
    assert_ends_like(run, undisturbed(**changes))
    fault_log("F7 a signal during a save, an evaluation, the last step")


def test_a_second_signal_ends_the_process_at_once(start, undisturbed, tmp_path, fault_log):
    run = tmp_path / "run"
    trainer = start(run, "two_signals@8")
    assert trainer.wait() == [128 + signal.SIGTERM], trainer.output
    assert saved_steps(run) == [5] and find_problem(run / "checkpoints" / "step_0000005") is None
    assert start(run).wait() == [0]
    assert_ends_like(run, undisturbed())
    fault_log("F7 a second signal", steps_again=3)


WAITING = """
import ctypes, math
from gpt2modern.training.stopping import StopRequest

request, library, mutex = StopRequest(math.inf), ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
print("waiting", flush=True)
library.pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="waits in glibc")
def test_a_second_signal_ends_a_process_that_waits_outside_of_python(fault_log):
    """A process waits so in a collective, where no Python handler runs."""
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        try:
            assert process.stdout.readline() == b"waiting\n"
            process.terminate()
            time.sleep(SAME_REQUEST_S + 0.3)
            assert process.poll() is None
            process.terminate()
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()
    fault_log("F7 a second signal")


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, **SLOW)])
def test_the_end_of_the_time_stops_like_a_signal(start, undisturbed, tmp_path, fault_log, num_processes):
    """The time is over before the first step; each start makes one step nevertheless."""
    run, none = tmp_path / "run", [""] * num_processes
    for step in (1, 2):
        trainer = start(run, *none, max_train_time=0.01)
        assert trainer.wait() == [STOPPED_EXIT_CODE] * num_processes, trainer.output
        assert f"stopped after step {step} because --max_train_time is over; saved in" in trainer.output
    assert start(run, *none).wait() == [0] * num_processes
    assert_ends_like(run, undisturbed(num_processes))
    fault_log("F6 --max_train_time", 2)


@pytest.mark.parametrize(
    ("fault", "missing", "says"),
    [
        ("file_size_limit@9-14", [10], "File too large"),
        ("few_bytes_free@9-14", [10], "the disk has only 1,000 of "),
        ("unwritable_folder@9-14", [10], "Permission denied"),
        ("records_refused@4-12", [], "metrics.jsonl cannot be written (Is a directory)"),
        ("vanished_folder@7", [5], "metrics.jsonl cannot be written (No such file or directory)"),
    ],
)
def test_a_disk_that_fails_costs_a_warning(start, undisturbed, tmp_path, fault_log, fault, missing, says):
    """In the end everything is there, also the rows that could not be written when they were made."""
    run, changes = tmp_path / "run", {"save_total_limit": 0, "eval_steps": 10}
    trainer = start(run, fault, **changes)
    assert trainer.wait() == [0], trainer.output
    assert f"warning: {'' if not missing or missing == [5] else 'checkpoint 10 ('}" in trainer.output
    assert says in trainer.output and trainer.output.count("metrics.jsonl cannot be written") <= 1
    if missing == [10]:
        assert re.search(
            r"checkpoint 10 \([\d,]+ bytes\) cannot be written to " + str(run / "checkpoints"), trainer.output
        )
    assert saved_steps(run) == sorted({5, 10, 15, 20, 24} - set(missing))
    assert_ends_like(run, undisturbed(**changes))
    fault_log("F8 full disk; F10 read-only, vanished folder: a save fails, the run continues")


@pytest.mark.parametrize(
    ("fault", "num_processes"),
    [
        ("few_bytes_free@9", 1),
        ("file_size_limit@9", 2),
        pytest.param("file_size_limit@9", 1, **SLOW),
        pytest.param("few_bytes_free@9", 2, **SLOW),
    ],
)
def test_a_failed_save_stops_the_run_if_asked_to(start, undisturbed, tmp_path, fault_log, fault, num_processes):
    run = tmp_path / "run"
    trainer = start(run, fault, *[""] * (num_processes - 1), save_failure="stop")
    assert trainer.wait() == [2] * num_processes, trainer.output
    assert "error: checkpoint 10 (" in trainer.output and "the older checkpoints are unchanged" in trainer.output
    assert saved_steps(run) == [5] and "Traceback" not in trainer.output
    assert start(run, *[""] * num_processes).wait() == [0] * num_processes
    assert_ends_like(run, undisturbed(num_processes))
    fault_log("F8 full disk: --save_failure stop", steps_again=5)


def test_a_failed_export_is_repeated_by_the_next_start(start, undisturbed, tmp_path, fault_log):
    run = tmp_path / "run"
    trainer = start(run, "file_size_limit@22", "")
    assert trainer.wait() == [2, 2], trainer.output
    assert "error: the finished model cannot be written to" in trainer.output and "Traceback" not in trainer.output
    assert saved_steps(run) == [10, 15, 20]
    assert start(run, "", "").wait() == [0, 0]
    assert_ends_like(run, undisturbed(2))
    fault_log("F8 full disk at the end of a run", steps_again=4)


def test_an_unwritable_folder_is_refused_at_the_start(start, tmp_path, fault_log):
    run = tmp_path / "run"
    assert start(run, "SIGTERM@2").wait() == [STOPPED_EXIT_CODE]
    (run / "resolved_config.yaml").unlink()
    (run / "resolved_config.yaml").mkdir()
    trainer = start(run, "", "")
    assert trainer.wait() == [2, 2], trainer.output
    assert f"error: --output_dir {run} cannot be written (" in trainer.output and "Traceback" not in trainer.output
    fault_log("F10 read-only or missing folder at the start")


HOW = ("deleted", "emptied", "truncated", "one bit flipped")


def test_every_damaged_file_of_a_checkpoint_is_named(undisturbed, tmp_path, fault_log):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(undisturbed() / "checkpoints", checkpoints)
    newest, before = list_checkpoints(checkpoints)[:2]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"model.safetensors", "modeling_gpt2modern.py", "tokenizer.json"}
    for path in files:
        whole = path.read_bytes()
        for how in HOW:
            damage(path, how)
            reports = []
            assert choose_checkpoint("auto", checkpoints, report=reports.append) == before
            assert len(reports) == 1 and (path.name in reports[0] or path.name == "checksums.json")
            path.write_bytes(whole)
    assert choose_checkpoint("auto", checkpoints, report=print) == newest
    fault_log("F9 a checkpoint's file is deleted, emptied, truncated, altered", len(files) * len(HOW))


def test_a_damaged_checkpoint_costs_its_interval_only(start, undisturbed, tmp_path, fault_log):
    run = tmp_path / "run"
    assert start(run, "kill@13").wait() == [-signal.SIGKILL]
    damage(run / "checkpoints" / "step_0000010" / "optimizer.safetensors", "one bit flipped")
    trainer = start(run)
    assert trainer.wait() == [0]
    assert (
        "skipping the invalid checkpoint step_0000010" in trainer.output
        and "optimizer.safetensors was altered" in trainer.output
    )
    assert_ends_like(run, undisturbed())
    fault_log("F9 a checkpoint's file is deleted, emptied, truncated, altered", steps_again=7)


def test_no_file_of_a_run_is_a_pickle(undisturbed, fault_log):
    files = [path for path in undisturbed().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        ".safetensors", ".json", ".jsonl", ".py", ".yaml", ".md", ".png", ".jinja", ".txt",
    }  # fmt: skip
    for path in files:
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError)):
            pickletools.dis(path.read_bytes(), out=io.StringIO())
    packages = [REPOSITORY / name for name in ("gpt2modern", "modeling_gpt2modern", "eval", "benchmarks")]
    for source in [*REPOSITORY.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]:
        text = source.read_text()
        assert "torch.load(" not in text and "import pickle" not in text, source
    fault_log("a checkpoint with a pickle in it", len(files))


def test_the_code_in_a_model_folder_is_never_run(undisturbed, start, data_dir, tmp_path, fault_log):
    """Neither evaluation nor fine-tuning run it, and a folder whose architecture is only in its code is refused."""
    folder, marker = shutil.copytree(undisturbed(), tmp_path / "model"), tmp_path / "was_run"
    shutil.rmtree(folder / "checkpoints")
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\n" + path.read_text())
    load_model(str(folder))
    load_tokenizer(str(folder))
    tune = {"model_name_or_path": folder, "config_overrides": "hidden_dropout=0.0", "warmup_steps": 0, "max_steps": 1}
    trainer = start(tmp_path / "run", **tune)
    assert trainer.wait() == [0], trainer.output
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "something_else"}))
    with pytest.raises(GPT2ModernError, match=r"--model .* cannot be loaded"):
        load_model(str(folder))
    with pytest.raises(SystemExit):
        generate.main(["--model", str(folder), "--prompt", "x"])
    trainer = start(tmp_path / "refused", **tune)
    assert trainer.wait() == [2], trainer.output
    assert not marker.exists()
    fault_log("hostile code in a model folder", 5)


@pytest.mark.parametrize(("fault", "num_processes"), [("nonfinite@7", 2), ("infinite_norm@7", 1)])
def test_a_nonfinite_step_stops_all_before_its_update(
    start, undisturbed, data_dir, tmp_path, fault_log, fault, num_processes
):
    """Only the last process has the fault; the blocks of every process are recorded."""
    run = tmp_path / "run"
    trainer = start(run, *[""] * (num_processes - 1), fault)
    assert trainer.wait() == [2] * num_processes, trainer.output
    assert re.search(r"error: the loss is \S+ and the gradient norm is (nan|inf) at step 7", trainer.output)
    assert "Traceback" not in trainer.output and saved_steps(run) == [5] and last_logged(run) == 6
    (row,) = [json.loads(line) for line in (run / "nonfinite_steps.jsonl").read_text().splitlines()]
    plan = BatchPlan(8, 2, num_processes, 32)
    samples = samples_in_order(len(PackedBlocks(data_dir, "train")), plan, seed=42, first=6 * 8, count=8)
    assert row["step"] == 7 and [seen["process"] for seen in row["processes"]] == list(range(num_processes))
    expected = samples.reshape(-1, num_processes, 2).swapaxes(0, 1).reshape(num_processes, -1).tolist()
    assert [seen["blocks"] for seen in row["processes"]] == expected
    assert row["processes"][-1]["grad_norm"] in ("nan", "inf")
    assert start(run, *[""] * num_processes).wait() == [0] * num_processes
    assert_same_weights(run, undisturbed(num_processes))
    fault_log("F11 a NaN or infinite loss or gradient: stop", steps_again=2)


@pytest.mark.parametrize("num_processes", [pytest.param(1, **SLOW), 2])
def test_a_skipped_step_leaves_its_update_out(start, undisturbed, tmp_path, fault_log, num_processes):
    run = tmp_path / "run"
    fault = "nonfinite@7 nonfinite@8 nonfinite@24"
    trainer = start(run, *[""] * (num_processes - 1), fault, on_nonfinite="skip", max_nonfinite_steps=2)
    assert trainer.wait() == [0] * num_processes, trainer.output
    assert trainer.output.count("; this update is skipped") == 3
    assert_same_weights(run, undisturbed(num_processes, "left_out@7 left_out@8 left_out@24"))
    assert [row["step"] for row in metrics(run) if row["loss"] is None] == [7, 8, 24]
    assert len((run / "nonfinite_steps.jsonl").read_text().splitlines()) == 3
    fault_log("F11 a NaN or infinite loss or gradient: skip", 3)


def test_too_many_skipped_steps_in_a_row_stop_the_run(start, tmp_path, fault_log):
    run = tmp_path / "run"
    trainer = start(run, "nonfinite@7 nonfinite@8 nonfinite@9", on_nonfinite="skip", max_nonfinite_steps=2)
    assert trainer.wait() == [2] and "3 such steps in a row are more than --max_nonfinite_steps 2" in trainer.output
    assert saved_steps(run) == [5]
    fault_log("F11 a NaN or infinite loss or gradient: skip", 3)


def test_an_infinite_gradient_is_left_to_the_loss_scale(tmp_path, fault_log):
    """Under fp16 the scaler skips the update and lowers itself; a NaN or infinite loss is found all the same."""
    config = TrainConfig(data_dir="data", output_dir=str(tmp_path), on_nonfinite="stop")
    loss, infinite = torch.tensor(1.0), torch.tensor(float("inf"))
    with joined_processes("no", ddp_timeout=30) as (accelerator, processes):
        assert not all_finite(loss, infinite, accelerator, processes)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        assert all_finite(loss, infinite, accelerator, processes)
        assert not all_finite(infinite, infinite, accelerator, processes)
        plan = BatchPlan(2, 2, 1, 32)
        with pytest.raises(GPT2ModernError, match="the loss is inf"):
            handle_nonfinite(config, accelerator, plan, TrainState(), np.arange(2), infinite, infinite)
    fault_log("F11 a NaN or infinite loss or gradient: fp16", 2)


@pytest.mark.parametrize(("loss", "warns"), [(3.9, True), (3.15, False), (float("nan"), False), (1.0, False)])
def test_a_jump_of_the_loss_is_a_warning(fault_log, loss, warns):
    rows = [{"step": step, "loss": 3.0 + 0.05 * (step % 2)} for step in range(40)]
    rows[-2] = {"step": 38, "loss": 9.0}  # an earlier one does not hide it
    rows[-1] = {"step": 39, "loss": None}
    warning = spike_warning(rows, loss)
    assert (warning is not None) == warns
    assert not warns or "jumped to 3.900; the median of the last 20 logged losses is 3.0" in warning
    assert spike_warning(rows[:10], loss) is None
    fault_log("F12 a jump of the loss")


def alter_newest(run, numbers):
    newest = list_checkpoints(run / "checkpoints")[0]
    path = numbers.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    damage(path, numbers.choice(HOW))


@pytest.mark.slow
def test_two_thousand_steps_with_a_fault_every_fifty(start, undisturbed, tmp_path, fault_log):
    numbers, run, again = random.Random(1), tmp_path / "run", []
    settings = {"max_steps": 2000, "save_steps": 20, "save_total_limit": 3}
    expected = undisturbed(**settings | {"save_steps": 0})
    tried = 0
    while newest_valid(run) < 1950:
        # Faults lie before the last step: what a full disk does to the export has its own test.
        step = min(newest_valid(run) + numbers.randint(30, 70), 1985)
        end = min(step + numbers.randint(5, 40), 1995)
        kind, code = numbers.choice(
            [
                (f"kill@{step}", -signal.SIGKILL),
                (f"error@{step}", 1),
                (f"SIGTERM@{step}", STOPPED_EXIT_CODE),
                (f"SIGINT@{step}", STOPPED_EXIT_CODE),
                (f"SIGUSR1@{step}", STOPPED_EXIT_CODE),
                (f"two_signals@{step}", 128 + signal.SIGTERM),
                (f"nonfinite@{step}", 2),
                (f"file_size_limit@{step}-{end} kill@{end + 1}", -signal.SIGKILL),
                (f"few_bytes_free@{step}-{end} kill@{end + 1}", -signal.SIGKILL),
                (f"records_refused@{step}-{end} kill@{end + 1}", -signal.SIGKILL),
                (f"kill_at_operation@{numbers.randint(150, 400)}", -signal.SIGKILL),
            ]
        )
        trainer = start(run, kind, **settings)
        codes = trainer.wait(300)
        assert codes == [code] or (codes == [0] and "operation" in kind), (kind, trainer.output)
        again.append(max(0, last_logged(run) - newest_valid(run)))
        tried += 1
        if numbers.random() < 0.25 and len(saved_steps(run)) > 1:
            alter_newest(run, numbers)
            tried += 1
    assert start(run, **settings).wait(300) == [0]
    assert_ends_like(run, expected)
    fault_log("soak: 2,000 steps with a fault about every 50", tried, max(again))
