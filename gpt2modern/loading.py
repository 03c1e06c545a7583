"""Load a model folder or Hub repository for evaluation, on the best device there is."""

from pathlib import Path
from typing import TYPE_CHECKING

from gpt2modern.errors import GPT2ModernError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str) -> "PreTrainedModel":
    """The causal language model `name` in fp32 and eval mode. Code from the folder is not run: this package is used.

    Raises GPT2ModernError, naming one, unless the tensors of the file are exactly those of the architecture and finite:
    transformers would fill in random ones.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    import modeling_gpt2modern  # noqa: F401  registers the architecture with the Auto classes
    from gpt2modern.training.finetuning import reason, tensor_problem

    _check_model_folder(name)
    transformers_logging.set_verbosity_error()  # a broken file is one line of ours
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # OSError, KeyError, UnpicklingError, ... by what is wrong with the folder
        raise GPT2ModernError(f"--model {name} cannot be loaded: {reason(error)}") from error
    if problem := tensor_problem(model, report):
        raise GPT2ModernError(f"--model {name} cannot be loaded: {problem}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    import modeling_gpt2modern  # noqa: F401
    from gpt2modern.training.finetuning import reason

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, TypeError, ... by what is wrong with its files
        raise GPT2ModernError(f"--model {name} has no tokenizer that can be loaded: {reason(error)}") from error


def longest_sequence(model: "PreTrainedModel") -> int | None:
    """Tokens that a model with learned positions takes at most; None where positions have no end."""
    config = model.config
    learned = getattr(config, "position_embedding_type", None) == "learned" or config.model_type == "gpt2"
    return config.max_position_embeddings if learned else None


def _check_model_folder(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise GPT2ModernError(f"--model {name} is not a model folder: it has no config.json")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise GPT2ModernError(f"--model {name}: no such folder, and not a Hub repository id (owner/name)")
