"""Provide the public Python API of GPT2-Modern. Each name is imported from its module when it is first used."""

import importlib
import os
import sys
from typing import Any

try:
    os.getcwd()
except FileNotFoundError:  # to import torch would end the process, too, and transformers cannot be imported
    print("error: the current folder was deleted; change to an existing one with cd", file=sys.stderr)
    sys.exit(2)

_MODULES = {
    "GPT2ModernError": "gpt2modern.errors",
    "PackedBlocks": "gpt2modern.data.blocks",
    "PrepareConfig": "gpt2modern.data.config",
    "TrainConfig": "gpt2modern.training.config",
    "evaluate_loss": "gpt2modern.evaluation.loss",
    "from_native": "gpt2modern.conversion.convert",
    "generate_text": "gpt2modern.evaluation.generation",
    "load_model": "gpt2modern.loading",
    "load_tokenizer": "gpt2modern.loading",
    "to_native": "gpt2modern.conversion.convert",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
