"""What a run shows and records while it trains, and what it leaves behind at the end."""

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.training.checkpoints import TRAINING_STATE_FILES, checkpoint_path
from gpt2modern.training.export import export_model
from gpt2modern.training.faults import spike_warning
from gpt2modern.training.finetuning import ADAPTER_FOLDER, is_adapted
from gpt2modern.training.hub import stage_files, upload_last
from gpt2modern.training.metrics import (
    bits_per_byte,
    model_flops_utilization,
    peak_memory_gib,
    plot_training_curves,
    write_json,
)
from gpt2modern.training.model_card import write_model_card
from gpt2modern.training.run import Run, chosen_settings, on_main_process
from gpt2modern.training.samples import on_one_line
from gpt2modern.training.sharding import whole_model
from modeling_gpt2modern import GPT2ModernForCausalLM

# What is published beside the model, where a run has it.
RECORDS = (
    "README.md", "summary.json", "metrics.jsonl", "samples.jsonl", "training_curves.png", "resolved_config.yaml",
)  # fmt: skip
# Settings that say where a run lay and who was told of it, not how the model was made.
NOT_OF_THE_RECIPE = {
    "data_dir", "output_dir", "resume_from_checkpoint", "report_to", "project", "run_name", "sample_prompts",
    "sample_max_new_tokens", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
    "license",
}  # fmt: skip


@contextlib.contextmanager
def progress_bar(run: Run) -> Iterator[tqdm]:
    """A bar whose numbers `record` sets; at its end, for whatever reason, the trackers are closed.

    The remaining time is ours: tqdm's takes one step with an evaluation in it for the pace of all steps.
    """
    with tqdm(
        total=run.config.max_steps,
        initial=run.step,
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # seconds; a log file keeps every redrawing
        disable=not run.accelerator.is_main_process,
    ) as bar:
        try:
            yield bar
        finally:
            if run.trackers is not None:
                run.trackers.close()


def training_metrics(run: Run, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> dict[str, Any]:
    """One row for metrics.jsonl: the step's loss over all processes, and the speed since the last row."""
    run.roll_call()  # before a wait for the device that could last
    steps, seconds = run.stopwatch.lap(run.step)
    loss = run.accelerator.reduce(loss, reduction="mean").item()
    tokens_per_second = (run.tokens_seen - run.tokens_before(run.step - steps)) / seconds
    return {
        "loss": loss if math.isfinite(loss) else None,  # of a step that --on_nonfinite skip left out
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
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


def record(run: Run, bar: tqdm, metrics: dict[str, Any]) -> None:
    """Append to metrics.jsonl, tell the trackers, redraw the curves after an evaluation, show numbers in the bar."""
    if not run.accelerator.is_main_process or not metrics:
        return
    row = {"tokens_seen": run.tokens_seen} | metrics
    if metrics.get("loss") is not None and (warning := spike_warning(run.log.rows, metrics["loss"])):
        bar.write(f"step {run.step}: {warning}")
    if run.log.rows and run.log.rows[-1]["step"] == run.step:  # an evaluation that was made up for
        run.log.amend(row)
    else:
        run.log.append({"step": run.step} | row)
    if "eval_loss" in metrics:
        draw_curves(run)
        bar.write(f"step {run.step}: validation loss {metrics['eval_loss']:.4f}")
        samples = [sample for sample in run.samples if sample["step"] == run.step]
        for number, sample in enumerate(samples):
            bar.write(f"  {on_one_line(sample)}")
            row[f"sample_{number}"] = sample["prompt"] + sample["text"]
    run.trackers.log(run.step, row)
    if metrics.get("loss") is not None:
        bar.set_postfix_str(bar_numbers(metrics, run.stopwatch.remaining_s(bar.total - run.step)), refresh=False)


def draw_curves(run: Run) -> None:
    """A disk that does not take the picture is a warning."""
    try:
        plot_training_curves(run.log.rows, run.output_dir / "training_curves.png")
    except OSError as error:
        warn(f"{run.output_dir / 'training_curves.png'} cannot be written ({error.strerror})")


def bar_numbers(metrics: dict[str, Any], remaining_s: float) -> str:
    """The line beside the bar; the most important first, since a narrow terminal cuts it."""
    numbers = [
        f"{tqdm.format_interval(remaining_s)} left",
        f"loss {metrics['loss']:.3f}",
        f"lr {metrics['learning_rate']:.1e}",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
        f"{metrics['peak_memory_gib']:.1f} GiB",
    ]
    if metrics["mfu"] is not None:
        numbers.insert(-1, f"MFU {metrics['mfu']:.1%}")
    return ", ".join(numbers)


def finish(run: Run) -> None:
    """Export the Hub-ready folder with its card and summary, publish it if that is asked for, and say where it is."""
    run.stopwatch.pause()
    model = whole_model(run.unwrapped_model, keep=run.accelerator.is_main_process)
    files = on_main_process(run, lambda: leave_everything(run, model, summarize(run)))
    if run.accelerator.is_main_process:
        where = f"model in {run.output_dir}"
        if is_adapted(run.unwrapped_model):
            where = f"merged {where}, adapters alone in {run.output_dir / ADAPTER_FOLDER}"
        print(f"finished: validation loss {run.eval_loss:.4f} nats/token, {where}")
    run.accelerator.wait_for_everyone()
    run.model = None  # DistributedDataParallel must be gone before the process group it reduces over
    run.accelerator.free_memory()
    run.accelerator.end_training()
    if run.uploader is not None:  # when no other process waits: their patience is shorter than an upload may be
        print(upload_last(run.uploader, run.output_dir, commit_message=f"Model after {run.step} steps", files=files))


def leave_everything(run: Run, model: GPT2ModernForCausalLM, summary: dict[str, Any]) -> list[Path]:
    """The files of a finished run beside its checkpoints; GPT2ModernError if the disk does not take them."""
    try:
        names = export_model(
            model,
            run.output_dir,
            tokenizer_files=run.train_blocks.tokenizer_files,
            eos_token_id=run.train_blocks.eos_token_id,
        )
        draw_curves(run)
        write_card(run, run.output_dir / "README.md", summary)
        write_json(run.output_dir / "summary.json", summary)
    except (OSError, SafetensorError) as error:
        raise GPT2ModernError(
            f"the finished model cannot be written to {run.output_dir}: {error}; its checkpoints are as they were, "
            "the same command tries again"
        ) from None
    return [run.output_dir / name for name in [*names, *RECORDS] if (run.output_dir / name).exists()]


def publish_checkpoint(run: Run) -> None:
    """Start to upload the model folder of this step's checkpoint, unless the upload before it is still going on or the
    finished model follows at once."""
    if run.uploader is None or run.config.hub_strategy == "end":
        return
    if run.uploader.is_busy or run.step == run.config.max_steps:
        return
    run.stopwatch.pause()
    staged = run.output_dir / ".hub_upload"
    try:
        plot_training_curves(run.log.rows, run.output_dir / "training_curves.png")
        checkpoint = checkpoint_path(run.checkpoints_dir, run.step)
        model_files = [path for path in checkpoint.iterdir() if path.is_file()]
        model_files = [path for path in model_files if path.name not in TRAINING_STATE_FILES]
        records = [run.output_dir / name for name in RECORDS if name not in ("README.md", "summary.json")]
        stage_files([*model_files, *(path for path in records if path.exists())], staged)
        write_card(run, staged / "README.md", summarize(run))
    except OSError as error:
        warn(f"--push_to_hub: step {run.step} is not uploaded: {error}")
    else:
        run.uploader.upload(
            staged,
            commit_message=f"Checkpoint of step {run.step}",
            path_in_repo="last-checkpoint" if run.config.hub_strategy == "checkpoint" else None,
        )
    run.stopwatch.resume()


def write_card(run: Run, path: Path, summary: dict[str, Any]) -> None:
    settings = {name: value for name, value in chosen_settings(run.config).items() if name not in NOT_OF_THE_RECIPE}
    if run.config.optimizer == "adamw":
        settings = {name: value for name, value in settings.items() if not name.startswith("muon_")}
    settings["num_processes"] = run.accelerator.num_processes
    write_model_card(
        path,
        name=run.uploader.repo_id if run.uploader else run.output_dir.resolve().name,
        preset=run.config.model_preset,
        base_model=run.unwrapped_model.config.name_or_path or None,
        license=run.config.license,
        manifest=run.train_blocks.manifest,
        summary=summary,
        evaluated_blocks=evaluated_blocks(run),
        max_steps=run.config.max_steps,
        samples=run.sample_log.rows if run.sample_log else [],
        settings=settings,
    )


def evaluated_blocks(run: Run) -> str:
    every, used = len(run.eval_blocks), run.num_eval_blocks
    where = "the first" if run.config.eval_blocks_at == "start" else "at equal distances"
    return f"all {every:,}" if used == every else f"{used:,} of {every:,}, {where}"


def summarize(run: Run) -> dict[str, Any]:
    """The contents of summary.json; its eval_loss is that of the last evaluation, if there was one."""
    losses = [row["loss"] for row in run.log.rows if row.get("loss") is not None]  # a step left out has none
    eval_loss = run.eval_loss
    wall_time_s = run.wall_time_s + run.stopwatch.total_s
    return {
        "params": run.unwrapped_model.num_parameters(),
        "steps": run.step,
        "tokens_seen": run.tokens_seen,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": eval_loss,
        "bits_per_byte": None if eval_loss is None else bits_per_byte(eval_loss, run.eval_blocks.bytes_per_token),
        "tokens_per_second": run.tokens_seen / wall_time_s,
        "wall_time_s": wall_time_s,
        "mixed_precision": run.accelerator.mixed_precision,
        "num_processes": run.accelerator.num_processes,
        "eval_blocks": run.num_eval_blocks,
        "peak_memory_gib": max([row.get("peak_memory_gib", 0.0) for row in run.log.rows], default=None),
    }
