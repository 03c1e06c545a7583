"""A checkpoint is complete or not there; what is resumed is the newest valid one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.checkpoints import (
    choose_checkpoint,
    find_problem,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_trainer_state,
    save_checkpoint,
    set_aside_later_checkpoints,
)
from tests.support.trainer import damage


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
    load_checkpoint(checkpoints / "step_0000010", other, [other_optimizer])
    assert read_trainer_state(checkpoints / "step_0000010") == {"step": 10}
    found = other.state_dict() | optimizer_state([other_optimizer], other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_restored_optimizer_makes_the_same_update():
    model, optimizer = trained_model()
    other, other_optimizer = trained_model()
    other_optimizer.state.clear()
    load_optimizer_state([other_optimizer], other, optimizer_state([optimizer], model))
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
        load_checkpoint(checkpoints / "step_0000010", model, [torch.optim.AdamW(model.parameters())])


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
