"""Count the CPU cores that this process may use, and find out whether the user has set its number of threads."""

import contextlib
import math
import os
import re
from pathlib import Path

import psutil

LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"}  # set by torchrun and by accelerate launch


def available_cores(*, physical: bool = False, quota: bool = True, root: Path = Path("/")) -> int:
    """Return the number of CPU cores that this process may use: those of its affinity (taskset, SLURM, cpuset), at most
    the CPU quota of its cgroups (version 1 or 2: containers, systemd) and of those above them, rounded up.

    physical: count the hyperthreads of a core once, if known. quota: whether quotas count. root: holds proc and sys.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return psutil.cpu_count(logical=not physical) or os.cpu_count() or 1
    cpus = [root / f"sys/devices/system/cpu/cpu{number}" for number in os.sched_getaffinity(0)]
    cores = len({(physical and _read(cpu / "topology/thread_siblings_list")) or cpu for cpu in cpus})
    groups = re.findall(r"^\d+:(.*\bcpu\b.*|):/?(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    for controllers, path in groups if quota else []:
        group = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / path
        for folder in (group, *group.parents):  # in a container only the uppermost may be visible
            version_1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            granted, _, period = (_read(folder / "cpu.max") or version_1).partition(" ")
            if granted.isdigit() and period.isdigit() and int(period):  # otherwise "max", -1 or absent
                cores = min(cores, math.ceil(int(granted) / int(period)))
    return max(1, cores)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def user_setting_of_threads(threads: int) -> str:
    """Return what the user has set this process's number of threads with, such as "OMP_NUM_THREADS=4", or "" if the
    number is a default, of torch or of the launcher. threads: the number of torch."""
    names = [name for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS") if os.environ.get(name)]
    if names and not (names == ["OMP_NUM_THREADS"] and _launcher_sets_threads()):
        return f"{names[0]}={os.environ[names[0]]}"
    defaults = [*map(os.environ.get, names)] or [str(available_cores(physical=each, quota=False)) for each in (0, 1)]
    return "" if str(threads) in defaults else f"torch.set_num_threads({threads})"


def _launcher_sets_threads() -> bool:
    """Return whether torchrun or accelerate launch has set OMP_NUM_THREADS of this process without being told to: its
    own environment lacks the variable, and its command has no --num_cpu_threads_per_process."""
    with contextlib.suppress(psutil.Error, OSError):  # a process of another user, or no /proc
        for process in psutil.Process().parents() if LAUNCHED & os.environ.keys() else ():
            if not LAUNCHED & (variables := process.environ()).keys():
                told = any(word.replace("-", "_").startswith("__num_cpu") for word in process.cmdline())
                return "OMP_NUM_THREADS" not in variables and not told
    return False
