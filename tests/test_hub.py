"""Models, data and checkpoints travel through a Hub, and nothing that fails there stops training or is lost."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import modeling_gpt2modern
from gpt2modern.cli import parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.formats.tokens import write_tokens
from gpt2modern.data.manifest import read_manifest
from gpt2modern.data.publishing import push_to_hub as push_dataset
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_config, load_model, load_tokenizer
from gpt2modern.training import publish
from gpt2modern.training.card import model_card
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support import hub as hub_of_tests
from tests.support.folders import EOS, contents, make_texts, refusal, run, write_jsonl
from tests.support.hub import TOKEN, Repository
from tests.support.trainer import REPOSITORY, TORCHRUN, assert_same_weights, command, flags_for, metrics, train
from train_accelerate import TrainConfig
from train_accelerate import train as train_with


def train_with_callback(callback, data_dir, output_dir, **changes):
    return train_with(parse_arguments(TrainConfig, flags_for(data_dir, output_dir, **changes)), callback)


def wait_for_uploads(event="before_update", step=0, **details):
    """Wait, as the callback of a run, before each update: a save that finds an upload going on starts none."""
    for thread in threading.enumerate():
        if event == "before_update" and "(_work)" in thread.name:  # Python names a thread after its function
            thread.join(60)


def uploads_of(hub, name="models/someone/run"):
    return hub.repositories[name].uploads


def write_upload(upload, folder):
    """Write the files of an upload to `folder`."""
    for name, content in upload.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def warnings_in(text):
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith("warning:")]


# A run is uploaded


def test_the_finished_model_arrives_with_its_card_and_records_and_nothing_else(hub, data_dir, tmp_path, capsys):
    train(
        data_dir, tmp_path / "run", push_to_hub=True, hub_private_repo=True, hub_revision="trial", license="mit",
        report_to="tensorboard", sample_prompts="def",
    )  # fmt: skip
    (upload,) = uploads_of(hub)
    repository = hub.repositories["models/someone/run"]
    assert repository.visibility == "private" and repository.branches["trial"] == upload.oid
    assert repository.at("main") is repository.commits[0]
    assert upload.changed == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md", "summary.json", "metrics.jsonl", "samples.jsonl", "training_curves.png", "resolved_config.yaml",
    } | {path.name for path in Path(modeling_gpt2modern.__file__).parent.glob("*_gpt2modern.py")}  # fmt: skip
    card = upload.files["README.md"].decode()
    assert 'model="someone/run"' in card and "license: mit" in card
    output = capsys.readouterr()
    assert f"uploaded to {hub.url}/someone/run" in output.out and not warnings_in(output.err)
    assert not list((tmp_path / "run").glob(".hub_upload*"))
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


def test_the_stock_model_is_a_subfolder_of_the_repository(hub, data_dir, tmp_path):
    flags = {"hub_model_id": "someone/model", "hub_strategy": "every_save", "export_stock": "auto", "max_steps": 4}
    hub.repositories["models/someone/model"] = Repository()
    hub.repositories["models/someone/model"].commit({"stock/model.safetensors": b"of earlier weights"})
    train(data_dir, tmp_path / "run", push_to_hub=True, callback=wait_for_uploads, **flags)
    *checkpoints, final = uploads_of(hub, "models/someone/model")
    assert checkpoints and not any(name.startswith("stock/") for each in checkpoints for name in each.files)
    assert not any(b"subfolder" in each.files["README.md"] for each in checkpoints)
    card = final.files["README.md"].decode()
    assert 'name = "someone/model"' in card and 'from_pretrained(name, subfolder="stock")' in card
    stock = AutoModelForCausalLM.from_pretrained("someone/model", subfolder="stock", trust_remote_code=False)
    batch = PackedBlocks(data_dir, "train").__getitems__([0])
    with torch.no_grad():
        expected = GPT2ModernForCausalLM.from_pretrained(tmp_path / "run")(batch).logits[..., :300]  # without padding
        torch.testing.assert_close(stock(batch).logits, expected, atol=1e-5, rtol=0)
    assert 'from_pretrained("someone/model", subfolder="stock")' in final.files["stock/README.md"].decode()


@pytest.mark.parametrize(("strategy", "folder"), [("every_save", ""), ("checkpoint", "last-checkpoint/")])
def test_checkpoints_arrive_and_only_the_strategy_checkpoint_has_their_optimizer(
    hub, data_dir, tmp_path, strategy, folder
):
    hub.repositories["models/someone/model"] = Repository()  # it exists, with a file of somebody else
    hub.repositories["models/someone/model"].commit({"notes.txt": b"mine"})
    flags = {"hub_model_id": "someone/model", "hub_strategy": strategy, "max_steps": 6}
    train(data_dir, tmp_path, push_to_hub=True, callback=wait_for_uploads, **flags)
    first, final = uploads_of(hub, "models/someone/model")
    card = first.files[f"{folder}README.md"].decode()
    assert all(name.startswith(folder) for name in first.changed) and f"{folder}model.safetensors" in first.changed
    state = {f"{folder}{name}" for name in ("optimizer.safetensors", "trainer_state.json", "checksums.json")}
    assert state & set(first.files) == (state if strategy == "checkpoint" else set())
    assert first.message == "Checkpoint of step 3" and "step 3 of 6" in card
    assert "| validation loss (nats/token) | not measured |" in card and "model_name" not in card  # measured at 4
    card = final.files["README.md"].decode()
    assert "model-index" in card and "checkpoint: step" not in card and final.files["notes.txt"] == b"mine"
    assert not any(name.startswith("last-checkpoint") for name in final.changed)


@pytest.mark.parametrize("unsaved", [2, 4])
def test_a_checkpoint_that_could_not_be_saved_is_not_uploaded(hub, data_dir, tmp_path, unsaved):
    """Neither the first one, when there is none, nor a later one, when an older one lies there."""

    def full_disk(event, step, **details):
        wait_for_uploads(event)
        if event == "saving" and step == unsaved:
            raise OSError("No space left on device")

    flags = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "max_steps": 6}
    train_with_callback(full_disk, data_dir, tmp_path / "run", **flags)
    steps = [upload.message for upload in uploads_of(hub)[:-1]]
    assert steps == [f"Checkpoint of step {6 - unsaved}"]


@pytest.mark.fault("F19 an upload fails")
def test_uploads_that_fail_are_one_warning_and_the_command_to_type(hub, data_dir, tmp_path, capsys):
    hub.fail("POST .*/commit/", 500, inf)
    flags = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "callback": wait_for_uploads}
    train(data_dir, tmp_path / "run", **flags)
    output = capsys.readouterr()
    (warning,) = warnings_in(output.err)
    assert "someone/run: HfHubHTTPError: " in warning and "500" in warning
    assert "the Hub of hf_... is overloaded" in warning
    assert f"(endpoint {hub.url}); training continues, and the next upload retries" in warning
    left = tmp_path / "run" / ".hub_upload_final"
    assert "was not uploaded to the Hub (HfHubHTTPError: " in output.out
    assert f"upload it with: hf upload someone/run {left} ." in output.out
    assert TOKEN not in output.out + output.err
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    hub.faults.clear()
    by_hand = shlex.split(output.out.rpartition("upload it with: ")[2])
    program = Path(sys.executable).with_name(by_hand[0])
    subprocess.run([program, *by_hand[1:]], env=hub.environment(tmp_path), capture_output=True, check=True)
    assert uploads_of(hub)[-1].files["model.safetensors"] == weights


@pytest.mark.fault("F19 an upload fails")
def test_uploads_survive_two_errors_of_the_hub_and_a_connection_that_breaks(hub, data_dir, tmp_path, capsys):
    """The client itself repeats none of these requests."""
    for request in ("POST /api/repos/create", "POST .*/commit/"):
        hub.fail(request, 500, 2)
    hub.fail("POST /api/validate-yaml", 0)
    train(data_dir, tmp_path / "run", push_to_hub=True, max_steps=2)
    output = capsys.readouterr()
    assert [upload.message for upload in uploads_of(hub)] == ["Model after 2 steps"]
    assert f"model uploaded to {hub.url}/someone/run" in output.out and not warnings_in(output.err)
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_slow_upload_holds_nothing_up_and_the_next_ones_are_left_out(hub, data_dir, tmp_path, capsys):
    """The first upload is stuck until the last step: the second checkpoint does not wait, the end does."""
    hub.gate.clear()

    def release_at_the_end(event, step, **details):
        if event == "logged" and step == 8:
            hub.gate.set()

    flags = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "save_total_limit": 1}
    train_with_callback(release_at_the_end, data_dir, tmp_path / "run", **flags)
    messages = [upload.message for upload in uploads_of(hub)]
    assert messages[-1] == "Model after 8 steps" and len(messages) <= 2
    assert not warnings_in(capsys.readouterr().err)


def test_the_end_does_not_wait_for_ever(hub, data_dir, tmp_path, capsys, monkeypatch):
    hub.gate.clear()
    monkeypatch.setattr(publish, "WAIT_S", 0.2)
    train(data_dir, tmp_path, push_to_hub=True, max_steps=2)
    assert "to the Hub (the upload was not finished after 0 s); upload it with: hf upload" in capsys.readouterr().out
    assert (tmp_path / ".hub_upload_final" / "model.safetensors").exists()


@pytest.mark.fault("F19 an upload fails")
def test_a_run_without_a_network_ends_well(data_dir, tmp_path, capsys):
    """The client is told that it is offline, as in all tests without a Hub."""
    train(data_dir, tmp_path / "run", push_to_hub=True, hub_strategy="every_save", max_steps=6)
    output = capsys.readouterr()
    (warning,) = warnings_in(output.err)
    assert "offline mode is enabled" in warning and "was not uploaded to the Hub" in output.out


# Refused tokens


@pytest.fixture
def refusing(hub, monkeypatch):
    """A Hub that does not know the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknown")
    return hub


def assert_says_how_to_log_in(line, hub):
    assert "401" in line and "Invalid username or password" in line and f"(endpoint {hub.url})" in line
    assert "run `hf auth login` or set HF_TOKEN" in line and "unknownunknown" not in line and "\n" not in line


def test_an_invalid_token_is_answered_with_how_to_set_one(refusing, data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / "run", push_to_hub=True, hub_model_id="someone/run", max_steps=2)
    output = capsys.readouterr()
    for line in (*warnings_in(output.err), output.out.splitlines()[-1]):
        assert_says_how_to_log_in(line, refusing)
    assert sum(request.startswith("POST /api/repos/create") for request in refusing.requests) == 2  # not repeated


def test_an_invalid_token_for_data_is_answered_likewise(
    refusing, data_dir, tokenizer_dir, tmp_path, monkeypatch, capsys
):
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GPT2ModernError) as refused:
        push_dataset(tmp_path / "data", read_manifest(data_dir), "someone/blocks", private=False)
    assert_says_how_to_log_in(str(refused.value), refusing)
    with pytest.raises(GPT2ModernError, match="someone/blocks: no such folder, and it cannot be downloaded") as refused:
        PackedBlocks("someone/blocks", "train")
    assert_says_how_to_log_in(str(refused.value), refusing)
    for names in (("stdlib", "someone/tokenizer"), ("someone/corpus", tokenizer_dir)):
        flags = ("--dataset_name", names[0], "--tokenizer_name", names[1], "--output_dir", "prepared")
        assert_says_how_to_log_in(refusal(capsys, *flags), refusing)


def test_an_invalid_token_for_a_model_is_answered_likewise(refusing, data_dir, tmp_path):
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(GPT2ModernError, match="someone/model") as refusal:
            load("someone/model")
        assert_says_how_to_log_in(str(refusal.value), refusing)
    with pytest.raises(GPT2ModernError, match="--resume_from_checkpoint hub: someone/run cannot be down") as refusal:
        resume = {"resume_from_checkpoint": "hub", "hub_model_id": "someone/run"}
        train_with_callback(wait_for_uploads, data_dir, tmp_path / "run", **resume)
    assert_says_how_to_log_in(str(refusal.value), refusing)


# Data


@pytest.mark.fault("F19 an upload fails")
def test_data_goes_up_and_down_through_errors_of_the_hub_and_replaces_earlier_data(hub, data_dir, tmp_path):
    """The repository has more shards of an earlier upload; load_dataset would read them, too."""
    hub.repositories["datasets/someone/blocks"] = Repository()
    old = {"train/data-00007-of-00008.arrow": b"old", "notes.txt": b"mine"}
    hub.repositories["datasets/someone/blocks"].commit(old)
    shutil.copytree(data_dir, tmp_path / "data")
    for request in ("POST /api/repos/create", "POST .*/commit/", "GET /api/datasets/someone/blocks/revision"):
        hub.fail(request, 500, 2)
    broken = [hub.fail("PUT /objects/", 0), hub.fail("GET /objects/", 0)]
    push_dataset(tmp_path / "data", read_manifest(data_dir), "someone/blocks", private=False)
    (upload,) = uploads_of(hub, "datasets/someone/blocks")
    assert upload.files.keys() == contents(tmp_path / "data").keys() | {"notes.txt"}
    found, expected = (PackedBlocks(each, "train") for each in ("someone/blocks", data_dir))
    assert torch.equal(found.stream(0, found.tokens), expected.stream(0, expected.tokens))
    found.verify_checksums()
    assert all(fault.times == 0 for fault in hub.faults) and len(broken) == 2


def test_the_client_with_xet_updates_existing_data_too(hub, data_dir, tmp_path, monkeypatch):
    """By its own upload, in which several commits may overlap; here every file is small, so none goes by Xet itself."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(hub_of_tests, "LARGE", ())
    hub.repositories["datasets/someone/blocks"] = Repository()
    hub.repositories["datasets/someone/blocks"].commit({"train/data-00007-of-00008.arrow": b"old"})
    shutil.copytree(data_dir, tmp_path / "data")
    push_dataset(tmp_path / "data", read_manifest(data_dir), "someone/blocks", private=False)
    assert uploads_of(hub, "datasets/someone/blocks")[-1].files.keys() == contents(tmp_path / "data").keys()


@pytest.mark.slow
def test_strangers_prepare_train_and_load_by_name_in_processes_of_their_own(hub, tmp_path):
    """A dataset of the Hub becomes blocks on the Hub, these a model on the Hub, and that is loaded, all by name."""
    card = "---\nlicense: odc-by\nlanguage:\n- en\n---\n# Corpus\n"
    corpus = write_jsonl(tmp_path / "train.jsonl", make_texts(300)).read_bytes()
    hub.repositories["datasets/someone/corpus"] = Repository()
    hub.repositories["datasets/someone/corpus"].commit({"README.md": card.encode(), "train.jsonl": corpus})

    def run_process(*arguments):
        settings = {"env": hub.environment(tmp_path / "home"), "cwd": tmp_path, "text": True, "timeout": 300}
        result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    prepared = ("--dataset_name", "someone/corpus", "--train_tokenizer", "300", "--block_size", "32")
    pushed = ("--push_to_hub", "--hub_dataset_id", "someone/blocks", "--output_dir", "data")
    run_process(REPOSITORY / "prepare_data.py", *prepared, *pushed)
    (upload,) = uploads_of(hub, "datasets/someone/blocks")
    facts = yaml.safe_load(upload.files["README.md"].decode().split("---\n")[1])
    assert (facts["license"], facts["language"], facts["source_datasets"]) == ("odc-by", ["en"], ["someone/corpus"])

    flags = {"hub_model_id": "someone/model", "hub_strategy": "every_save", "push_to_hub": True, "save_steps": 2}
    _, *arguments = command("someone/blocks", "out/model", **flags)
    assert f"model uploaded to {hub.url}/someone/model" in run_process(*arguments)
    *checkpoints, final = uploads_of(hub, "models/someone/model")
    assert checkpoints and final.message == "Model after 8 steps"
    loaded = json.loads(run_process("-c", LOADING).splitlines()[-1])
    assert loaded["module"].startswith("transformers_modules.someone.model") and loaded["text"].startswith("the cat")
    facts = ModelCard(final.files["README.md"].decode()).data
    assert (facts.datasets, facts.language, facts.license) == (["someone/corpus", "someone/blocks"], ["en"], None)
    assert loaded["rows"] == read_manifest(tmp_path / "data")["splits"]["train"]["rows"]


LOADING = """
import json
from datasets import load_dataset
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained("someone/model", trust_remote_code=True)
generate = pipeline("text-generation", model="someone/model", trust_remote_code=True)
text = generate("the cat", max_new_tokens=4)[0]["generated_text"]
rows = load_dataset("someone/blocks", split="train").num_rows
print(json.dumps({"module": type(model).__module__, "text": text, "rows": rows}))
"""


# Resume from the Hub

RESUMED = {"push_to_hub": True, "hub_strategy": "checkpoint", "resume_from_checkpoint": "hub"}
RESUMED |= {"hub_model_id": "run", "save_steps": 2, "sample_prompts": "def"}


@pytest.fixture
def stopped(hub, data_dir, tmp_path, capsys):
    """A run of 8 steps that had nothing to resume from and was stopped after 5; its last checkpoint is on the Hub."""

    def stop(event, step, **details):
        if event == "before_update" and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    summary = train_with_callback(stop, data_dir, tmp_path / "stopped", **RESUMED)
    assert summary["steps"] == 5 and uploads_of(hub)[-1].message == "Checkpoint of step 5"
    assert "someone/run has no last-checkpoint to resume from on the Hub" in capsys.readouterr().out
    return tmp_path / "stopped"


@pytest.mark.fault("F26 the machine and its disk are lost")
def test_a_run_resumes_on_another_machine_from_its_last_checkpoint_on_the_hub(hub, stopped, data_dir, tmp_path, capsys):
    whole = train(data_dir, tmp_path / "whole", save_steps=2, sample_prompts="def")
    hub.fail("GET /api/models/someone/run", 500, 2)
    hub.fail("GET /objects/", 0)
    resumed = train(data_dir, tmp_path / "resumed", **RESUMED)
    assert "step_0000005 at step 5" in capsys.readouterr().out
    assert_same_weights(whole, resumed)
    states = [each / "checkpoints" / "step_0000008" / "optimizer.safetensors" for each in (whole, resumed)]
    assert states[0].read_bytes() == states[1].read_bytes()
    same = [[(row["step"], row["loss"], row.get("eval_loss")) for row in metrics(each)] for each in (whole, resumed)]
    assert same[0] == same[1] and len(same[0]) == 8
    assert (whole / "samples.jsonl").read_bytes() == (resumed / "samples.jsonl").read_bytes()
    assert not list((resumed / "checkpoints").glob(".*"))


def test_a_newer_checkpoint_in_the_folder_is_preferred_and_a_damaged_one_on_the_hub_is_an_error(
    hub, stopped, data_dir, tmp_path, capsys
):
    newest = stopped / "checkpoints" / "step_0000005"
    asked, there = len(hub.requests), newest.stat().st_ino
    train(data_dir, stopped, **RESUMED | {"push_to_hub": False})
    assert "step_0000005 at step 5" in capsys.readouterr().out and newest.stat().st_ino == there
    assert not [request for request in hub.requests[asked:] if "last-checkpoint/optimizer" in request]
    repository = hub.repositories["models/someone/run"]
    damaged = repository.at().files | {"last-checkpoint/optimizer.safetensors": b"x"}
    repository.commit(damaged)
    with pytest.raises(GPT2ModernError, match=r"hub: someone/run: .*optimizer.safetensors was altered"):
        train_with_callback(wait_for_uploads, data_dir, tmp_path / "resumed", **RESUMED)
    assert not (tmp_path / "resumed" / "checkpoints" / "step_0000005").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_resume_from_the_checkpoint_on_the_hub_that_one_downloads(
    hub, stopped, data_dir, tmp_path, damaged
):
    """If it is damaged, the run ends with that line, and no process waits for the other."""
    place, repository = tmp_path / "two", hub.repositories["models/someone/run"]
    if damaged:
        repository.commit(repository.at().files | {"last-checkpoint/optimizer.safetensors": b"x"})
    asked = len(hub.requests)
    launched = command(data_dir, place, *TORCHRUN, "2", **RESUMED | {"push_to_hub": False})
    done = subprocess.run(launched, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=300)
    downloads = [each for each in hub.requests[asked:] if "last-checkpoint/optimizer" in each]
    assert len(downloads) == 1, (hub.requests[asked:], done.stderr)
    if damaged:
        assert done.returncode != 0 and "optimizer.safetensors was altered" in done.stderr
        assert "exitcode  : 2 (" in done.stderr and not list(place.rglob("step_*"))
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step_0000005 at step 5") == 1
    alone = train(data_dir, tmp_path / "alone", **RESUMED | {"push_to_hub": False})
    expected, found = ([row["loss"] for row in metrics(each)] for each in (alone, place))
    assert found == pytest.approx(expected, abs=1e-4) and len(found) == 8


# Adapters


def test_adapters_are_uploaded_with_the_merged_model_and_names_without_paths(hub, data_dir, tmp_path):
    """The checkpoint and the finished model of a LoRA run, from a place whose names nobody else should read."""
    home = tmp_path / "home" / "secretuser"
    train(data_dir, home / "base", max_steps=2, save_steps=0)
    flags = {"model_name_or_path": home / "base", "config_overrides": "", "lora_rank": 2, "learning_rate": 0.05}
    flags |= {"push_to_hub": True, "hub_strategy": "checkpoint", "max_steps": 4, "save_steps": 2}
    shutil.copytree(data_dir, home / "data")
    train(home / "data", home / "run", callback=wait_for_uploads, report_to="tensorboard", **flags)
    assert [each.message for each in uploads_of(hub)] == ["Checkpoint of step 2", "Model after 4 steps"]
    upload = uploads_of(hub)[-1]
    for name, content in upload.files.items():
        assert b"secretuser" not in content and str(Path.cwd()).encode() not in content, name
    for folder in ("last-checkpoint/", ""):
        settings = upload.files[f"{folder}resolved_config.yaml"].decode()
        recipe = yaml.safe_load(settings)
        assert (recipe["data_dir"], recipe["model_name_or_path"], recipe["output_dir"]) == ("data", "base", "run")
        assert "# torch: " in settings and "command" not in settings
        assert f"{folder}adapter/adapter_model.safetensors" in upload.files
        configuration = json.loads(upload.files[f"{folder}adapter/adapter_config.json"])
        assert configuration["base_model_name_or_path"] == "base"
        card = upload.files[f"{folder}README.md"].decode()
        assert 'subfolder="adapter"' in card and 'from_pretrained("base")' in card
    tracked = [path for path in (home / "run" / "tensorboard").rglob("*") if path.is_file()]
    assert tracked and not any(b"secretuser" in path.read_bytes() for path in tracked)
    local = yaml.safe_load((home / "run" / "resolved_config.yaml").read_text())
    assert local["data_dir"] == str(home / "data")
    final = write_upload(upload, tmp_path / "final")
    base = GPT2ModernForCausalLM.from_pretrained(home / "base")
    batch = PackedBlocks(data_dir, "train").__getitems__([0])
    with torch.no_grad():
        before = base(batch).logits
        stacked = PeftModel.from_pretrained(base, final, subfolder="adapter").eval()(batch).logits
        merged = GPT2ModernForCausalLM.from_pretrained(final)(batch).logits
    torch.testing.assert_close(stacked, merged, atol=1e-5, rtol=0)
    assert (stacked - before).abs().max() > 1e-3


def test_adapters_name_their_base_on_the_hub_and_both_load_by_name(hub, data_dir, tmp_path):
    base = train(data_dir, tmp_path / "base", max_steps=2, save_steps=0)
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    hub.repositories["models/someone/base"] = Repository()
    hub.repositories["models/someone/base"].commit(files)
    flags = {"model_name_or_path": "someone/base", "config_overrides": "", "lora_rank": 2, "learning_rate": 0.05}
    run_dir = train(data_dir, tmp_path / "run", push_to_hub=True, max_steps=2, save_steps=0, **flags)
    (upload,) = uploads_of(hub)
    assert ModelCard(upload.files["README.md"].decode()).data.base_model == "someone/base"
    assert json.loads(upload.files["adapter/adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    batch = PackedBlocks(data_dir, "train").__getitems__([0])
    base_model = GPT2ModernForCausalLM.from_pretrained("someone/base")
    with torch.no_grad():
        stacked = PeftModel.from_pretrained(base_model, "someone/run", subfolder="adapter").eval()(batch).logits
        merged = GPT2ModernForCausalLM.from_pretrained(run_dir)(batch).logits
    torch.testing.assert_close(stacked, merged, atol=1e-5, rtol=0)


# The speedrun's files of tokens


@pytest.fixture
def speedrun(hub, tmp_path):
    """A dataset like kjj0/fineweb10B-gpt2: three training files of 1,000 tokens each, one for validation of 500."""
    rng, files = np.random.default_rng(0), {}
    sizes = {"fineweb_val_000000.bin": 500} | {f"fineweb_train_00000{number}.bin": 1000 for number in (1, 2, 3)}
    for name, size in sizes.items():
        tokens = rng.integers(1, 300, size)
        tokens[::40] = EOS  # before each document
        write_tokens(tmp_path / name, [tokens], has_header=True)
        files[name] = (tmp_path / name).read_bytes()
    repository = hub.repositories["datasets/someone/fineweb10B"] = Repository(large=set(files))
    repository.commit(files | {"README.md": b"---\nlicense: mit\n---\n"})
    return hub


def downloads(hub):
    return [request.rpartition("/")[2] for request in hub.requests if re.match("(HEAD|GET) .*/resolve/.*bin", request)]


@pytest.mark.fault("F27 a download fails")
def test_tokens_of_the_speedrun_are_downloaded_by_name_as_far_as_they_are_needed(speedrun, tokenizer_dir, tmp_path):
    """1,010 tokens need the first two files. The Hub fails twice, and breaks the connection in the middle of a file."""
    speedrun.fail("GET /api/datasets/someone/fineweb10B", 500, 2)
    speedrun.fail("GET /objects/", 0)
    flags = ("--tokenizer_name", tokenizer_dir, "--block_size", 16, "--max_tokens", 1010)
    named = run(tmp_path / "named", "--dataset_name", "someone/fineweb10B", *flags)
    assert set(downloads(speedrun)) == {
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "fineweb_val_000000.bin",
    }
    assert all(fault.times == 0 for fault in speedrun.faults)
    local = ("--train_file", tmp_path / "fineweb_train_*.bin", "--validation_file", tmp_path / "fineweb_val_000000.bin")
    run(tmp_path / "local", *local, *flags)
    for split in ("train", "validation"):
        assert contents(tmp_path / "named" / split) == contents(tmp_path / "local" / split)
    counts = {split: named["splits"][split]["tokens"] for split in ("train", "validation")}
    assert counts == {"train": 1040, "validation": 500}  # to the end of the document in which token 1,010 lies
    assert named["source"]["name"] == "someone/fineweb10B" and named["source"]["card"] == {"license": "mit"}


def test_a_file_of_tokens_that_differs_from_the_hub_is_an_error(speedrun, tokenizer_dir, tmp_path, capsys):
    """The client checks the size only. The next call downloads this file alone."""
    flags = ("--dataset_name", "someone/fineweb10B", "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    content = next(iter(speedrun.repositories.values())).at().files["fineweb_train_000002.bin"]
    speedrun.altered = {hashlib.sha256(content).hexdigest(): content[:-2] + b"\1\1"}
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert "someone/fineweb10B: " in line and "has another sha256 than on the Hub; delete it" in line
    assert not (tmp_path / "data").exists()
    speedrun.altered = {}
    Path(line.split(": ")[1].split(" has")[0]).unlink()
    before = len(speedrun.requests)
    manifest = run(tmp_path / "data", *flags)
    assert manifest["splits"]["train"]["tokens"] == 3000
    fetched = [request for request in speedrun.requests[before:] if request.startswith("GET /objects/")]
    assert len(fetched) == 1


def test_max_tokens_of_text_without_streaming_is_refused(hub, tokenizer_dir, tmp_path, capsys):
    hub.repositories["datasets/someone/corpus"] = Repository()
    hub.repositories["datasets/someone/corpus"].commit({"train.jsonl": b'{"text": "a"}\n'})
    flags = ("--dataset_name", "someone/corpus", "--tokenizer_name", tokenizer_dir, "--max_tokens", 10)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert line == "--max_tokens 10 works only with --streaming or files of tokens; use --max_documents instead"


# Cards


def test_a_name_that_no_repository_can_have_is_an_error_before_anything_starts():
    with pytest.raises(GPT2ModernError, match="--hub_model_id 'a/b/c' is not a repository name; give owner/name"):
        parse_arguments(
            TrainConfig, ["--data_dir=data", "--output_dir=out", "--push_to_hub=true", "--hub_model_id=a/b/c"]
        )


@pytest.fixture
def summarized(data_dir):
    """The manifest, the summary and the other arguments of a card."""
    manifest = json.loads((data_dir / "manifest.json").read_text())
    summary = {
        "params": 1000, "steps": 3, "tokens_seen": 512, "eval_loss": 3.14159, "bits_per_byte": 1.5, "wall_time_s": 2.0,
        "tokens_per_second": 256.0, "eval_blocks": 8, "num_processes": 1,
    }  # fmt: skip
    samples = [{"step": 2, "prompt": "of an earlier step", "text": ""}, {"step": 3, "prompt": "a ```", "text": " b"}]
    rest = {"name": "someone/model", "base_model": "someone/base", "samples": samples, "num_eval_blocks": 12}
    return manifest, summary, rest


def test_the_card_says_what_it_was_trained_on_and_from(summarized):
    manifest, summary, rest = summarized
    manifest["source"] |= {"name": "owner/corpus", "card": {"language": ["en"], "license": "odc-by"}}
    config = TrainConfig(data_dir="data", output_dir="out", max_steps=3, learning_rate=0.1, license="mit")
    text = model_card(config, summary, manifest=manifest, **rest)
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (card.data.datasets, card.data.base_model, card.data.license) == (["owner/corpus"], "someone/base", "mit")
    assert card.data.language == ["en"] and "| licence of the source | odc-by |" in card.text
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"loss": 3.1416, "bits_per_byte": 1.5}
    assert "````text\na ``` b\n````" in card.text and "of an earlier step" not in card.text
    assert "| learning_rate | 0.1 |" in card.text
    assert "| validation blocks | 8 of 12, at equal distances |" in card.text


@pytest.mark.parametrize(
    ("source", "data", "named"),
    [
        ("owner/corpus", "someone/blocks", ["owner/corpus", "someone/blocks"]),
        (["corpus.jsonl"], "someone/blocks", ["someone/blocks"]),
        ("/home/someone/corpus", "/home/someone/blocks", None),
    ],
)
def test_the_card_lists_the_datasets_of_the_hub(summarized, source, data, named):
    manifest, summary, rest = summarized
    manifest["source"]["name"] = source
    text = model_card(TrainConfig(data_dir=data, output_dir="out"), summary, manifest=manifest, **rest)
    facts = ModelCard(text).data
    assert facts.datasets == named and "/home" not in text
    assert facts.language is None and facts.license is None and "| licence of the source | not stated |" in text


def test_the_card_leaves_out_settings_without_effect_and_those_of_the_place():
    shown = TrainConfig(data_dir="data", output_dir="out", project="secret").chosen(card=True)
    assert "learning_rate" in shown
    assert not shown.keys() & {"data_dir", "output_dir", "project", "muon_learning_rate", "config", "dry_run"}
    assert "muon_learning_rate" in TrainConfig(data_dir="data", output_dir="out", optimizer="muon").chosen(card=True)
