"""Every flag of the trainer reaches something: another value changes losses, an optimizer, a record or a named part."""

import contextlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import train_accelerate
from gpt2modern.training.checkpoints import changed_settings, list_checkpoints, read_trainer_state
from gpt2modern.training.launch import build_accelerator
from gpt2modern.training.metrics import model_flops_per_token
from gpt2modern.training.resume import resume, save, settings_of_every_update
from gpt2modern.training.run import closed_batches
from gpt2modern.training.stopping import StopRequest
from tests.support.folders import write_prepared
from tests.support.trainer import TINY
from train_accelerate import TrainConfig, build_run, evaluate, train_step

COMMON = {
    "config_overrides": TINY,
    "per_device_train_batch_size": "2",
    "total_batch_size": 128,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "eval_blocks": 3,
}
MUON = {"optimizer": "muon"}
STABLE = {"lr_scheduler_type": "warmup_stable_decay", "decay_steps": 8}
SINGLY = {"per_device_train_batch_size": "1", "total_batch_size": 256}
SPEEDRUN = {"model_preset": "speedrun"}  # with a head of its own, and scalars
STEPS = 4


@contextlib.contextmanager
def started(data_dir, output_dir, **changes):
    """A Run at its first step, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(**(COMMON | {"data_dir": str(data_dir), "output_dir": str(output_dir)} | changes))
    accelerator = build_accelerator(mixed_precision=config.mixed_precision, ddp_timeout=config.ddp_timeout)
    with StopRequest(None, time.monotonic()) as stop_request:
        run = build_run(config, accelerator, stop_request)
        with closed_batches(run):
            resume(run)
            yield run


def losses(run, steps=STEPS):
    values = []
    for _ in range(steps):
        values.append(train_step(run)[0].item())
        run.step += 1
    return values


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory):
    """A checkpoint to put adapters on."""
    with started(data_dir, tmp_path_factory.mktemp("model")) as run:
        losses(run, 1)
        save(run)
        return list_checkpoints(run.checkpoints_dir)[0]


@pytest.fixture(scope="module")
def base_losses(data_dir, model_dir, tmp_path_factory):
    """base settings -> the losses of its first steps; each is trained once."""
    known = {}

    def of(base):
        base = with_model(base, model_dir)
        key = json.dumps(base, sort_keys=True)
        if key not in known:
            with started(data_dir, tmp_path_factory.mktemp("base"), **base) as run:
                known[key] = losses(run)
        return known[key]

    return of


def with_model(base, model_dir):
    if "lora_rank" in base:
        return base | {"model_name_or_path": str(model_dir), "config_overrides": None}
    return base


LORA = {"lora_rank": 4}


@pytest.mark.parametrize(
    ("flag", "value", "base"),
    [
        ("model_preset", "gpt2", {}),
        ("config_overrides", TINY + ",hidden_dropout=0.1", {}),
        ("block_size", 16, {}),
        ("total_batch_size", 64, {}),
        ("batch_size_warmup_steps", 3, SINGLY),
        ("initial_total_batch_size", 64, SINGLY | {"batch_size_warmup_steps": 3}),
        ("optimizer", "muon", {}),
        ("learning_rate", 2e-2, {}),
        ("embedding_learning_rate", 2e-2, {}),
        ("scalar_learning_rate", 0.1, SPEEDRUN),
        ("muon_learning_rate", 0.05, MUON),
        ("muon_momentum_warmup_steps", 2, MUON),
        ("lr_scheduler_type", "linear", {}),
        ("warmup_steps", 2, {}),
        ("warmup_ratio", 0.5, {}),
        ("decay_steps", 7, STABLE),
        ("decay_ratio", 0.9, {"lr_scheduler_type": "warmup_stable_decay"}),
        ("decay_type", "linear", STABLE),
        ("min_lr_ratio", 0.5, {}),
        ("max_steps", 16, {}),
        ("weight_decay", 0.5, {}),
        ("adam_beta1", 0.5, {}),
        ("adam_beta2", 0.5, {}),
        ("adam_epsilon", 1e-3, {}),
        ("max_grad_norm", 0.01, {"adam_epsilon": 1e-3}),
        ("z_loss", 0.1, {}),
        ("seed", 43, {}),
        ("mixed_precision", "bf16", {}),
        ("lora_rank", 2, LORA),
        ("lora_alpha", 32.0, LORA),
        ("lora_target_modules", ["q_proj"], LORA),
    ],
)  # fmt: skip
def test_another_value_changes_the_losses(data_dir, model_dir, base_losses, tmp_path, flag, value, base):
    with started(data_dir, tmp_path, **(with_model(base, model_dir) | {flag: value})) as run:
        changed = losses(run)
    difference = max(abs(a - b) for a, b in zip(changed, base_losses(base), strict=True))
    assert difference > 1e-5  # rounding gives 1e-6


def test_every_rate_and_average_reaches_its_group(data_dir, tmp_path):
    rates = {"embedding_learning_rate": 0.1, "learning_rate": 0.2, "scalar_learning_rate": 0.3}
    averages = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_epsilon": 1e-4, "weight_decay": 0.05}
    flags = SPEEDRUN | MUON | rates | averages | {"muon_learning_rate": 0.4}
    with started(data_dir, tmp_path, **flags) as run:
        adamw, muon = (optimizer.param_groups for optimizer in run.optimizers)
    assert [(group["peak_lr"], group["weight_decay"]) for group in adamw] == [(0.1, 0.05), (0.2, 0.05), (0.3, 0.0)]
    assert [(group["peak_lr"], group["weight_decay"]) for group in muon] == [(0.4, 0.05)]
    assert {(group["betas"], group["eps"]) for group in adamw} == {((0.6, 0.7), 1e-4)}


def test_a_fall_of_no_given_length_takes_a_fifth_of_the_steps():
    schedule = TrainConfig(
        data_dir="data", output_dir="out", max_steps=100, lr_scheduler_type="warmup_stable_decay"
    ).schedule
    assert schedule.decay_steps == 20 and (schedule.factor(80), schedule.factor(79)) == (1.0, 1.0) > (
        schedule.factor(81),
    )


def test_what_does_not_change_the_losses_reaches_its_part(data_dir, base_losses, tmp_path, monkeypatch):
    """Reading ahead, recomputed activations, another kernel: the same losses, by other means."""
    from gpt2modern.training.batches import DataLoader

    workers, create = [], DataLoader.__init__

    def noting_workers(self, *arguments, **keywords) -> None:
        workers.append(keywords["num_workers"])
        create(self, *arguments, **keywords)

    monkeypatch.setattr(DataLoader, "__init__", noting_workers)
    flags = {"dataloader_num_workers": 1, "gradient_checkpointing": True, "attn_implementation": "eager"}
    with started(data_dir, tmp_path, **flags) as run:
        assert workers == [1]
        assert run.unwrapped_model.is_gradient_checkpointing
        assert run.unwrapped_model.config._attn_implementation == "eager"
        assert losses(run) == pytest.approx(base_losses({}), abs=1e-5)


def test_evaluations_take_the_blocks_and_batches_asked_for(data_dir, tmp_path):
    from eval.perplexity import evaluate_loss

    with started(data_dir, tmp_path, per_device_eval_batch_size=2, eval_blocks=3) as run:
        batches = []
        run.unwrapped_model.register_forward_pre_hook(
            lambda module, arguments, keywords: batches.append(keywords["input_ids"]), with_kwargs=True
        )
        evaluate(run)
        every = run.eval_blocks
        spread = [index * len(every) // 3 for index in range(3)]
        assert [len(batch) for batch in batches] == [2, 1]
        assert torch.equal(torch.cat(batches), every.__getitems__(spread)[:, :-1].clamp(min=0))
        run.config.eval_blocks_at, first_batches = "start", len(batches)
        evaluate(run)
        assert spread != [0, 1, 2]
        assert torch.equal(torch.cat(batches[first_batches:]), every.__getitems__([0, 1, 2])[:, :-1].clamp(min=0))
        whole = evaluate_loss(run.unwrapped_model, every, batch_size=4)
        assert evaluate_loss(run.unwrapped_model, every, batch_size=4, max_blocks=10**6, from_start=True) == whole


def test_as_many_checkpoints_are_kept_as_asked_for(data_dir, tmp_path):
    for limit, kept in ((2, [4, 3]), (0, [4, 3, 2, 1])):
        with started(data_dir, tmp_path / str(limit), save_total_limit=limit) as run:
            for run.step in range(1, 5):
                save(run)
            assert [int(path.name[5:]) for path in list_checkpoints(run.checkpoints_dir)] == kept


@pytest.fixture(scope="module")
def first(data_dir, tmp_path_factory):
    """A run that is looked at and not trained."""
    with started(data_dir, tmp_path_factory.mktemp("first")) as run:
        return run


SETTINGS = {
    "seed": 1, "document_masking": True, "batch_size_warmup_steps": 2, "optimizer": "muon", "learning_rate": 1.0,
    "embedding_learning_rate": 1.0, "scalar_learning_rate": 1.0, "muon_learning_rate": 1.0,
    "muon_momentum_warmup_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 1, "warmup_ratio": 0.5,
    "decay_steps": 1, "decay_ratio": 0.5, "decay_type": "linear", "min_lr_ratio": 0.7, "weight_decay": 0.7,
    "adam_beta1": 0.7, "adam_beta2": 0.7, "adam_epsilon": 0.7, "max_grad_norm": 0.7, "z_loss": 0.7, "lora_rank": 1,
    "lora_alpha": 1.0, "lora_target_modules": ["q_proj"],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_compares(first, name):
    config = SimpleNamespace(**(vars(first.config) | {name: SETTINGS[name]}))
    config.SETTINGS_OF_EVERY_UPDATE = TrainConfig.SETTINGS_OF_EVERY_UPDATE
    was, now = settings_of_every_update(first), settings_of_every_update(replace(first, config=config))
    assert changed_settings(was, now) == [f"{name} was {getattr(first.config, name)!r}, is {SETTINGS[name]!r}"]


def test_a_resumed_run_compares_tokens_and_precision(first):
    other = replace(
        first,
        plan=replace(first.plan, samples_per_step=8, warmup_steps=2, first_samples=2),
        accelerator=SimpleNamespace(mixed_precision="bf16"),
    )
    assert changed_settings(settings_of_every_update(first), settings_of_every_update(other)) == [
        "mixed_precision was 'no', is 'bf16'",
        "tokens_of_first_step was 128, is 64",
        "tokens_per_step was 128, is 256",
    ]


def test_the_loss_scale_is_saved_and_restored(data_dir, tmp_path):
    """A scaler of the CPU stands for that of a GPU under fp16."""
    with started(data_dir, tmp_path / "first") as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=96.0)
        run.step = 1
        save(run)
        (checkpoint,) = list_checkpoints(run.checkpoints_dir)
        assert read_trainer_state(checkpoint)["grad_scaler"]["scale"] == 96.0
    with started(data_dir, tmp_path / "second") as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        run.config.resume_from_checkpoint = str(checkpoint)
        resume(run)
        assert run.step == 1 and run.accelerator.scaler.get_scale() == 96.0


def test_tf32_is_on(data_dir, tmp_path):
    torch.set_float32_matmul_precision("highest")
    with started(data_dir, tmp_path):
        assert torch.get_float32_matmul_precision() == "high"


def test_curves_are_drawn_at_each_evaluation(data_dir, tmp_path, monkeypatch):
    from gpt2modern.training import progress

    drawn = []
    monkeypatch.setattr(
        progress, "plot_training_curves", lambda rows, path: drawn.append((path.name, rows[-1]["step"]))
    )
    with started(data_dir, tmp_path, max_steps=4, eval_steps=2, save_steps=0, logging_steps=1) as run:
        train_accelerate.train(run)
    assert drawn == [("training_curves.png", 2), ("training_curves.png", 4)]


def test_utilization_is_of_one_device(data_dir, tmp_path):
    """Of two processes, each has half of the tokens and one peak."""
    from gpt2modern.training.progress import training_metrics

    with started(data_dir, tmp_path) as run:
        loss, grad_norm, rate = train_step(run)
        run.step += 1
        device = run.accelerator.device
        run.accelerator = SimpleNamespace(num_processes=2, device=device, reduce=lambda tensor, reduction: tensor)
        run.device_flops = 1e12
        row = training_metrics(run, loss, grad_norm, rate)
        flops = model_flops_per_token(run.unwrapped_model, run.train_blocks.block_size)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 2 * flops / 1e12)


def test_an_evaluation_is_no_training_time(data_dir, tmp_path, monkeypatch):
    """By a clock that goes on only where it is told."""
    from eval import perplexity
    from gpt2modern.training import metrics

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow_evaluation(*arguments, **keywords):
        clock.now += 1000.0
        return 1.0

    monkeypatch.setattr(perplexity, "evaluate_loss", slow_evaluation)
    with started(data_dir, tmp_path) as run:
        clock.now += 5.0
        evaluate(run)
        clock.now += 2.0
        assert run.stopwatch.lap(1)[1] == 7.0 and run.stopwatch.paused_s == 1000.0


def test_processes_drop_out_different_units(data_dir, tmp_path, monkeypatch):
    """All blocks are the same one, so that the masks alone tell the processes apart."""
    from accelerate import Accelerator

    rows = [list(range(33))] * 16
    data = write_prepared(
        tmp_path / "data", {"train": [rows], "validation": [rows]}, tokenizer_dir=data_dir / "tokenizer", block_size=32
    )
    first_losses = {}
    for dropout in (0.0, 0.1):
        for process_index in (0, 1):
            flags = {"config_overrides": f"{TINY},hidden_dropout={dropout}"}
            with started(data, tmp_path / f"{dropout}-{process_index}", **flags) as run, monkeypatch.context() as patch:
                patch.setattr(Accelerator, "process_index", property(lambda self, index=process_index: index))
                first_losses[dropout, process_index] = losses(run, 1)[0]
    assert first_losses[0.0, 0] == first_losses[0.0, 1]
    assert first_losses[0.1, 0] != first_losses[0.1, 1]
