"""What a run would be, without training it: its settings, sizes, memory and arithmetic. Nothing is written."""

import textwrap
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.finetuning import pretrained_config, starting_model
from gpt2modern.training.memory import FORMULA, estimate_memory, fits_by_estimate, largest_that_fits
from gpt2modern.training.metrics import model_flops_per_token
from gpt2modern.training.run import chosen_settings
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM


@dataclass(frozen=True)
class NoData:
    """Stands for data that is not there: blocks of the preset's own vocabulary, of no number."""

    vocab_size: int
    eos_token_id: int
    block_size: int


def data_or_stand_in(config: Any) -> PackedBlocks | NoData:
    """The training blocks; without --data_dir, what the preset says of its vocabulary and context."""
    if config.data_dir is not None:
        return PackedBlocks(config.data_dir, "train", config.block_size)
    name = config.model_name_or_path
    preset = GPT2ModernConfig.from_preset(config.model_preset) if name is None else pretrained_config(name)
    return NoData(
        preset.unpadded_vocab_size or preset.vocab_size,
        preset.eos_token_id,
        config.block_size or preset.max_position_embeddings,
    )


def dry_run(config: Any, accelerator: Accelerator) -> None:
    """Print the settings as a recipe, then what follows from them as comments: the output is a file for --config.

    Without --data_dir the preset's own vocabulary and context are assumed, and without --model_name_or_path the preset
    for the model that adapters stand on. It is built on the meta device: no size of it takes memory. Raises what the
    run itself would raise for its settings and its data.
    """
    blocks = data_or_stand_in(config)
    with torch.device("meta"):
        model = starting_model(config, blocks, load_weights=False)
    plan = config.batch_plan(blocks.block_size, accelerator.num_processes)
    if config.per_device_train_batch_size == "auto":
        needs = {"block_size": blocks.block_size, "optimizer": config.optimizer}
        fitting = largest_that_fits(
            plan.micro_batch_sizes(), lambda size: fits_by_estimate(accelerator, model, size, **needs)
        )
        plan = replace(plan, micro_batch_size=max(1, fitting))
    settings = yaml.safe_dump(chosen_settings(config), sort_keys=False)
    lines = [f"{name:<20} {value}" for name, value in facts(config, accelerator, blocks, model, plan).items()]
    lines += textwrap.wrap(FORMULA, width=110)
    accelerator.print(settings + "".join(f"# {line}\n" for line in lines), end="", flush=True)
    accelerator.end_training()


def facts(
    config: Any, accelerator: Accelerator, blocks: PackedBlocks | NoData, model: GPT2ModernForCausalLM, plan: BatchPlan
) -> dict[str, str]:
    """What the settings amount to, each in words with its unit."""
    block_size, last = blocks.block_size, config.max_steps
    samples = plan.consumed_samples(last)
    epochs = f"{samples / len(blocks):.2f} epochs of the data" if isinstance(blocks, PackedBlocks) else "no --data_dir"
    flops = model_flops_per_token(model, block_size)
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    formula = "6 N + 12 L D T" if trained == parameters else "6 P + 4 (N - P) + 12 L D T, P of N parameters trained"
    memory = estimate_memory(
        model,
        optimizer=config.optimizer,
        mixed_precision=accelerator.mixed_precision,
        micro_batch_size=plan.micro_batch_size,
        block_size=block_size,
        gradient_checkpointing=config.gradient_checkpointing,
        shards=accelerator.num_processes if accelerator.is_fsdp2 else 1,
    )
    stand_in = ", in place of the --model_name_or_path that a run with --lora_rank needs" if config.lora_rank else ""
    return {
        "model": config.model_name_or_path or f"preset {config.model_preset}{stand_in}",
        "parameters": f"{parameters:,}",
        "trained parameters": f"{trained:,} ({trained / parameters:.2%})",
        "processes": f"{accelerator.num_processes} x {accelerator.device.type}, {accelerator.mixed_precision}",
        "tokens per step": f"{plan.samples_per_step * block_size:,} = {accelerator.num_processes} x "
        f"{plan.grad_accum_steps(last)} x {plan.micro_batch_size} x {block_size} "
        "(processes, passes, sequences, tokens)",
        "steps": f"{last:,}",
        "tokens": f"{samples * block_size:,} ({epochs})",
        "FLOPs per token": f"{flops:,} ({formula})",
        "FLOPs": f"{flops * samples * block_size:.3e}",
        "memory per process": f"{memory.total / 2**30:.2f} GiB (estimate)",
        "  weights": f"{memory.weights / 2**30:.2f} GiB",
        "  gradients": f"{memory.gradients / 2**30:.2f} GiB",
        "  optimizer states": f"{memory.optimizer_states / 2**30:.2f} GiB",
        "  activations": f"{memory.activations / 2**30:.2f} GiB",
    }
