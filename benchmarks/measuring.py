"""Functions that all benchmarks use: choose a device, run in a new process and in turn, time generation, reset the
peak memory."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from gpt2modern.errors import GPT2ModernError, first_line

TIMED_CALLS = 3  # of generate


def choose_device(name: str | None) -> torch.device:
    """Return the device `name`; None: the GPU, else the CPU. Raises GPT2ModernError if it cannot be used."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GPT2ModernError(f"--device {name} cannot be used ({first_line(error)}); try --device cpu") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its queued work. Does nothing for a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Call `function` in a new process, which has only done imports, and return its result: for clean memory values."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # imported once for all processes
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


def in_turn(calls: dict[Hashable, tuple[int, Callable]]) -> dict[Any, list | str]:
    """Call each function as often as its number says, in turn and each time in a new process. Return for each key the
    results, or the error message of a function that failed, which is not called again."""
    results: dict[Any, list | str] = {key: [] for key in calls}
    turns = range(max(number for number, _ in calls.values()))
    for key in tqdm([key for turn in turns for key, (number, _) in calls.items() if turn < number], unit="measurement"):
        if not isinstance(results[key], str):
            try:
                results[key].append(in_fresh_process(calls[key][1]))
            except (GPT2ModernError, RuntimeError, ValueError) as error:  # also out of memory, or a process that died
                results[key] = first_line(error)
    return results


def generation_seconds(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, **options: Any) -> float:
    """Return the median seconds of TIMED_CALLS calls of greedy `generate`, after one call that warms up."""
    times = []
    for _ in range(1 + TIMED_CALLS):
        start = time.perf_counter()
        model.generate(prompts.to(model.device), max_new_tokens=new_tokens, do_sample=False, **options)
        synchronize(model.device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory_gib` reads to the memory used now. Does nothing for a CPU without Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
