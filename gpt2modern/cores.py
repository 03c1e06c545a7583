"""Count the CPU cores that this process may use, and find out whether the user has set its number of threads."""

import math
import os
from pathlib import Path

import psutil

LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"}  # set by torchrun and by accelerate launch


def available_cores(*, physical: bool = False, root: Path = Path("/")) -> int:
    """Return the number of CPU cores that this process may use: those of its affinity (taskset, SLURM, cpuset), at most
    the CPU quota of its cgroups (version 1 or 2: containers, systemd) and of those above them, rounded up.

    physical: count the hyperthreads of one core once, if the system tells. root: the folder that has proc and sys.
    """
    cores = _cores_of_affinity(physical, root)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / path.strip("/")
        for folder in (group, *group.parents):  # in a container only the uppermost may be visible
            version_1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            quota, _, period = (_read(folder / "cpu.max") or version_1).partition(" ")
            if quota.isdigit():  # otherwise it is "max", -1 or absent
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _cores_of_affinity(physical: bool, root: Path = Path("/")) -> int:
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return psutil.cpu_count(logical=not physical) or os.cpu_count() or 1
    cpus = [root / f"sys/devices/system/cpu/cpu{number}" for number in os.sched_getaffinity(0)]
    return len({(physical and _read(cpu / "topology/thread_siblings_list")) or cpu for cpu in cpus})


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def user_setting_of_threads(threads: int) -> str:
    """Return what the user has set this process's number of threads with, such as "OMP_NUM_THREADS=4", or "" if the
    number is a default, of torch or of the launcher. threads: the number of torch."""
    names = [name for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS") if os.environ.get(name)]
    if names and not (names == ["OMP_NUM_THREADS"] and _launcher_sets_threads()):
        return f"{names[0]}={os.environ[names[0]]}"
    defaults = [os.environ[name] for name in names] or [str(_cores_of_affinity(physical)) for physical in (True, False)]
    return "" if str(threads) in defaults else f"torch.set_num_threads({threads})"


def _launcher_sets_threads() -> bool:
    """Return whether torchrun or accelerate launch has set OMP_NUM_THREADS of this process without being told to: its
    own environment lacks the variable, and its command has no --num_cpu_threads_per_process."""
    try:
        for process in psutil.Process().parents() if LAUNCHED & os.environ.keys() else ():
            variables = process.environ()
            if not LAUNCHED & variables.keys():
                told = any(word.replace("-", "_").startswith("__num_cpu") for word in process.cmdline())
                return "OMP_NUM_THREADS" not in variables and not told
    except psutil.Error:  # a process of another user
        pass
    return False
