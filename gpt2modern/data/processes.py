"""Several processes that write shards: none outlives the one that started them, none goes on when one has failed."""

import contextlib
import ctypes
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.shards import Job, Stopped, is_finished, write_shard

_starting_workers = _forked_by_main_thread = False


def write_shards(job: Job, indices: Sequence[int], num_proc: int | None) -> None:
    """Write the training shards that are not there yet, `num_proc` at a time.

    Raises what the first process that fails raises; OSError where one is ended from outside. Shards that are finished
    by then stay.
    """
    from datasets import Dataset
    from multiprocess import TimeoutError as WorkerTimeout

    pending = [index for index in indices if not is_finished(job, index)]
    if len(pending) < len(indices):
        print(f"{len(indices) - len(pending)} of {len(indices)} shards are there already, verified")
    if not pending:
        return
    num_proc = min(num_proc or available_cores(), len(pending))
    if num_proc > 1:
        # Workers are forked after `tokenizers` has used threads here: without this each warns of it, at length.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stop_file = job.workspace / f"stop-{uuid.uuid4().hex}"

    def write(row: dict) -> None:
        _write_or_stop(job, row["shard"], stop_file)

    try:
        with _workers_end_with_this_process():
            Dataset.from_dict({"shard": pending}).map(
                write,
                num_proc=num_proc if num_proc > 1 else None,
                load_from_cache_file=False,
                new_fingerprint="shards",
                desc=f"Preparing {len(pending)} shards" if len(pending) > 1 else "Preparing one shard",
            )
    except WorkerTimeout as error:  # `map` asks for results that are not there when Ctrl-C ends it
        raise (KeyboardInterrupt if isinstance(error.__context__, KeyboardInterrupt) else error) from None
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise OSError("one of its processes was ended from outside, perhaps for want of memory") from None


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_or_stop(job: Job, index: int, stop_file: Path) -> None:
    """`map` hears of an error when all its processes have returned: they do so soon where one has failed."""
    if stop_file.exists():
        return
    try:
        write_shard(job, index, stop_file)
    except Stopped:
        return
    except BaseException:
        with contextlib.suppress(OSError):
            stop_file.touch()
        raise


@contextlib.contextmanager
def _workers_end_with_this_process() -> Iterator[None]:
    """Processes that are forked in the block are killed by Linux when this one dies, and leave Ctrl-C to it."""
    global _starting_workers
    _starting_workers = True
    try:
        yield
    finally:
        _starting_workers = False


def _note_thread() -> None:
    global _forked_by_main_thread
    _forked_by_main_thread = threading.current_thread() is threading.main_thread()


def _follow_parent() -> None:
    if _starting_workers:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # each would print a traceback
        if _forked_by_main_thread:  # the signal comes when the thread ends that forked, of which some end early
            set_parent_death_signal = 1
            with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux
                ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_thread, after_in_child=_follow_parent)


@contextlib.contextmanager
def only_user_of(folder: Path, *, shared: bool) -> Iterator[None]:
    """Hold `folder` against other processes; `shared`: only against those that ask for it alone.

    Raises GPT2ModernError if it is held for longer than a killed process's workers take to die. No effect on a file system
    without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for attempts_left in reversed(range(50)):
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not attempts_left:
                    raise GPT2ModernError(
                        f"--output_dir {folder}: another process is preparing it; wait for that one, or end it"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
