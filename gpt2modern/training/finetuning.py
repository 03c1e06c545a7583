"""Training that begins with a finished model: its weights, and low-rank adapters where only those are to be trained.

Adapters (LoRA, arXiv:2106.09685) are PEFT's, put into the model in place: forward, evaluation and wrappers see the same
class as without them. What is saved of such a run is both the model with the adapters merged in, a model folder as any
other, and in its subfolder `adapter/` what `PeftModel.from_pretrained(base, ...)` reads.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.training.models import build_model, parse_config_overrides
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

ADAPTER_FOLDER = "adapter"
ADAPTER_NAME = "default"
DROPOUTS = ("embedding_dropout", "attention_dropout", "hidden_dropout")


def starting_model(config: Any, blocks: PackedBlocks, *, load_weights: bool = True) -> GPT2ModernForCausalLM:
    """The model that a TrainConfig begins with: a preset's with random weights or a finished one; with its adapters.

    load_weights: False gives a finished model's shape alone; adapters may then stand on a preset's shape too.
    """
    if config.lora_rank and config.model_name_or_path is None and load_weights:
        raise GPT2ModernError(f"--lora_rank {config.lora_rank} needs --model_name_or_path: a model worth freezing")
    if config.model_name_or_path is None:
        model = build_model(
            model_preset=config.model_preset,
            config_overrides=config.config_overrides,
            attn_implementation=config.attn_implementation,
            gradient_checkpointing=config.gradient_checkpointing,
            blocks=blocks,
        )
    else:
        model = pretrained_model(config, blocks, load_weights=load_weights)
    if config.lora_rank:
        add_adapters(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            base=config.model_name_or_path,
        )
    return model


def pretrained_config(name: str) -> GPT2ModernConfig:
    """Of a folder or Hub repository; raises GPT2ModernError for anything but a GPT2-Modern model. Runs no code from there."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with the folder
        raise GPT2ModernError(f"--model_name_or_path {name}: {reason(error)}") from error
    if not isinstance(config, GPT2ModernConfig):
        raise GPT2ModernError(
            f"--model_name_or_path {name} is a {config.model_type} model; convert it first: python -m "
            f"gpt2modern.conversion --model {name} --output_dir CONVERTED"
        )
    return config


def pretrained_model(config: Any, blocks: PackedBlocks, *, load_weights: bool) -> GPT2ModernForCausalLM:
    """The model of --model_name_or_path in fp32. Raises GPT2ModernError if the data does not fit it."""
    name = config.model_name_or_path
    model_config = pretrained_config(name)
    overrides = parse_config_overrides(config.config_overrides)
    if fixed := sorted(overrides.keys() - set(DROPOUTS)):
        raise GPT2ModernError(
            f"--config_overrides {fixed[0]} is fixed by --model_name_or_path; only dropouts can be set"
        )
    model_config.update(overrides)
    refuse_larger_vocabulary(name, model_config.unpadded_vocab_size or model_config.vocab_size, blocks)
    if isinstance(blocks, PackedBlocks):
        refuse_other_tokenizer(name, blocks)
    if blocks.block_size > model_config.max_position_embeddings:
        raise GPT2ModernError(
            f"--block_size {blocks.block_size} is longer than max_position_embeddings="
            f"{model_config.max_position_embeddings} of {name}; use a smaller one"
        )
    arguments = {"config": model_config, "attn_implementation": config.attn_implementation}
    try:
        if load_weights:
            model, report = GPT2ModernForCausalLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
        else:
            model = GPT2ModernForCausalLM._from_config(**arguments)
    except Exception as error:
        raise GPT2ModernError(f"--model_name_or_path {name} cannot be loaded: {reason(error)}") from error
    if load_weights and (problem := tensor_problem(model, report)):
        raise GPT2ModernError(f"--model_name_or_path {name} cannot be loaded: {problem}")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def reason(error: Exception) -> str:
    """Why transformers could not load a folder, in one line with a way out where its own has none."""
    text = str(error)
    if "trust_remote_code" in text:
        return "its architecture is neither gpt2modern nor one of transformers, and code from the folder is never run"
    if "Couldn't instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json; save the tokenizer beside the model"
    return first_line(error)


def tensor_problem(model: PreTrainedModel, report: dict) -> str | None:
    """What is wrong with the tensors that a model was loaded from, naming one; None if they are all there and numbers.

    report: of `from_pretrained` with `output_loading_info`.
    """
    for name, in_file, here in sorted(report["mismatched_keys"]):
        return f"tensor {name} is {tuple(in_file)} in the file, {tuple(here)} by config.json"
    for key, what in {"missing_keys": "is missing", "unexpected_keys": "does not belong to it"}.items():
        if names := sorted(report[key]):
            return f"tensor {names[0]} {what} ({model.config.model_type} by config.json)"
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"tensor {name} has values that are not finite numbers; use an earlier checkpoint"
    return None


def add_adapters(
    model: GPT2ModernForCausalLM,
    *,
    rank: int,
    alpha: float | None,
    target_modules: Sequence[str] | None,
    base: str | None,
) -> None:
    """Freeze the model and put adapters of `rank` beside its linear layers; alpha / rank scales what they add.

    target_modules: names of projections inside the layers; None: all of them. alpha: None is twice the rank.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise GPT2ModernError("--lora_rank needs peft, which is not installed: pip install peft") from None

    linear = (name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear))
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if unknown := sorted(set(target_modules or ()) - set(known)):
        raise GPT2ModernError(f"--lora_target_modules {unknown[0]}: this model's layers have {', '.join(known)}")
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=sorted(target_modules or known),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(lora, model, ADAPTER_NAME)


def is_adapted(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of an adapted model, by the names that PEFT's files have."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(model: GPT2ModernForCausalLM, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors in `folder`/adapter: beside the merged model's files, stock
    code would put the adapters on top of it a second time."""
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True)
    model.peft_config[ADAPTER_NAME].save_pretrained(target)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: GPT2ModernForCausalLM, checkpoint: Path) -> None:
    """Put a checkpoint's adapters into `model`. Raises GPT2ModernError, naming a tensor, if they belong to another model or
    the frozen weights are not those that they were trained on."""
    path = checkpoint / ADAPTER_FOLDER / "adapter_model.safetensors"
    if not path.is_file():
        raise GPT2ModernError(
            f"{checkpoint} has no adapters; leave out --lora_rank, or start over in another --output_dir"
        )
    saved, parameters = load_file(path), adapter_tensors(model)
    for name in sorted(saved.keys() ^ parameters.keys()):
        raise GPT2ModernError(f"{path} belongs to another model: tensor {name} does not match")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != saved[name].shape:
                raise GPT2ModernError(f"{path} belongs to another model: tensor {name} does not match")
            parameter.copy_(saved[name])
    expected = merged(model).state_dict()
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if not torch.allclose(weight, expected[name].cpu(), rtol=1e-4, atol=1e-5):  # another device adds differently
            raise GPT2ModernError(f"{checkpoint} was trained on another --model_name_or_path: {name} differs")


def merged(model: GPT2ModernForCausalLM) -> GPT2ModernForCausalLM:
    """A copy in which the adapters are added to the weights, with the names and shapes of a model without any."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        module.merge()
        model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)
