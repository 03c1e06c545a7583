"""Train a GPT-2-class language model on prepared data.

    python train_accelerate.py --config recipes/demo.yaml --data_dir data/stdlib --output_dir out/demo
    accelerate launch --config_file accelerate_configs/one_gpu_bf16.yaml train_accelerate.py --config ... [--flag value]
    accelerate launch --config_file accelerate_configs/eight_gpus_ddp.yaml train_accelerate.py --config ...
    accelerate launch --config_file accelerate_configs/two_nodes_ddp.yaml --machine_rank 0 --main_process_ip HOST0 ...
    accelerate launch --config_file accelerate_configs/fsdp2_one_node.yaml train_accelerate.py --config ...
    torchrun --nproc_per_node 8 train_accelerate.py --config ... --mixed_precision bf16
    sbatch accelerate_configs/slurm_two_nodes.sbatch --config ...

On two nodes the second gets --machine_rank 1. The command line wins over the recipe. The process count comes from the
launcher; every hyperparameter comes from here.
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gpt2modern.cli import (
    check_range,
    check_writable_folder,
    exit_code_2_on_user_error,
    number_or_auto,
    parse_arguments,
)
from gpt2modern.errors import GPT2ModernError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from gpt2modern.training.batches import BatchPlan
    from gpt2modern.training.run import Run
    from gpt2modern.training.schedules import Schedule
    from gpt2modern.training.stopping import StopRequest


@dataclass
class TrainConfig:
    # Settings that decide which update follows which: a checkpoint is continued only under the same ones. The rest (the
    # micro-batch, the number of processes, what is logged) may change at any restart; max_steps where the learning rate
    # has not depended on it yet (training/resume.py).
    SETTINGS_OF_EVERY_UPDATE: ClassVar[tuple[str, ...]] = (
        "seed", "document_masking", "batch_size_warmup_steps", "optimizer",
        "learning_rate", "embedding_learning_rate", "scalar_learning_rate", "muon_learning_rate",
        "muon_momentum_warmup_steps", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "decay_steps", "decay_ratio",
        "decay_type", "min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "z_loss", "lora_rank", "lora_alpha", "lora_target_modules",
    )  # fmt: skip

    config: str | None = field(default=None, metadata={"help": "YAML recipe: the same keys as these flags"})
    dry_run: bool = field(
        default=False, metadata={"help": "print the resolved recipe, its sizes and its cost, and stop; needs no data"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder written by prepare_data.py, or its name on the Hub (needed)"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "folder for the model and its records (needed)"})

    model_preset: str = field(default="modern", metadata={"help": "architecture and size: gpt2, modern, ..."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "model settings over the preset's: hidden_size=64,num_hidden_layers=2", "may_be_empty": True},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "fine-tune this GPT2-Modern model, a folder or a name on the Hub, not a preset"}
    )
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank alone (PEFT); 0: every weight"})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "what adapters add is scaled by lora_alpha / lora_rank; default: twice the rank"},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "projections that get adapters: q_proj, ...; default: all in the layers"}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "attention kernel: eager, sdpa, flash_attention_2, flex_attention, ..."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass: less memory, about 30 %% slower"}
    )

    block_size: int | None = field(default=None, metadata={"help": "tokens per sequence; default: that of the data"})
    per_device_train_batch_size: str = field(
        default="8", metadata={"help": "sequences per forward pass and process; auto: as many as fit in memory"}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "sequences per evaluation pass and process"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens per optimizer step over all processes; default: one forward pass each"}
    )
    batch_size_warmup_steps: int = field(
        default=0, metadata={"help": "steps over which the tokens per step grow to total_batch_size"}
    )
    initial_total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens of that warm-up's first step; default: an eighth of total_batch_size"}
    )
    document_masking: bool = field(
        default=False,
        metadata={"help": "a token sees its own document only, not those before it in the block (validation: all)"},
    )
    max_steps: int = field(
        default=1000,
        metadata={
            "help": "optimizer steps; a run goes on to another number if its learning rate so far stays the same"
        },
    )

    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "muon: Muon for the matrices inside the layers, AdamW for the rest"}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "peak learning rate of AdamW"})
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "AdamW's for the token embedding; default: learning_rate"}
    )
    scalar_learning_rate: float | None = field(
        default=None, metadata={"help": "AdamW's for gains, biases and scalars; default: learning_rate"}
    )
    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "peak learning rate of Muon; without --optimizer muon of no effect"}
    )
    muon_momentum_warmup_steps: int = field(
        default=300,
        metadata={"help": "steps over which Muon's momentum goes from 0.85 to 0.95; without it of no effect"},
    )
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = field(
        default="cosine", metadata={"help": "fall of the learning rate after the warm-up"}
    )
    warmup_steps: int | None = field(default=None, metadata={"help": "steps of linear warm-up; default: none"})
    warmup_ratio: float | None = field(default=None, metadata={"help": "the same as a share of max_steps"})
    decay_steps: int | None = field(
        default=None, metadata={"help": "last steps, in which warmup_stable_decay falls; default: a fifth of max_steps"}
    )
    decay_ratio: float | None = field(default=None, metadata={"help": "the same as a share of max_steps"})
    decay_type: Literal["1-sqrt", "linear", "cosine"] | None = field(
        default=None, metadata={"help": "shape of warmup_stable_decay's fall; default: 1-sqrt"}
    )
    min_lr_ratio: float = field(
        default=0.1, metadata={"help": "last learning rate, as a share of the peak; without effect on constant"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "decay of matrices, times the learning rate"})
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of the gradient average"})
    adam_beta2: float = field(default=0.95, metadata={"help": "decay of the squared-gradient average"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "added to the denominator"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient to this norm; 0: no clipping"})
    z_loss: float = field(
        default=0.0, metadata={"help": "weight of log(sum(exp(logits)))^2 in what is minimised, as 1e-4; not in `loss`"}
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "precision of matrix products; default: what accelerate launch says, else no"}
    )
    torch_compile: bool = field(default=False, metadata={"help": "compile the training step's model"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read ahead; 0: read in line"})
    ddp_timeout: int = field(
        default=1800, metadata={"help": "seconds a process waits for the others before the run ends with an error"}
    )
    seed: int = field(default=42, metadata={"help": "weights, data order and dropout"})

    logging_steps: int = field(default=10, metadata={"help": "steps between lines of metrics.jsonl"})
    eval_steps: int = field(default=100, metadata={"help": "steps between evaluations; 0: only at the end"})
    eval_blocks: int | None = field(default=None, metadata={"help": "validation sequences used; default: all of them"})
    eval_blocks_at: Literal["equal_distances", "start"] = field(
        default="equal_distances", metadata={"help": "which these are: spread over the split, or its first ones"}
    )
    save_steps: int = field(default=100, metadata={"help": "steps between checkpoints; 0: none"})
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints kept; 0: all"})
    save_failure: Literal["warn", "stop"] = field(
        default="warn", metadata={"help": "a checkpoint cannot be written: go on with the older ones, or stop"}
    )
    max_train_time: str | None = field(
        default=None, metadata={"help": "save and stop after this time: seconds, or hours:minutes:seconds"}
    )
    on_nonfinite: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "a loss or gradient that is no number: stop before it is applied, or skip it"}
    )
    max_nonfinite_steps: int = field(default=3, metadata={"help": "steps skipped so in a row before the run stops"})
    resume_from_checkpoint: str = field(
        default="auto", metadata={"help": "auto (the newest whole one in output_dir), none, or a checkpoint folder"}
    )
    force_resume: bool = field(
        default=False,
        metadata={"help": "go on from a checkpoint of other settings; its place in the data is that step's of the new"},
    )

    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "trackers that get the rows of metrics.jsonl too: none, or of trackio tensorboard wandb"},
    )
    project: str = field(default="gpt2-modern", metadata={"help": "project of trackio and wandb"})
    run_name: str | None = field(default=None, metadata={"help": "name in the trackers; default: made of output_dir"})
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "texts that the model continues at each evaluation; '': a document's start",
            "may_be_empty": True,
        },
    )
    sample_max_new_tokens: int = field(default=64, metadata={"help": "tokens of each sample at most"})

    push_to_hub: bool = field(default=False, metadata={"help": "upload the model folder in the background"})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "repository, owner/name; default: output_dir's name, with your account"}
    )
    hub_strategy: Literal["end", "every_save", "checkpoint"] = field(
        default="end",
        metadata={
            "help": "end: the finished model; every_save: also each checkpoint's, in its place; checkpoint: also each "
            "checkpoint's, in the repository's folder last-checkpoint"
        },
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "whether a new repository is private; default: as its owner has set"}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "branch to upload to; made where it is missing"})
    license: str | None = field(
        default=None, metadata={"help": "the model's licence in its card: an identifier of the Hub, as apache-2.0"}
    )

    def __post_init__(self):
        if (self.data_dir is None or self.output_dir is None) and not self.dry_run:
            raise ValueError("--data_dir and --output_dir are needed, on the command line or in the --config file")
        self.per_device_train_batch_size = number_or_auto(
            "--per_device_train_batch_size", self.per_device_train_batch_size
        )
        if self.per_device_train_batch_size == "auto" and self.total_batch_size is None:
            raise ValueError("--per_device_train_batch_size auto divides a step, whose --total_batch_size is not given")
        for name in (
            "block_size", "per_device_eval_batch_size", "total_batch_size", "initial_total_batch_size", "max_steps",
            "logging_steps", "eval_blocks", "sample_max_new_tokens", "ddp_timeout",
        ):  # fmt: skip
            check_range(f"--{name}", getattr(self, name), 1)
        for name in (
            "batch_size_warmup_steps", "warmup_steps", "decay_steps", "muon_momentum_warmup_steps", "eval_steps",
            "save_steps", "save_total_limit", "learning_rate", "embedding_learning_rate",
            "scalar_learning_rate", "muon_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm",
            "z_loss", "max_nonfinite_steps",
        ):  # fmt: skip
            check_range(f"--{name}", getattr(self, name), 0)
        most_of = {"min_lr_ratio": 1, "warmup_ratio": 1, "decay_ratio": 1, "adam_beta1": 0.99999, "adam_beta2": 0.99999}
        for name, most in (most_of | {"seed": 2**63 - 1, "dataloader_num_workers": 256}).items():
            check_range(f"--{name}", getattr(self, name), 0, most)
        for name in self.report_to:
            if name not in ("none", "trackio", "tensorboard", "wandb"):
                raise ValueError(f"--report_to {name}: there are none, trackio, tensorboard and wandb")
        self.check_output_dir()
        self.check_hub_model_id()
        check_range("--lora_rank", self.lora_rank, 0)
        check_range("--lora_alpha", self.lora_alpha, 0)
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_target_modules):
            raise ValueError("--lora_alpha and --lora_target_modules need --lora_rank")
        if self.lora_rank and self.optimizer == "muon":
            raise ValueError("--optimizer muon is for whole matrices; use adamw with --lora_rank")
        if self.initial_total_batch_size is not None and not self.batch_size_warmup_steps:
            raise ValueError("--initial_total_batch_size needs --batch_size_warmup_steps")
        if self.max_train_time is not None:
            from gpt2modern.training.stopping import parse_duration

            parse_duration(self.max_train_time)
        self.schedule()

    def check_output_dir(self) -> None:
        check_writable_folder("--output_dir", self.output_dir)
        output_dir = os.path.realpath(self.output_dir or "")
        for flag, name, also in (
            ("--data_dir", self.data_dir, " or inside of it"),
            ("--model_name_or_path", self.model_name_or_path, ""),
        ):
            taken = name and os.path.isdir(name) and os.path.realpath(name)
            if self.output_dir and taken and (output_dir == taken or (also and output_dir.startswith(taken + os.sep))):
                raise ValueError(f"--output_dir {self.output_dir} is the {flag}{also}; name another folder")

    def check_hub_model_id(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        name = self.hub_model_id or (self.output_dir and Path(self.output_dir).resolve().name)
        if (self.push_to_hub or self.hub_model_id) and name:
            try:
                validate_repo_id(name)
            except HFValidationError:
                raise ValueError(f"--hub_model_id {name!r} is no repository name; give owner/name") from None

    def batch_plan(self, block_size: int, num_processes: int) -> "BatchPlan":
        """How a step is divided; with an automatic micro-batch, for now, into single sequences."""
        from gpt2modern.training.batches import plan_batches

        is_auto = self.per_device_train_batch_size == "auto"
        return plan_batches(
            total_batch_size=self.total_batch_size,
            block_size=block_size,
            per_device_train_batch_size=1 if is_auto else self.per_device_train_batch_size,
            num_processes=num_processes,
            batch_size_warmup_steps=self.batch_size_warmup_steps,
            initial_total_batch_size=self.initial_total_batch_size,
        )

    def schedule(self) -> "Schedule":
        """The learning rate's course; raises ValueError for parts that contradict each other."""
        from gpt2modern.training.schedules import DEFAULT_DECAY_RATIO, Schedule, steps_from

        warmup_steps = steps_from("warmup", self.warmup_steps, self.warmup_ratio, self.max_steps) or 0
        decay_steps = steps_from("decay", self.decay_steps, self.decay_ratio, self.max_steps)
        if decay_steps is None and self.lr_scheduler_type == "warmup_stable_decay":
            decay_steps = round(DEFAULT_DECAY_RATIO * self.max_steps)
        return Schedule(
            self.lr_scheduler_type, self.max_steps, warmup_steps, decay_steps, self.decay_type, self.min_lr_ratio
        )


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    config = parse_arguments(TrainConfig, argv, __doc__)

    from gpt2modern.training.dry_run import dry_run
    from gpt2modern.training.launch import build_accelerator
    from gpt2modern.training.progress import finish
    from gpt2modern.training.resume import resume
    from gpt2modern.training.run import closed_batches
    from gpt2modern.training.stopping import StopRequest, leave

    accelerator = build_accelerator(mixed_precision=config.mixed_precision, ddp_timeout=config.ddp_timeout)
    config.mixed_precision = accelerator.mixed_precision  # the launcher's, where none was given: for what is recorded
    if config.dry_run:
        return dry_run(config, accelerator)
    with StopRequest(config.max_train_time, started) as stop_request:
        run = build_run(config, accelerator, stop_request)
        with run.roll_call.on_failure(), closed_batches(run):
            resume(run)
            train(run)
            if run.stopping:
                leave(run)
            finish(run)


def train(run: "Run") -> None:
    """The steps that are left, or those until all processes stop."""
    from gpt2modern.training.progress import progress_bar, publish_checkpoint, record, training_metrics
    from gpt2modern.training.resume import save

    config = run.config
    with progress_bar(run) as bar:
        if run.step and evaluation_is_due(run):  # the run was stopped before it was over
            record(run, bar, evaluate(run))
        while run.step < config.max_steps and not run.stopping:
            loss, grad_norm, learning_rate = train_step(run)
            run.step += 1
            last = run.step == config.max_steps
            metrics = {}
            if is_due(run.step, config.logging_steps) or run.step == 1 or last:
                metrics |= training_metrics(run, loss, grad_norm, learning_rate)
            if evaluation_is_due(run):
                metrics |= evaluate(run)
            record(run, bar, metrics)
            due = is_due(run.step, config.save_steps) or (last and config.save_steps > 0) or run.stopping
            if due and save(run):
                publish_checkpoint(run)
            bar.update()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_is_due(run: "Run") -> bool:
    due = is_due(run.step, run.config.eval_steps) or run.step >= run.config.max_steps
    return due and run.evaluated_step != run.step and not run.stopping


def build_run(config: TrainConfig, accelerator: "Accelerator", stop_request: "StopRequest") -> "Run":
    """Open the data, build the model and let Accelerate place and wrap it; print what will be trained."""
    import torch

    from gpt2modern.data.blocks import PackedBlocks
    from gpt2modern.training.finetuning import starting_model
    from gpt2modern.training.launch import RollCall, refuse_fp16_on_cpu
    from gpt2modern.training.memory import largest_micro_batch_size
    from gpt2modern.training.metrics import peak_flops
    from gpt2modern.training.optimizers import OptimizerChain, build_optimizers
    from gpt2modern.training.run import Run
    from gpt2modern.training.samples import check_sample_prompts
    from gpt2modern.training.sharding import shard_model
    from gpt2modern.training.stopping import Agreement
    from gpt2modern.training.trackers import check_trackers

    refuse_fp16_on_cpu(accelerator)
    check_trackers(config.report_to)
    if config.lora_rank and accelerator.is_fsdp2:
        raise GPT2ModernError("--lora_rank does not go with FSDP2: adapters are small; use a DDP configuration")

    train_blocks = PackedBlocks(config.data_dir, "train", config.block_size)
    eval_blocks = PackedBlocks(config.data_dir, "validation", config.block_size)
    plan = config.batch_plan(train_blocks.block_size, accelerator.num_processes)
    torch.manual_seed(config.seed)
    unwrapped_model = starting_model(config, train_blocks)
    check_sample_prompts(
        config.sample_prompts,
        config.sample_max_new_tokens,
        tokenizer_path=train_blocks.tokenizer_path,
        model=unwrapped_model,
    )
    if config.per_device_train_batch_size == "auto":
        micro_batch_size = largest_micro_batch_size(
            accelerator,
            unwrapped_model,
            plan.micro_batch_sizes(),
            block_size=train_blocks.block_size,
            optimizer=config.optimizer,
            separator=train_blocks.eos_token_id if config.document_masking else None,
        )
        plan = replace(plan, micro_batch_size=micro_batch_size)
    if accelerator.is_fsdp2:
        shard_model(unwrapped_model, accelerator, torch_compile=config.torch_compile)
    optimizers = build_optimizers(
        unwrapped_model,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        embedding_learning_rate=config.embedding_learning_rate,
        scalar_learning_rate=config.scalar_learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
    )
    model = unwrapped_model
    if not accelerator.is_fsdp2:
        model = accelerator.prepare(model)
        model = torch.compile(model) if config.torch_compile else model
    accelerator.print(
        f"{config.model_name_or_path or config.model_preset}: {unwrapped_model.num_parameters():,} parameters, "
        f"{unwrapped_model.num_parameters(only_trainable=True):,} of them trained, on {accelerator.num_processes} x "
        f"{accelerator.device.type}{', sharded by FSDP2' if accelerator.is_fsdp2 else ''}, "
        f"precision {accelerator.mixed_precision}; {plan.samples_per_step} x "
        f"{train_blocks.block_size} tokens per step, {plan.grad_accum_steps(config.max_steps)} forward passes each"
    )
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        unwrapped_model=unwrapped_model,
        optimizers=optimizers,
        optimizer=accelerator.prepare_optimizer(OptimizerChain(optimizers), device_placement=False),
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
        plan=plan,
        schedule=config.schedule(),
        device_flops=peak_flops(accelerator.device),
        roll_call=RollCall(accelerator, config.ddp_timeout),
        agreement=Agreement(accelerator, config.ddp_timeout),
        stop_request=stop_request,
    )


def train_step(run: "Run") -> tuple["torch.Tensor", "torch.Tensor", float]:
    """One optimizer update. Returns this process's part of the step's mean loss (nats/token; the mean over processes
    is the step's), the gradient norm before clipping and the learning rate; the tensors stay on the device.

    The loss of each micro-batch is its sum over the step's target tokens of all processes, not a mean of means: the
    gradient is that of one big batch however it is divided.
    """
    import torch

    from gpt2modern.training.batches import samples_of_step
    from gpt2modern.training.faults import may_update
    from gpt2modern.training.models import objective_and_loss
    from gpt2modern.training.optimizers import set_schedule
    from gpt2modern.training.run import hash_seed
    from gpt2modern.training.sharding import whole_tensor

    config, accelerator = run.config, run.accelerator
    factor = run.schedule.factor(run.step)
    set_schedule(
        run.optimizers,
        step=run.step,
        learning_rate_factor=factor,
        muon_momentum_warmup_steps=config.muon_momentum_warmup_steps,
    )
    # Dropout depends on (seed, step, process) alone, so that no generator has to be saved for an exact resume.
    torch.manual_seed(hash_seed(config.seed, run.step, accelerator.process_index))
    samples = samples_of_step(len(run.train_blocks), run.plan, seed=config.seed, step=run.step)
    # DistributedDataParallel averages gradients over processes; dividing by the targets per process makes it a sum.
    # A tensor, because a compiled step would be compiled again for another number.
    targets_per_process = torch.tensor(
        run.train_blocks.num_targets(samples) / accelerator.num_processes, device=accelerator.device
    )
    separator = run.train_blocks.eos_token_id if config.document_masking else None
    grad_accum_steps = run.plan.grad_accum_steps(run.step)

    run.model.train()
    loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(grad_accum_steps):
        batch = next(run.batches).to(accelerator.device, non_blocking=True)
        last = micro_step == grad_accum_steps - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            objective, micro_loss = objective_and_loss(
                run.model, batch, num_items=targets_per_process, separator=separator, z_loss=config.z_loss
            )
            accelerator.backward(objective)
        loss += micro_loss
    grad_norm = whole_tensor(accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf))
    if may_update(run, loss, grad_norm, samples):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, config.learning_rate * factor


def evaluate(run: "Run") -> dict[str, Any]:
    """Validation loss (nats/token) as a part of a row for metrics.jsonl, and samples; no training time.

    Nothing, if the processes are asked to stop while it runs: the run that goes on begins with this evaluation.
    """
    from gpt2modern.evaluation.generation import generate_text
    from gpt2modern.evaluation.loss import evaluate_loss
    from gpt2modern.training.run import stop_if_not_finite
    from gpt2modern.training.samples import sample
    from gpt2modern.training.sharding import reshard
    from gpt2modern.training.stopping import agree_to_stop

    run.stopwatch.pause()
    try:
        loss = evaluate_loss(
            run.unwrapped_model,
            run.eval_blocks,
            batch_size=run.config.per_device_eval_batch_size,
            process_index=run.accelerator.process_index,
            num_processes=run.accelerator.num_processes,
            max_blocks=run.config.eval_blocks,
            from_start=run.config.eval_blocks_at == "start",
            should_stop=lambda: bool(agree_to_stop(run)),
        )
        if loss is None:
            return {}
        stop_if_not_finite(run, "validation loss", loss)
        run.evaluated_step, run.eval_loss = run.step, loss
        sample(run, generate_text)
        return {"eval_loss": loss}
    finally:
        reshard(run.unwrapped_model)
        run.stopwatch.resume()


if __name__ == "__main__":
    main()
