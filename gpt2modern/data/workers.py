"""Write several shards in parallel, each in one process, which gets only the number of its shard."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from tqdm import tqdm

from gpt2modern.cores import available_cores
from gpt2modern.data.shards import Job, Stopped, is_finished, write_shard


def write_shards(job: Job, indices: Sequence[int], num_proc: int | None) -> None:
    """Write the training shards that are not finished yet, in `num_proc` processes (None: one per core).

    Raises the error of the first process that fails, or OSError if a process is killed. Then the other processes stop,
    and finished shards are kept.
    """
    pending = [index for index in indices if not is_finished(job, index)]
    if len(pending) < len(indices):
        print(f"{len(indices) - len(pending)} of {len(indices)} shards are already finished and verified")
    num_proc = min(num_proc or available_cores(), len(pending))
    bar = tqdm(total=len(pending), desc="Preparing shards", disable=not pending)
    if num_proc <= 1:
        with bar:
            for index in pending:
                write_shard(job, index)
                bar.update()
        return
    # Workers are forked after `tokenizers` used threads here; without this, each worker prints a long warning.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    with bar, ProcessPoolExecutor(num_proc, context, _start_worker, (job, stop)) as pool:
        try:
            for written in as_completed([pool.submit(_write_shard, index) for index in pending]):
                written.result()
                bar.update()
        except BrokenProcessPool:
            raise OSError(
                "one of its processes was killed, perhaps because memory ran out (then use a smaller --num_proc)"
            ) from None
        finally:  # after an error, or Ctrl-C, no more shards are started
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start_worker(job: Job, stop) -> None:
    """Store `job` and `stop` in this worker process, ignore Ctrl-C, and end the worker when the main process ends."""
    global _job, _stop
    _job, _stop = job, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write_shard(index: int) -> None:
    with contextlib.suppress(Stopped):
        write_shard(_job, index, _stop.is_set)
