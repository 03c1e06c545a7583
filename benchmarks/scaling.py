"""Compare training in two processes on a CPU with one process of two threads, and with the prediction of a dry run.

    python -m benchmarks.scaling --data_dir data/stdlib --train_flags "--per_device_train_batch_size 4"

Every run is train_accelerate.py as users start it. The prediction (docs/scaling.md) takes two measurements: the step of
one process of one thread with half the batch, and the bandwidth of an all-reduce of as many bytes as the gradient has.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import distributed

from eval import evidence
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.batches import plan_batches
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import resolved_precision
from gpt2modern.training.dry_run import Device, predict_step
from gpt2modern.training.models import build_model

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
# Processes, threads of each, share of the batch, variables of the launcher.
PEER, HALF, DDP, FSDP2 = "one process, two threads", "one thread, half the batch", "two processes, DDP", "FSDP2"
WAYS = {PEER: (1, 2, 1, {}), HALF: (1, 1, 0.5, {}), DDP: (2, 1, 1, {}), FSDP2: (2, 1, 1, SHARDED)}


@dataclass(kw_only=True)
class ScalingConfig:
    data_dir: str = setting(help="folder that prepare_data.py wrote")
    recipe: str = setting("demo", "recipe of train_accelerate.py; it sets total_batch_size")
    train_flags: str = setting("", "further flags of train_accelerate.py, in one string", may_be_empty=True)
    steps: int = setting(5, "number of steps in one measurement, after as many others", least=1)
    repetitions: int = setting(3, "number of measurements of each way", least=1)
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        shlex.split(self.train_flags)  # ValueError for an open quotation mark


def seconds_per_step(flags: list[str], way: str, tokens: int, steps: int) -> float:
    """Train in a new launch and return the seconds of a step. Raises GPT2ModernError, with its error, if it fails."""
    processes, threads, share, variables = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""} | variables
    with tempfile.TemporaryDirectory() as folder:
        own = f"--max_steps={2 * steps} --logging_steps={steps} --save_steps=0 --eval_steps=0 --eval_blocks=1".split()
        own += [f"--total_batch_size={int(share * tokens)}", "--warmup_steps=0", f"--output_dir={folder}/run"]
        command = [sys.executable, *launcher, str(evidence.REPOSITORY / "train_accelerate.py"), *flags, *own]
        result = subprocess.run(command, env=variables, capture_output=True, text=True)
        if result.returncode:
            problem = re.search(r"error: .*|.*\Z", result.stderr.strip())[0]
            raise GPT2ModernError(f"{way}: {problem}")
        return json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[-1])["step_time_s"]


def time_ring(rank: int, folder: str, num_bytes: int) -> None:
    """Sum `num_bytes` bytes over two processes and write the seconds to a file in `folder`."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for _ in range(2):  # the first time for the connections
        start = time.perf_counter()
        for bucket in torch.zeros(num_bytes // 4).split(25 * 2**18):  # DDP's of 25 MiB
            distributed.all_reduce(bucket)
    Path(folder, "seconds").write_text(str(time.perf_counter() - start))


def ring_bandwidth(num_bytes: int) -> float:
    """Return the bytes per second that each of two processes sends while they sum `num_bytes` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(time_ring, (folder, num_bytes), nprocs=2)
        return num_bytes / float(Path(folder, "seconds").read_text())


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(ScalingConfig, argv, __doc__)
        flags = ["--config", config.recipe, "--data_dir", config.data_dir, *shlex.split(config.train_flags)]
        settings = parse_arguments(TrainConfig, [*flags, "--dry_run"])
        blocks = PackedBlocks(config.data_dir, "train", settings.block_size)
        with torch.device("meta"):
            model = build_model(settings, blocks, load_weights=False)
        plan = plan_batches(settings, block_size=blocks.block_size, num_processes=2)
        tokens, passes = plan.samples_per_step * plan.block_size, plan.grad_accum_steps(settings.max_steps)
        measures = [*evidence.TRAINING_CODE, "benchmarks/scaling.py"]
        measures += ["gpt2modern/training/distributed.py", "gpt2modern/training/dry_run.py"]
        report = evidence.Report("scaling", config.output, torch.device("cpu"), argv, "accelerate", measures=measures)
        bandwidths, times = [], {way: [] for way in WAYS}
        for _ in range(config.repetitions):
            bandwidths.append(ring_bandwidth(4 * model.num_parameters(only_trainable=True)))
            for way, seconds in times.items():
                seconds.append(seconds_per_step(flags, way, tokens, config.steps))
        medians = {way: median(seconds) for way, seconds in times.items()}
        core = Device(1.0, math.inf, *[median(bandwidths)] * 2, overlaps=False)
        core = replace(core, flops=predict_step(model, replace(plan, num_processes=1), core, passes)[0] / medians[HALF])
        lines, results = [["way", "seconds per step (p20 to p80)", "speed over the peer's", "predicted", "error"]], {}
        for way, (processes, _, share, variables) in WAYS.items():
            autocast = resolved_precision(settings.mixed_precision) == "bf16"
            predicted = predict_step(model, plan, core, passes, fsdp2=bool(variables), autocast=autocast)[0]
            results[way] = {"seconds": times[way], "predicted": predicted if processes > 1 else None}
            cells = [f"{predicted:.3f}", f"{predicted / medians[way] - 1:+.0%}"] if processes > 1 else ["-", "-"]
            speed = f"{share * medians[PEER] / medians[way]:.2f}"
            lines.append([way, evidence.median_and_spread(times[way], ".3f"), speed, *cells])
        method = f"""
{model.num_parameters():,} parameters, {tokens:,} tokens per step, {passes} passes of {plan.micro_batch_size} sequences
in each of two processes. n = {config.repetitions} repetitions in turn of {config.steps} steps after as many others."""
        remarks = f"Measured for the prediction: {core.within_node / 1e9:.2f} GB/s of a ring, {core.flops:.3e} FLOP/s."
        question = "what do two processes cost, and does the cost model of docs/scaling.md predict it?"
        report.write("Two processes against one", question, method, lines, remarks, results)


if __name__ == "__main__":
    main()
