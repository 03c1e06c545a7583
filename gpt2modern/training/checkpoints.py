"""Checkpoints that are either whole or not there.

A checkpoint is written into a hidden temporary folder, checksummed, flushed to disk and renamed; rotation comes after.
A process killed at any moment leaves the older checkpoints as they were. What is resumed is the newest one whose files
match their checksums. `checkpoints/step_0000100/` is at the same time a model folder for `from_pretrained`.
"""

import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import flush_to_disk, sha256_of
from gpt2modern.training.export import give_users_modes
from gpt2modern.training.finetuning import is_adapted, load_adapter
from gpt2modern.training.sharding import shard_like, whole_tensor

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
MODEL_FILE = "model.safetensors"
CHECKSUM_FILE = "checksums.json"  # written last: a folder without it is not a checkpoint
TRAINING_STATE_FILES = {STATE_FILE, OPTIMIZER_FILE, CHECKSUM_FILE}  # the rest of a checkpoint is a model folder


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    optimizer_state: dict[str, torch.Tensor],
    trainer_state: dict[str, Any],
    save_total_limit: int,
    model_bytes: int = 0,
) -> Path:
    """Write checkpoint `step` and delete the oldest beyond `save_total_limit` (0: none). Call it on one process only.

    save_model: writes the Hub-ready model folder, of about `model_bytes`, into the path it is given.
    trainer_state: JSON values; what `read_trainer_state` gives back.
    Raises OSError, before anything is written, if the disk has less room than it takes, or for what the disk answers;
    the temporary folder is then removed.
    """
    checkpoints_dir.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in checkpoints_dir.glob(".step_*.tmp"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    refuse_full_disk(checkpoints_dir, model_bytes + sum(tensor.nbytes for tensor in optimizer_state.values()))
    final = checkpoint_path(checkpoints_dir, step)
    temporary = checkpoints_dir / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        save_model(temporary)
        save_file(optimizer_state, temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(trainer_state, indent=2))
        give_users_modes(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        checksums = {str(path.relative_to(temporary)): sha256_of(path) for path in files}
        (temporary / CHECKSUM_FILE).write_text(json.dumps(checksums, indent=2))
        for path in [*files, temporary / CHECKSUM_FILE, temporary]:
            flush_to_disk(path)
        temporary.rename(final)
        flush_to_disk(checkpoints_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if save_total_limit > 0:
        for old in list_checkpoints(checkpoints_dir)[save_total_limit:]:
            if old.is_symlink():  # what it names is not of this run alone
                old.unlink()
            else:
                shutil.rmtree(old)
    return final


def checkpoint_path(checkpoints_dir: Path, step: int) -> Path:
    return checkpoints_dir / f"step_{step:07d}"


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise OSError if there are less than `needed` free bytes where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed:,} bytes, the disk has {free:,} left", str(folder))


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Finished checkpoints, newest first; not yet verified."""
    found = [path for path in checkpoints_dir.glob("step_*") if re.fullmatch("[0-9]+", path.name[5:]) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find_problem(checkpoint: Path) -> str | None:
    """None if every file of the checkpoint is there and has its checksum, otherwise what is wrong, naming the file."""
    try:
        checksums = json.loads((checkpoint / CHECKSUM_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return f"{checkpoint / CHECKSUM_FILE} is missing or unreadable"
    needed = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE}
    if not isinstance(checksums, dict) or not needed <= checksums.keys():
        return f"{checkpoint / CHECKSUM_FILE} does not list {', '.join(sorted(needed))}"
    for name, expected in checksums.items():
        path = checkpoint / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{checkpoint / CHECKSUM_FILE} was altered: {name!r} is outside of the checkpoint"
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        except ValueError:  # no file can be called so
            return f"{checkpoint / CHECKSUM_FILE} was altered: it names {name!r}"
        if found != expected:
            return f"{path} was altered (its sha256 differs)"
    return None


def checkpoint_to_resume(
    resume_from_checkpoint: str, checkpoints_dir: Path, report: Callable[[str], None]
) -> Path | None:
    """The checkpoint folder named by `--resume_from_checkpoint auto|none|PATH`; None means a fresh start.

    `auto` takes the newest one that verifies and reports those it had to pass over. Raises GPT2ModernError if there are
    checkpoints but none verifies, or if PATH does not.
    """
    if resume_from_checkpoint == "none":
        return None
    if resume_from_checkpoint != "auto":
        problem = find_problem(Path(resume_from_checkpoint))
        if problem:
            raise GPT2ModernError(f"--resume_from_checkpoint {resume_from_checkpoint}: {problem}")
        return Path(resume_from_checkpoint)

    problems = []
    for checkpoint in list_checkpoints(checkpoints_dir):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint
        report(f"passing over {checkpoint.name}: {problem}")
        problems.append(problem)
    if problems:
        raise GPT2ModernError(
            f"no checkpoint in {checkpoints_dir} can be resumed ({problems[0]}); "
            f"--resume_from_checkpoint none starts again from step 0"
        )
    return None


def set_aside_later_checkpoints(checkpoints_dir: Path, step: int) -> None:
    """Move checkpoints beyond `step`, where this run begins, into `replaced_N/`: none may pass for its newest."""
    later = [path for path in list_checkpoints(checkpoints_dir) if int(path.name[5:]) > step]
    if later:
        number = next(n for n in itertools.count(1) if not (checkpoints_dir / f"replaced_{n}").exists())
        aside = checkpoints_dir / f"replaced_{number}"
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The `trainer_state` that `save_checkpoint` was given."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] | None) -> None:
    """Load weights and optimizer state in place; with None for the optimizers, the weights alone.

    Raises GPT2ModernError, naming one, if the checkpoint's tensors are not those of this model.
    """
    if is_adapted(model):
        load_adapter(model, checkpoint)
    else:
        _load_weights(checkpoint, model)
    if optimizers is not None:
        load_optimizer_state(optimizers, model, load_file(checkpoint / OPTIMIZER_FILE))


def _load_weights(checkpoint: Path, model: nn.Module) -> None:
    saved = load_file(checkpoint / MODEL_FILE)
    parameters = dict(model.named_parameters())  # tied ones under the one name that is saved
    for name in sorted(saved.keys() | parameters.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (saved, parameters)]
        if shapes[0] != shapes[1]:
            raise GPT2ModernError(
                f"{checkpoint / MODEL_FILE} belongs to another model: {name} is {shapes[0]} there and {shapes[1]} here"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(saved[name], parameter))


def changed_settings(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Every setting that differs, the model's own by their names, as 'name was X, is Y'."""
    saved = saved | saved["model"]
    current = current | current["model"]
    return [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if name != "model" and saved.get(name) != current.get(name)
    ]


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, *, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizers' tensors, keyed `parameter name/state name`: independent of group order and free of pickle.

    Those of a sharded model are whole: every process has to call this, and those with keep=False get nothing.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                value = whole_tensor(value.detach())
                if keep:
                    tensors[f"{names[parameter]}/{key}"] = value.cpu().contiguous()
    return tensors


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_state` returned, on each parameter's device (AdamW's step counters included); a tensor
    with the shape of its parameter is sharded like it."""
    parameters = dict(model.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in tensors.items():
        name, state_name = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = shard_like(value, parameter)
        owner[parameter].state[parameter][state_name] = value.to(parameter.device, copy=True)
