"""A checkpoint is complete or not there; what is resumed is the newest valid one."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import sha256_of
from gpt2modern.training.checkpoints import (
    choose_checkpoint,
    find_problem,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.optimizers import init_state
from gpt2modern.training.state import SavedState
from modeling_gpt2modern import GPT2ModernConfig
from tests.support.folders import change_json, change_tensors
from tests.support.trainer import COMMON, MUON_SETTINGS, built, checkpoints_of, config_of, damage
from train_accelerate import main, train


def trained_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, model, optimizer, save_total_limit=0):
    return save_checkpoint(
        folder,
        step,
        save_model=lambda path: save_file(model.state_dict(), path / "model.safetensors"),
        optimizer_state=optimizer_state([optimizer], model),
        trainer_state={"step": step},
        save_total_limit=save_total_limit,
    )


@pytest.fixture
def checkpoints(tmp_path):
    model, optimizer = trained_model()
    for step in (2, 10):
        save(tmp_path, step, model, optimizer)
    return tmp_path


def test_loading_restores_weights_optimizer_and_state_exactly(checkpoints):
    model, optimizer = trained_model()
    expected = {
        name: value.clone() for name, value in (model.state_dict() | optimizer_state([optimizer], model)).items()
    }
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    load_checkpoint(checkpoints / "step_0000010", other, [other_optimizer], SavedState(step=10))
    assert json.loads((checkpoints / "step_0000010" / "trainer_state.json").read_text()) == {"step": 10}
    found = other.state_dict() | optimizer_state([other_optimizer], other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_restored_optimizer_makes_the_same_update(tmp_path):
    model, optimizer = trained_model()
    other, other_optimizer = trained_model()
    other_optimizer.state.clear()
    save_file(optimizer_state([optimizer], model), tmp_path / "optimizer.safetensors")
    init_state([other_optimizer])
    other.load_state_dict(model.state_dict())
    load_optimizer_state([other_optimizer], other, tmp_path / "optimizer.safetensors", step=3)
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        one(torch.ones(5, 4)).square().sum().backward()
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_is_resumed(checkpoints):
    assert choose_checkpoint("auto", checkpoints, report=print).name == "step_0000010"


@pytest.mark.fault("F9 a checkpoint's file is deleted, emptied, truncated, altered")
@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated", "one bit flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(checkpoints, name, how):
    if name == "checksums.json" and how == "one bit flipped":
        name = "trainer_state.json"  # a flipped bit in the checksums shows as an altered file
    damage(checkpoints / "step_0000010" / name, how)
    reports = []
    assert choose_checkpoint("auto", checkpoints, report=reports.append).name == "step_0000002"
    assert len(reports) == 1 and name in reports[0]


@pytest.mark.parametrize("checksums", ["[]", "{}", "half"])
def test_checksums_must_list_the_files(checkpoints, checksums):
    (checkpoints / "step_0000010" / "checksums.json").write_text(checksums)
    assert "checksums.json" in find_problem(checkpoints / "step_0000010")


@pytest.mark.fault("F9 a checkpoint's file is deleted, emptied, truncated, altered")
def test_if_none_is_valid_the_run_does_not_start_over(checkpoints):
    for checkpoint in list_checkpoints(checkpoints):
        damage(checkpoint / "model.safetensors", "truncated")
    with pytest.raises(GPT2ModernError, match="--resume_from_checkpoint none"):
        choose_checkpoint("auto", checkpoints, report=print)


def test_a_checkpoint_asked_for_by_path_must_be_one(tmp_path):
    with pytest.raises(GPT2ModernError, match=r"checksums\.json is missing"):
        choose_checkpoint(str(tmp_path / "nothing"), tmp_path, report=print)


def test_no_checkpoint_is_a_fresh_start(checkpoints, tmp_path):
    assert choose_checkpoint("auto", tmp_path / "elsewhere", report=print) is None
    assert choose_checkpoint("none", checkpoints, report=print) is None


@pytest.mark.fault("F8 full disk; F10 read-only, vanished folder: a save fails, the run continues")
def test_a_failed_save_leaves_the_older_checkpoints(checkpoints):
    def fail(path):
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(checkpoints, 11, save_model=fail, optimizer_state={}, trainer_state={}, save_total_limit=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_0000002", "step_0000010"]
    assert find_problem(checkpoints / "step_0000010") is None


def test_files_are_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """Four files and their folder are flushed, then renamed, then the folder that holds the name is flushed."""
    events, rename = [], Path.rename
    monkeypatch.setattr("gpt2modern.files.os.fsync", lambda descriptor: events.append("flush"))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("rename") or rename(path, target))
    save(tmp_path, 1, *trained_model())
    assert events == ["flush"] * 5 + ["rename", "flush"]


def test_rotation_keeps_the_newest(checkpoints):
    save(checkpoints, 20, *trained_model(), save_total_limit=2)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step_0000020", "step_0000010"]


def test_later_checkpoints_are_set_aside(checkpoints):
    set_aside_later_checkpoints(checkpoints, 2)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step_0000002"]
    assert find_problem(checkpoints / "replaced_1" / "step_0000010") is None


def test_a_checkpoint_of_another_model_is_refused(checkpoints):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    with pytest.raises(GPT2ModernError, match="belongs to another model"):
        load_checkpoint(checkpoints / "step_0000010", model, None, SavedState(step=10))


def test_what_is_saved_holds_no_pickle(checkpoints):
    files = {path.name for path in (checkpoints / "step_0000010").iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "checksums.json"}


@pytest.mark.parametrize("strange", ["deep", "a\0b", "\ud800"], ids=ascii)
def test_senseless_checksums_are_a_problem_not_a_crash(tmp_path, strange):
    names = ("model.safetensors", "optimizer.safetensors", "trainer_state.json")
    for name in names:
        (tmp_path / name).write_text("")
    content = "[" * 100_000 if strange == "deep" else json.dumps({strange: ""} | dict.fromkeys(names, ""))
    (tmp_path / "checksums.json").write_text(content)
    assert "checksums.json" in find_problem(tmp_path)


def test_only_plain_numbers_are_steps(tmp_path):
    for name in ("step_0000003", "step_\u00b2", "step_x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000003"]


# Checkpoints whose checksums are right and whose content is not: written by other software, or on purpose.

KINDS = {
    "adamw": {},
    "muon": {"optimizer": "muon", "model_preset": "speedrun"},
    "normuon": {"optimizer": "muon", "muon_normalize_rows": True},
    "lora": {"lora_rank": 4, "config_overrides": None},
}


def altered(checkpoint, folder, change):
    """Copy a checkpoint, change the copy by `change(copy)`, and write its checksums anew."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    change(copy)
    names = [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]
    sums = {name: sha256_of(copy / name) for name in names if name != "checksums.json"}
    (copy / "checksums.json").write_text(json.dumps(sums))
    return copy


@pytest.fixture(scope="module")
def saved(data_dir, tmp_path_factory):
    """Return a function from a kind to a checkpoint of step 3 and the `Checkpoints` of a run that can resume it."""
    known = {}

    def of(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            flags = KINDS[kind]
            if kind == "lora":
                train(config_of(data_dir, folder / "base", max_steps=1))
                flags = flags | {"model_name_or_path": str(folder / "base")}
            train(config_of(data_dir, folder / "run", max_steps=3, save_steps=3, eval_steps=2, **flags))
            with built(data_dir, folder / "resumed", max_steps=3, **flags) as run:
                checkpoints = checkpoints_of(run)
            checkpoints.accelerator.print = lambda *words: None
            known[kind] = folder / "run" / "checkpoints" / "step_0000003", checkpoints
        return known[kind]

    return of


def restore(run, checkpoint):
    run.config = dataclasses.replace(run.config, resume_from_checkpoint=str(checkpoint))
    return run.restore()


def refusal(run, checkpoint):
    """Return the message with which a checkpoint is refused, or None where it is resumed."""
    try:
        restore(run, checkpoint)
    except GPT2ModernError as error:
        assert str(checkpoint) in str(error) and len(str(error)) < 20_000
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_saved_is_resumed_also_without_a_version(saved, tmp_path, kind):
    """Those of earlier versions state neither the version, nor whether there is optimizer state, nor later settings."""
    checkpoint, run = saved(kind)
    assert restore(run, checkpoint).step == 3

    def to_earlier(state):
        del state["format_version"], state["has_optimizer_state"], state["settings"]["model"]["mlp_bias"]
        for name in MUON_SETTINGS.keys() - {"muon_momentum_warmup_steps", *KINDS[kind]}:
            del state["settings"][name]

    earlier = altered(checkpoint, tmp_path, lambda copy: change_json(copy / "trainer_state.json", to_earlier))
    assert restore(run, earlier).to_json() == restore(run, checkpoint).to_json()


def places_in(values, path=()):
    """Yield the path of keys of every value in nested dicts, the dicts included; of settings the first and last four,
    since all are compared in the same way."""
    keys = list(values)
    for key in keys[:4] + keys[-4:] if path[:1] == ("settings",) else keys:
        yield (*path, key)
        if isinstance(values[key], dict):
            yield from places_in(values[key], (*path, key))


DELETED = object()
ODD = [
    DELETED,
    None,
    True,
    -1,
    0,
    2,
    10**9,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    "../../x",
    [],
    [1],
    {},
    {"x": 1},
]


def is_harmless(place, value, before):
    """Say whether `value` could be what a run has saved there: it is resumed."""
    number = type(value) in (int, float) and 0 <= value < 1e10
    valid = {
        ("wall_time_s",): number and value > 0,
        ("evaluation", "eval_loss"): number or value == -1,
        ("evaluation", "bits_per_byte"): number or value in (None, DELETED, -1),
        ("evaluation",): False,
        ("nonfinite_steps",): value in (0, 2),
        ("evaluated_step",): value == 2,
        ("format_version",): value in (0, DELETED) and value is not False,
        ("grad_scaler",): value in ({}, {"x": 1}),  # is looked at where there is a scaler
    }
    same = type(value) is type(before) and value == before
    default = getattr(TrainConfig, place[-1], getattr(GPT2ModernConfig, place[-1], None))
    same |= place[0] == "settings" and before == default and value is DELETED  # a setting that came later
    # Only max_steps is read from the schedule: the settings it was made from are compared one by one.
    return same or (place[0] == "schedule" and place != ("schedule", "max_steps")) or valid.get(place, False)


def test_no_odd_value_in_the_state_is_resumed_or_a_traceback(saved, tmp_path):
    checkpoint, run = saved("adamw")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    places = list(places_in(state))
    assert len(places) > 30
    silent = []
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    for place in places:
        for value in ODD:
            changed = json.loads(json.dumps(state))
            *parents, name = place
            parent = functools.reduce(dict.__getitem__, parents, changed)
            before = parent.pop(name)
            if value is not DELETED:
                parent[name] = value
            with_text(copy, "trainer_state.json", json.dumps(changed))
            if refusal(run, copy) is None and not is_harmless(place, value, before):
                silent.append((place, value))
    assert silent == []


def with_text(folder, name, text):
    """Write a file of a checkpoint and its checksum."""
    (folder / name).write_text(text)
    change_json(folder / "checksums.json", lambda sums: sums.update({name: sha256_of(folder / name)}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"x"', "{}", "[" * 100_000, "9" * 5000, '{"step": 3}', "\ud800",
     '{"format_version": 2}', '{"settings": ' + '{"model": ' * 900 + "1" + "}" * 901],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_a_state_that_is_none_is_refused(saved, tmp_path, text):
    checkpoint, run = saved("adamw")
    copy = altered(
        checkpoint,
        tmp_path,
        lambda copy: (copy / "trainer_state.json").write_bytes(text.encode(errors="surrogatepass")),
    )
    assert str(copy / "trainer_state.json") in refusal(run, copy)


def test_a_format_of_the_future_is_named(saved, tmp_path):
    checkpoint, run = saved("adamw")
    copy = altered(
        checkpoint,
        tmp_path,
        lambda copy: change_json(copy / "trainer_state.json", lambda state: state.update(format_version=7)),
    )
    assert "format_version 7 must be at most 1" in refusal(run, copy)


def rename(tensors, name):
    tensors["x/y"] = tensors.pop(name)


def put(function):
    def change(tensors, name):
        tensors[name] = function(tensors[name])

    return change


TENSOR_CHANGES = {
    "none left": lambda tensors, name: tensors.clear(),
    "one missing": lambda tensors, name: tensors.pop(name),
    "one more": lambda tensors, name: tensors.update({"x/exp_avg": torch.zeros(3)}),
    "no slash": lambda tensors, name: tensors.update(x=torch.zeros(3)),
    "renamed": rename,
    "scalar": put(lambda tensor: tensor.flatten()[0].clone()),
    "longer": put(lambda tensor: torch.cat([tensor.flatten(), torch.zeros(1)])),
    "shorter": put(lambda tensor: tensor.flatten()[:-1]),
    "empty": put(lambda tensor: torch.zeros(0)),
    "one dimension more": put(lambda tensor: tensor[None]),
    "float16": put(lambda tensor: tensor.half()),
    "float64": put(lambda tensor: tensor.double()),
    "integers": put(lambda tensor: tensor.long()),
    "booleans": put(lambda tensor: tensor.bool()),
    "NaN": put(lambda tensor: torch.full_like(tensor, torch.nan)),
    "infinite": put(lambda tensor: torch.full_like(tensor, torch.inf)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors", "adapter/adapter_model.safetensors"])
def test_no_odd_tensor_is_loaded_or_a_crash(saved, tmp_path, kind, file):
    """The first tensor of each kind: name, state name and number of dimensions."""
    if file.startswith("adapter") and kind != "lora":
        return
    checkpoint, run = saved(kind)
    tensors = load_file(checkpoint / file)
    first = {(name.rpartition("/")[2][-12:], tensor.ndim): name for name, tensor in sorted(tensors.items())[::-1]}
    silent, copy = [], shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    for name, (what, change) in itertools.product(first.values(), TENSOR_CHANGES.items()):
        changed = dict(tensors)
        change(changed, name)
        if what == "scalar" and tensors[name].ndim == 0:
            continue
        save_file(changed, copy / file)
        change_json(copy / "checksums.json", lambda sums: sums.update({file: sha256_of(copy / file)}))
        if file not in (refusal(run, copy) or ""):
            silent.append((name, what))
    assert silent == []


@pytest.mark.parametrize(
    ("state_name", "value"),
    [("step", -1.0), ("step", 4.0), ("step", 1e9), ("exp_avg_sq", -1.0), ("row_mean_square", -1.0)],
    ids=str,
)
def test_values_that_no_update_makes_are_refused(saved, tmp_path, state_name, value):
    checkpoint, run = saved("normuon" if state_name == "row_mean_square" else "adamw")

    def change(tensors):
        name = next(name for name in tensors if name.endswith(f"/{state_name}"))
        tensors[name].fill_(value)

    copy = altered(checkpoint, tmp_path, lambda copy: change_tensors(copy / "optimizer.safetensors", change))
    assert re.search(rf"impossible values in tensor \S+/{state_name} for step 3", refusal(run, copy))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]", b"\x10" + bytes(40)]
)
def test_files_without_tensors_are_refused(saved, tmp_path, name, content):
    checkpoint, run = saved("adamw")
    copy = altered(checkpoint, tmp_path, lambda copy: (copy / name).write_bytes(content))
    assert str(copy / name) in refusal(run, copy)


def test_a_run_that_has_skipped_every_update_resumes(data_dir, tmp_path):
    """Its optimizer has no state, and its checkpoint says so."""
    flags = {"on_nonfinite": "skip", "save_steps": 1}

    def end(event, **details):
        if event == "before_update":
            details["loss"].fill_(torch.nan)

    with contextlib.suppress(GPT2ModernError):
        train(config_of(data_dir, tmp_path, max_nonfinite_steps=2, **flags), end)
    assert load_file(tmp_path / "checkpoints" / "step_0000002" / "optimizer.safetensors") == {}
    summary = train(config_of(data_dir, tmp_path, **flags))
    assert summary["steps"] == 8


@pytest.mark.parametrize("odd", [{"batch_size_ramp": [0, 0]}, {"batch_size_ramp": [-1, 1]}, {"average_last": 1e400}])
def test_a_schedule_that_cannot_be_computed_is_refused(saved, tmp_path, odd):
    checkpoint, run = saved("adamw")
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    state = json.loads((copy / "trainer_state.json").read_text())
    state["schedule"] |= odd
    with_text(copy, "trainer_state.json", json.dumps(state))
    assert "is not the state of a run" in refusal(run, copy)


def test_a_loss_scale_is_checked(saved, tmp_path):
    checkpoint, run = saved("adamw")
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=96.0)
    scale = run.accelerator.scaler.state_dict()
    try:
        for number, wrong in enumerate(
            [
                {},
                scale | {"scale": "x"},
                scale | {"scale": -1.0},
                scale | {"growth_interval": 2.5},
                scale | {"scale": 0.0},
            ]
        ):
            copy = altered(
                checkpoint,
                tmp_path / str(number),
                lambda copy, wrong=wrong: change_json(
                    copy / "trainer_state.json", lambda state: state.update(grad_scaler=wrong)
                ),
            )
            assert "grad_scaler" in refusal(run, copy)
    finally:
        run.accelerator.scaler = None


def test_the_command_answers_in_one_line_and_writes_nothing(saved, data_dir, tmp_path, capsys):
    """Tensors of a wrong shape used to end the interpreter in the first update."""
    checkpoint, _ = saved("adamw")
    copy = altered(
        checkpoint,
        tmp_path,
        lambda copy: change_tensors(
            copy / "optimizer.safetensors", lambda tensors: TENSOR_CHANGES["scalar"](tensors, next(iter(tensors)))
        ),
    )
    flags = [f"--{name}={value}" for name, value in (COMMON | {"max_steps": 3}).items()]
    with pytest.raises(SystemExit) as caught:
        main([*flags, f"--data_dir={data_dir}", f"--output_dir={tmp_path / 'run'}", f"--resume_from_checkpoint={copy}"])
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "optimizer.safetensors" in lines[-1] and "Traceback" not in lines
