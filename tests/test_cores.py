"""A process uses the cores that the machine grants, unless the user has said how many threads there are to be."""

import os
import subprocess
import sys

import pytest
import torch

from gpt2modern.cores import available_cores
from gpt2modern.training.distributed import joined_processes
from tests.support.trainer import TORCHRUN, command, environment

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and cgroups are Linux's")


def write_files(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


V2, V1 = "0::/job.slice/step.scope", "9:cpuset:/\n3:cpu,cpuacct:/docker/12ab\n1:name=systemd:/docker/12ab"


@on_linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 99),
        ({"proc/self/cgroup": V2}, 99),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/job.slice/step.scope/cpu.max": "max 100000"}, 99),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/job.slice/step.scope/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/job.slice/step.scope/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/job.slice/step.scope/cpu.max": "1000 100000"}, 1),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/job.slice/step.scope/cpu.max": "800000 100000",
                "sys/fs/cgroup/job.slice/cpu.max": "200000 50000",
            },
            4,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),  # a namespace of its own
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),  # the path is the host's
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/12ab/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu/docker/12ab/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_the_smallest_quota_of_the_cgroups_limits_the_cores(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(99)))
    write_files(tmp_path, files)
    assert available_cores(root=tmp_path) == expected


@on_linux
def test_hyperthreads_of_a_granted_core_count_once(tmp_path, monkeypatch):
    write_files(
        tmp_path,
        {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}" for n in range(8)},
    )
    for granted, cores in (({0, 1, 2, 3, 4, 5, 6, 7}, 4), ({1, 5}, 1), ({1, 2, 6}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, granted=granted: granted)
        assert available_cores(physical=True, root=tmp_path) == cores
        assert available_cores(root=tmp_path) == len(granted)
        assert available_cores(physical=True, root=tmp_path / "unknown") == len(granted)


@on_linux
def test_the_affinity_of_a_process_limits_its_cores():
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    script += "from gpt2modern.cores import available_cores; print(available_cores(), available_cores(physical=True))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == ["1", "1"]


ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no")
ONE, TWO = (*ACCELERATE, "--num_processes=1"), (*ACCELERATE, "--num_processes=2", "--multi_gpu")
SCRIPT = """
import os
from gpt2modern.cores import user_setting_of_threads
print("\\n<" + user_setting_of_threads(int(os.environ.get("OMP_NUM_THREADS", 7))) + ">")
"""


@on_linux
@pytest.mark.parametrize(
    ("launcher", "variables", "expected"),
    [
        (ONE, {}, ""),
        ((*ONE, "--num-cpu-threads-per-process=1"), {}, "OMP_NUM_THREADS=1"),
        ((*TWO, "--num_cpu_threads_per_process", "3"), {}, "OMP_NUM_THREADS=3"),
        (ONE, {"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1"),
        (TWO, {"MKL_NUM_THREADS": "2"}, "MKL_NUM_THREADS=2"),
        ((*TORCHRUN, "2"), {}, ""),
        ((*TORCHRUN, "2"), {"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1"),
        ((sys.executable,), {"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1"),
        ((sys.executable,), {}, "torch.set_num_threads(7)"),
    ],
)
def test_the_threads_of_the_user_are_told_from_those_of_the_launcher(tmp_path, launcher, variables, expected):
    (tmp_path / "script.py").write_text(SCRIPT)
    plain = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [*launcher, str(tmp_path / "script.py")], env=plain | variables, capture_output=True, text=True, timeout=200
    )
    printed = [line for line in result.stdout.splitlines() if line.startswith("<")]
    assert set(printed) == {f"<{expected}>"}, result.stderr


def test_a_launched_run_uses_all_cores_and_says_so_first(data_dir, tmp_path):
    """accelerate launch itself would let it use one."""
    plain = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    arguments = command(data_dir, tmp_path, *ONE, max_steps=1, eval_steps=0, save_steps=0, warmup_steps=0)
    result = subprocess.run(arguments, env=plain, capture_output=True, text=True, timeout=200)
    cores = available_cores(physical=True)
    assert result.stdout.startswith(f"CPU threads per process: {cores} (cores: {cores} of "), result.stderr


@pytest.mark.parametrize(("threads", "words"), [(1, "1, by OMP_NUM_THREADS=1"), (3, "3, by torch.set_num_threads(3)")])
def test_a_run_from_python_keeps_the_threads_of_its_caller(monkeypatch, threads, words):
    monkeypatch.setenv("OMP_NUM_THREADS", "1" if threads == 1 else "")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with joined_processes(None, 60) as (_, processes):
            assert torch.get_num_threads() == threads
            assert processes.threads.startswith(f"CPU threads per process: {words} (cores: ")
    finally:
        torch.set_num_threads(before)


def test_processes_with_the_same_cores_divide_them(monkeypatch):
    """Three on one machine, and one elsewhere or on other cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("gpt2modern.training.distributed.available_cores", lambda physical: 7)
    monkeypatch.setattr("gpt2modern.training.distributed.gather_object", lambda places: places * 3 + [("other", {0})])
    monkeypatch.setattr(torch, "get_num_threads", lambda: CPUS)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with joined_processes(None, 60) as (_, processes):
        assert chosen == [2]
    assert chosen == [2, CPUS]
    assert "(cores: 7 of " in processes.threads and "processes that share them: 3)" in processes.threads


def test_a_run_leaves_the_threads_of_the_process_as_they_were(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("gpt2modern.training.distributed.available_cores", lambda physical: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(CPUS)
    try:
        with joined_processes(None, 60):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == CPUS
    finally:
        torch.set_num_threads(before)
