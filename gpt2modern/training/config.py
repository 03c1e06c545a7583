"""Define TrainConfig: every setting of a training run, with its unit, range and group. Imports no large package."""

import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, number_or_auto, setting
from gpt2modern.training.schedules import DEFAULT_DECAY_RATIO, Schedule, steps_from

# One function per heading in --help. Settings made by those named *_decides must not change when a run is resumed.
model = partial(setting, group="model")
batch = partial(setting, group="data and batches")
schedule = partial(setting, group="learning rate")
speed = partial(setting, group="speed and precision")
record = partial(setting, group="evaluation and records")
checkpoint = partial(setting, group="checkpoints and stopping")
hub = partial(setting, group="Hub", card=False)
model_decides, batch_decides = partial(model, resume="same"), partial(batch, resume="same")
rate_decides = partial(schedule, least=0, resume="same")
optimizer_decides = partial(setting, group="optimizer", least=0, resume="same")
muon_decides = partial(optimizer_decides, optimizer="muon")


@dataclass
class TrainConfig:
    """Hold the settings of one training run. Raises ValueError, which names the flag, for an invalid value.

    Metadata of a field: resume="same" if a resumed run must not change it, because it determines the updates;
    card=False if the model card does not list it, because it does not affect the model (folders, trackers, Hub);
    optimizer: the only value of --optimizer with which it has an effect.
    """

    config: str | None = setting(None, "YAML recipe with these flags as keys: a file, or a shipped recipe (demo, ...)")
    dry_run: str = setting(
        "false", "print settings, sizes and FLOPs, and exit; '8 x H100': also its speed there", nargs="?", const="true"
    )

    model_preset: str = model("modern", "architecture and size of a new model: gpt2, modern, speedrun, ...")
    depth: int | None = model(
        None, "layers of a new model; width, tokens, batch, learning rates, weight decay follow if not given", least=1
    )
    config_overrides: str | None = model(
        None, "model settings that replace those of the preset: hidden_size=64,num_hidden_layers=2", may_be_empty=True
    )
    model_name_or_path: str | None = model(
        None, "model to fine-tune instead of training a new one: a folder or a name on the Hub; also GPT-2, Llama, ..."
    )
    lora_rank: int = model_decides(0, "train only LoRA adapters of this rank (PEFT); 0: train all weights", least=0)
    lora_alpha: float | None = model_decides(
        None, "LoRA adapters are scaled by lora_alpha / lora_rank; default: twice the rank", least=0
    )
    lora_target_modules: list[str] | None = model_decides(
        None, "linear layers that get LoRA adapters: q_proj, ...; default: all in the decoder layers"
    )

    data_dir: str | None = batch(None, "folder from prepare_data.py, or its name on the Hub (required)", card=False)
    block_size: int | None = batch(None, "tokens per sequence; default: that of the prepared data", least=1)
    per_device_train_batch_size: str = batch(
        "8", "sequences per forward pass and process; auto: the largest number that fits in memory", or_number=True
    )
    total_batch_size: int | None = batch(
        None, "tokens per optimizer step over all processes; default: those of one pass on each process", least=1
    )
    batch_size_warmup_steps: int = batch_decides(
        0, "steps over which the tokens per step grow to total_batch_size; 0: no growth", least=0
    )
    initial_total_batch_size: int | None = batch(
        None, "tokens of the first step of a batch-size warm-up; default: an eighth of total_batch_size", least=1
    )
    batch_size_ramp: list[float] | None = batch_decides(
        None,
        "tokens per step in equal parts of the run, relative to those of the last part: 1 2 4; learning rates follow "
        "with the square root",
        least=0.001,
    )
    sliding_window_ramp: list[float] | None = batch_decides(
        None, "sliding windows in equal parts of the run, relative to the last, which is the model's: 1 2 4", least=1e-3
    )
    document_masking: bool = batch_decides(
        False, "in training, tokens attend only to their own document in the block; evaluation does not mask documents"
    )
    max_document_length: int | None = batch_decides(
        None, "tokens after which document_masking begins a new document inside a longer one; default: none", least=1
    )
    seed: int = batch_decides(42, "random seed of initial weights, data order and dropout", least=0, most=2**63 - 1)

    max_steps: int = schedule(
        1000, "optimizer steps; a resumed run may change it if the past learning rates stay the same", least=1
    )
    learning_rate: float = rate_decides(6e-4, "peak learning rate of AdamW")
    embedding_learning_rate: float | None = rate_decides(
        None, "AdamW's peak learning rate for tables that are looked up by token ids; default: learning_rate"
    )
    head_learning_rate: float | None = rate_decides(
        None, "AdamW's peak learning rate for an output head that is not tied to the embedding; default: learning_rate"
    )
    scalar_learning_rate: float | None = rate_decides(
        None, "AdamW's peak learning rate for norm gains, biases and scalars; default: learning_rate"
    )
    muon_learning_rate: float = rate_decides(
        0.02, "peak learning rate of Muon; only with --optimizer muon", optimizer="muon"
    )
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = rate_decides(
        "cosine", "shape of the learning-rate decay after the warm-up"
    )
    warmup_steps: int | None = rate_decides(None, "steps of linear learning-rate warm-up; default: none")
    warmup_ratio: float | None = rate_decides(None, "warmup_steps as a fraction of max_steps", most=1)
    decay_steps: int | None = rate_decides(
        None, "number of last steps in which warmup_stable_decay decays; default: a fifth of max_steps"
    )
    decay_ratio: float | None = rate_decides(None, "decay_steps as a fraction of max_steps", most=1)
    decay_type: Literal["1-sqrt", "linear", "cosine"] | None = rate_decides(
        None, "shape of the decay of warmup_stable_decay; default: 1-sqrt"
    )
    min_lr_ratio: float = rate_decides(0.1, "final learning rate as a fraction of the peak (not for constant)", most=1)

    optimizer: str = optimizer_decides(
        "adamw", "adamw, or muon: Muon for the matrices inside the layers and AdamW for the rest"
    )
    weight_decay: float = optimizer_decides(0.1, "weight decay of matrices, multiplied by the learning rate")
    adam_beta1: float = optimizer_decides(0.9, "decay rate of AdamW's average of gradients", most=0.99999)
    adam_beta2: float = optimizer_decides(0.95, "decay rate of AdamW's average of squared gradients", most=0.99999)
    adam_epsilon: float = optimizer_decides(1e-8, "small number added to the denominator of AdamW's update")
    cautious_weight_decay: bool = optimizer_decides(
        False, "AdamW and Muon decay only weights that the same update moves towards zero (arXiv:2510.12402)"
    )
    muon_momentum_warmup_steps: int = muon_decides(
        300, "steps over which Muon's momentum grows from 0.85 to 0.95; only with --optimizer muon"
    )
    muon_momentum_cooldown_steps: int = muon_decides(
        0, "last steps over which Muon's momentum shrinks from 0.95 to 0.85; only with --optimizer muon"
    )
    muon_coefficients: Literal["quintic", "polar_express"] = muon_decides(
        "quintic", "polynomials of Muon's five steps, arXiv:2505.16932 for polar_express; only with --optimizer muon"
    )
    muon_normalize_rows: bool = muon_decides(
        False, "NorMuon (arXiv:2510.05491): rows of Muon's updates get equal sizes; only with --optimizer muon"
    )
    max_grad_norm: float = optimizer_decides(1.0, "clip the gradient's global norm to this value; 0: no clipping")
    z_loss: float = optimizer_decides(
        0.0, "weight of log(sum(exp(logits)))^2 added to the minimised loss, such as 1e-4; not in the reported loss"
    )
    multi_token_prediction: list[float] | None = optimizer_decides(
        None,
        "first weights of the losses of the tokens after the next one, such as 0.5 0.25, which fall to 0 one after the "
        "other; not in the reported loss",
    )
    average_last: float | None = optimizer_decides(
        None, "last fraction of max_steps whose weights are averaged to the final model, such as 0.1", most=1
    )

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = speed(
        None,
        "precision of matrix products; auto: bf16 if the device computes it fast, otherwise no (fp32); default: what "
        "accelerate launch says, otherwise no",
    )
    torch_compile: bool = speed(False, "compile the model for training with torch.compile")
    attn_implementation: str | None = speed(
        None,
        "attention kernel: sdpa, flash_attention_2, flex_attention, blockwise, ...; default: blockwise for bf16 on a "
        "CPU, otherwise sdpa",
    )
    gradient_checkpointing: bool = speed(
        False, "recompute activations in the backward pass: uses less memory, about 30 %% slower"
    )
    dataloader_num_workers: int = speed(
        0, "threads that read data ahead, for slow disks; 0: data is read when it is needed", least=0, most=256
    )

    logging_steps: int = record(10, "steps between two lines of metrics.jsonl", least=1)
    eval_steps: int = record(100, "steps between two evaluations; 0: evaluate only at the end", least=0)
    eval_blocks: int | None = record(None, "validation sequences per evaluation; default: all of them", least=1)
    eval_blocks_at: Literal["equal_distances", "start"] = record(
        "equal_distances", "validation sequences that eval_blocks selects: evenly spaced ones, or the first ones"
    )
    per_device_eval_batch_size: int = record(8, "sequences per forward pass and process in evaluation", least=1)
    sample_prompts: list[str] | None = record(
        None,
        "prompts that the model continues at each evaluation; '': an empty prompt, the start of a document",
        may_be_empty=True,
        card=False,
    )
    eval_tasks: list[str] | None = record(
        None, "also evaluate on hellaswag, lambada: from the Hub, or a JSON-lines file: hellaswag=FILE", card=False
    )
    eval_tasks_steps: int = record(0, "steps between two evaluations on eval_tasks; 0: only at the end", least=0)
    eval_tasks_limit: int | None = record(None, "documents per task, the first ones; default: all of them", least=1)
    sample_max_new_tokens: int = record(64, "maximum number of tokens generated per sample", least=1, card=False)
    report_to: list[str] = record(
        default_factory=lambda: ["none"],
        help="trackers that receive the rows of metrics.jsonl: none, trackio, tensorboard, wandb",
        card=False,
    )
    project: str = record("gpt2-modern", "project name in trackio and wandb", card=False)
    run_name: str | None = record(None, "run name in the trackers; default: made from output_dir", card=False)

    output_dir: str | None = checkpoint(None, "folder for the model and its records (required)", card=False)
    export_stock: Literal["auto", "true", "false"] = checkpoint(
        "auto",
        "also write the model as a stock class of transformers, to output_dir/stock; auto: if one has the same logits; "
        "true: refuse to train a model without one",
        card=False,
    )
    save_steps: int = checkpoint(100, "steps between two checkpoints; 0: save none", least=0)
    save_total_limit: int = checkpoint(2, "number of newest checkpoints to keep; 0: all", least=0)
    save_failure: Literal["warn", "stop"] = checkpoint(
        "warn", "if a checkpoint cannot be written: warn and continue the run, or stop it with an error"
    )
    resume_from_checkpoint: str = checkpoint(
        "auto", "auto (newest in output_dir), hub (or newer on the Hub), none (step 0), or a folder", card=False
    )
    force_resume: bool = checkpoint(
        False, "resume although settings have changed, at the checkpoint's step in the new data order"
    )
    max_train_time: str | None = checkpoint(
        None, "save and stop after this time: seconds, or hours:minutes:seconds", or_number=True
    )
    on_nonfinite: Literal["stop", "skip"] = checkpoint(
        "stop", "if the loss or gradient is NaN or infinite: stop the run before the update, or skip the update"
    )
    max_nonfinite_steps: int = checkpoint(3, "maximum number of consecutive skipped updates before stopping", least=0)
    ddp_timeout: int = checkpoint(
        1800, "seconds that a process waits for the others before the run ends with an error", least=1
    )

    push_to_hub: bool = hub(False, "upload the model folder to the Hugging Face Hub in the background")
    hub_model_id: str | None = hub(None, "Hub repository, owner/name; default: output_dir's name in your account")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = hub(
        "end",
        "end: upload only the finished model; every_save: also the model of each checkpoint, replacing the previous "
        "one; checkpoint: the same in the folder last-checkpoint, with what --resume_from_checkpoint hub needs",
    )
    hub_private_repo: bool | None = hub(None, "make a new repository private; default: the owner's Hub setting")
    hub_revision: str | None = hub(None, "Hub branch to upload to; created if it is missing")
    license: str | None = hub(None, "licence of the weights in the model card, as a Hub identifier: apache-2.0, ...")

    def __post_init__(self):
        for field in dataclasses.fields(self):  # Python code may give a folder as a Path
            if isinstance(value := getattr(self, field.name), Path):
                setattr(self, field.name, str(value))
        words = dict.fromkeys(["true", "yes", "t", "y", "1"], "true") | dict.fromkeys(
            ["false", "no", "f", "n", "0"], ""
        )
        self.dry_run = words.get(str(self.dry_run).lower(), self.dry_run)
        if (self.data_dir is None or self.output_dir is None) and not self.dry_run:
            raise ValueError("--data_dir and --output_dir are required, as flags or in the --config file")
        self.per_device_train_batch_size = number_or_auto(
            "--per_device_train_batch_size", self.per_device_train_batch_size
        )
        if self.per_device_train_batch_size == "auto" and self.total_batch_size is None:
            raise ValueError("--per_device_train_batch_size auto needs --total_batch_size; set it or give a number")
        check_ranges(self)
        if self.lora_rank == 0 and (self.lora_alpha is not None or self.lora_target_modules):
            raise ValueError("--lora_alpha and --lora_target_modules need --lora_rank above 0; set it or omit them")
        if self.initial_total_batch_size is not None and not self.batch_size_warmup_steps:
            raise ValueError("--initial_total_batch_size needs --batch_size_warmup_steps above 0; set it or omit both")
        if self.depth is not None and self.model_name_or_path is not None:
            raise ValueError(f"--depth {self.depth} is the size of a new model; omit it with --model_name_or_path")
        if (ramp := list(self.batch_size_ramp or [])) != sorted(ramp) or (ramp and self.batch_size_warmup_steps):
            raise ValueError(f"--batch_size_ramp {ramp} must rise, and replaces --batch_size_warmup_steps; omit one")
        if len(self.sliding_window_ramp or []) > (most := min(8, self.max_steps)):  # 8: torch.compile's limit
            raise ValueError(f"--sliding_window_ramp has more than {most} values (8, or --max_steps); give fewer")
        if self.max_document_length is not None and not self.document_masking:
            raise ValueError(f"--max_document_length {self.max_document_length} needs --document_masking true; set it")
        self._check_output_dir()
        self._check_hub_model_id()
        self.max_train_seconds()
        self.schedule  # noqa: B018  raises ValueError

    def _check_output_dir(self) -> None:
        check_writable_folder("--output_dir", self.output_dir)
        output_dir = os.path.realpath(self.output_dir or "")
        for flag, name, also in (
            ("--data_dir", self.data_dir, " or inside it"),
            ("--model_name_or_path", self.model_name_or_path, ""),
        ):
            taken = name and os.path.isdir(name) and os.path.realpath(name)
            if self.output_dir and taken and (output_dir == taken or (also and output_dir.startswith(taken + os.sep))):
                raise ValueError(f"--output_dir {self.output_dir} is the {flag}{also}; use another folder")

    def _check_hub_model_id(self) -> None:
        name = self.hub_model_id or (self.output_dir and Path(self.output_dir).resolve().name)
        if (self.push_to_hub or self.hub_model_id) and name:
            try:
                validate_repo_id(name)
            except HFValidationError:
                raise ValueError(f"--hub_model_id {name!r} is not a repository name; give owner/name") from None

    @functools.cached_property  # read in every step
    def schedule(self) -> Schedule:
        """Return the schedule of these settings; raises ValueError if they contradict each other."""
        warmup_steps = steps_from("warmup", self.warmup_steps, self.warmup_ratio, self.max_steps) or 0
        decay_steps = steps_from("decay", self.decay_steps, self.decay_ratio, self.max_steps)
        if decay_steps is None and self.lr_scheduler_type == "warmup_stable_decay":
            decay_steps = round(DEFAULT_DECAY_RATIO * self.max_steps)
        decays = (warmup_steps, decay_steps, self.decay_type, self.min_lr_ratio)
        others = (self.multi_token_prediction, self.average_last, self.batch_size_ramp, self.sliding_window_ramp)
        return Schedule(self.lr_scheduler_type, self.max_steps, *decays, *others)

    def max_train_seconds(self) -> float:
        """Return --max_train_time ('5400', '90:00', '1:30:00') in seconds, or infinity if it is not given.

        Raises ValueError for any other format, and for zero.
        """
        if self.max_train_time is None:
            return math.inf
        text = str(self.max_train_time)
        if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
            raise ValueError(
                f"--max_train_time {text} is invalid; give seconds, or hours:minutes:seconds such as 11:50:00"
            )
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
        if not seconds:
            raise ValueError(f"--max_train_time {text} must be above zero")
        return seconds

    def chosen(self, *, card: bool = False) -> dict[str, Any]:
        """Return the settings of the run that are not None, by flag name. card: only those that the model card lists
        and that have an effect with this optimizer."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
            and field.name not in ("config", "dry_run")  # they belong to the command, not to the run
            and (not card or (field.metadata.get("card", True) and self._has_effect(field)))
        }

    def _has_effect(self, field: dataclasses.Field) -> bool:
        return field.metadata.get("optimizer", self.optimizer) == self.optimizer

    def fixed_on_resume(self) -> dict[str, Any]:
        """Return the settings that decide the updates, metadata resume="same", by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("resume") == "same"
        }
