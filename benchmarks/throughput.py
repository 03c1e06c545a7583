"""Train a model as the benchmarks do: by the trainer's step, by the trainer as a whole, or in a plain loop of PyTorch.

A row is one way to train: the model, which may be a peer, the optimizer, the precision, compiled or not, the loop.
"""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from accelerate.utils import patch_environment
from torch import nn
from transformers.utils import logging

from benchmarks import measuring
from benchmarks.peers import PEERS, peer_loss
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training import models
from gpt2modern.training.batches import StepBatch
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import joined_processes
from gpt2modern.training.memory import freed_memory_kept
from gpt2modern.training.optimizers import OptimizerChain, build_optimizers
from gpt2modern.training.speed import peak_memory_gib
from train_accelerate import train, train_step

GPT2_VOCAB_SIZE = 50257
LEARNING_RATE_WARM_UP = 10  # steps
WARM_UP_STEPS = 2  # for compilation, the allocator's first blocks, the optimizer's state
NO_DROPOUT = "embedding_dropout=0.0,attention_dropout=0.0,hidden_dropout=0.0"


@dataclass(kw_only=True)
class StepConfig:
    """Hold the flags that all benchmarks of training share: sizes, attention, device."""

    config_overrides: str | None = setting(None, "settings to change in every preset: hidden_size=64,head_dim=32")
    block_size: int = setting(1024, "tokens per sequence", least=1)
    per_device_train_batch_size: int = setting(8, "number of sequences in a step", least=1)
    attn_implementation: str | None = setting(None, "attention of the presets; default: as in train_accelerate.py")
    device: str | None = setting(None, "cpu or cuda; default: the GPU if there is one")
    output: str = setting("eval/reports", "folder that the report is written to")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output", self.output)
        self.device = str(measuring.choose_device(self.device))


@dataclass(frozen=True)
class Row:
    """Represent one way to train a preset or, if `peer` is a key of PEERS, that model in the preset's sizes.

    loop: the trainer's step in a loop of the benchmark; train_accelerate.py as a whole; or a plain loop with autocast.
    keeps_logits: the preset's loss is computed from all logits.
    """

    model_preset: str
    optimizer: str = "adamw"
    precision: str = "fp32"
    compiled: bool = False
    peer: str | None = None
    gradient_checkpointing: bool = False
    loop: Literal["trainer's step", "train_accelerate.py", "plain loop"] = "trainer's step"
    keeps_logits: bool = False

    @property
    def cells(self) -> list[str]:
        return [self.peer or self.model_preset, self.optimizer, self.precision + " compiled" * self.compiled]

    def __str__(self) -> str:
        return ", ".join(self.cells)


def read_blocks(config: StepConfig, data: str, steps: int) -> PackedBlocks:
    """Open the prepared folder `data`. Raises GPT2ModernError if it has too few blocks for `steps` steps."""
    blocks = PackedBlocks(data, "train", config.block_size)
    if len(blocks) < steps * config.per_device_train_batch_size:
        have = f"--data {data} has {len(blocks)} blocks of --block_size {config.block_size}"
        need = f"{steps} steps of {config.per_device_train_batch_size} sequences need"
        raise GPT2ModernError(f"{have}, but {need} {steps * config.per_device_train_batch_size}; lower one of them")
    return blocks


def batches_of(blocks: PackedBlocks, config: StepConfig, steps: int) -> Iterator[torch.Tensor]:
    """Yield the batches of `steps` steps, (sequences, block_size + 1) token ids, always the same and all distinct."""
    size = config.per_device_train_batch_size
    for indices in np.random.default_rng(0).permutation(len(blocks))[: steps * size].reshape(steps, size).tolist():
        yield blocks.__getitems__(indices)


def settings_of(row: Row, config: StepConfig) -> TrainConfig:
    """Return the trainer's settings for a row. The learning rate is constant after its warm-up."""
    precision = "bf16" if row.precision == "bf16" else "no"
    attention = config.attn_implementation or models.fastest_attention(torch.device(config.device), precision)
    return TrainConfig(
        dry_run=True,  # so no folders are needed
        model_preset=row.model_preset,
        config_overrides=config.config_overrides,
        attn_implementation=attention,
        gradient_checkpointing=row.gradient_checkpointing,
        optimizer=row.optimizer,
        mixed_precision=precision,
        torch_compile=row.compiled,
        lr_scheduler_type="constant",
        warmup_steps=LEARNING_RATE_WARM_UP,
    )


def build_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> nn.Module:
    """Build the row's model on the default device, with random weights and the vocabulary of `data` (None: GPT-2's)."""
    shape = data or models.DataShape(GPT2_VOCAB_SIZE, eos_token_id=0, block_size=config.block_size)
    if row.peer is None:
        return models.build_model(settings_of(row, config), shape)
    return PEERS[row.peer](weightless_model(replace(row, peer=None), config, data).config)


def weightless_model(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> nn.Module:
    with torch.device("meta"):
        return build_model(row, config, data)


def loss_from_logits(model: nn.Module, batch: torch.Tensor, *, num_items: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a preset's loss as `batch_loss` does, computed from all logits."""
    inputs, labels = batch[:, :-1].clamp(min=0), batch[:, 1:]
    loss = model(
        input_ids=inputs, shift_labels=labels, labels=labels, num_items_in_batch=num_items, use_cache=False
    ).loss
    return loss, loss.detach()


@contextlib.contextmanager
def training_step(row: Row, config: StepConfig, data: PackedBlocks | None = None) -> Iterator[Callable]:
    """Build the row's model and optimizer as the trainer does, and yield a function that trains on one batch.

    The function takes token ids (sequences, block_size + 1) on the CPU and returns the StepResult of `train_step`, or
    in a plain loop the loss. The initial weights are drawn on the CPU, so they are the same for every device,
    precision and optimizer.
    """
    settings = settings_of(row, config)
    with (
        patch_environment(ACCELERATE_TORCH_DEVICE=config.device),  # also for cpu on a machine with a GPU
        joined_processes(settings.mixed_precision, settings.ddp_timeout) as (accelerator, processes),
        contextlib.nullcontext() if row.peer or row.loop == "plain loop" else freed_memory_kept(),
    ):
        torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")  # the trainer's: high
        torch.manual_seed(settings.seed)
        is_plain = row.loop == "plain loop"
        model = build_model(row, config, data).train()
        optimizers = build_optimizers(model, settings)
        model = model.to(config.device) if is_plain else accelerator.prepare(model)
        model = (
            torch.compile(model, options=None if row.peer else models.COMPILE_OPTIONS)
            if settings.torch_compile
            else model
        )
        optimizer = accelerator.prepare_optimizer(OptimizerChain(optimizers), device_placement=False)
        objective = batch_loss if row.peer is None else peer_loss
        objective = loss_from_logits if row.keeps_logits else objective
        count = itertools.count()

        def step(batch: torch.Tensor):
            num_targets = int((batch[:, 1:] >= 0).sum())
            one_pass = StepBatch(np.arange(len(batch)), num_targets, grad_accum_steps=1, micro_batches=iter([batch]))
            return train_step(settings, accelerator, processes, model, optimizer, one_pass, objective, next(count))

        def plain_step(batch: torch.Tensor) -> torch.Tensor:
            batch = batch.to(config.device)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=row.precision == "bf16"):
                loss, _ = objective(model, batch, num_items=torch.tensor(float(batch[:, 1:].numel())))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
            return loss.detach()

        yield plain_step if is_plain else step


def measure_training(row: Row, config: StepConfig, blocks: PackedBlocks, steps: int) -> dict[str, float]:
    """Train on `steps` batches after warm-up steps; return tokens/s, seconds per step, and the process's peak memory in
    GiB, absolute and above what it had when this was called. Call it in a new process."""
    logging.set_verbosity_error()
    device = torch.device(config.device)
    before = psutil.Process().memory_info().rss / 2**30 if device.type == "cpu" else 0.0
    tokens = config.per_device_train_batch_size * config.block_size
    if row.loop == "train_accelerate.py":
        seconds = tokens / tokens_per_second_of_trainer(row, config, blocks, steps)
    else:
        batches = [*batches_of(blocks, config, WARM_UP_STEPS + steps)]
        with training_step(row, config, blocks) as step:
            for part in batches[:WARM_UP_STEPS], batches[WARM_UP_STEPS:]:
                measuring.synchronize(device)
                start = time.perf_counter()
                for batch in part:
                    step(batch)
                measuring.synchronize(device)
                seconds = (time.perf_counter() - start) / steps
    peak = peak_memory_gib(device)
    return {"tokens/s": tokens / seconds, "s per step": seconds, "peak GiB": peak, "GiB above imports": peak - before}


def tokens_per_second_of_trainer(row: Row, config: StepConfig, blocks: PackedBlocks, steps: int) -> float:
    """Run train_accelerate.py's `train` on the prepared folder and return the tokens/s that it logs for its last
    `steps` steps, after as many others."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, patch_environment(ACCELERATE_TORCH_DEVICE=config.device):
        run = replace(
            settings_of(row, config),
            dry_run=False,
            data_dir=str(blocks.data_dir),
            output_dir=str(Path(folder, "run")),
            block_size=config.block_size,
            per_device_train_batch_size=str(config.per_device_train_batch_size),
            max_steps=2 * steps,
            warmup_steps=None,
            logging_steps=steps,
            eval_blocks=1,
            save_steps=0,
        )
        train(run, lambda event, **details: rows.append(details["row"]) if event == "logged" else None)
    return rows[-1]["tokens_per_second"]
