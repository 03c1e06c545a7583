"""Every flag of the trainer reaches something: another value changes losses, an optimizer, a record or a named part."""

import contextlib
import copy
import dataclasses
import json
import threading
import time
import typing
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator

from gpt2modern.cli import parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.evaluation.curves import read_rows
from gpt2modern.training.checkpoints import (
    changed_settings,
    fixed_settings,
    list_checkpoints,
    read_trainer_state,
)
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.distributed import joined_processes
from gpt2modern.training.state import TrainState
from tests.support.folders import write_prepared
from tests.support.trainer import TINY, built, checkpoints_of, config_of
from train_accelerate import no_callback, train

MUON = {"optimizer": "muon"}
STABLE = {"lr_scheduler_type": "warmup_stable_decay", "decay_steps": 8}
SINGLY = {"per_device_train_batch_size": "1", "total_batch_size": 256}
SPEEDRUN = {"model_preset": "speedrun"}  # with a head of its own, and scalars
LORA = {"lora_rank": 4}
STEPS = 4


class EnoughError(Exception):
    """Ends a run that has shown what a test needs."""


def losses(data_dir, output_dir, steps=STEPS, watch=no_callback, **changes):
    """Return the losses of a run's first steps, then end it. watch: a callback for the run."""
    values = []

    def callback(event, **details):
        watch(event, **details)
        if event == "logged":
            values.append(details["row"]["loss"])
            if details["step"] == steps:
                raise EnoughError

    with contextlib.suppress(EnoughError):
        train(config_of(data_dir, output_dir, **changes), callback)
    return values


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory):
    """Train a model to put adapters on."""
    output_dir = tmp_path_factory.mktemp("model")
    train(config_of(data_dir, output_dir, max_steps=1))
    return output_dir


@pytest.fixture(scope="module")
def base_losses(data_dir, model_dir, tmp_path_factory):
    """Return a function from settings to the losses of their first steps; each is trained once."""
    known = {}

    def of(base):
        base = with_model(base, model_dir)
        key = json.dumps(base, sort_keys=True)
        if key not in known:
            known[key] = losses(data_dir, tmp_path_factory.mktemp("base"), **base)
        return known[key]

    return of


def with_model(base, model_dir):
    if "lora_rank" in base:
        return base | {"model_name_or_path": str(model_dir), "config_overrides": None}
    return base


FIELDS = dataclasses.fields(TrainConfig)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_flag_has_help_and_a_group(field):
    assert field.metadata["help"]
    assert bool(field.metadata["group"]) == (field.name not in ("config", "dry_run"))


def test_every_number_has_a_range():
    kinds = {field.name: set(typing.get_args(field.type)) | {field.type} for field in FIELDS}
    numbers = [field for field in FIELDS if kinds[field.name] & {int, float}]
    assert len(numbers) > 30
    assert not [field.name for field in numbers if field.metadata["least"] is None]


def test_help_shows_every_flag_once_under_its_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(TrainConfig, ["--help"])
    text = capsys.readouterr().out
    flags = text[text.index("\noptions:") :]
    group, shown = "options", {}
    for line in flags.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            group = line[:-1]
        elif line.startswith("  --"):
            shown.setdefault(line.split()[0], []).append(group)
    assert shown == {f"--{field.name}": [field.metadata["group"] or "options"] for field in FIELDS}


@pytest.mark.parametrize(
    ("flag", "value", "base"),
    [
        ("model_preset", "gpt2", {}),
        ("config_overrides", TINY + ",hidden_dropout=0.1", {}),
        ("block_size", 16, {}),
        ("total_batch_size", 64, {}),
        ("batch_size_warmup_steps", 3, SINGLY),
        ("initial_total_batch_size", 64, SINGLY | {"batch_size_warmup_steps": 3}),
        ("batch_size_ramp", [1, 2, 4], SINGLY),
        ("sliding_window_ramp", [1, 2], {"config_overrides": f"{TINY},sliding_window=8"}),
        ("max_document_length", 8, {"document_masking": True}),
        ("optimizer", "muon", {}),
        ("learning_rate", 2e-2, {}),
        ("embedding_learning_rate", 2e-2, {}),
        ("scalar_learning_rate", 0.1, SPEEDRUN),
        ("muon_learning_rate", 0.05, MUON),
        ("muon_momentum_warmup_steps", 2, MUON),
        ("muon_momentum_cooldown_steps", 16, MUON | {"muon_momentum_warmup_steps": 0}),
        ("muon_coefficients", "polar_express", MUON),
        ("muon_normalize_rows", True, MUON),
        ("cautious_weight_decay", True, {}),
        ("head_learning_rate", 2e-2, SPEEDRUN),
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
        ("multi_token_prediction", [0.5, 0.25], {}),
        ("seed", 43, {}),
        ("mixed_precision", "bf16", {}),
        ("lora_rank", 2, LORA),
        ("lora_alpha", 32.0, LORA),
        ("lora_target_modules", ["q_proj"], LORA),
    ],
)  # fmt: skip
def test_another_value_changes_the_losses(data_dir, model_dir, base_losses, tmp_path, flag, value, base):
    changed = losses(data_dir, tmp_path, **(with_model(base, model_dir) | {flag: value}))
    assert len(changed) == STEPS
    difference = max(abs(a - b) for a, b in zip(changed, base_losses(base), strict=True))
    assert difference > 1e-5  # rounding gives 1e-6


def test_every_rate_and_average_reaches_its_group(data_dir, tmp_path):
    rates = {"embedding_learning_rate": 0.1, "head_learning_rate": 0.2, "scalar_learning_rate": 0.3}
    averages = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_epsilon": 1e-4, "weight_decay": 0.05}
    flags = SPEEDRUN | MUON | rates | averages | {"muon_learning_rate": 0.4}
    with built(data_dir, tmp_path, **flags) as run:
        adamw, muon = (optimizer.param_groups for optimizer in run.optimizers)
    assert [(group["peak_lr"], group["weight_decay"]) for group in adamw] == [(0.1, 0.05), (0.2, 0.05), (0.3, 0.0)]
    assert [(group["peak_lr"], group["weight_decay"]) for group in muon] == [(0.4, 0.05)]
    assert {(group["betas"], group["eps"]) for group in adamw} == {((0.6, 0.7), 1e-4)}


def test_a_decay_without_a_length_takes_a_fifth_of_the_steps():
    schedule = TrainConfig(
        data_dir="data", output_dir="out", max_steps=100, lr_scheduler_type="warmup_stable_decay"
    ).schedule
    assert schedule.decay_steps == 20 and (schedule.factor(80), schedule.factor(79)) == (1.0, 1.0) > (
        schedule.factor(81),
    )


def test_what_does_not_change_the_losses_reaches_its_part(data_dir, base_losses, tmp_path):
    """Reading ahead, recomputed activations, another kernel: the same losses, by other means."""
    seen = []

    def watch(event, model=None, **details):
        if event == "before_update":
            workers = sum(thread.name.startswith("read_ahead") for thread in threading.enumerate())
            seen.append((workers, model.is_gradient_checkpointing, model.config._attn_implementation))

    flags = {"dataloader_num_workers": 1, "gradient_checkpointing": True, "attn_implementation": "eager"}
    assert losses(data_dir, tmp_path, watch=watch, **flags) == pytest.approx(base_losses({}), abs=1e-5)
    assert seen == [(1, True, "eager")] * STEPS


@pytest.mark.parametrize(("supported", "expected"), [(True, ("bf16", "blockwise")), (False, ("no", "sdpa"))])
def test_auto_is_bf16_with_its_attention_where_the_cpu_has_instructions(
    data_dir, tmp_path, monkeypatch, supported, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    seen = []

    def watch(event, model=None, **details):
        if event == "before_update":
            seen.append(model.config._attn_implementation)

    losses(data_dir, tmp_path, steps=1, watch=watch, mixed_precision="auto")
    recorded = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert (recorded["mixed_precision"], *seen) == expected and recorded["attn_implementation"] == expected[1]


@pytest.mark.parametrize("place", ["equal_distances", "start"])
def test_evaluations_take_the_blocks_and_batches_asked_for(data_dir, tmp_path, place):
    batches = []

    def note(module, arguments, keywords):
        if not module.training:
            batches.append(keywords["input_ids"])

    def watch(event, model=None, **details):
        if event == "before_update":
            model.register_forward_pre_hook(note, with_kwargs=True)

    flags = {"eval_steps": 1, "per_device_eval_batch_size": 2, "eval_blocks": 3, "eval_blocks_at": place}
    losses(data_dir, tmp_path, steps=1, watch=watch, **flags)
    every = PackedBlocks(data_dir, "validation")
    spread = [index * len(every) // 3 for index in range(3)]
    assert spread != [0, 1, 2]
    expected = spread if place == "equal_distances" else [0, 1, 2]
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat(batches), every.__getitems__(expected)[:, :-1].clamp(min=0))


@pytest.mark.parametrize(("limit", "kept"), [(2, [4, 3]), (0, [4, 3, 2, 1])])
def test_as_many_checkpoints_are_kept_as_asked_for(data_dir, tmp_path, limit, kept):
    train(config_of(data_dir, tmp_path, max_steps=4, save_steps=1, save_total_limit=limit))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")] == kept


@pytest.fixture(scope="module")
def first(data_dir, tmp_path_factory):
    """Build the parts of a run and do not train it."""
    with built(data_dir, tmp_path_factory.mktemp("first")) as run:
        return run


def fixed(run, **changes):
    """Return what must be the same on a resume of `run`, some of its parts replaced."""
    run = SimpleNamespace(**(vars(run) | {"mixed_precision": "no"} | changes))
    return fixed_settings(run.config, run.mixed_precision, run.unwrapped_model, run.train_blocks, run.plan)


SETTINGS = {
    "seed": 1, "document_masking": True, "batch_size_warmup_steps": 2, "optimizer": "muon", "learning_rate": 1.0,
    "embedding_learning_rate": 1.0, "head_learning_rate": 1.0, "scalar_learning_rate": 1.0, "muon_learning_rate": 1.0,
    "cautious_weight_decay": True, "muon_momentum_warmup_steps": 1, "muon_momentum_cooldown_steps": 1,
    "muon_coefficients": "polar_express", "muon_normalize_rows": True, "lr_scheduler_type": "constant",
    "warmup_steps": 1, "warmup_ratio": 0.5,
    "decay_steps": 1, "decay_ratio": 0.5, "decay_type": "linear", "min_lr_ratio": 0.7, "weight_decay": 0.7,
    "adam_beta1": 0.7, "adam_beta2": 0.7, "adam_epsilon": 0.7, "max_grad_norm": 0.7, "z_loss": 0.7, "lora_rank": 1,
    "lora_alpha": 1.0, "lora_target_modules": ["q_proj"], "multi_token_prediction": [0.5],
    "average_last": 0.5, "batch_size_ramp": [1.0, 2.0], "sliding_window_ramp": [1.0, 2.0],
    "max_document_length": 8,
}  # fmt: skip


def test_what_decides_the_updates_is_compared_on_a_resume():
    assert SETTINGS.keys() == {field.name for field in FIELDS if field.metadata.get("resume") == "same"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_compares(first, name):
    config = copy.copy(first.config)
    setattr(config, name, SETTINGS[name])  # also where the run would refuse it beside the others
    changes = changed_settings(fixed(first), fixed(first, config=config))
    assert changes == [f"{name} was {getattr(first.config, name)!r}, is {SETTINGS[name]!r}"]


def test_a_resumed_run_compares_tokens_and_precision(first):
    plan = dataclasses.replace(first.plan, samples_per_step=8, warmup_steps=2, first_samples=2)
    assert changed_settings(fixed(first), fixed(first, plan=plan, mixed_precision="bf16")) == [
        "mixed_precision was 'no', is 'bf16'",
        "tokens_of_first_step was 128, is 64",
        "tokens_per_step was 128, is 256",
    ]


def test_the_loss_scale_is_saved_and_restored(data_dir, tmp_path):
    """A scaler of the CPU stands for that of a GPU under fp16."""
    with built(data_dir, tmp_path / "first") as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=96.0)
        checkpoints = checkpoints_of(run)
        assert checkpoints.save(TrainState(step=1, wall_time_s=1.0), no_callback)
        checkpoint = checkpoints.path(1)
        assert read_trainer_state(checkpoint)[0].grad_scaler["scale"] == 96.0
    with built(data_dir, tmp_path / "second", resume_from_checkpoint=str(checkpoint)) as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        assert checkpoints_of(run).restore().step == 1
        assert run.accelerator.scaler.get_scale() == 96.0


def test_tf32_is_on():
    torch.set_float32_matmul_precision("highest")
    with joined_processes(None, 60):
        assert torch.get_float32_matmul_precision() == "high"


def test_curves_are_drawn_at_each_evaluation(data_dir, tmp_path):
    curves, drawn = tmp_path / "training_curves.png", {}

    def callback(event, step, **details):
        if event == "logged" and curves.exists():
            drawn.setdefault(curves.stat().st_mtime_ns, step)

    train(config_of(data_dir, tmp_path, max_steps=5, eval_steps=2), callback)
    assert list(drawn.values()) == [2, 4, 5]


def test_evaluations_and_saves_are_not_training_time(data_dir, tmp_path, monkeypatch):
    """By a clock that moves only where it is told to."""
    clock, times = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def callback(event, row=None, **details):
        if event == "before_update":
            clock.now += 5.0
        elif event == "logged":
            times.append(row["step_time_s"])
        else:
            clock.now += 1000.0

    summary = train(config_of(data_dir, tmp_path, max_steps=4, eval_steps=2, save_steps=2), callback)
    assert times == [5.0] * 4 and summary["wall_time_s"] == 20.0 and clock.now == 4020.0


@pytest.fixture(scope="module")
def equal_blocks(data_dir, tmp_path_factory):
    """Data whose blocks are all the same one, so that only dropout tells steps and processes apart."""
    folder, rows = tmp_path_factory.mktemp("equal") / "data", [list(range(33))] * 16
    splits = {"train": [rows], "validation": [rows]}
    return write_prepared(folder, splits, tokenizer_dir=data_dir / "tokenizer", block_size=32)


def test_processes_drop_out_different_units(equal_blocks, tmp_path, monkeypatch):
    first_losses = {}
    for dropout in (0.0, 0.1):
        for process_index in (0, 1):
            flags = {"config_overrides": f"{TINY},hidden_dropout={dropout}"}
            with monkeypatch.context() as patch:
                patch.setattr(Accelerator, "process_index", property(lambda self, index=process_index: index))
                (loss,) = losses(equal_blocks, tmp_path / f"{dropout}-{process_index}", steps=1, **flags)
            first_losses[dropout, process_index] = loss
    assert first_losses[0.0, 0] == first_losses[0.0, 1]
    assert first_losses[0.1, 0] != first_losses[0.1, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_step_and_seed_drops_out_other_units(equal_blocks, model_dir, tmp_path, dropout):
    """The weights are the same ones, and stay as they are: the learning rate is 0."""
    found = {}
    for seed in (1, 2):
        flags = {"model_name_or_path": str(model_dir), "config_overrides": f"hidden_dropout={dropout}"}
        found[seed] = losses(equal_blocks, tmp_path / str(seed), learning_rate=0.0, seed=seed, **flags)
    assert len({*found[1], *found[2]}) == (2 * STEPS if dropout else 1)


def test_every_sample_and_seed_draws_other_tokens(data_dir, model_dir, tmp_path):
    """The model and the prompts are the same."""
    flags = {"model_name_or_path": str(model_dir), "config_overrides": None, "learning_rate": 0.0, "max_steps": 1}
    texts = []
    for seed in (1, 2):
        prompts = {"sample_prompts": ["def", "def"], "sample_max_new_tokens": 8}
        train(config_of(data_dir, tmp_path / str(seed), seed=seed, **flags, **prompts))
        texts += [row["text"] for row in read_rows(tmp_path / str(seed) / "samples.jsonl")]
    assert len(texts) == len(set(texts)) == 4


@pytest.mark.parametrize(
    ("flag", "value"), [("lr_scheduler_type", "wsd"), ("mixed_precision", "fp7"), ("save_failure", "")]
)
def test_a_choice_that_does_not_exist_is_refused_from_python_too(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value} is unknown; choose from "):
        TrainConfig(data_dir="data", output_dir="out", **{flag: value})


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("max_steps", "3", "str, expected int"),
        ("seed", 2.5, "float, expected int"),
        ("learning_rate", "6e-4", "str, expected float"),
        ("torch_compile", 1, "int, expected bool"),
        ("sample_prompts", "ab", "str, expected list"),
    ],
)
def test_a_value_of_another_type_is_refused_from_python(flag, value, expected):
    with pytest.raises(ValueError, match=f"--{flag} {value} is {expected}"):
        TrainConfig(data_dir="data", output_dir="out", **{flag: value})
