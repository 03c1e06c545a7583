"""Load and check a model, configuration or tokenizer from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import is_hub_name
from gpt2modern.hub import hub_problem
from modeling_gpt2modern import GPT2ModernConfig  # the import registers the architecture with the Auto classes


def load_model(name: str, *, flag: str = "--model", **kwargs: Any) -> PreTrainedModel:
    """Load the causal language model `name`, a folder or Hub repository, on the CPU in eval mode; fp32 by default.

    flag: the command-line flag that error messages name. kwargs: passed to `from_pretrained`. Code from the folder is
    never run: the architecture must be GPT2-Modern or one of transformers. Raises GPT2ModernError if the model cannot
    be loaded, or a tensor is missing, unexpected, of another shape, NaN or infinite.
    """
    check_model_name(name, flag, kwargs.get("subfolder") or "")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a damaged file is reported below, in one line
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
    finally:
        transformers_logging.set_verbosity(verbosity)
    if problem := tensor_problem(model, report):
        raise GPT2ModernError(f"{flag} {name} cannot be loaded: {problem}")
    return model.eval()


def load_config(name: str, *, flag: str = "--model") -> GPT2ModernConfig:
    """Load the configuration of the model folder or Hub repository `name`, translated if it is that of a stock model.
    Raises GPT2ModernError if that fails, or if GPT2-Modern has no counterpart of the model."""
    check_model_name(name, flag)
    try:
        return GPT2ModernConfig.from_pretrained(name)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with the folder
        raise GPT2ModernError(f"{flag} {name} cannot be loaded: {loading_problem(error)}") from error


def load_tokenizer(name: str | Path, *, flag: str = "--model") -> PreTrainedTokenizerBase:
    """Load the tokenizer of the folder or Hub repository `name`. Raises GPT2ModernError if that fails."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with its files
        raise GPT2ModernError(f"{flag} {name} has no tokenizer that can be loaded: {loading_problem(error)}") from error
    for argument in ("is_local", "local_files_only"):  # of from_pretrained; save_pretrained would write them
        tokenizer.init_kwargs.pop(argument, None)
    return tokenizer


def best_device() -> torch.device:
    """Return the accelerator device that torch finds, or the CPU if there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def num_token_ids(config: PreTrainedConfig) -> int:
    """Return the number of valid token ids of a model: vocab_size without the padding that GPT2-Modern may have."""
    return getattr(config, "unpadded_vocab_size", None) or config.vocab_size


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return the maximum sequence length (tokens) of a model with learned position embeddings, None for others."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    learned = any("pos" in name or "wpe" in name for name in names)  # as in OPT, BioGPT, GPT-2, GPT-Neo, ...
    return model.config.max_position_embeddings if learned else None


def check_model_name(name: str, flag: str, subfolder: str = "") -> None:
    """Raise GPT2ModernError if `name` is a folder without config.json (in its `subfolder`), or neither a folder nor of
    the form owner/name. flag: the command-line flag that the message names. This does not connect to the Hub."""
    folder = Path(name)
    if folder.is_dir() and not (folder / subfolder / "config.json").is_file():
        raise GPT2ModernError(
            f"{flag} {name} is not a model folder: it has no config.json; name the folder that has it"
        )
    if not folder.is_dir() and not is_hub_name(name):
        raise GPT2ModernError(f"{flag} {name} is neither a folder nor a Hub repository id (owner/name); check the name")


def loading_problem(error: Exception) -> str:
    """Return a message of one line that says why transformers could not load a folder, given the `error` it raised."""
    text = str(error)
    if "trust_remote_code" in text:
        return "its architecture is neither GPT2-Modern nor one of transformers, and code from the folder is never run"
    if isinstance(error.__cause__, HfHubHTTPError):
        return hub_problem(error.__cause__)
    if "Couldn't instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json; save the tokenizer in the model folder"
    return first_line(error)


def tensor_problem(model: PreTrainedModel, report: dict) -> str | None:
    """Return a message about the first tensor of a loaded model that is missing, unexpected, of another shape than in
    config.json, NaN or infinite; None if there is none. report: from `from_pretrained` with `output_loading_info`."""
    for name, in_file, here in sorted(report["mismatched_keys"]):
        return f"tensor {name} has shape {tuple(in_file)} in the file, but {tuple(here)} according to config.json"
    for key, what in {"missing_keys": "is missing", "unexpected_keys": "does not belong to this model"}.items():
        if names := sorted(report[key]):
            return f"tensor {names[0]} {what} (config.json describes a {model.config.model_type} model)"
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            return f"tensor {name} has NaN or infinite values; use an earlier checkpoint"
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite. Extremes are found many times as fast as each value is tested."""
    if tensor.numel() and tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.stack(tensor.aminmax())
    return bool(tensor.isfinite().all())


def read_tensors(path: Path, expected: dict[str, torch.Tensor], advice: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raises GPT2ModernError, which ends with `advice`, if it
    cannot be read, or has other names, shapes or dtypes than `expected`, or NaN or infinite values."""
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise GPT2ModernError(f"{path} cannot be read: {first_line(error)}; {advice}") from None
    for name in sorted(saved.keys() | expected.keys()):
        found, wanted = (
            f"{tuple(d[name].shape)} {d[name].dtype}" if name in d else "missing" for d in (saved, expected)
        )
        if found != wanted:
            problem = f"belongs to another model: tensor {name} is {found} in the file but {wanted} in this run"
            raise GPT2ModernError(f"{path} {problem}; {advice}")
        if not is_finite(saved[name]):
            raise GPT2ModernError(f"{path} has NaN or infinite values in tensor {name}; {advice}")
    return saved
