"""A run is uploaded in the background: what arrives, and that nothing which fails there stops training."""

import json
import shutil
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import modeling_gpt2modern
from gpt2modern.cli import parse_arguments
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.manifest import read_manifest
from gpt2modern.data.publishing import push_to_hub as push_dataset
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_config, load_model, load_tokenizer
from gpt2modern.training import publish
from gpt2modern.training.card import model_card
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.trainer import ENVIRONMENT, command, flags_for, train
from train_accelerate import TrainConfig
from train_accelerate import train as train_with

TOKEN = "hf_secretsecretsecret"
ENDPOINT = constants.ENDPOINT


class FakeHub:
    """Stands for the Hub: keeps the files it is given; `fails` raises for each upload, `gate` holds it up."""

    def __init__(self, folder):
        self.folder = folder
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
            raise RuntimeError(f"error while uploading for {TOKEN}\nand more") from ConnectionError(
                "refused by a proxy"
            )
        copy = Path(tempfile.mkdtemp(dir=self.folder)) / "copy"
        shutil.copytree(folder_path, copy)
        names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        card = (copy / "README.md").read_text()
        self.uploads.append(SimpleNamespace(repo_id=repo_id, names=names, folder=copy, card=card, **options))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def fake(monkeypatch, tmp_path_factory):
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
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
    assert not list((tmp_path / "run").glob(".hub_upload*"))
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


def test_the_stock_model_is_a_subfolder_of_the_repository(fake, data_dir, tmp_path):
    flags = {"hub_model_id": "someone/model", "hub_strategy": "every_save", "export_stock": "auto", "max_steps": 4}
    train(data_dir, tmp_path / "run", push_to_hub=True, **flags)
    *checkpoints, final = fake.uploads
    assert checkpoints and not any(name.startswith("stock/") for each in checkpoints for name in each.names)
    assert all("stock/*" in each.delete_patterns and "subfolder" not in each.card for each in checkpoints)
    assert 'name = "someone/model"' in final.card and 'from_pretrained(name, subfolder="stock")' in final.card
    stock = AutoModelForCausalLM.from_pretrained(final.folder, subfolder="stock", trust_remote_code=False)
    batch = PackedBlocks(data_dir, "train").__getitems__([0])
    with torch.no_grad():
        expected = GPT2ModernForCausalLM.from_pretrained(final.folder)(batch).logits[..., :300]  # without padding
        torch.testing.assert_close(stock(batch).logits, expected, atol=1e-5, rtol=0)
    assert 'from_pretrained("someone/model", subfolder="stock")' in (final.folder / "stock" / "README.md").read_text()


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
    cause = "RuntimeError: error while uploading for hf_... and more, caused by ConnectionError: refused by a proxy"
    assert f"someone/run: {cause} (endpoint {ENDPOINT}); training continues" in warning
    left = tmp_path / "run" / ".hub_upload_final"
    assert f"was not uploaded to the Hub ({cause}" in output.out
    assert f"upload it with: hf upload someone/run {left} ." in output.out
    assert TOKEN not in output.out + output.err
    assert (left / "model.safetensors").exists() and (tmp_path / "run" / "model.safetensors").exists()


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
    assert (tmp_path / ".hub_upload_final" / "model.safetensors").exists()
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


@pytest.fixture
def endpoint(monkeypatch):
    """An endpoint that answers every request with 401, asked by the real client."""

    class Unauthorized(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = b'{"error": "Invalid username or password."}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_HEAD = do_POST

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Unauthorized)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield url
    server.shutdown()


def assert_says_how_to_log_in(line, endpoint):
    assert "401" in line and "Invalid username or password" in line and f"(endpoint {endpoint})" in line
    assert "run `hf auth login` or set HF_TOKEN" in line and TOKEN not in line


def test_an_invalid_token_is_answered_with_how_to_set_one(endpoint, data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / "run", push_to_hub=True, hub_model_id="someone/run", max_steps=2)
    output = capsys.readouterr()
    for line in (*warnings_in(output.err.replace("\r", "\n")), output.out.splitlines()[-1]):
        assert_says_how_to_log_in(line, endpoint)


def test_an_invalid_token_for_a_dataset_is_answered_likewise(endpoint, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    with pytest.raises(GPT2ModernError) as refusal:
        push_dataset(tmp_path / "data", read_manifest(data_dir), "someone/blocks", private=False)
    assert_says_how_to_log_in(str(refusal.value), endpoint)


def test_private_data_is_answered_likewise(endpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GPT2ModernError, match="someone/blocks: no such folder, and it cannot be downloaded") as refusal:
        PackedBlocks("someone/blocks", "train")
    assert_says_how_to_log_in(str(refusal.value), endpoint)


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_a_private_model_is_answered_likewise(endpoint, load):
    with pytest.raises(GPT2ModernError, match="someone/model") as refusal:
        load("someone/model")
    assert "401" in str(refusal.value) and "run `hf auth login` or set HF_TOKEN" in str(refusal.value)
    assert "\n" not in str(refusal.value) and TOKEN not in str(refusal.value)


@pytest.fixture
def adapted(fake, data_dir, tmp_path):
    """Upload a LoRA run, its checkpoint and its finished model, from a place whose names nobody else should read."""
    home = tmp_path / "home" / "secretuser"
    train(data_dir, home / "base", max_steps=2, save_steps=0)
    flags = {"model_name_or_path": home / "base", "config_overrides": "", "lora_rank": 2, "learning_rate": 0.05}
    flags |= {"push_to_hub": True, "hub_strategy": "every_save", "max_steps": 4, "save_steps": 2}
    flags |= {"report_to": "tensorboard"}

    def wait(event, step, **details):
        if event == "before_update":
            wait_for_uploads()

    shutil.copytree(data_dir, home / "data")
    train(home / "data", home / "run", callback=wait, **flags)
    return home


def test_what_is_uploaded_holds_names_and_no_paths(fake, adapted):
    assert [upload.commit_message for upload in fake.uploads] == ["Checkpoint of step 2", "Model after 4 steps"]
    for upload in fake.uploads:
        for name in upload.names:
            content = (upload.folder / name).read_bytes()
            assert b"secretuser" not in content and str(Path.cwd()).encode() not in content, name
        settings = (upload.folder / "resolved_config.yaml").read_text()
        recipe = yaml.safe_load(settings)
        assert (recipe["data_dir"], recipe["model_name_or_path"], recipe["output_dir"]) == ("data", "base", "run")
        assert "# torch: " in settings and "command" not in settings
    tracked = [path for path in (adapted / "run" / "tensorboard").rglob("*") if path.is_file()]
    assert tracked and not any(b"secretuser" in path.read_bytes() for path in tracked)
    local = yaml.safe_load((adapted / "run" / "resolved_config.yaml").read_text())
    assert local["data_dir"] == str(adapted / "data")


def test_adapters_are_uploaded_with_the_merged_model(fake, adapted, data_dir):
    for upload in fake.uploads:
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < upload.names
        configuration = json.loads((upload.folder / "adapter" / "adapter_config.json").read_text())
        assert configuration["base_model_name_or_path"] == "base"
        assert 'subfolder="adapter"' in upload.card and 'from_pretrained("base")' in upload.card
    final = fake.uploads[-1].folder
    base = GPT2ModernForCausalLM.from_pretrained(adapted / "base")
    batch = PackedBlocks(data_dir, "train").__getitems__([0])
    with torch.no_grad():
        before = base(batch).logits
        stacked = PeftModel.from_pretrained(base, final, subfolder="adapter").eval()(batch).logits
        torch.testing.assert_close(
            stacked, GPT2ModernForCausalLM.from_pretrained(final)(batch).logits, atol=1e-5, rtol=0
        )
    assert (stacked - before).abs().max() > 1e-3


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
    manifest["source"]["name"] = "owner/corpus"
    config = TrainConfig(data_dir="data", output_dir="out", max_steps=3, learning_rate=0.1, license="mit")
    text = model_card(config, summary, manifest=manifest, **rest)
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (card.data.datasets, card.data.base_model, card.data.license) == (["owner/corpus"], "someone/base", "mit")
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
    assert ModelCard(text).data.datasets == named and "/home" not in text


def test_the_card_leaves_out_settings_without_effect_and_those_of_the_place():
    shown = TrainConfig(data_dir="data", output_dir="out", project="secret").chosen(card=True)
    assert "learning_rate" in shown
    assert not shown.keys() & {"data_dir", "output_dir", "project", "muon_learning_rate", "config", "dry_run"}
    assert "muon_learning_rate" in TrainConfig(data_dir="data", output_dir="out", optimizer="muon").chosen(card=True)
