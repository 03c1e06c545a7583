"""What a run leaves behind besides its metrics: a folder that stock transformers loads, and the run's settings."""

import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, PreTrainedModel


def save_model_folder(model: PreTrainedModel, folder: Path, *, tokenizer_path: Path, eos_token_id: int) -> None:
    """Weights, configuration, the model's code, tokenizer and generation defaults, as from_pretrained expects them."""
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        do_sample=True,  # greedy decoding of a base model soon repeats itself
        temperature=0.8,
        top_k=50,
    )
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_path, folder, dirs_exist_ok=True)
    # safetensors creates files that only their owner can read; a model folder has the modes of its user.
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def export_model(model: PreTrainedModel, output_dir: Path, *, tokenizer_path: Path, eos_token_id: int) -> list[str]:
    """Put the model folder's files beside a run's records; each file appears whole or not at all. Returns names."""
    temporary = output_dir / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model_folder(model, temporary, tokenizer_path=tokenizer_path, eos_token_id=eos_token_id)
    names = sorted(path.name for path in temporary.iterdir())
    for name in names:
        (temporary / name).replace(output_dir / name)
    temporary.rmdir()
    return names


def write_resolved_config(path: Path, settings: dict[str, Any]) -> None:
    """Every setting of a run as a recipe that `--config` takes, with the versions and the command it ran under."""
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    header = {"python": platform.python_version(), **versions, "command": " ".join(sys.argv)}
    comments = "".join(f"# {name}: {value}\n" for name, value in header.items())
    path.write_text(comments + yaml.safe_dump(settings, sort_keys=False))
