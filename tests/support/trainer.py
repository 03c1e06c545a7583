"""Train a tiny model in this process or in others, and read what the run has left."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_accelerate
from gpt2modern.training.checkpoints import Checkpoints
from gpt2modern.training.distributed import joined_processes
from train_accelerate import TrainConfig, build

REPOSITORY = Path(__file__).parents[2]
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
FLAGS = {
    "config_overrides": TINY,
    "per_device_train_batch_size": 4,
    "total_batch_size": 256,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "logging_steps": 1,
    "eval_steps": 4,
    "eval_blocks": 8,
    "save_steps": 3,
    "save_total_limit": 9,
    "export_stock": "false",  # a second model folder, which only its own tests need
}
MUON_SETTINGS = {  # all that are off by default
    "muon_coefficients": "polar_express",
    "muon_normalize_rows": True,
    "muon_momentum_warmup_steps": 2,
    "muon_momentum_cooldown_steps": 3,
    "cautious_weight_decay": True,
    "head_learning_rate": 5e-3,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def flags_for(data_dir, output_dir, **changes):
    settings = FLAGS | {"data_dir": data_dir, "output_dir": output_dir} | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def train(data_dir, output_dir, extra=(), callback=train_accelerate.no_callback, **changes):
    """Train in this process, on one CPU device; `extra` holds the flags that take lists."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a test that has made an Accelerator
    train_accelerate.main([*flags_for(data_dir, output_dir, **changes), *extra], callback)
    return output_dir


def command(data_dir, output_dir, *launcher, **changes):
    return [
        *(launcher or [sys.executable]),
        str(REPOSITORY / "train_accelerate.py"),
        *flags_for(data_dir, output_dir, **changes),
    ]


def metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir):
    return [row["loss"] for row in metrics(output_dir)]


def assert_same_weights(first, second):
    expected, found = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def environment(**more):
    """Return the environment of a shell on a machine whose GPUs, if it has any, are hidden."""
    plain = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("ACCELERATE_")}
    return plain | {"CUDA_VISIBLE_DEVICES": "", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"} | more


def damage(path, how):
    """Damage a file: how is "deleted", "emptied", "truncated", or anything else for one flipped bit."""
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


# What a TrainConfig needs that is made without a command line.
COMMON = {
    "config_overrides": TINY,
    "per_device_train_batch_size": "2",
    "total_batch_size": 128,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "eval_steps": 0,
    "eval_blocks": 3,
    "save_steps": 0,
}


def config_of(data_dir, output_dir, **changes):
    return TrainConfig(**(COMMON | {"data_dir": str(data_dir), "output_dir": str(output_dir)} | changes))


@contextlib.contextmanager
def built(data_dir, output_dir, **changes):
    """Give the parts of a run that has not begun."""
    config = config_of(data_dir, output_dir, **changes)
    with joined_processes(config.mixed_precision, config.ddp_timeout) as (accelerator, processes):
        parts = build(config, accelerator)._asdict()
        yield SimpleNamespace(config=config, accelerator=accelerator, processes=processes, **parts)


def checkpoints_of(run):
    return Checkpoints(
        run.config, run.accelerator, run.processes, run.unwrapped_model, run.optimizers, run.train_blocks, run.plan
    )
