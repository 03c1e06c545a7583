"""A run is uploaded in the background: what arrives, and that nothing which fails there stops training."""

import json
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

import modeling_gpt2modern
from gpt2modern.cli import parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training import publish
from gpt2modern.training.card import model_card
from tests.support.trainer import ENVIRONMENT, command, flags_for, train
from train_accelerate import TrainConfig
from train_accelerate import train as train_with

TOKEN = "hf_secretsecretsecret"


class FakeHub:
    """Stands for the Hub: keeps the files it is given; `fails` raises for each upload, `gate` holds it up."""

    def __init__(self):
        self.repositories, self.uploads = [], []
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()

    def create_repo(self, repo_id, **options):
        self.repositories.append((repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.branch = options["branch"]

    def upload_folder(self, *, repo_id, folder_path, **options):
        assert self.gate.wait(60)
        if self.fails:
            raise ConnectionError(f"refused for {TOKEN}\nand more")
        weights = load_file(folder_path / "model.safetensors")
        names = {path.name for path in folder_path.iterdir()}
        card = (folder_path / "README.md").read_text()
        self.uploads.append(SimpleNamespace(repo_id=repo_id, names=names, weights=weights, card=card, **options))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def fake(monkeypatch):
    hub = FakeHub()
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(HfApi, name, getattr(hub, name))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def train_with_callback(callback, data_dir, output_dir, **changes):
    train_with(parse_arguments(TrainConfig, flags_for(data_dir, output_dir, **changes)), callback)


def wait_for_uploads():
    for thread in threading.enumerate():
        if "(_work)" in thread.name:  # Python names a thread after the function it runs
            thread.join(60)


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("warning:")]


def test_the_finished_model_arrives_with_its_card_and_records_and_nothing_else(fake, data_dir, tmp_path, capsys):
    train(
        data_dir, tmp_path / "run", push_to_hub=True, hub_private_repo=True, hub_revision="trial", license="mit",
        report_to="tensorboard", sample_prompts="def",
    )  # fmt: skip
    (upload,) = fake.uploads
    assert fake.repositories[0] == ("run", {"private": True, "exist_ok": True})
    assert (upload.repo_id, upload.path_in_repo) == ("someone/run", None)
    assert upload.revision == fake.branch == "trial"
    assert upload.names == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md", "summary.json", "metrics.jsonl", "samples.jsonl", "training_curves.png", "resolved_config.yaml",
    } | {path.name for path in Path(modeling_gpt2modern.__file__).parent.glob("*_gpt2modern.py")}  # fmt: skip
    assert 'model="someone/run"' in upload.card and "license: mit" in upload.card
    output = capsys.readouterr()
    assert "uploaded to https://huggingface.co/someone/run" in output.out and not warnings_in(output.err)
    assert not (tmp_path / "run" / ".hub_upload.tmp").exists()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


@pytest.mark.parametrize(("strategy", "folder"), [("every_save", None), ("checkpoint", "last-checkpoint")])
def test_checkpoints_arrive_without_their_optimizer(fake, data_dir, tmp_path, strategy, folder):
    train(data_dir, tmp_path, push_to_hub=True, hub_model_id="someone/model", hub_strategy=strategy, max_steps=6)
    assert all(not upload.names & {"optimizer.safetensors", "trainer_state.json"} for upload in fake.uploads)
    *checkpoints, final = fake.uploads
    assert checkpoints and {upload.path_in_repo for upload in checkpoints} == {folder}
    assert checkpoints[0].commit_message == "Checkpoint of step 3" and "step 3 of 6" in checkpoints[0].card
    assert "| validation loss (nats/token) | not measured |" in checkpoints[0].card  # the first evaluation is at 4
    assert "model_name" not in checkpoints[0].card and "model-index" in final.card
    assert final.path_in_repo is None and "checkpoint: step" not in final.card


@pytest.mark.parametrize("unsaved", [2, 4])
def test_a_checkpoint_that_could_not_be_saved_is_not_uploaded(fake, data_dir, tmp_path, unsaved):
    """Neither the first one, when there is none, nor a later one, when an older one lies there."""

    def full_disk(event, step, **details):
        if event == "before_update":
            wait_for_uploads()  # a save that finds one going on starts none
        if event == "saving" and step == unsaved:
            raise OSError("No space left on device")

    flags = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "max_steps": 6}
    train_with_callback(full_disk, data_dir, tmp_path, **flags)
    steps = [upload.commit_message for upload in fake.uploads[:-1]]
    assert steps == [f"Checkpoint of step {6 - unsaved}"]


@pytest.mark.fault("F19 an upload fails")
def test_uploads_that_fail_are_one_warning_and_the_command_to_type(fake, data_dir, tmp_path, capsys):
    fake.fails = True
    train(data_dir, tmp_path / "run", push_to_hub=True, hub_strategy="every_save", save_steps=2)
    output = capsys.readouterr()
    (warning,) = warnings_in(output.err)
    assert "someone/run: ConnectionError: refused for hf_...; training continues" in warning
    assert "was not uploaded to the Hub" in output.out and "upload it with: hf upload someone/run" in output.out
    assert TOKEN not in output.out + output.err
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_slow_upload_holds_nothing_up_and_the_next_ones_are_left_out(fake, data_dir, tmp_path, capsys):
    """The first upload is stuck until the last step: the second checkpoint does not wait, the end does."""
    fake.gate.clear()

    def release_at_the_end(event, step, **details):
        if event == "logged" and step == 8:
            fake.gate.set()

    flags = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "save_total_limit": 1}
    train_with_callback(release_at_the_end, data_dir, tmp_path, **flags)
    messages = [upload.commit_message for upload in fake.uploads]
    assert messages[-1] == "Model after 8 steps" and len(messages) <= 2
    assert not warnings_in(capsys.readouterr().err)


def test_the_end_does_not_wait_for_ever(fake, data_dir, tmp_path, capsys, monkeypatch):
    fake.gate.clear()
    monkeypatch.setattr(publish, "WAIT_S", 0.2)
    train(data_dir, tmp_path, push_to_hub=True, max_steps=2)
    assert "to the Hub (the upload was not finished after 0 s); upload it with: hf upload" in capsys.readouterr().out
    fake.gate.set()


@pytest.mark.fault("F19 an upload fails")
def test_a_run_without_a_network_ends_well(data_dir, tmp_path):
    """The real client, told that it is offline."""
    result = subprocess.run(
        command(data_dir, tmp_path / "run", push_to_hub=True, hub_strategy="every_save", max_steps=6),
        env=ENVIRONMENT | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (warning,) = warnings_in(result.stderr.replace("\r", "\n"))
    assert "offline mode is enabled" in warning
    assert "was not uploaded to the Hub" in result.stdout and TOKEN not in result.stdout + result.stderr


def test_a_name_that_no_repository_can_have_is_an_error_before_anything_starts():
    with pytest.raises(GPT2ModernError, match="--hub_model_id 'a/b/c' is not a repository name; give owner/name"):
        parse_arguments(
            TrainConfig, ["--data_dir=data", "--output_dir=out", "--push_to_hub=true", "--hub_model_id=a/b/c"]
        )


def test_the_card_says_what_it_was_trained_on_and_from(data_dir):
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest["source"]["name"] = "owner/corpus"
    summary = {
        "params": 1000, "steps": 3, "tokens_seen": 512, "eval_loss": 3.14159, "bits_per_byte": 1.5, "wall_time_s": 2.0,
        "tokens_per_second": 256.0, "eval_blocks": 8, "num_processes": 1,
    }  # fmt: skip
    text = model_card(
        TrainConfig(data_dir="data", output_dir="out", max_steps=3, learning_rate=0.1, license="mit"),
        summary,
        name="someone/model",
        base_model="someone/base",
        samples=[{"step": 2, "prompt": "of an earlier step", "text": ""}, {"step": 3, "prompt": "a ```", "text": " b"}],
        manifest=manifest,
        num_eval_blocks=12,
    )
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (card.data.datasets, card.data.base_model, card.data.license) == ("owner/corpus", "someone/base", "mit")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"loss": 3.1416, "bits_per_byte": 1.5}
    assert "````text\na ``` b\n````" in card.text and "of an earlier step" not in card.text
    assert "| learning_rate | 0.1 |" in card.text
    assert "| validation blocks | 8 of 12, at equal distances |" in card.text


def test_the_card_leaves_out_settings_without_effect_and_those_of_the_place():
    shown = TrainConfig(data_dir="data", output_dir="out", project="secret").chosen(card=True)
    assert "learning_rate" in shown
    assert not shown.keys() & {"data_dir", "output_dir", "project", "muon_learning_rate", "config", "dry_run"}
    assert "muon_learning_rate" in TrainConfig(data_dir="data", output_dir="out", optimizer="muon").chosen(card=True)
