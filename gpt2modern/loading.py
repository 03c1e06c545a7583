"""Load a checked model or tokenizer from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import modeling_gpt2modern  # noqa: F401  registers the architecture with the Auto classes
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import is_hub_name


def load_model(name: str, *, flag: str = "--model", **kwargs: Any) -> PreTrainedModel:
    """Load the causal language model `name` in eval mode, on the CPU, in fp32 unless `kwargs` name a dtype.

    name: folder or Hub repository; flag: the one that named it, for messages; kwargs: those of `from_pretrained`.
    Code from the folder is never run: the architecture is this package's or one of transformers'. Raises
    GPT2ModernError, naming one, unless the file's tensors are exactly those of the architecture and finite, where
    transformers would fill in random ones.
    """
    check_model_name(name, flag)
    transformers_logging.set_verbosity_error()  # a damaged file is one line of ours
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"dtype": torch.float32} | kwargs),
        )
    except Exception as error:  # OSError, KeyError, UnpicklingError, ... by what is wrong with the folder
        raise GPT2ModernError(f"{flag} {name} cannot be loaded: {loading_problem(error)}") from error
    if problem := tensor_problem(model, report):
        raise GPT2ModernError(f"{flag} {name} cannot be loaded: {problem}")
    return model.eval()


def load_config(name: str, *, flag: str = "--model") -> PreTrainedConfig:
    """Load the configuration of a folder or Hub repository; raises GPT2ModernError where there is none."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with the folder
        raise GPT2ModernError(f"{flag} {name}: {loading_problem(error)}") from error


def load_tokenizer(name: str | Path, *, flag: str = "--model") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub repository; raises GPT2ModernError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with its files
        raise GPT2ModernError(f"{flag} {name} has no tokenizer that can be loaded: {loading_problem(error)}") from error


def best_device() -> torch.device:
    """Return the accelerator that torch finds, or the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model with learned positions takes at most; None where positions have no end."""
    config = model.config
    learned = getattr(config, "position_embedding_type", None) == "learned" or config.model_type == "gpt2"
    return config.max_position_embeddings if learned else None


def check_model_name(name: str, flag: str) -> None:
    """Raise GPT2ModernError for a folder without a model, and for what is neither a folder nor a Hub name."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise GPT2ModernError(f"{flag} {name} is not a model folder: it has no config.json")
    if not folder.is_dir() and not is_hub_name(name):
        raise GPT2ModernError(f"{flag} {name}: no such folder, and not a Hub repository id (owner/name)")


def loading_problem(error: Exception) -> str:
    """Say in one line why transformers could not load a folder, with a way out where its own message has none."""
    text = str(error)
    if "trust_remote_code" in text:
        return "its architecture is neither gpt2modern nor one of transformers, and code from the folder is never run"
    if "Couldn't instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json; save the tokenizer beside the model"
    return first_line(error)


def tensor_problem(model: PreTrainedModel, report: dict) -> str | None:
    """Say what is wrong with the tensors a model was loaded from, naming one; None if all are there and finite.

    report: from `from_pretrained` with `output_loading_info`.
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
