"""Train a GPT-2-class language model on prepared data.

    python train_accelerate.py --config recipes/demo.yaml --data_dir data/stdlib --output_dir out/demo
    accelerate launch --config_file accelerate_configs/one_gpu_bf16.yaml train_accelerate.py --config ... [--flag value]
    accelerate launch --config_file accelerate_configs/eight_gpus_ddp.yaml train_accelerate.py --config ...
    accelerate launch --config_file accelerate_configs/two_nodes_ddp.yaml --machine_rank 0 --main_process_ip HOST0 ...
    accelerate launch --config_file accelerate_configs/fsdp2_one_node.yaml train_accelerate.py --config ...
    torchrun --nproc_per_node 8 train_accelerate.py --config ... --mixed_precision bf16
    sbatch accelerate_configs/slurm_two_nodes.sbatch --config ...

On two nodes, give the second one --machine_rank 1. Flags override the values of the recipe. The launcher sets the
number of processes; flags and recipe set everything else. From Python: `train(TrainConfig(data_dir=..., ...))`.
"""

import gpt2modern  # noqa: F401  first, as it refuses a deleted working directory  # isort: skip
import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.generation import check_prompts, generate_samples
from gpt2modern.evaluation.loss import METRICS, batch_loss, evaluate_loss
from gpt2modern.evaluation.tasks import PreparedTask, evaluate_tasks, prepare_tasks
from gpt2modern.training.averaging import WeightMean
from gpt2modern.training.batches import (
    BatchPlan,
    StepBatch,
    hash_seed,
    plan_batches,
    refuse_too_few_blocks,
    step_batches,
)
from gpt2modern.training.checkpoints import Checkpoints, checkpoints_dir, refuse_nonfinite
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.depth import flags_of_depth
from gpt2modern.training.distributed import (
    Processes,
    all_finite,
    joined_processes,
    refuse_fp16_on_cpu,
    reshard,
    shard_model,
    whole_model,
    whole_tensor,
)
from gpt2modern.training.dry_run import dry_run
from gpt2modern.training.export import find_stock_class
from gpt2modern.training.memory import fit_micro_batch, freed_memory_kept
from gpt2modern.training.models import COMPILE_OPTIONS, build_model, fastest_attention
from gpt2modern.training.nonfinite import handle_nonfinite
from gpt2modern.training.optimizers import OptimizerChain, build_optimizers, set_schedules
from gpt2modern.training.publish import Publisher
from gpt2modern.training.records import Records, reserved_output_dir
from gpt2modern.training.schedules import scaled_windows
from gpt2modern.training.speed import Stopwatch, step_metrics
from gpt2modern.training.state import TrainState
from gpt2modern.training.stopping import StopRequest, describe, exit_code_of_stop
from gpt2modern.training.trackers import check_trackers
from modeling_gpt2modern import GPT2ModernForCausalLM

Callback = Callable[..., None]


def no_callback(event: str, **details: Any) -> None:
    """Ignore every event of a run: the default `callback` of `train`."""


def main(argv: list[str] | None = None, callback: Callback = no_callback) -> None:
    with one_line_errors():
        config = parse_arguments(TrainConfig, argv, __doc__, derive=flags_of_depth)
        if config.dry_run:
            with joined_processes(config.mixed_precision, config.ddp_timeout) as (accelerator, _):
                config = replace(config, mixed_precision=config.mixed_precision or accelerator.mixed_precision)
                accelerator.print(dry_run(config, accelerator), end="", flush=True)
            return
        summary = train(config, callback)
    if summary["stopped"]:
        raise SystemExit(exit_code_of_stop())


def train(config: TrainConfig, callback: Callback = no_callback) -> dict[str, Any]:
    """Train a model, or resume its training, and return the contents of summary.json plus the key `stopped`: the reason
    why the run ended before its last step (a signal or --max_train_time), or None if the run finished.

    callback: called in each process as callback(event, step=..., ...): "before_update" (model, loss, grad_norm: the
    gradients are clipped, and in-place changes take effect), "logged" (row), "evaluating", "saving" (main process only;
    folder: where the checkpoint is being written). Raises GPT2ModernError for every error that the user can fix.
    """
    if config.dry_run:
        raise GPT2ModernError("a dry run does not train; call gpt2modern.training.dry_run.dry_run instead")
    stop = StopRequest(time.monotonic() + config.max_train_seconds())
    with (
        contextlib.ExitStack() as held,
        stop,
        freed_memory_kept(),
        joined_processes(config.mixed_precision, config.ddp_timeout) as (accelerator, processes),
    ):
        attention = config.attn_implementation or fastest_attention(accelerator.device, accelerator.mixed_precision)
        # The launcher's precision, if no flag is given.
        config = replace(config, mixed_precision=accelerator.mixed_precision, attn_implementation=attention)
        if processes.threads:
            accelerator.print(processes.threads)
        with processes.errors_of_main():
            if accelerator.is_main_process:
                held.enter_context(reserved_output_dir(Path(config.output_dir)))
        model, unwrapped_model, optimizers, train_blocks, eval_blocks, tasks, plan = build(config, accelerator)
        optimizer = accelerator.prepare_optimizer(OptimizerChain(optimizers), device_placement=False)
        mean = WeightMean(unwrapped_model, config.schedule)
        states = [*optimizers, mean]
        checkpoints = Checkpoints(config, accelerator, processes, unwrapped_model, states, train_blocks, plan)
        state = checkpoints.restore()
        with processes.errors_of_main():
            new_model = None if config.model_name_or_path else unwrapped_model.config
            records = Records(config, state, plan, is_main=accelerator.is_main_process, new_model=new_model)
        publisher = Publisher(config, records, unwrapped_model, plan, eval_blocks)
        clock = Stopwatch(accelerator.device, unwrapped_model, plan, step=state.step, wall_time_s=state.wall_time_s)
        evaluation = functools.partial(
            evaluate, config, accelerator, processes, unwrapped_model, mean, eval_blocks, tasks, stop, clock, callback
        )
        separator = train_blocks.eos_token_id if config.document_masking else None
        masking = {"separator": separator, "max_document_length": config.max_document_length}
        objective = functools.partial(batch_loss, **masking, z_loss=config.z_loss)
        batches = step_batches(config, accelerator, train_blocks, plan, first_step=state.step)
        with records, contextlib.closing(batches):
            if state.step and evaluation_is_due(config, state):  # the run was interrupted in it
                records.log(state.step, *evaluation(state), remaining_s=0.0)
            for batch in () if stop.agreed else batches:
                loss, grad_norm, learning_rate, finite = train_step(
                    config, accelerator, processes, model, optimizer, batch, objective, state.step, callback
                )
                if not finite:
                    handle_nonfinite(config, accelerator, plan, state, batch.samples, loss, grad_norm)
                if config.average_last and any(each.state for each in optimizers):  # saved with all states or none
                    mean.step(step=state.step)
                state.nonfinite_steps = 0 if finite else state.nonfinite_steps + 1
                state.step += 1
                stop.agree(processes)
                last, row, samples = state.step == config.max_steps, {}, []
                if is_due(state.step, config.logging_steps) or state.step == 1 or last:
                    processes.call_roll()  # before a wait for the device that could last
                    row = step_metrics(accelerator, loss, grad_norm, learning_rate) | clock.lap(state.step)
                if evaluation_is_due(config, state) and not stop.agreed:
                    results, samples = evaluation(state)
                    row |= results
                if row:
                    records.log(state.step, row, samples, remaining_s=clock.remaining_s(config.max_steps - state.step))
                    callback("logged", step=state.step, row=row)
                if is_due(state.step, config.save_steps) or (last and config.save_steps > 0) or stop.agreed:
                    with clock.paused():
                        state.wall_time_s = clock.total_s
                        if checkpoints.save(state, callback) and not stop.agreed:
                            publisher.upload_checkpoint(state, checkpoints.path(state.step))
                records.bar.update()
                if stop.agreed:
                    break
        state.wall_time_s = clock.total_s
        summary = publisher.summary(state)
        if stop.agreed:
            accelerator.print(stop.message(state.step, checkpoints.folder, saved=checkpoints.path(state.step).is_dir()))
            held.callback(publisher.upload_checkpoint, state, checkpoints.path(state.step), waits=True)
        else:
            with mean.in_place_of_weights(state.step):
                whole = whole_model(unwrapped_model, keep=accelerator.is_main_process)
                with processes.errors_of_main():
                    if accelerator.is_main_process:
                        publisher.export(summary, whole, train_blocks)
            held.callback(publisher.upload_final, summary)  # later, as the other processes do not wait so long
        del model, optimizer  # DistributedDataParallel must be gone before the process group it reduces over
    return summary | {"stopped": describe(stop.agreed) if stop.agreed else None}


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_is_due(config: TrainConfig, state: TrainState) -> bool:
    due = is_due(state.step, config.eval_steps) or tasks_are_due(config, state)
    return due and state.evaluated_step != state.step


def tasks_are_due(config: TrainConfig, state: TrainState) -> bool:
    every = config.eval_tasks_steps if config.eval_tasks else 0
    return is_due(state.step, every) or state.step >= config.max_steps


class Built(NamedTuple):
    """Hold the parts of a run that `build` creates. `model` is trained: it may be wrapped by DDP and compiled.
    `unwrapped_model` has the same weights and is evaluated, sampled from and saved."""

    model: torch.nn.Module
    unwrapped_model: GPT2ModernForCausalLM
    optimizers: list[torch.optim.Optimizer]
    train_blocks: PackedBlocks
    eval_blocks: PackedBlocks
    tasks: list[PreparedTask]
    plan: BatchPlan


def build(config: TrainConfig, accelerator: Accelerator) -> Built:
    """Open the prepared data, build the model and its optimizers, move the model to its device (wrapped by DDP or
    sharded by FSDP2), and print one line about what will be trained."""
    refuse_fp16_on_cpu(accelerator)
    check_trackers(config.report_to)
    if config.lora_rank and accelerator.is_fsdp2:
        raise GPT2ModernError(
            f"--lora_rank {config.lora_rank} cannot be used with FSDP2; LoRA adapters are small, so use a DDP "
            "configuration such as accelerate_configs/eight_gpus_ddp.yaml"
        )
    train_blocks = PackedBlocks(config.data_dir, "train", config.block_size)
    eval_blocks = PackedBlocks(config.data_dir, "validation", config.block_size)
    plan = plan_batches(config, block_size=train_blocks.block_size, num_processes=accelerator.num_processes)
    refuse_too_few_blocks(train_blocks, plan)
    torch.manual_seed(config.seed)
    model = unwrapped_model = build_model(config, train_blocks)
    find_stock_class(config, model.config)  # raises GPT2ModernError
    check_prompts(config.sample_prompts, config.sample_max_new_tokens, train_blocks.tokenizer_path, unwrapped_model)
    tokenizer_path = train_blocks.tokenizer_path
    tasks = prepare_tasks(config.eval_tasks or [], unwrapped_model, tokenizer_path, config.eval_tasks_limit)
    if config.per_device_train_batch_size == "auto":
        separator = train_blocks.eos_token_id if config.document_masking else None
        plan = fit_micro_batch(config, accelerator, unwrapped_model, plan, separator)
    if accelerator.is_fsdp2:
        shard_model(unwrapped_model, accelerator, torch_compile=config.torch_compile)
    optimizers = build_optimizers(unwrapped_model, config)
    if not accelerator.is_fsdp2:
        model = accelerator.prepare(unwrapped_model)
        model = torch.compile(model, options=COMPILE_OPTIONS) if config.torch_compile else model
    accelerator.print(
        f"{config.model_name_or_path or config.model_preset}: {unwrapped_model.num_parameters():,} parameters, "
        f"{unwrapped_model.num_parameters(only_trainable=True):,} of them trained, on {accelerator.num_processes} x "
        f"{accelerator.device.type}{', sharded by FSDP2' if accelerator.is_fsdp2 else ''}, "
        f"precision {accelerator.mixed_precision}; {plan.samples_per_step} x "
        f"{plan.block_size} tokens per step, in {plan.grad_accum_steps(config.max_steps)} forward passes per process"
    )
    if accelerator.num_processes > 1:
        # DistributedDataParallel regroups its gradient buckets after the first backward pass. Without this pass, whose
        # gradients are discarded, the first gradient sum of a resumed run would be rounded differently.
        model.train()
        batch = train_blocks.__getitems__([0] * plan.micro_batch_size).to(accelerator.device)
        num_items = torch.tensor(float(batch.numel()), device=accelerator.device)  # as in training: compiled once
        accelerator.backward(batch_loss(model, batch, num_items=num_items)[0])
        model.zero_grad(set_to_none=True)
    return Built(model, unwrapped_model, optimizers, train_blocks, eval_blocks, tasks, plan)


class StepResult(NamedTuple):
    """Hold the results of one optimizer step. loss: this process's part of the step's loss in nats per token (the mean
    of the parts over processes is the step's mean loss); grad_norm: before clipping; both are scalars on the device.
    finite: False if the update was skipped because of a NaN or infinite value."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    learning_rate: float
    finite: bool


def train_step(
    config: TrainConfig,
    accelerator: Accelerator,
    processes: Processes,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    objective: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    step: int,
    callback: Callback = no_callback,
) -> StepResult:
    """Run forward and backward passes over the micro-batches of `batch` and make update `step` (the first is 0).

    objective: called as objective(model, micro_batch, num_items=...); returns the value to minimise and the loss to
    report, both summed over the micro-batch's targets and divided by num_items. This is the number of targets of the
    complete step, not of one micro-batch, so that the gradient does not depend on how the step is divided.
    """
    factor, window_share = config.schedule.factor(step), config.schedule.share(config.sliding_window_ramp, step)
    set_schedules(optimizer, step=step, learning_rate_factor=factor)
    # Dropout depends only on (seed, step, process), so that no generator has to be saved for an exact resume.
    torch.manual_seed(hash_seed(config.seed, step, accelerator.process_index))
    # DistributedDataParallel averages gradients over processes; dividing by the targets per process makes it a sum.
    # A tensor, because a compiled step would be recompiled for every new Python number.
    targets_per_process = torch.tensor(batch.num_targets / accelerator.num_processes, device=accelerator.device)
    later_weights = config.schedule.later_weights(step)
    later = {"later_weights": torch.tensor(later_weights, device=accelerator.device)} if later_weights else {}
    model.train()
    loss = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        micro_batch = micro_batch.to(accelerator.device, non_blocking=True)  # (micro_batch_size, block_size + 1)
        last = number == batch.grad_accum_steps
        with contextlib.nullcontext() if last else accelerator.no_sync(model), scaled_windows(model, window_share):
            minimised, micro_loss = objective(model, micro_batch, num_items=targets_per_process, **later)
            accelerator.backward(minimised)
        loss += micro_loss
    grad_norm = whole_tensor(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf))
    callback("before_update", step=step + 1, model=model, loss=loss, grad_norm=grad_norm)
    finite = all_finite(loss, grad_norm, accelerator, processes)
    if finite or accelerator.scaler is not None:  # the loss scaler skips the update itself
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, config.learning_rate * factor, finite)


def evaluate(
    config: TrainConfig,
    accelerator: Accelerator,
    processes: Processes,
    model: GPT2ModernForCausalLM,
    mean: WeightMean,
    blocks: PackedBlocks,
    tasks: list[PreparedTask],
    stop: StopRequest,
    clock: Stopwatch,
    callback: Callback,
    state: TrainState,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Evaluate the model, store the results in `state`, and return them by the names in METRICS, with those of the
    tasks if they are due, plus sample rows. Once `mean` has weights in it, the results are those of the mean, and
    `unaveraged_eval_loss` is that of the weights themselves.

    Returns ({}, []) if the run is asked to stop meanwhile; the resumed run then starts with this evaluation.
    """
    with clock.paused(), contextlib.ExitStack() as held:
        callback("evaluating", step=state.step)
        shares = {
            "batch_size": config.per_device_eval_batch_size,
            "process_index": accelerator.process_index,
            "num_processes": accelerator.num_processes,
            "should_stop": lambda: stop.agree(processes),
        }
        chosen = {"max_blocks": config.eval_blocks, "from_start": config.eval_blocks_at == "start"}
        loss_of = functools.partial(evaluate_loss, model, blocks, **chosen, **shares)
        unaveraged = {"unaveraged_eval_loss": loss_of()} if mean.has_begun(state.step) else {}
        held.enter_context(mean.in_place_of_weights(state.step))
        loss = None if None in unaveraged.values() else loss_of()
        due = tasks if tasks_are_due(config, state) else []
        answers = None if loss is None else evaluate_tasks(due, model, **shares)
        samples = []
        if answers is not None:
            refuse_nonfinite("validation loss", loss, state.step, checkpoints_dir(config))
            state.evaluated_step = state.step
            results = {name: metric.of(loss, blocks) for name, metric in METRICS.items()} | answers | unaveraged
            finite = {name: math.isfinite(value or 0) for name, value in results.items()}
            state.evaluation = {name: value if finite[name] else None for name, value in results.items()}
            if config.sample_prompts and (accelerator.is_main_process or accelerator.is_fsdp2):
                samples = generate_samples(
                    model,
                    blocks.tokenizer_path,
                    config.sample_prompts,
                    max_new_tokens=config.sample_max_new_tokens,
                    seeds=[hash_seed(config.seed, state.step, n) % 2**63 for n in range(len(config.sample_prompts))],
                )
        reshard(model)
    rows = [{"step": state.step, **sample} for sample in samples]
    return (state.evaluation if answers is not None else {}), rows


if __name__ == "__main__":
    main()
