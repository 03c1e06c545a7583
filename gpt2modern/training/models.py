"""Build the model that a run trains: a preset with random weights or a finished model, on request with LoRA adapters.

Adapters (LoRA, arXiv:2106.09685) are PEFT's and are added in place: the model keeps its class. Such a run saves both
the model with the adapters merged into its weights, as an ordinary model folder, and, in the subfolder `adapter/`, the
adapters alone, which `PeftModel.from_pretrained(base, ...)` reads.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from gpt2modern.cli import nearest
from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import public_name
from gpt2modern.loading import load_config, load_model, num_token_ids, read_tensors
from gpt2modern.training.config import TrainConfig
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
except ImportError:  # the extra `finetune`; only --lora_rank needs it
    LoraConfig = inject_adapter_in_model = LoraLayer = None

# The settings of the architecture, without those that transformers adds to every configuration, such as return_dict.
MODEL_SETTINGS = (*GPT2ModernConfig.__annotations__, *GPT2ModernConfig.attribute_map, "rope_theta", "rope_scaling")
DROPOUTS = ("embedding_dropout", "attention_dropout", "hidden_dropout")
# exp instead of tanh in compiled GELUs: as exact in fp32, and half the time on a CPU. GPUs ignore it.
COMPILE_OPTIONS = {"cpp.use_decompose_tanh": True}
ADAPTER_FOLDER = "adapter"
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class DataShape:
    """Hold the properties of the data that the model must fit; used instead of blocks in a dry run without data."""

    vocab_size: int
    eos_token_id: int
    block_size: int


def build_model(
    config: TrainConfig, data: PackedBlocks | DataShape, *, load_weights: bool = True
) -> GPT2ModernForCausalLM:
    """Return the model that a run starts with, in fp32 on the current device, with adapters if --lora_rank is set.

    load_weights: with False the weights of --model_name_or_path are not loaded, and adapters may also be added to a
    preset. Raises GPT2ModernError for settings that contradict each other and for data that does not fit the model.
    """
    if config.lora_rank and config.model_name_or_path is None and load_weights:
        raise GPT2ModernError(f"--lora_rank {config.lora_rank} needs --model_name_or_path: a trained model to adapt")
    if config.model_name_or_path is None:
        model = _preset_model(config, data)
    else:
        model = _pretrained_model(config, data, load_weights)
    if config.sliding_window_ramp and "sliding_attention" not in model.config.layer_types:
        raise GPT2ModernError("--sliding_window_ramp needs a model with sliding layers; set sliding_window, or omit it")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        _add_adapters(model, config)
    return model


def fastest_attention(device: torch.device, mixed_precision: str) -> str:
    """Return the attention implementation to train with if none is chosen: the fastest that torch brings along."""
    return "blockwise" if device.type == "cpu" and mixed_precision == "bf16" else "sdpa"


def _preset_model(config: TrainConfig, data: PackedBlocks | DataShape) -> GPT2ModernForCausalLM:
    """Build the preset, adjusted to the data (vocabulary, context length, special tokens) and then by
    --config_overrides, with random weights. Raises GPT2ModernError if the settings or the data do not fit."""
    overrides = parse_config_overrides(config.config_overrides)
    overrides = size_of_depth(config.depth) | overrides if config.depth else overrides
    try:
        preset = GPT2ModernConfig.from_preset(config.model_preset)
        fitted = {
            "max_position_embeddings": data.block_size,
            "bos_token_id": data.eos_token_id,
            "eos_token_id": data.eos_token_id,
        }
        if data.vocab_size != num_token_ids(preset):
            fitted["vocab_size"] = data.vocab_size
            if preset.unpadded_vocab_size is not None:  # rows in multiples of 64 suit tensor cores
                fitted["vocab_size"] = -(-data.vocab_size // 64) * 64
                fitted["unpadded_vocab_size"] = data.vocab_size
        model_config = GPT2ModernConfig.from_preset(config.model_preset, **(fitted | overrides))
    except (ValueError, TypeError) as error:
        raise GPT2ModernError(f"--model_preset {config.model_preset} with --config_overrides: {error}") from None
    if isinstance(data, PackedBlocks):
        refuse_larger_vocabulary("the model", num_token_ids(model_config), data)
    _refuse_longer_blocks("--config_overrides", model_config, data)
    try:
        return GPT2ModernForCausalLM._from_config(model_config, attn_implementation=config.attn_implementation)
    except (ValueError, ImportError, RuntimeError, AttributeError) as error:
        flags = f"--attn_implementation {config.attn_implementation} and --config_overrides"
        raise GPT2ModernError(f"the model cannot be built with {flags}: {first_line(error)}") from None


def _pretrained_model(config: TrainConfig, data: PackedBlocks | DataShape, load_weights: bool) -> GPT2ModernForCausalLM:
    """Return the model of --model_name_or_path in fp32, without its weights if load_weights is False; raises
    GPT2ModernError if the data does not fit the model."""
    name, flag = config.model_name_or_path, "--model_name_or_path"
    model_config = load_config(name, flag=flag)
    overrides = parse_config_overrides(config.config_overrides)
    if fixed := sorted(overrides.keys() - set(DROPOUTS)):
        raise GPT2ModernError(f"--config_overrides cannot set {fixed[0]} with {flag}; set only {', '.join(DROPOUTS)}")
    model_config.update(overrides)
    if isinstance(data, PackedBlocks):
        refuse_larger_vocabulary(name, num_token_ids(model_config), data)
        refuse_other_tokenizer(name, data)
    _refuse_longer_blocks(name, model_config, data)
    arguments = {"config": model_config, "attn_implementation": config.attn_implementation}
    if load_weights:
        return load_model(name, flag=flag, **arguments)
    return GPT2ModernForCausalLM._from_config(**arguments)


def size_of_depth(depth: int) -> dict[str, int]:
    """Return the model settings of --depth: a width of 64 x depth, rounded up to whole heads, which have 128
    dimensions, or 64 where the width is below 512."""
    head_dim = 128 if depth >= 8 else 64
    heads = -(-64 * depth // head_dim)
    return {"num_hidden_layers": depth, "hidden_size": heads * head_dim, "num_attention_heads": heads}


def parse_config_overrides(text: str | None) -> dict[str, Any]:
    """Return the model settings of 'hidden_size=64,layer_types=[full_attention,sliding_attention]' by name, typed by
    YAML's rules; {} for None. Raises GPT2ModernError for a part that is not key=value, unknown or given twice."""
    overrides = {}
    for pair in re.split(r",(?=\s*\w+=)", text) if text else []:
        key, separator, value = pair.partition("=")
        key = key.strip()
        if not separator:
            raise GPT2ModernError(f"--config_overrides: expected key=value, found {pair!r}")
        if key in overrides:
            raise GPT2ModernError(f"--config_overrides: {key!r} is given twice; keep one")
        if key not in MODEL_SETTINGS:
            close = nearest(key, MODEL_SETTINGS, "")
            raise GPT2ModernError(f"--config_overrides: the model has no setting {key!r}{close}")
        try:
            overrides[key] = yaml.safe_load(value)
        except Exception:  # YAMLError, RecursionError; ValueError, ... of a number or date that does not exist
            raise GPT2ModernError(f"--config_overrides: cannot read the value of {key!r}: {value[:80]!r}") from None
    return overrides


def _refuse_longer_blocks(model: str, config: GPT2ModernConfig, data: PackedBlocks | DataShape) -> None:
    if data.block_size > config.max_position_embeddings:
        raise GPT2ModernError(
            f"--block_size {data.block_size} is longer than max_position_embeddings={config.max_position_embeddings} "
            f"of {model}; use a smaller --block_size"
        )


def _add_adapters(model: GPT2ModernForCausalLM, config: TrainConfig) -> None:
    """Freeze the weights and add trainable LoRA adapters to the linear layers, scaled by lora_alpha / lora_rank. Raises
    GPT2ModernError if peft is not installed or the model has no such layer."""
    if inject_adapter_in_model is None:
        raise GPT2ModernError("--lora_rank needs peft, which is not installed: pip install peft")
    linear = (name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear))
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if unknown := sorted(set(config.lora_target_modules or ()) - set(known)):
        raise GPT2ModernError(
            f"--lora_target_modules {unknown[0]} is not in this model; its layers have {', '.join(known)}"
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=sorted(config.lora_target_modules or known),
        base_model_name_or_path=config.model_name_or_path and public_name(config.model_name_or_path),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(lora, model, ADAPTER_NAME)


def has_adapters(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def save_adapters(model: GPT2ModernForCausalLM, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors to the subfolder `adapter` of `folder`.

    Next to the merged model's files, transformers would apply the adapters to that model a second time.
    """
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True)
    model.peft_config[ADAPTER_NAME].save_pretrained(target)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_tensors(model).items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapters(model: GPT2ModernForCausalLM, checkpoint: Path) -> None:
    """Load a checkpoint's LoRA adapters into `model`.

    Raises GPT2ModernError if the checkpoint has none, or, naming a tensor, if they do not fit the model or were trained
    with other frozen weights.
    """
    path = checkpoint / ADAPTER_FOLDER / "adapter_model.safetensors"
    if not path.is_file():
        raise GPT2ModernError(
            f"{checkpoint} has no LoRA adapters; omit --lora_rank, or start a new run in another --output_dir"
        )
    parameters = _adapter_tensors(model)
    advice = "use the --lora_rank and --lora_target_modules of the checkpoint, or another --output_dir"
    saved = read_tensors(path, parameters, advice)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    advice = "give the --model_name_or_path that it was trained on, or another --output_dir"
    expected = dict(merged(model).named_parameters())
    for name, weight in read_tensors(checkpoint / "model.safetensors", expected, advice).items():
        if not torch.allclose(weight, expected[name].cpu(), rtol=1e-4, atol=1e-5):  # another device adds differently
            raise GPT2ModernError(
                f"{checkpoint} was trained on another --model_name_or_path: tensor {name} differs; {advice}"
            )


def merged(model: GPT2ModernForCausalLM) -> PreTrainedModel:
    """Return a copy of the model with its adapters added to the weights and removed, as an ordinary model."""
    model = copy.deepcopy(model)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        module.merge()
        model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def _adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model with adapters, by the names that PEFT uses in its files."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
