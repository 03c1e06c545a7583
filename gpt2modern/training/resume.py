"""Saving a run's position, and going on from it as if the run had never stopped."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.batches import training_batches
from gpt2modern.training.checkpoints import (
    changed_settings,
    checkpoint_to_resume,
    list_checkpoints,
    load_checkpoint,
    optimizer_state,
    read_trainer_state,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from gpt2modern.training.export import save_model_folder, write_resolved_config
from gpt2modern.training.hub import HubUploader
from gpt2modern.training.metrics import MetricsLog, Stopwatch
from gpt2modern.training.models import summed_loss
from gpt2modern.training.run import Run, chosen_settings, on_main_process, stop_if_not_finite
from gpt2modern.training.schedules import Schedule
from gpt2modern.training.sharding import is_sharded, whole_model, whole_tensor
from gpt2modern.training.trackers import Trackers

SETTINGS_FILE = "resolved_config.yaml"


def resume(run: Run) -> None:
    """Load the checkpoint asked for, if there is one, and open what depends on the position: batches and the log."""
    config, accelerator = run.config, run.accelerator
    checkpoint = on_main_process(
        run,
        lambda: checkpoint_to_resume(config.resume_from_checkpoint, run.checkpoints_dir, report=accelerator.print),
    )
    if checkpoint is not None:
        restore(run, checkpoint)
    run.batches = training_batches(
        run.train_blocks,
        run.plan,
        seed=config.seed,
        consumed_samples=run.plan.consumed_samples(run.step),
        process_index=accelerator.process_index,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    on_main_process(run, lambda: open_output_dir(run))
    settle_gradient_buckets(run)
    accelerator.wait_for_everyone()
    run.stopwatch = Stopwatch(accelerator.device, run.step)


def restore(run: Run, checkpoint: Path) -> None:
    """Weights, optimizer state, loss scale and step of a checkpoint that was made under this run's settings.

    Another length is the same setting as long as the schedule gives the updates so far the learning rates they had: a
    constant one, or the stable part of warmup_stable_decay, is lengthened; a cosine, whose every rate says how far the
    end is, is not. Under other settings only with --force_resume, and then with fresh optimizer state where the
    optimizer is another one.
    Raises GPT2ModernError listing every setting that differs.
    """
    state = read_trainer_state(checkpoint)
    differing = changed_settings(state["settings"], settings_of_every_update(run))
    schedule = Schedule(**state["schedule"])
    if schedule.max_steps != run.schedule.max_steps and not schedule.gave_the_same(run.schedule, state["step"]):
        differing.append(f"max_steps was {schedule.max_steps}, is {run.schedule.max_steps}")
    differing = "; ".join(differing)
    if differing and not run.config.force_resume:
        raise GPT2ModernError(
            f"{checkpoint} was made under other settings: {differing}; put them back, go on all the same with "
            f"--force_resume true, or start over with --resume_from_checkpoint none or another --output_dir"
        )
    if differing:
        run.accelerator.print(f"--force_resume: {differing}")
    same_optimizer = state["settings"]["optimizer"] == run.config.optimizer
    load_checkpoint(checkpoint, run.unwrapped_model, run.optimizers if same_optimizer else None)
    run.step, run.wall_time_s, run.run_id = state["step"], state["wall_time_s"], state["run_id"]
    run.evaluated_step, run.eval_loss = state["evaluated_step"], state["eval_loss"]
    if run.accelerator.scaler is not None and state["grad_scaler"]:
        run.accelerator.scaler.load_state_dict(state["grad_scaler"])
    run.accelerator.print(f"resumed from {checkpoint} at step {run.step}")


def settings_of_every_update(run: Run) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, as JSON values."""
    model_config = run.unwrapped_model.config
    model = {name: getattr(model_config, name) for name in type(model_config).__annotations__}  # not transformers' own
    manifest = json.dumps(run.train_blocks.manifest, sort_keys=True)
    settings = {name: getattr(run.config, name) for name in run.config.SETTINGS_OF_EVERY_UPDATE}
    settings |= {
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens_per_step": run.plan.samples_per_step * run.train_blocks.block_size,
        "tokens_of_first_step": run.plan.samples_at(0) * run.train_blocks.block_size,
        "block_size": run.train_blocks.block_size,
        "data": hashlib.sha256(manifest.encode()).hexdigest(),
        "model": model,
    }
    return json.loads(json.dumps(settings))


def open_output_dir(run: Run) -> None:
    """Make the folder, and let it hold nothing that lies beyond the position where this run begins.

    Raises GPT2ModernError if the folder holds files of somebody else that the run would replace.
    """
    if not (run.output_dir / SETTINGS_FILE).exists() and not list_checkpoints(run.checkpoints_dir):
        for name in ("README.md", "config.json", "model.safetensors", "metrics.jsonl"):
            if (run.output_dir / name).exists():
                raise GPT2ModernError(f"--output_dir {run.output_dir}: has a {name} of no run; name another folder")
    try:
        run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        set_aside_later_checkpoints(run.checkpoints_dir, run.step)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {run.output_dir}: cannot be created ({error.strerror})") from None
    run.log = MetricsLog(run.output_dir / "metrics.jsonl", resumed_step=run.step)
    if run.config.sample_prompts:
        run.sample_log = MetricsLog(run.output_dir / "samples.jsonl", resumed_step=run.step)
    settings = chosen_settings(run.config)
    try:
        write_resolved_config(run.output_dir / SETTINGS_FILE, settings, num_processes=run.accelerator.num_processes)
    except OSError as error:
        raise GPT2ModernError(f"--output_dir {run.output_dir}: cannot be written to ({error.strerror})") from None
    run.trackers = Trackers(
        run.config.report_to,
        project=run.config.project,
        run_name=run.config.run_name or f"{run.output_dir.resolve().name}-{run.run_id}",
        run_id=run.run_id,
        tensorboard_dir=run.output_dir / "tensorboard",
        settings=settings,
        resumed_step=run.step,
        logged_step=run.log.last_step if run.step else 0,
    )
    if run.config.push_to_hub:
        run.uploader = HubUploader(
            run.config.hub_model_id or run.output_dir.resolve().name,
            private=run.config.hub_private_repo,
            revision=run.config.hub_revision,
        )


def settle_gradient_buckets(run: Run) -> None:
    """One backward pass whose gradients are thrown away, where there are several processes.

    DistributedDataParallel regroups what it sums together after its first backward pass. Without this a resumed run's
    first sum would be grouped, and so rounded, in another way than that of a run that was not stopped.
    """
    if run.accelerator.num_processes > 1:
        run.model.train()
        batch = run.train_blocks.__getitems__([0] * run.plan.micro_batch_size).to(run.accelerator.device)
        run.accelerator.backward(summed_loss(run.model, batch, num_items=batch.numel()))
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)


def save(run: Run) -> bool:
    """Write a checkpoint, and say whether it is there; the other processes wait, so that none goes on with a half.

    A disk that is full, read-only or gone leaves the older checkpoints and, by --save_failure warn, the run alive; with
    `stop` it raises GPT2ModernError on every process.
    """
    run.stopwatch.pause()
    main = run.accelerator.is_main_process
    norm = whole_tensor(torch.nn.utils.get_total_norm(run.unwrapped_model.parameters()))
    stop_if_not_finite(run, "norm of the weights", norm.item())
    model = whole_model(run.unwrapped_model, keep=main)
    gathered = is_sharded(run.unwrapped_model)  # by all processes together
    optimizer_tensors = optimizer_state(run.optimizers, run.unwrapped_model, keep=main) if main or gathered else None
    problem = None
    if main:
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        bytes_needed = model_bytes + sum(tensor.nbytes for tensor in optimizer_tensors.values())
        scaler = run.accelerator.scaler
        try:
            save_checkpoint(
                run.checkpoints_dir,
                run.step,
                save_model=lambda folder: save_model_folder(
                    model,
                    folder,
                    tokenizer_files=run.train_blocks.tokenizer_files,
                    eos_token_id=run.train_blocks.eos_token_id,
                ),
                optimizer_state=optimizer_tensors,
                trainer_state={
                    "step": run.step,
                    "tokens_seen": run.tokens_seen,
                    "wall_time_s": run.wall_time_s + run.stopwatch.total_s,
                    "run_id": run.run_id,
                    "evaluated_step": run.evaluated_step,
                    "eval_loss": run.eval_loss,
                    "grad_scaler": scaler.state_dict() if scaler is not None else None,
                    "settings": settings_of_every_update(run),
                    "schedule": asdict(run.schedule),
                },
                save_total_limit=run.config.save_total_limit,
                model_bytes=model_bytes,
            )
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a disk that is full
            problem = (
                f"checkpoint {run.step} ({bytes_needed:,} bytes) cannot be written to {run.checkpoints_dir}: {error}"
            )
    run.accelerator.wait_for_everyone()
    failed = run.agreement.largest(int(problem is not None)) != [0]
    if failed:
        if run.config.save_failure == "stop":
            raise GPT2ModernError(
                f"{problem or 'the main process could not save'}; the older checkpoints are as they were"
            )
        run.accelerator.print(f"warning: {problem}; the run goes on, the older checkpoints are as they were")
    run.stopwatch.resume()
    return not failed
