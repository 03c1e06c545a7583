"""Save, verify, choose and restore checkpoints, each of which is either complete or absent.

A checkpoint is written into a hidden temporary folder, checksummed, flushed to disk and renamed; only then are old ones
deleted. A process killed at any moment leaves the older checkpoints unchanged. A run resumes from the newest one whose
files match their checksums. `checkpoints/step_0000100/` is also a model folder for `from_pretrained`.
"""

import errno
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import apply_umask, atomic_folder, move_folder, remove_leftovers, sha256_of
from gpt2modern.hub import files_on_hub, hub_errors, retried
from gpt2modern.loading import read_tensors
from gpt2modern.settings import check_ranges
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import Processes, is_sharded, shard_like, whole_model, whole_tensor
from gpt2modern.training.export import save_model_folder
from gpt2modern.training.models import has_adapters, load_adapters
from gpt2modern.training.optimizers import init_state
from gpt2modern.training.schedules import Schedule
from gpt2modern.training.state import FORMAT_VERSION, SavedState, TrainState
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
MODEL_FILE = "model.safetensors"
CHECKSUM_FILE = "checksums.json"  # written last: a folder without it is not a checkpoint
OTHERWISE = "resume from another checkpoint with --resume_from_checkpoint PATH, or start again with none"
HUB_FOLDER = "last-checkpoint"  # of the Hub repository, under --hub_strategy checkpoint
TRAINING_STATE_FILES = {STATE_FILE, OPTIMIZER_FILE, CHECKSUM_FILE}  # the rest of a checkpoint is a model folder


@dataclass
class Checkpoints:
    """Restore a run from its checkpoints and save new ones.

    model: not wrapped by DDP; optimizers: those whose state is saved. Every process creates one such object and calls
    the same methods; only the main process writes files.
    """

    config: TrainConfig
    accelerator: Accelerator
    processes: Processes
    model: GPT2ModernForCausalLM
    optimizers: Sequence[torch.optim.Optimizer]
    blocks: PackedBlocks
    plan: BatchPlan

    def __post_init__(self):
        self.schedule = self.config.schedule
        self.folder = checkpoints_dir(self.config)
        precision = self.accelerator.mixed_precision
        self.settings = fixed_settings(self.config, precision, self.model, self.blocks, self.plan)

    def restore(self) -> TrainState:
        """Load the checkpoint that --resume_from_checkpoint selects into model and optimizers and return its TrainState
        (step and results); without a checkpoint return a new TrainState and load nothing.

        A changed max_steps is accepted if the schedule gives all finished updates the learning rates that they had: a
        constant schedule, or the stable part of warmup_stable_decay, can be lengthened; cosine and linear cannot, nor
        can a run whose Muon has begun to lower its momentum at the end. For other changed settings raises
        GPT2ModernError that lists them, unless --force_resume is set; the optimizer state is then skipped if it would
        need other tensors, because --optimizer or --muon_normalize_rows has changed. Even
        --force_resume cannot change average_last, or max_steps once averaging has begun.
        """
        if self.config.resume_from_checkpoint == "hub":
            self.processes.on_main(lambda: download_checkpoint(self.config, self.folder))
        checkpoint = self.processes.on_main(
            lambda: choose_checkpoint(self.config.resume_from_checkpoint, self.folder, report=self.accelerator.print)
        )
        if checkpoint is None:
            return TrainState()
        state, schedule = read_trainer_state(checkpoint)
        differing = changed_settings(state.settings, self.settings)
        lengths, cooldown = {schedule.max_steps, self.schedule.max_steps}, self.config.muon_momentum_cooldown_steps
        has_cooled = cooldown > 0 and state.step - 1 > min(lengths) - cooldown
        if len(lengths) > 1 and (has_cooled or not schedule.gave_the_same(self.schedule, state.step)):
            differing.append(f"max_steps was {schedule.max_steps}, is {self.schedule.max_steps}")
        began = [each.average_weight(state.step - 1) for each in (schedule, self.schedule)]
        if self.config.force_resume and (
            began[0] != began[1] or (schedule.average_last is None) != (self.schedule.average_last is None)
        ):
            raise GPT2ModernError(
                f"{checkpoint} has the mean of other weights: average_last was {schedule.average_last} of "
                f"{schedule.max_steps} steps, is {self.schedule.average_last} of {self.schedule.max_steps}; restore it"
            )
        if differing and not self.config.force_resume:
            raise GPT2ModernError(
                f"{checkpoint} was saved with other settings: {'; '.join(differing)}; restore these settings, keep the "
                "new ones with --force_resume true, or start again from step 0 with --resume_from_checkpoint none or "
                "another --output_dir"
            )
        if differing:
            self.accelerator.print(f"--force_resume true: resuming with changed settings: {'; '.join(differing)}")
        scaler, scale = self.accelerator.scaler, state.grad_scaler
        if scaler is not None and scale is not None:
            types, expected = ({name: type(value) for name, value in d.items()} for d in (scale, scaler.state_dict()))
            if types != expected or not 0 < scale["scale"] < math.inf:
                raise GPT2ModernError(f"{checkpoint / STATE_FILE} has the invalid grad_scaler {scale}; {OTHERWISE}")
            scaler.load_state_dict(scale)
        same_state = not any(each.startswith(("optimizer was", "muon_normalize_rows was")) for each in differing)
        load_checkpoint(checkpoint, self.model, self.optimizers if same_state else None, state)
        self.accelerator.print(f"resumed from {checkpoint} at step {state.step}")
        return state

    def save(self, state: TrainState, callback: Callable[..., None]) -> bool:
        """Write a checkpoint on the main process, while the others wait, and return whether it was written.

        If it cannot be written (disk full, read-only or missing), the older checkpoints stay unchanged; with
        --save_failure warn a warning is printed, with `stop` every process raises GPT2ModernError, as it does if the
        weights are NaN or infinite. callback: gets "saving" and the temporary folder, on the main process.
        """
        main, config = self.accelerator.is_main_process, self.config
        norm = whole_tensor(torch.nn.utils.get_total_norm(self.model.parameters())).item()
        refuse_nonfinite("norm of the weights", norm, state.step, self.folder)
        model = whole_model(self.model, keep=main)
        tensors = {}
        if main or is_sharded(self.model):  # every process takes part in gathering the shards
            tensors = optimizer_state(self.optimizers, self.model, keep=main)
        scaler = self.accelerator.scaler
        problem = None
        if main:
            num_bytes = sum(parameter.nbytes for parameter in [*model.parameters(), *tensors.values()])

            def write_model(folder: Path) -> None:
                callback("saving", step=state.step, folder=folder)
                save_model_folder(model, folder, self.blocks)

            try:
                save_checkpoint(
                    self.folder,
                    state.step,
                    save_model=write_model,
                    optimizer_state=tensors,
                    trainer_state=state.to_json()
                    | {
                        "grad_scaler": scaler.state_dict() if scaler is not None else None,
                        "settings": self.settings,
                        "schedule": asdict(self.schedule),
                        "format_version": FORMAT_VERSION,
                        "has_optimizer_state": bool(tensors),
                    },
                    save_total_limit=config.save_total_limit,
                    num_bytes=num_bytes,
                )
            except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
                problem = f"checkpoint {state.step} ({num_bytes:,} bytes) cannot be written to {self.folder}: {error}"
        self.accelerator.wait_for_everyone()
        failed = self.processes.largest(int(problem is not None)) > 0
        if failed and config.save_failure == "stop":
            raise GPT2ModernError(
                f"{problem or 'the main process could not write the checkpoint'}; the older checkpoints are unchanged; "
                "make the folder writable or free disk space, then run the same command again to resume"
            )
        if failed:
            self.accelerator.print(f"warning: {problem}; the run continues, the older checkpoints are unchanged")
        return not failed

    def path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)


def checkpoints_dir(config: TrainConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:07d}"


def refuse_nonfinite(name: str, value: float, step: int, folder: Path) -> None:
    """Raise GPT2ModernError if `value`, called `name` in the message, is NaN or infinite, so that no broken model is
    saved or exported. Every process passes the same value, hence all raise or none does."""
    if not math.isfinite(value):
        raise GPT2ModernError(
            f"the {name} is {value} at step {step}; lower --learning_rate or --max_grad_norm and resume from an "
            f"earlier checkpoint in {folder} with --resume_from_checkpoint and --force_resume true"
        )


def fixed_settings(
    config: TrainConfig, mixed_precision: str, model: GPT2ModernForCausalLM, blocks: PackedBlocks, plan: BatchPlan
) -> dict[str, Any]:
    """Return the settings that must not change when a checkpoint is resumed, by name, as JSON values: flags, model
    settings, tokens per step, precision, and a hash of the data's manifest."""
    model_settings = {name: getattr(model.config, name) for name in type(model.config).__annotations__}
    manifest = json.dumps(blocks.manifest, sort_keys=True)
    settings = config.fixed_on_resume() | {
        "mixed_precision": mixed_precision,
        "tokens_per_step": plan.samples_per_step * blocks.block_size,
        "tokens_of_first_step": plan.samples_at(0) * blocks.block_size,
        "block_size": blocks.block_size,
        "data": hashlib.sha256(manifest.encode()).hexdigest(),
        "model": model_settings,
    }
    return json.loads(json.dumps(settings))


def changed_settings(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a text 'name was X, is Y' for each setting whose value in a checkpoint (X) and in this run (Y) differs.
    Of a checkpoint of an earlier version, a setting that came later has the default value, which changes nothing."""
    current = current | current["model"]
    defaults = {name: getattr(TrainConfig, name, getattr(GPT2ModernConfig, name, None)) for name in current}
    saved = defaults | saved | saved["model"]
    return [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if name != "model" and saved.get(name) != current.get(name)
    ]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    optimizer_state: dict[str, torch.Tensor],
    trainer_state: dict[str, Any],
    save_total_limit: int,
    num_bytes: int = 0,
) -> Path:
    """Write checkpoint `step` into `folder`, delete the oldest ones until `save_total_limit` are left (0: delete none),
    and return the checkpoint's path. Call it on one process only.

    save_model: writes the model folder into the path it receives. trainer_state: JSON values for `read_trainer_state`.
    num_bytes: approximate size of the checkpoint. Raises OSError before writing if the disk has less free space, and
    if writing fails; the temporary folder is then removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"the disk has only {free:,} of {num_bytes:,} bytes free", str(folder))
    final = checkpoint_path(folder, step)
    with atomic_folder(final) as temporary:
        save_model(temporary)
        save_file(optimizer_state, temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(trainer_state, indent=2))
        apply_umask(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        checksums = {str(path.relative_to(temporary)): sha256_of(path) for path in files}
        (temporary / CHECKSUM_FILE).write_text(json.dumps(checksums, indent=2))
    if save_total_limit > 0:
        for old in list_checkpoints(folder)[save_total_limit:]:
            if old.is_symlink():  # its target may be used by other runs
                old.unlink()
            else:
                shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the paths of the finished checkpoints in `folder`, newest first, without verifying their files."""
    found = [path for path in folder.glob("step_*") if re.fullmatch("[0-9]+", path.name[5:]) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find_problem(checkpoint: Path) -> str | None:
    """Return None if every file of the checkpoint exists and matches its checksum, otherwise a message that names the
    first file that does not and what is wrong with it."""
    try:
        checksums = json.loads((checkpoint / CHECKSUM_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return f"{checkpoint / CHECKSUM_FILE} is missing or unreadable"
    needed = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE}
    if not isinstance(checksums, dict) or not needed <= checksums.keys():
        return f"{checkpoint / CHECKSUM_FILE} does not list all of {', '.join(sorted(needed))}"
    for name, expected in checksums.items():
        path = checkpoint / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{checkpoint / CHECKSUM_FILE} was altered: {name!r} is outside the checkpoint"
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        except ValueError:  # no file can have this name
            return f"{checkpoint / CHECKSUM_FILE} was altered: it lists the invalid file name {name!r}"
        if found != expected:
            return f"{path} was altered (its sha256 checksum differs from the recorded one)"
    return None


def choose_checkpoint(resume_from_checkpoint: str, folder: Path, report: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint auto|hub|none|PATH` selects, or None to start from step 0.

    `auto` and `hub` select the newest valid one in `folder`, or None if it has none, and `report` those that they skip.
    Raises GPT2ModernError if PATH is invalid, or if `folder` has checkpoints but no valid one.
    """
    if resume_from_checkpoint == "none":
        return None
    if resume_from_checkpoint not in ("auto", "hub"):
        if problem := find_problem(Path(resume_from_checkpoint)):
            raise GPT2ModernError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: {problem}; give a valid checkpoint folder, or auto"
            )
        return Path(resume_from_checkpoint)

    problems = []
    for checkpoint in list_checkpoints(folder):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint
        report(f"warning: skipping the invalid checkpoint {checkpoint.name}: {problem}")
        problems.append(problem)
    if problems:
        raise GPT2ModernError(
            f"no checkpoint in {folder} is valid ({problems[0]}); "
            "use --resume_from_checkpoint none to start again from step 0"
        )
    return None


def download_checkpoint(config: TrainConfig, folder: Path) -> None:
    """Download `last-checkpoint` of the run's Hub repository to `folder`, if that has none of its step or a later one,
    and its metrics and samples to --output_dir. Prints a line if the Hub has none; a killed download is continued.

    Raises GPT2ModernError if the Hub refuses it, or the checkpoint is invalid. The run then removes the leftovers."""
    name, download = config.hub_model_id or Path(config.output_dir).resolve().name, folder / ".hub.tmp"
    advice = "run the same command again, or resume from the checkpoints in --output_dir with auto"
    with hub_errors(f"--resume_from_checkpoint hub: {name} cannot be downloaded", advice):
        name = name if "/" in name else f"{retried(HfApi().whoami)['name']}/{name}"
        commit, files = files_on_hub(name, revision=config.hub_revision)
        if f"{HUB_FOLDER}/{STATE_FILE}" not in files:
            print(f"{name} has no {HUB_FOLDER} to resume from on the Hub; --hub_strategy checkpoint uploads one")
            return
        fetch = functools.partial(retried, HfApi().snapshot_download, name, revision=commit, local_dir=download)
        fetch(allow_patterns=[f"{HUB_FOLDER}/{STATE_FILE}"])
        step = read_trainer_state(download / HUB_FOLDER)[0].step
        if any(int(path.name[5:]) >= step for path in list_checkpoints(folder)[:1]):
            return
        fetch(allow_patterns=[f"{HUB_FOLDER}/*"])
    if problem := find_problem(download / HUB_FOLDER):
        raise GPT2ModernError(f"--resume_from_checkpoint hub: {name}: {problem}; {OTHERWISE}")
    for path in (download / HUB_FOLDER).glob("*.jsonl"):
        path.replace(Path(config.output_dir) / path.name)
    move_folder(download / HUB_FOLDER, checkpoint_path(folder, step))


def set_aside_later_checkpoints(folder: Path, step: int) -> None:
    """Move checkpoints later than `step`, where a run starts, into a new subfolder `replaced_N` of `folder`, so that
    none of them is taken for the run's newest. Does nothing if there are none."""
    later = [path for path in list_checkpoints(folder) if int(path.name[5:]) > step]
    if later:
        number = next(n for n in itertools.count(1) if not (folder / f"replaced_{n}").exists())
        aside = folder / f"replaced_{number}"
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)


def read_trainer_state(checkpoint: Path) -> tuple[SavedState, Schedule]:
    """Return the state that a checkpoint has in trainer_state.json, and the schedule in it. Raises GPT2ModernError that
    names a value which is missing, unknown, of another type, or contradicts another one."""
    path = checkpoint / STATE_FILE
    try:
        state = SavedState.from_json(json.loads(path.read_text(encoding="utf-8")))
        schedule = Schedule(**state.schedule)
        check_ranges(schedule, prefix="schedule.")
        schedule.gave_the_same(schedule, state.step)  # what a resume will compute from it
        _ = {**state.settings, **state.settings["model"]}
        named = re.fullmatch("step_([0-9]+)", checkpoint.name)
        if state.step > schedule.max_steps or (named and int(named[1]) != state.step):
            raise ValueError(f"step {state.step} is not that of the folder, or above max_steps {schedule.max_steps}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise GPT2ModernError(f"{path} is not the state of a run ({first_line(error)}); {OTHERWISE}") from None
    return state, schedule


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] | None, state: SavedState
) -> None:
    """Load the weights (or the LoRA adapters, if the model has any) and the optimizer state of a checkpoint in place.

    With optimizers=None no optimizer state is loaded. Raises GPT2ModernError that names a tensor if the names, shapes
    or dtypes differ from those of model and optimizers, or if its values are impossible.
    """
    if optimizers is not None and state.has_optimizer_state:
        init_state(optimizers)  # first, as the weights change
    if has_adapters(model):
        load_adapters(model, checkpoint)
    else:
        advice = "use the model settings of the checkpoint, or another --output_dir"
        parameters = dict(model.named_parameters())  # tied ones under the one name that is saved
        saved = read_tensors(checkpoint / MODEL_FILE, parameters, advice)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(shard_like(saved[name], parameter))
    if optimizers is not None:
        load_optimizer_state(optimizers, model, checkpoint / OPTIMIZER_FILE, step=state.step)


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, *, keep: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors of the optimizers' states, unsharded and on the CPU, keyed `parameter name/state name`: the
    keys do not depend on the order of parameter groups, and saving needs no pickle.

    For a sharded model every process must call this; processes with keep=False get an empty dict.
    """
    tensors = {}
    for name, (state, key) in _states_by_name(optimizers, model).items():
        value = whole_tensor(state[key].detach())
        if keep:
            tensors[name] = value.cpu().contiguous()
    return tensors


def _states_by_name(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[str, tuple[dict, str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    return {f"{names[parameter]}/{key}": (state, key) for parameter, state in states for key in state}


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, path: Path, *, step: int
) -> None:
    """Replace the state tensors of the optimizers, after `step` updates, by those of a safetensors file, on the same
    devices and sharded alike. Raises GPT2ModernError that names a tensor if the file does not have just these, in the
    same shapes and dtypes (a fused update would read beyond the end of others), or if a value is impossible."""
    states = _states_by_name(optimizers, model)
    expected = {name: state[key] for name, (state, key) in states.items()}
    for name, tensor in read_tensors(path, expected, OTHERWISE).items():
        state, key = states[name]
        if (key in ("step", "exp_avg_sq", "row_mean_square") and tensor.min() < 0) or (key == "step" and tensor > step):
            raise GPT2ModernError(f"{path} has impossible values in tensor {name} for step {step}; {OTHERWISE}")
        state[key].copy_(shard_like(tensor, state[key]))
