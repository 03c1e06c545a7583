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

from gpt2modern.training.finetuning import is_adapted, merged, save_adapter


def save_model_folder(
    model: PreTrainedModel, folder: Path, *, tokenizer_files: dict[str, bytes], eos_token_id: int
) -> None:
    """Weights, configuration, the model's code, tokenizer and generation defaults, as from_pretrained expects them.

    tokenizer_files: contents by name, as they were when the run began (`PackedBlocks.tokenizer_files`).
    """
    model.generation_config = GenerationConfig(
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        do_sample=True,  # greedy decoding of a base model soon repeats itself
        temperature=0.8,
        top_k=50,
    )
    if is_adapted(model):
        save_adapter(model, folder)
        model = merged(model)
    model.save_pretrained(folder)
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)
    give_users_modes(folder)


def give_users_modes(folder: Path) -> None:
    """Modes as the user's umask has them, also for what safetensors creates, which only its owner could read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def export_model(
    model: PreTrainedModel, output_dir: Path, *, tokenizer_files: dict[str, bytes], eos_token_id: int
) -> list[str]:
    """Put the model folder's files beside a run's records; each file appears whole or not at all.

    Returns the names of those that make up the model, without the folder of adapters.
    """
    temporary = output_dir / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model_folder(model, temporary, tokenizer_files=tokenizer_files, eos_token_id=eos_token_id)
    files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
    for path in files:
        (output_dir / path).parent.mkdir(exist_ok=True)
        (temporary / path).replace(output_dir / path)
    shutil.rmtree(temporary)
    return [path.name for path in files if len(path.parts) == 1]


def write_resolved_config(path: Path, settings: dict[str, Any], *, num_processes: int) -> None:
    """Every setting of a run as a recipe that `--config` takes, with the versions, the processes and the command it ran
    under."""
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate")}
    header = {"python": platform.python_version(), **versions, "num_processes": num_processes}
    header["command"] = " ".join(sys.argv)
    comments = "".join(f"# {name}: {value}\n" for name, value in header.items())
    path.write_text(comments + yaml.safe_dump(settings, sort_keys=False))
