"""Print a dry run: settings, sizes and memory of a run, and its predicted speed on devices that it is not running on.

The cost model and where its assumptions come from: docs/scaling.md.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_config, num_token_ids
from gpt2modern.training.batches import BatchPlan, plan_batches
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.export import find_stock_class
from gpt2modern.training.memory import estimate_memory, fits_by_estimate, largest_that_fits
from gpt2modern.training.models import DataShape, build_model
from gpt2modern.training.speed import PEAK_TFLOPS, find_device, model_flops_per_token
from modeling_gpt2modern import GPT2ModernConfig

# Nominal GB/s: of a device's memory; from a device to others of its node, one way; from a node to others, one way. The
# last is not the device's but usual: 400 Gbit/s per H100 and later, 200 per A100, 100 per node of consumer cards. These
# exchange data through host memory, at half the rate of PCIe.
BANDWIDTHS = {
    "B200": (8000, 900, 400), "H200": (4800, 450, 400), "H100": (3350, 450, 400), "MI300X": (5300, 448, 400),
    "H100 PCIe": (2000, 64, 100), "A100": (2039, 300, 200), "L40S": (864, 32, 25), "L4": (300, 32, 25),
    "RTX 5090": (1792, 32, 12.5), "RTX 4090": (1008, 16, 12.5), "RTX 3090": (936, 16, 12.5),
}  # fmt: skip
MFU = 0.4  # of the dense bf16 peak, in forward and backward passes
BANDWIDTH_SHARE = 0.75  # of a nominal bandwidth that is reached
DEVICES_PER_NODE = 8
UPDATE_BYTES = 40  # read and written per weight: 28 by AdamW, 12 by the norm of the gradients and their clipping


@dataclass(frozen=True)
class Device:
    """Hold the speed that a prediction assumes of a device: FLOP/s in passes, and bytes/s of its memory, to the devices
    of its node and between nodes. overlaps: it computes while it sends, as GPUs do; a CPU core does not."""

    flops: float
    memory: float
    within_node: float
    between_nodes: float
    overlaps: bool = True


def named_devices(text: str) -> tuple[int, str, Device]:
    """Return number, kind and assumed speed of the devices in a text such as '8 x H100'. Raises GPT2ModernError if it
    has another form, or for a kind that is not in BANDWIDTHS."""
    match = re.fullmatch(r"([1-9]\d{0,5}) ?[xX] ?(.*\S)", text.strip())
    nominal = match and find_device(match[2], BANDWIDTHS)
    if not nominal:
        raise GPT2ModernError(
            f"--dry_run {text} is neither true, false nor a number and kind of devices such as '8 x H100'; the kinds "
            f"are {', '.join(BANDWIDTHS)}"
        )
    bandwidths = (BANDWIDTH_SHARE * 1e9 * bandwidth for bandwidth in nominal)
    return int(match[1]), match[2], Device(MFU * 1e12 * find_device(match[2], PEAK_TFLOPS), *bandwidths)


def predict_step(
    model: PreTrainedModel, plan: BatchPlan, device: Device, passes: int, *, fsdp2: bool = False, autocast: bool = True
) -> tuple[float, float]:
    """Return (seconds, bytes that each device sends) of a step of `passes` passes with DDP or FSDP2.

    DDP sums fp32 gradients in the last backward pass, in a ring: twice (n - 1) / n of their bytes leave each device.
    FSDP2 gathers a layer's weights for each forward and each backward pass, the others once per pass, and sums fp32
    gradients into shards in the last one. Layers are sent while others are computed; for the rest the device waits.
    """
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    weights = sum(trained.values())
    layers = sum(size for name, size in trained.items() if ".layers." in name)
    count, ring = plan.num_processes, (plan.num_processes - 1) / plan.num_processes
    gather, reduce = (ring * (2 if autocast else 4), ring * 4) if fsdp2 else (0, 2 * ring * 4)  # bytes per weight
    bandwidth = device.within_node if count <= DEVICES_PER_NODE else min(device.within_node, device.between_nodes)
    tokens = plan.micro_batch_size * plan.block_size
    forward = tokens * model_flops_per_token(model, plan.block_size) / 3 / device.flops
    backward = forward * (3 if model.model.layers[0].gradient_checkpointing else 2)  # one of 3 is the recomputation
    both = max if device.overlaps else lambda computing, sending: computing + sending

    def seconds(reduce: float) -> float:
        in_layers = both(forward, gather * layers / bandwidth) + both(backward, (gather + reduce) * layers / bandwidth)
        return in_layers + (gather + reduce) * (weights - layers) / bandwidth

    update = UPDATE_BYTES * weights / (count if fsdp2 else 1) / device.memory
    sent = passes * gather * (layers + weights) + reduce * weights
    return (passes - 1) * seconds(0) + seconds(reduce) + update, sent


def predict_run(config: TrainConfig, model: PreTrainedModel, plan: BatchPlan, device: Device) -> dict[str, str]:
    """Return the predicted speed of DDP and FSDP2 in bf16 on `device`, and the hours of all steps, as text by name."""
    nodes, tokens = -(-plan.num_processes // DEVICES_PER_NODE), plan.samples_per_step * plan.block_size
    tflop = model_flops_per_token(model, plan.block_size) * tokens / plan.num_processes / 1e12
    facts = {
        "prediction": f"{nodes} node(s), {MFU:.0%} of peak FLOP/s, {BANDWIDTH_SHARE:.0%} of bandwidths; not measured",
        "  compute": f"{tflop:,.1f} TFLOP per step and device",
    }
    steps = Counter(map(plan.grad_accum_steps, range(config.max_steps)))  # by passes: a warm-up changes them
    for name in ["DDP"] if config.lora_rank else ["DDP", "FSDP2"]:
        times = {passes: predict_step(model, plan, device, passes, fsdp2=name == "FSDP2") for passes in steps}
        seconds, sent = times[max(steps)]
        facts[f"  {name}"] = (
            f"{1000 * seconds:,.1f} ms per step, {tokens / seconds:,.0f} tokens/s, "
            f"{sum(times[passes][0] * count for passes, count in steps.items()) / 3600:,.2f} hours, "
            f"{sent / 1e9:,.2f} GB sent per step and device"
        )
    return facts


def dry_run(config: TrainConfig, accelerator: Accelerator) -> str:
    """Return the settings as YAML, followed by model size, compute and memory as comments: a valid --config file.

    If --dry_run names devices, the sizes are those of a launch on them in bf16, followed by its predicted speed.
    Without --data_dir the preset's own vocabulary and context length are assumed. Without --model_name_or_path the
    preset replaces the model that --lora_rank needs. The model is built on the meta device and takes no memory. Raises
    the same errors as the run itself for its settings and data.
    """
    count, kind, device = accelerator.num_processes, accelerator.device.type, None
    if config.dry_run != "true":
        count, kind, device = named_devices(config.dry_run)
    data = PackedBlocks(config.data_dir, "train", config.block_size) if config.data_dir else assumed_data(config)
    with torch.device("meta"):
        model = build_model(config, data, load_weights=False)
    plan = plan_batches(config, block_size=data.block_size, num_processes=count)
    if config.per_device_train_batch_size == "auto":
        fitting = largest_that_fits(
            plan.micro_batch_sizes(), lambda size: fits_by_estimate(config, accelerator, model, size, plan.block_size)
        )
        plan = replace(plan, micro_batch_size=max(1, fitting))
    precision = "bf16" if device else accelerator.mixed_precision
    fsdp2 = device is None and accelerator.is_fsdp2
    memory = estimate_memory(config, model, plan, autocast=precision != "no", fsdp2=fsdp2)
    last = config.max_steps
    samples, tokens = plan.consumed_samples(last), plan.tokens_seen(last)
    epochs = f"{samples / len(data):.2f} epochs of the data" if isinstance(data, PackedBlocks) else "no --data_dir"
    flops = model_flops_per_token(model, plan.block_size)
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    formula = "6 N + 12 L D T" if trained == parameters else "6 P + 4 (N - P) + 12 L D T, P of N parameters trained"
    shape = model.config
    stand_in = ", in place of the --model_name_or_path that --lora_rank needs for training" if config.lora_rank else ""
    facts = {
        "model": config.model_name_or_path or f"preset {config.model_preset}{stand_in}",
        "size": f"{shape.num_hidden_layers} layers of width {shape.hidden_size}, {shape.num_attention_heads} heads",
        "stock class": find_stock_class(config, shape) or "none",
        "parameters": f"{parameters:,}",
        "trained parameters": f"{trained:,} ({trained / parameters:.2%})",
        "processes": f"{count} x {kind}, {precision}",
        "tokens per step": f"{plan.samples_per_step * plan.block_size:,} = {count} x {plan.grad_accum_steps(last)} x "
        f"{plan.micro_batch_size} x {plan.block_size} (processes, passes, sequences, tokens)",
        "steps": f"{last:,}",
        "tokens": f"{tokens:,} ({epochs})",
        "FLOPs per token": f"{flops:,} ({formula})",
        "FLOPs": f"{flops * tokens:.3e}",
        "memory per process": f"{sum(memory.values()) / 2**30:.2f} GiB (estimate{', DDP' if device else ''})",
        **{f"  {name}": f"{size / 2**30:.2f} GiB" for name, size in memory.items()},
        **(predict_run(config, model, plan, device) if device else {}),
    }
    settings = yaml.safe_dump(config.chosen(), sort_keys=False)
    return settings + "".join(f"# {name:<20} {value}\n" for name, value in facts.items())


def assumed_data(config: TrainConfig) -> DataShape:
    """Return vocabulary and context length of a model without data. Raises GPT2ModernError if the model is unknown."""
    name, preset = config.model_name_or_path, config.model_preset
    try:
        preset = load_config(name, flag="--model_name_or_path") if name else GPT2ModernConfig.from_preset(preset)
    except ValueError as error:
        raise GPT2ModernError(f"--model_preset: {error}") from None
    return DataShape(
        num_token_ids(preset),
        preset.eos_token_id,
        config.block_size or preset.max_position_embeddings,
    )
