"""TrainConfig: every setting of a training run, with its unit, range and group; imports nothing heavy."""

import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, number_or_auto, setting
from gpt2modern.training.schedules import DEFAULT_DECAY_RATIO, Schedule, steps_from

MODEL, BATCHES, OPTIMIZER, SCHEDULE = "model", "data and batches", "optimizer", "learning rate"
PRECISION, RECORDS, CHECKPOINTS, HUB = (
    "speed and precision",
    "evaluation and records",
    "checkpoints and stopping",
    "Hub",
)


@dataclass
class TrainConfig:
    """The settings of one training run; raises ValueError, naming the flag, for values that cannot be.

    Metadata of a field: resume="same" if a resumed run must not change it, because it decides the updates; card=False
    if it says where the run lay and who was told of it, not how the model was made; optimizer: the only value of
    --optimizer under which it has an effect.
    """

    config: str | None = setting(None, "YAML recipe with these flags as keys: a file, or a shipped recipe (demo, ...)")
    dry_run: bool = setting(False, "print the resolved recipe, its sizes and its cost, and stop; needs no data")
    data_dir: str | None = setting(
        None, "folder written by prepare_data.py, or its name on the Hub (needed)", group=BATCHES, card=False
    )
    output_dir: str | None = setting(
        None, "folder for the model and its records (needed)", group=CHECKPOINTS, card=False
    )

    model_preset: str = setting("modern", "architecture and size: gpt2, modern, speedrun, ...", group=MODEL)
    config_overrides: str | None = setting(
        None, "settings that replace the preset's: hidden_size=64,num_hidden_layers=2", group=MODEL, may_be_empty=True
    )
    model_name_or_path: str | None = setting(
        None, "fine-tune this GPT2-Modern model, a folder or a name on the Hub, instead of a preset", group=MODEL
    )
    lora_rank: int = setting(
        0, "train only LoRA adapters of this rank (PEFT); 0: train every weight", group=MODEL, least=0, resume="same"
    )
    lora_alpha: float | None = setting(
        None,
        "adapters are scaled by lora_alpha / lora_rank; default: twice the rank",
        group=MODEL,
        least=0,
        resume="same",
    )
    lora_target_modules: list[str] | None = setting(
        None, "projections that get adapters: q_proj, ...; default: all in the layers", group=MODEL, resume="same"
    )
    attn_implementation: str = setting(
        "sdpa", "attention kernel: eager, sdpa, flash_attention_2, flex_attention, ...", group=PRECISION
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about 30 %% slower", group=PRECISION
    )

    block_size: int | None = setting(
        None, "tokens per sequence; default: the block size of the data", group=BATCHES, least=1
    )
    per_device_train_batch_size: str = setting(
        "8", "sequences per forward pass and process; auto: as many as fit in memory", group=BATCHES
    )
    per_device_eval_batch_size: int = setting(8, "sequences per evaluation pass and process", group=RECORDS, least=1)
    total_batch_size: int | None = setting(
        None,
        "tokens per optimizer step over all processes; default: one forward pass per process",
        group=BATCHES,
        least=1,
    )
    batch_size_warmup_steps: int = setting(
        0,
        "steps over which the tokens per step grow to total_batch_size",
        group=BATCHES,
        least=0,
        resume="same",
    )
    initial_total_batch_size: int | None = setting(
        None, "tokens of the first step of that growth; default: an eighth of total_batch_size", group=BATCHES, least=1
    )
    document_masking: bool = setting(
        False,
        "a token attends to its own document only, not to those before it in the block (evaluation: to all)",
        group=BATCHES,
        resume="same",
    )
    max_steps: int = setting(
        1000,
        "optimizer steps; a resumed run may change it if the learning rates so far stay the same",
        group=SCHEDULE,
        least=1,
    )

    optimizer: str = setting(
        "adamw",
        "adamw, or muon: Muon for the matrices inside the layers and AdamW for the rest",
        group=OPTIMIZER,
        resume="same",
    )
    learning_rate: float = setting(6e-4, "peak learning rate of AdamW", group=SCHEDULE, least=0, resume="same")
    embedding_learning_rate: float | None = setting(
        None, "AdamW's peak for the token embedding; default: learning_rate", group=SCHEDULE, least=0, resume="same"
    )
    scalar_learning_rate: float | None = setting(
        None,
        "AdamW's peak for gains, biases and scalars; default: learning_rate",
        group=SCHEDULE,
        least=0,
        resume="same",
    )
    muon_learning_rate: float = setting(
        0.02,
        "peak learning rate of Muon; only with --optimizer muon",
        group=SCHEDULE,
        least=0,
        resume="same",
        optimizer="muon",
    )
    muon_momentum_warmup_steps: int = setting(
        300,
        "steps over which Muon's momentum goes from 0.85 to 0.95; only with --optimizer muon",
        group=OPTIMIZER,
        least=0,
        resume="same",
        optimizer="muon",
    )
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = setting(
        "cosine", "decay of the learning rate after the warm-up", group=SCHEDULE, resume="same"
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up; default: none", group=SCHEDULE, least=0, resume="same"
    )
    warmup_ratio: float | None = setting(
        None, "warm-up as a share of max_steps", group=SCHEDULE, least=0, most=1, resume="same"
    )
    decay_steps: int | None = setting(
        None,
        "last steps, in which warmup_stable_decay decays; default: a fifth of max_steps",
        group=SCHEDULE,
        least=0,
        resume="same",
    )
    decay_ratio: float | None = setting(
        None, "decay_steps as a share of max_steps", group=SCHEDULE, least=0, most=1, resume="same"
    )
    decay_type: Literal["1-sqrt", "linear", "cosine"] | None = setting(
        None, "shape of warmup_stable_decay's decay; default: 1-sqrt", group=SCHEDULE, resume="same"
    )
    min_lr_ratio: float = setting(
        0.1,
        "last learning rate as a share of the peak; no effect on constant",
        group=SCHEDULE,
        least=0,
        most=1,
        resume="same",
    )
    weight_decay: float = setting(
        0.1, "decay of matrices, times the learning rate", group=OPTIMIZER, least=0, resume="same"
    )
    adam_beta1: float = setting(
        0.9, "decay of AdamW's gradient average", group=OPTIMIZER, least=0, most=0.99999, resume="same"
    )
    adam_beta2: float = setting(
        0.95, "decay of AdamW's squared-gradient average", group=OPTIMIZER, least=0, most=0.99999, resume="same"
    )
    adam_epsilon: float = setting(1e-8, "added to the denominator of AdamW", group=OPTIMIZER, least=0, resume="same")
    max_grad_norm: float = setting(
        1.0, "clip the gradient to this norm; 0: no clipping", group=OPTIMIZER, least=0, resume="same"
    )
    z_loss: float = setting(
        0.0,
        "weight of log(sum(exp(logits)))^2 in what is minimised, such as 1e-4; not part of `loss`",
        group=OPTIMIZER,
        least=0,
        resume="same",
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "precision of matrix products; default: what accelerate launch says, else no", group=PRECISION
    )
    torch_compile: bool = setting(False, "compile the model of the training step", group=PRECISION)
    dataloader_num_workers: int = setting(
        0, "processes that read ahead; 0: read in the training process", group=PRECISION, least=0, most=256
    )
    ddp_timeout: int = setting(
        1800, "seconds a process waits for the others before the run ends with an error", group=CHECKPOINTS, least=1
    )
    seed: int = setting(
        42, "seed of weights, data order and dropout", group=BATCHES, least=0, most=2**63 - 1, resume="same"
    )

    logging_steps: int = setting(10, "steps between lines of metrics.jsonl", group=RECORDS, least=1)
    eval_steps: int = setting(100, "steps between evaluations; 0: only at the end", group=RECORDS, least=0)
    eval_blocks: int | None = setting(None, "validation sequences used; default: all of them", group=RECORDS, least=1)
    eval_blocks_at: Literal["equal_distances", "start"] = setting(
        "equal_distances", "which these are: spread over the split, or its first ones", group=RECORDS
    )
    save_steps: int = setting(100, "steps between checkpoints; 0: none", group=CHECKPOINTS, least=0)
    save_total_limit: int = setting(2, "checkpoints kept; 0: all", group=CHECKPOINTS, least=0)
    save_failure: Literal["warn", "stop"] = setting(
        "warn", "when a checkpoint cannot be written: continue with the older ones, or stop", group=CHECKPOINTS
    )
    max_train_time: str | None = setting(
        None, "save and stop after this time: seconds, or hours:minutes:seconds", group=CHECKPOINTS
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "at a NaN or infinite loss or gradient: stop before the update, or skip it", group=CHECKPOINTS
    )
    max_nonfinite_steps: int = setting(3, "updates skipped in a row before the run stops", group=CHECKPOINTS, least=0)
    resume_from_checkpoint: str = setting(
        "auto",
        "auto (the newest valid checkpoint in output_dir), none, or a checkpoint folder",
        group=CHECKPOINTS,
        card=False,
    )
    force_resume: bool = setting(
        False,
        "resume from a checkpoint of other settings, at the same step of the new data order",
        group=CHECKPOINTS,
    )

    report_to: list[str] = setting(
        default_factory=lambda: ["none"],
        help="trackers that also get the rows of metrics.jsonl: none, trackio, tensorboard, wandb",
        group=RECORDS,
        card=False,
    )
    project: str = setting("gpt2-modern", "project name in trackio and wandb", group=RECORDS, card=False)
    run_name: str | None = setting(
        None, "name of the run in the trackers; default: made from output_dir", group=RECORDS, card=False
    )
    sample_prompts: list[str] | None = setting(
        None,
        "texts that the model continues at each evaluation; '': the start of a document",
        group=RECORDS,
        may_be_empty=True,
        card=False,
    )
    sample_max_new_tokens: int = setting(64, "largest number of tokens of a sample", group=RECORDS, least=1, card=False)

    push_to_hub: bool = setting(False, "upload the model folder in the background", group=HUB, card=False)
    hub_model_id: str | None = setting(
        None, "repository, owner/name; default: output_dir's name in your account", group=HUB, card=False
    )
    hub_strategy: Literal["end", "every_save", "checkpoint"] = setting(
        "end",
        "end: the finished model; every_save: also each checkpoint's, replacing the last; checkpoint: also each "
        "checkpoint's, in the repository's folder last-checkpoint",
        group=HUB,
        card=False,
    )
    hub_private_repo: bool | None = setting(
        None, "whether a new repository is private; default: the owner's setting", group=HUB, card=False
    )
    hub_revision: str | None = setting(None, "branch to upload to; created if it is missing", group=HUB, card=False)
    license: str | None = setting(
        None, "licence of the weights in the model card: an identifier of the Hub, as apache-2.0", group=HUB, card=False
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):  # Python code may give a folder as a Path
            if isinstance(value := getattr(self, field.name), Path):
                setattr(self, field.name, str(value))
        if (self.data_dir is None or self.output_dir is None) and not self.dry_run:
            raise ValueError("--data_dir and --output_dir are needed, on the command line or in the --config file")
        self.per_device_train_batch_size = number_or_auto(
            "--per_device_train_batch_size", self.per_device_train_batch_size
        )
        if self.per_device_train_batch_size == "auto" and self.total_batch_size is None:
            raise ValueError("--per_device_train_batch_size auto divides a step, whose --total_batch_size is not given")
        check_ranges(self)
        if self.lora_rank == 0 and (self.lora_alpha is not None or self.lora_target_modules):
            raise ValueError("--lora_alpha and --lora_target_modules need --lora_rank")
        if self.initial_total_batch_size is not None and not self.batch_size_warmup_steps:
            raise ValueError("--initial_total_batch_size needs --batch_size_warmup_steps")
        self._check_output_dir()
        self._check_hub_model_id()
        self.max_train_seconds()
        self.schedule  # noqa: B018  raises ValueError

    def _check_output_dir(self) -> None:
        check_writable_folder("--output_dir", self.output_dir)
        output_dir = os.path.realpath(self.output_dir or "")
        for flag, name, also in (
            ("--data_dir", self.data_dir, " or inside of it"),
            ("--model_name_or_path", self.model_name_or_path, ""),
        ):
            taken = name and os.path.isdir(name) and os.path.realpath(name)
            if self.output_dir and taken and (output_dir == taken or (also and output_dir.startswith(taken + os.sep))):
                raise ValueError(f"--output_dir {self.output_dir} is the {flag}{also}; name another folder")

    def _check_hub_model_id(self) -> None:
        name = self.hub_model_id or (self.output_dir and Path(self.output_dir).resolve().name)
        if (self.push_to_hub or self.hub_model_id) and name:
            try:
                validate_repo_id(name)
            except HFValidationError:
                raise ValueError(f"--hub_model_id {name!r} is not a repository name; give owner/name") from None

    @functools.cached_property  # read in every step
    def schedule(self) -> Schedule:
        """The learning rate's schedule; raises ValueError for settings that contradict each other."""
        warmup_steps = steps_from("warmup", self.warmup_steps, self.warmup_ratio, self.max_steps) or 0
        decay_steps = steps_from("decay", self.decay_steps, self.decay_ratio, self.max_steps)
        if decay_steps is None and self.lr_scheduler_type == "warmup_stable_decay":
            decay_steps = round(DEFAULT_DECAY_RATIO * self.max_steps)
        return Schedule(
            self.lr_scheduler_type, self.max_steps, warmup_steps, decay_steps, self.decay_type, self.min_lr_ratio
        )

    def max_train_seconds(self) -> float:
        """Return --max_train_time ('5400', '90:00', '1:30:00') in seconds, infinity where it is not given.

        Raises ValueError for anything else, and for zero.
        """
        text = self.max_train_time
        if text is None:
            return math.inf
        if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
            raise ValueError(f"--max_train_time {text}: expected seconds, or hours:minutes:seconds such as 11:50:00")
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
        if not seconds:
            raise ValueError(f"--max_train_time {text}: must be more than zero")
        return seconds

    def chosen(self, *, card: bool = False) -> dict[str, Any]:
        """Return the settings that have a value, as a recipe would give them; card: only those for the model card."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
            and field.name not in ("config", "dry_run")  # of the command, not of the run
            and (not card or (field.metadata.get("card", True) and self._has_effect(field)))
        }

    def _has_effect(self, field: dataclasses.Field) -> bool:
        return field.metadata.get("optimizer", self.optimizer) == self.optimizer

    def fixed_on_resume(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("resume") == "same"
        }
