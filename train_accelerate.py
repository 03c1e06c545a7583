"""Train a GPT-2-class language model on prepared data.

    python train_accelerate.py --config recipes/demo.yaml --data_dir data/stdlib --output_dir out/demo
    accelerate launch --config_file accelerate_configs/one_gpu_bf16.yaml train_accelerate.py --config ... [--flag value]
    accelerate launch --config_file accelerate_configs/eight_gpus_ddp.yaml train_accelerate.py --config ...

The command line wins over the recipe. The process count comes from the launcher; every hyperparameter comes from here.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from command_line import UserError, check_range, exit_code_2_on_user_error, parse_arguments

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from modeling_gpt2modern import GPT2ModernForCausalLM
    from training.batches import BatchPlan
    from training.blocks import PackedBlocks
    from training.metrics import MetricsLog, Stopwatch


@dataclass
class TrainConfig:
    config: str | None = field(default=None, metadata={"help": "YAML recipe: the same keys as these flags"})
    data_dir: str | None = field(default=None, metadata={"help": "folder written by prepare_data.py (needed)"})
    output_dir: str | None = field(default=None, metadata={"help": "folder for the model and its records (needed)"})

    model_preset: str = field(default="modern", metadata={"help": "architecture and size: gpt2, modern, ..."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "model settings over the preset's: hidden_size=64,num_hidden_layers=2"}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "attention kernel: eager, sdpa, flash_attention_2, flex_attention, ..."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass: less memory, about 30 %% slower"}
    )

    block_size: int | None = field(default=None, metadata={"help": "tokens per sequence; default: that of the data"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "sequences per forward pass and process"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "sequences per evaluation pass and process"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens per optimizer step over all processes; default: one forward pass each"}
    )
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})

    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "muon: Muon for the matrices inside the layers, AdamW for the rest"}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "peak learning rate of AdamW"})
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "AdamW's for the token embedding; default: learning_rate"}
    )
    muon_learning_rate: float = field(default=0.02, metadata={"help": "peak learning rate of Muon"})
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "fall of the learning rate after the warm-up"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    min_lr_ratio: float = field(default=0.1, metadata={"help": "last learning rate, as a share of the peak"})
    weight_decay: float = field(default=0.1, metadata={"help": "decay of matrices, times the learning rate"})
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of the gradient average"})
    adam_beta2: float = field(default=0.95, metadata={"help": "decay of the squared-gradient average"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "added to the denominator"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient to this norm; 0: no clipping"})

    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "precision of matrix products; default: what accelerate launch says, else no"}
    )
    torch_compile: bool = field(default=False, metadata={"help": "compile the training step's model"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read ahead; 0: read in line"})
    seed: int = field(default=42, metadata={"help": "weights, data order and dropout"})

    logging_steps: int = field(default=10, metadata={"help": "steps between lines of metrics.jsonl"})
    eval_steps: int = field(default=100, metadata={"help": "steps between evaluations; 0: only at the end"})
    eval_blocks: int | None = field(default=None, metadata={"help": "validation sequences used; default: all of them"})
    save_steps: int = field(default=100, metadata={"help": "steps between checkpoints; 0: none"})
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints kept; 0: all"})
    resume_from_checkpoint: str = field(
        default="auto", metadata={"help": "auto (the newest whole one in output_dir), none, or a checkpoint folder"}
    )

    def __post_init__(self):
        if self.data_dir is None or self.output_dir is None:
            raise ValueError("--data_dir and --output_dir are needed, on the command line or in the --config file")
        for name in (
            "block_size", "per_device_train_batch_size", "per_device_eval_batch_size", "total_batch_size", "max_steps",
            "logging_steps", "eval_blocks",
        ):  # fmt: skip
            check_range(f"--{name}", getattr(self, name), 1)
        for name in (
            "warmup_steps", "eval_steps", "save_steps", "save_total_limit", "dataloader_num_workers", "learning_rate",
            "embedding_learning_rate", "muon_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm",
        ):  # fmt: skip
            check_range(f"--{name}", getattr(self, name), 0)
        for name, most in {"min_lr_ratio": 1, "adam_beta1": 0.99999, "adam_beta2": 0.99999, "seed": 2**63 - 1}.items():
            check_range(f"--{name}", getattr(self, name), 0, most)
        if Path(self.data_dir).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"--output_dir {self.output_dir} is the --data_dir; name another folder")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}")


# Settings that decide which update follows which: a checkpoint is continued only under the same ones. The rest (the
# micro-batch, the number of processes, what is logged, how long the run lasts) may change at any restart.
SETTINGS_OF_EVERY_UPDATE = (
    "seed", "optimizer", "learning_rate", "embedding_learning_rate", "muon_learning_rate",
    "lr_scheduler_type", "warmup_steps", "min_lr_ratio", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


@dataclass
class Run:
    """Everything the loop holds. `step` and `wall_time_s` are saved; what else a run's position needs follows from
    the step: data order, learning rate and dropout are functions of (seed, step)."""

    config: TrainConfig
    accelerator: "Accelerator"
    model: "torch.nn.Module"  # wrapped and maybe compiled: what is trained
    unwrapped_model: "GPT2ModernForCausalLM"  # the same weights: what is evaluated, sampled from and saved
    optimizers: "list[torch.optim.Optimizer]"
    train_blocks: "PackedBlocks"
    eval_blocks: "PackedBlocks"
    plan: "BatchPlan"
    device_flops: float | None
    step: int = 0
    wall_time_s: float = 0.0  # of earlier processes of this run
    batches: "Iterator[torch.Tensor]" = None
    log: "MetricsLog" = None
    stopwatch: "Stopwatch" = None

    @property
    def tokens_per_step(self) -> int:
        return self.plan.samples_per_step * self.train_blocks.block_size

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(TrainConfig, argv, __doc__)
    run = build_run(config)
    resume(run)
    metrics = {}
    with progress_bar(run) as bar:
        while run.step < config.max_steps:
            loss, grad_norm, learning_rate = train_step(run)
            run.step += 1
            last = run.step == config.max_steps
            saves = is_due(run.step, config.save_steps) or (last and config.save_steps > 0)
            metrics = {}
            if is_due(run.step, config.logging_steps) or run.step == 1 or last:
                metrics |= training_metrics(run, loss, grad_norm, learning_rate)
            if is_due(run.step, config.eval_steps) or last:
                metrics |= evaluate(run)
            if metrics:
                record(run, bar, metrics)
            if saves:
                save(run)
            bar.update()
    finish(run, metrics.get("eval_loss"))


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build_run(config: TrainConfig) -> Run:
    """Open the data, build the model and let Accelerate place and wrap it; print what will be trained."""
    import torch

    from training.batches import plan_batches
    from training.blocks import PackedBlocks
    from training.metrics import peak_flops
    from training.models import build_model
    from training.optimizers import build_optimizers

    accelerator = build_accelerator(config)
    train_blocks = PackedBlocks(config.data_dir, "train", config.block_size)
    eval_blocks = PackedBlocks(config.data_dir, "validation", config.block_size)
    plan = plan_batches(
        total_batch_size=config.total_batch_size,
        block_size=train_blocks.block_size,
        per_device_train_batch_size=config.per_device_train_batch_size,
        num_processes=accelerator.num_processes,
    )
    torch.manual_seed(config.seed)
    unwrapped_model = build_model(
        model_preset=config.model_preset,
        config_overrides=config.config_overrides,
        attn_implementation=config.attn_implementation,
        gradient_checkpointing=config.gradient_checkpointing,
        blocks=train_blocks,
    )
    optimizers = build_optimizers(
        unwrapped_model,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        embedding_learning_rate=config.embedding_learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
    )
    model, *optimizers = accelerator.prepare(unwrapped_model, *optimizers)
    if config.torch_compile:
        model = torch.compile(model)
    accelerator.print(
        f"{config.model_preset}: {unwrapped_model.num_parameters():,} parameters on {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}; {plan.samples_per_step} x "
        f"{train_blocks.block_size} tokens per step, {plan.grad_accum_steps} forward passes each"
    )
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        unwrapped_model=unwrapped_model,
        optimizers=optimizers,
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
        plan=plan,
        device_flops=peak_flops(accelerator.device),
    )


def build_accelerator(config: TrainConfig) -> "Accelerator":
    """Raises UserError where a launch would silently train one copy per process."""
    import torch
    from accelerate import Accelerator
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar is enough; transformers draws another for every file it writes
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    launched = os.environ.get("WORLD_SIZE", "1")
    if not launched.isdigit():
        raise UserError(f"the environment has WORLD_SIZE={launched!r}, which is no number: unset it, or use a launcher")
    try:
        # Accelerate joins CPU processes only if told that the CPU is meant; otherwise each would train alone.
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision)
    except ValueError as error:
        raise UserError(f"cannot set up {launched} process(es), precision {config.mixed_precision}: {error}") from None
    if int(launched) != accelerator.num_processes:
        raise UserError(
            f"the launcher started WORLD_SIZE={launched} processes but Accelerate joined "
            f"{accelerator.num_processes}: each would train alone; use a file of accelerate_configs/ for this machine"
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise UserError(f"the launcher asks for precision {accelerator.mixed_precision!r}; there are no, fp16 and bf16")
    if accelerator.mixed_precision == "fp16" and config.optimizer == "muon":
        raise UserError("--optimizer muon does not go with fp16: the loss scale serves one optimizer; use bf16 or no")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"the Accelerate configuration sets gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; "
            f"remove it: accumulation follows from --total_batch_size"
        )
    return accelerator


def resume(run: Run) -> None:
    """Load the checkpoint asked for, if there is one, and open what depends on the position: batches and the log."""
    from accelerate.utils import broadcast_object_list

    from training.batches import training_batches
    from training.checkpoints import (
        checkpoint_to_resume,
        load_checkpoint,
        read_trainer_state,
        refuse_changed_settings,
        set_aside_later_checkpoints,
    )
    from training.export import write_resolved_config
    from training.metrics import MetricsLog, Stopwatch

    config, accelerator = run.config, run.accelerator
    checkpoint = None
    if accelerator.is_main_process:
        checkpoint = checkpoint_to_resume(
            config.resume_from_checkpoint, run.output_dir / "checkpoints", report=accelerator.print
        )
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is not None:
        state = read_trainer_state(checkpoint)
        refuse_changed_settings(checkpoint, state["settings"], run_settings(run))
        load_checkpoint(checkpoint, run.unwrapped_model, run.optimizers)
        run.step, run.wall_time_s = state["step"], state["wall_time_s"]
        if accelerator.scaler is not None and state["grad_scaler"]:
            accelerator.scaler.load_state_dict(state["grad_scaler"])
        accelerator.print(f"resumed from {checkpoint} at step {run.step}")

    run.batches = training_batches(
        run.train_blocks,
        run.plan,
        seed=config.seed,
        consumed_samples=run.step * run.plan.samples_per_step,
        process_index=accelerator.process_index,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if accelerator.is_main_process:
        try:
            (run.output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {run.output_dir}: cannot be created ({error.strerror})") from None
        set_aside_later_checkpoints(run.output_dir / "checkpoints", run.step)
        run.log = MetricsLog(run.output_dir / "metrics.jsonl", resumed_step=run.step)
        write_resolved_config(run.output_dir / "resolved_config.yaml", chosen_settings(config))
    settle_gradient_buckets(run)
    accelerator.wait_for_everyone()
    run.stopwatch = Stopwatch(accelerator.device, run.step)


def settle_gradient_buckets(run: Run) -> None:
    """One backward pass whose gradients are thrown away, where there are several processes.

    DistributedDataParallel regroups what it sums together after its first backward pass. Without this a resumed run's
    first sum would be grouped, and so rounded, in another way than that of a run that was not stopped.
    """
    from training.models import summed_loss

    if run.accelerator.num_processes > 1:
        run.model.train()
        batch = run.train_blocks.__getitems__([0] * run.plan.micro_batch_size).to(run.accelerator.device)
        run.accelerator.backward(summed_loss(run.model, batch, num_items=batch.numel()))
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)


def chosen_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that have a value, as a recipe would give them."""
    return {name: value for name, value in asdict(config).items() if value is not None and name != "config"}


def run_settings(run: Run) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, as JSON values."""
    model_config = run.unwrapped_model.config
    model = {name: getattr(model_config, name) for name in type(model_config).__annotations__}  # not transformers' own
    manifest = json.dumps(run.train_blocks.manifest, sort_keys=True)
    settings = {name: getattr(run.config, name) for name in SETTINGS_OF_EVERY_UPDATE}
    settings |= {
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens_per_step": run.tokens_per_step,
        "block_size": run.train_blocks.block_size,
        "data": hashlib.sha256(manifest.encode()).hexdigest(),
        "model": model,
    }
    return json.loads(json.dumps(settings))


def train_step(run: Run) -> tuple["torch.Tensor", "torch.Tensor", float]:
    """One optimizer update. Returns this process's mean loss over all its tokens of the step (nats/token), the
    gradient norm before clipping and the learning rate; the tensors stay on the device.

    The loss of each micro-batch is its sum over the step's target tokens of all processes, not a mean of means: the
    gradient is that of one big batch however it is divided.
    """
    import torch

    from training.models import summed_loss
    from training.optimizers import set_schedule
    from training.schedules import learning_rate_factor

    config, accelerator = run.config, run.accelerator
    factor = learning_rate_factor(
        run.step,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps,
        min_lr_ratio=config.min_lr_ratio,
    )
    set_schedule(run.optimizers, step=run.step, learning_rate_factor=factor)
    # Dropout depends on (seed, step, process) alone, so that no generator has to be saved for an exact resume.
    torch.manual_seed(hash_seed(config.seed, run.step, accelerator.process_index))
    # DistributedDataParallel averages gradients over processes; dividing by the tokens per process makes it a sum.
    tokens_per_process = run.tokens_per_step / accelerator.num_processes

    run.model.train()
    loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(run.plan.grad_accum_steps):
        batch = next(run.batches).to(accelerator.device, non_blocking=True)
        last = micro_step == run.plan.grad_accum_steps - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            micro_loss = summed_loss(run.model, batch, num_items=tokens_per_process)
            accelerator.backward(micro_loss)
        loss += micro_loss.detach()
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, config.learning_rate * factor


def hash_seed(*numbers: int) -> int:
    """A 64-bit seed in which neighbouring numbers give unrelated streams."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def training_metrics(run: Run, loss: "torch.Tensor", grad_norm: "torch.Tensor", learning_rate: float) -> dict[str, Any]:
    """One row for metrics.jsonl: the step's loss over all processes, and the speed since the last row."""
    from training.metrics import model_flops_utilization, peak_memory_gib

    steps, seconds = run.stopwatch.lap(run.step)
    loss = run.accelerator.reduce(loss, reduction="mean").item()
    stop_if_not_finite(run, "loss", loss)
    if run.accelerator.scaler is None:  # with a loss scale, an overflow is a skipped step
        stop_if_not_finite(run, "gradient norm", float(grad_norm))
    tokens_per_second = steps * run.tokens_per_step / seconds
    return {
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm),
        "tokens_per_second": tokens_per_second,
        "mfu": model_flops_utilization(
            run.unwrapped_model,
            seq_len=run.train_blocks.block_size,
            tokens_per_second=tokens_per_second / run.accelerator.num_processes,
            peak_flops=run.device_flops,
        ),
        "step_time_s": seconds / steps,
        "peak_memory_gib": peak_memory_gib(run.accelerator.device),
    }


def evaluate(run: Run) -> dict[str, Any]:
    """Validation loss (nats/token) as a part of a row for metrics.jsonl; its time is not training time."""
    from eval.perplexity import evaluate_loss

    run.stopwatch.pause()
    loss = evaluate_loss(
        run.unwrapped_model,
        run.eval_blocks,
        batch_size=run.config.per_device_eval_batch_size,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
        max_blocks=run.config.eval_blocks,
    )
    run.stopwatch.resume()
    stop_if_not_finite(run, "validation loss", loss)
    return {"eval_loss": loss}


def stop_if_not_finite(run: Run, name: str, value: float) -> None:
    """Raise UserError, on every process alike, before a broken model is saved or exported."""
    if not math.isfinite(value):
        raise UserError(
            f"the {name} is {value} at step {run.step}: lower the learning rate or --max_grad_norm, and go on from an "
            f"earlier checkpoint of {run.output_dir / 'checkpoints'}"
        )


@contextlib.contextmanager
def progress_bar(run: Run) -> "Iterator[tqdm]":
    from tqdm import tqdm

    with tqdm(
        total=run.config.max_steps,
        initial=run.step,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    ) as bar:
        yield bar


def record(run: Run, bar: "tqdm", metrics: dict[str, Any]) -> None:
    """Append to metrics.jsonl, redraw the curves after an evaluation, and show the numbers beside the bar."""
    from training.metrics import plot_training_curves

    if not run.accelerator.is_main_process:
        return
    run.log.append({"step": run.step, "tokens_seen": run.step * run.tokens_per_step} | metrics)
    if "eval_loss" in metrics:
        plot_training_curves(run.log.rows, run.output_dir / "training_curves.png")
        bar.write(f"step {run.step}: validation loss {metrics['eval_loss']:.4f}")
    if "loss" in metrics:
        bar.set_postfix(
            {
                "loss": f"{metrics['loss']:.3f}",
                "lr": f"{metrics['learning_rate']:.1e}",
                "tok/s": f"{metrics['tokens_per_second']:,.0f}",
            },
            refresh=False,
        )


def save(run: Run) -> None:
    """Write a checkpoint; the other processes wait, so that none goes on with a half-written one."""
    import torch

    from training.checkpoints import optimizer_state, save_checkpoint
    from training.export import save_model_folder

    run.stopwatch.pause()
    norms = torch.stack([parameter.detach().float().norm() for parameter in run.unwrapped_model.parameters()])
    stop_if_not_finite(run, "norm of the weights", norms.norm().item())
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        save_checkpoint(
            run.output_dir / "checkpoints",
            run.step,
            save_model=lambda folder: save_model_folder(
                run.unwrapped_model,
                folder,
                tokenizer_path=run.train_blocks.tokenizer_path,
                eos_token_id=run.train_blocks.eos_token_id,
            ),
            optimizer_state=optimizer_state(run.optimizers, run.unwrapped_model),
            trainer_state={
                "step": run.step,
                "tokens_seen": run.step * run.tokens_per_step,
                "wall_time_s": run.wall_time_s + run.stopwatch.total_s,
                "grad_scaler": scaler.state_dict() if scaler is not None else None,
                "settings": run_settings(run),
            },
            save_total_limit=run.config.save_total_limit,
        )
    run.accelerator.wait_for_everyone()
    run.stopwatch.resume()


def finish(run: Run, eval_loss: float | None) -> None:
    """Export the Hub-ready folder with its card and summary, and say where it is.

    eval_loss: of the last evaluation, at the last step; None if this process has trained no step.
    """
    from training.export import export_model
    from training.metrics import bits_per_byte, plot_training_curves, write_json
    from training.model_card import write_model_card

    run.stopwatch.pause()
    if eval_loss is None:  # nothing was left to train
        eval_loss = evaluate(run)["eval_loss"]
    if run.accelerator.is_main_process:
        rows, output_dir = run.log.rows, run.output_dir
        last = {key: value for row in rows for key, value in row.items()}  # the newest value of each measure
        wall_time_s = run.wall_time_s + run.stopwatch.total_s
        summary = {
            "params": run.unwrapped_model.num_parameters(),
            "steps": run.step,
            "tokens_seen": run.step * run.tokens_per_step,
            "train_loss": last.get("loss"),
            "eval_loss": eval_loss,
            "bits_per_byte": bits_per_byte(eval_loss, run.eval_blocks.bytes_per_token),
            "tokens_per_second": run.step * run.tokens_per_step / wall_time_s,
            "wall_time_s": wall_time_s,
            "peak_memory_gib": max([row.get("peak_memory_gib", 0.0) for row in rows], default=None),
        }
        export_model(
            run.unwrapped_model,
            output_dir,
            tokenizer_path=run.train_blocks.tokenizer_path,
            eos_token_id=run.train_blocks.eos_token_id,
        )
        write_json(output_dir / "summary.json", summary)
        plot_training_curves(rows, output_dir / "training_curves.png")
        settings = chosen_settings(run.config)
        for local in ("data_dir", "output_dir", "resume_from_checkpoint"):  # mean nothing to a reader
            settings.pop(local)
        if run.config.optimizer == "adamw":
            settings.pop("muon_learning_rate")
        write_model_card(
            output_dir / "README.md",
            name=output_dir.resolve().name,
            preset=run.config.model_preset,
            manifest=run.train_blocks.manifest,
            summary=summary,
            settings=settings,
        )
        print(f"finished: validation loss {eval_loss:.4f} nats/token, model in {output_dir}")
    run.accelerator.wait_for_everyone()
    run.model = None  # DistributedDataParallel must be gone before the process group it reduces over
    run.accelerator.free_memory()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
