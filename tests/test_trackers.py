"""Trackers get what metrics.jsonl gets, once, and cannot stop a run."""

import importlib.util

import pytest
from accelerate.tracking import GeneralTracker

from gpt2modern.cli import parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.trackers import TRACKERS, Trackers, check_trackers, flat_settings
from tests.support.trainer import flags_for, losses, train
from train_accelerate import TrainConfig
from train_accelerate import train as train_with


class FakeTracker(GeneralTracker):
    """Keeps what it is told; raises in the call named `fails_in`."""

    requires_logging_directory = False
    fails_in = None
    instances: list["FakeTracker"] = []

    def __init__(self, project, **keywords):
        super().__init__(_blank=True)
        self.keywords, self.calls = keywords, []
        FakeTracker.instances.append(self)

    def called(self, what, *details):
        self.calls.append((what, *details))
        if what == self.fails_in:
            raise OSError("no route to host")

    def start(self):
        self.called("start")

    def store_init_configuration(self, values):
        self.called("settings", values)

    def log(self, values, step=None):
        self.called("log", step, values)

    def finish(self):
        self.called("finish")


@pytest.fixture
def fake(monkeypatch):
    FakeTracker.instances = []
    for name in TRACKERS:
        monkeypatch.setitem(TRACKERS, name, FakeTracker)
    return FakeTracker


def build(tmp_path, report_to=("wandb",), resumed_step=0, logged_step=0):
    return Trackers(
        report_to,
        project="project",
        run_name="run",
        run_id="1234",
        tensorboard_dir=tmp_path,
        settings={"max_steps": 3},
        resumed_step=resumed_step,
        logged_step=logged_step,
    )


def test_settings_rows_and_end_arrive(tmp_path, fake):
    opened = build(tmp_path)
    opened.log(1, {"loss": 2.0, "mfu": None})
    opened.close()
    (tracker,) = fake.instances
    assert tracker.calls == [("start",), ("settings", {"max_steps": 3}), ("log", 1, {"loss": 2.0}), ("finish",)]
    assert tracker.keywords == {"name": "run", "resume": "never", "id": "1234"}


def test_a_resumed_run_keeps_its_name_and_logs_no_step_twice(tmp_path, fake):
    opened = build(tmp_path, ["trackio", "tensorboard"], resumed_step=3, logged_step=5)
    for step in range(4, 8):
        opened.log(step, {"loss": 1.0})
    trackio, tensorboard = fake.instances
    assert trackio.keywords["resume"] == "allow"
    assert [call[1] for call in trackio.calls if call[0] == "log"] == [6, 7]
    assert tensorboard.keywords["purge_step"] == 4  # drops 4 and 5, so these are written again
    assert [call[1] for call in tensorboard.calls if call[0] == "log"] == [4, 5, 6, 7]


@pytest.mark.fault("F18 a tracker fails")
@pytest.mark.parametrize("fails_in", ["start", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_continue(tmp_path, fake, capsys, monkeypatch, fails_in):
    class BrokenTracker(FakeTracker):
        pass

    BrokenTracker.fails_in = fails_in
    monkeypatch.setitem(TRACKERS, "wandb", BrokenTracker)
    opened = build(tmp_path, ["wandb", "trackio"])
    for step in (1, 2):
        opened.log(step, {"loss": 2.0})
    opened.close()
    broken, whole = fake.instances
    assert broken.calls[-1][0] == fails_in
    assert [call[0] for call in whole.calls] == ["start", "settings", "log", "log", "finish"]
    assert capsys.readouterr().err == (
        "warning: --report_to wandb failed and is disabled for the rest of the run: OSError: no route to host\n"
    )


def test_trackers_are_closed_when_a_run_breaks_off(data_dir, tmp_path, fake):
    def interrupt(event, **details):
        if event == "evaluating":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with(parse_arguments(TrainConfig, flags_for(data_dir, tmp_path, report_to="trackio")), interrupt)
    assert fake.instances[0].calls[-1] == ("finish",)


def test_settings_are_flat():
    assert flat_settings({"a": 1, "b": True, "c": ["x", "y"], "d": {"e": 2}}) == {
        "a": 1, "b": True, "c": '["x", "y"]', "d": '{"e": 2}',
    }  # fmt: skip


def test_a_tracker_that_is_not_installed_or_unknown_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(["none"])
    with pytest.raises(
        GPT2ModernError, match="--report_to wandb: wandb is not installed; run: python -m pip install wandb"
    ):
        check_trackers(["wandb"])
    choices = "choose from none, trackio, tensorboard, wandb"
    with pytest.raises(GPT2ModernError, match=f"--report_to tensorbored is unknown; {choices}"):
        check_trackers(["none", "tensorbored"])


def test_a_wrong_tracker_is_refused_before_anything_is_written(data_dir, tmp_path):
    config = parse_arguments(
        TrainConfig, [*flags_for(data_dir, tmp_path / "run"), "--report_to", "none", "tensorbored"]
    )
    with pytest.raises(GPT2ModernError, match="--report_to tensorbored is unknown"):
        train_with(config)
    assert not (tmp_path / "run").exists()


def tensorboard_steps(folder, tag):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_a_run_and_its_continuation_are_one_run_in_tensorboard_and_trackio(data_dir, tmp_path, monkeypatch):
    """Stopped after step 5, resumed from the checkpoint of step 3: steps 4 and 5 are made twice and shown once."""
    pytest.importorskip("tensorboard")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    reports = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "lr_scheduler_type": "constant"}
    flags = ["--report_to", "tensorboard", "trackio", "--project", "tests"]
    run = tmp_path / "run"
    train(data_dir, run, **reports | {"max_steps": 5}, extra=flags)
    for checkpoint in (run / "checkpoints").glob("step_0000005"):
        checkpoint.rename(run / "gone")
    train(data_dir, run, **reports, extra=flags)

    (folder,) = (run / "tensorboard").glob("run-*")
    assert tensorboard_steps(folder, "loss") == [1, 2, 3, 4, 5, 6]
    names = storage.get_runs("tests")
    assert names == [folder.name]
    rows = [row for row in storage.get_logs("tests", names[0]) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault("F18 a tracker fails")
def test_a_tracker_that_cannot_write_does_not_stop_the_run(data_dir, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("a file where the folder should be")
    train(data_dir, run, max_steps=2, extra=["--report_to", "tensorboard"])
    assert len(losses(run)) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "--report_to tensorboard failed" in warnings[0]
