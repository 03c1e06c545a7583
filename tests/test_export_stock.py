"""A finished run has a stock model beside it, which loads without the model's code and is served as it is."""

import contextlib
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prepare_data
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_model
from tests.support import clients
from tests.support.trainer import TINY, config_of, train
from train_accelerate import train as train_with

SHORT = {"max_steps": 2, "save_steps": 0, "eval_steps": 0, "logging_steps": 20, "export_stock": "auto"}
PROMPT = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
UNEXPORTABLE = f"{TINY},use_unet_skips=true"


def logits(model, input_ids=PROMPT):
    with torch.no_grad():
        return model(input_ids).logits[..., :300]


CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
CHATS = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"}] for n in range(60)]


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """Train on conversations, with QK-norm, so that the stock class is Qwen3's; the vocabulary is padded to 320."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    prepare_data.main(
        ["--train_file", str(folder / "chats.jsonl"), "--validation_file", str(folder / "chats.jsonl"),
         "--chat_column", "messages", "--chat_template", str(folder / "template.jinja"), "--block_size", "32",
         "--tokenizer_name", str(data_dir / "tokenizer"), "--output_dir", str(folder / "data")]
    )  # fmt: skip
    overrides = f"{TINY},use_qk_norm=true"
    return train(folder / "data", folder / "run", config_overrides=overrides, **SHORT | {"max_steps": 60})


def test_the_stock_model_computes_the_same_without_code(run):
    assert not list((run / "stock").glob("*.py")) and not list(run.glob("stock/checkpoints"))
    assert "auto_map" not in json.loads((run / "stock" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(run, subfolder="stock", trust_remote_code=False)
    assert type(stock).__name__ == "Qwen3ForCausalLM"
    torch.testing.assert_close(logits(stock), logits(load_model(str(run))), atol=1e-5, rtol=0)


def test_the_stock_model_has_tokenizer_and_generation_settings(run):
    text = "def f(x):\n\treturn 12345  # it's caf\u00e9"
    tokenizer = AutoTokenizer.from_pretrained(run, subfolder="stock", trust_remote_code=False)
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(run)(text).input_ids
    here, there = GenerationConfig.from_pretrained(run), GenerationConfig.from_pretrained(run, subfolder="stock")
    assert here.to_diff_dict() == there.to_diff_dict() and there.top_k == 50 and there.eos_token_id == 0


def test_the_card_leads_with_the_way_that_needs_no_code_and_it_runs(run, monkeypatch, capsys):
    card = (run / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'subfolder="stock"' in first and "trust_remote_code" not in first
    assert "trust_remote_code=True" in second and "`Qwen3ForCausalLM`" in card
    assert 'from_pretrained("run", subfolder="stock")' in (run / "stock" / "README.md").read_text()
    monkeypatch.chdir(run.parent)
    exec(first, {})
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("flags", [{}, {"dry_run": True}], ids=["run", "dry run"])
def test_without_a_stock_class_true_refuses_before_training(flags, data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train(data_dir, tmp_path / "run", **SHORT | {"export_stock": "true"}, config_overrides=UNEXPORTABLE, **flags)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert error.startswith("error: --export_stock true: no stock architecture has the same logits; the closest, Llama")
    assert "use_unet_skips=True" in error


def test_a_dry_run_names_the_stock_class(data_dir, tmp_path, capsys):
    for overrides, expected in ((TINY, "LlamaForCausalLM"), (UNEXPORTABLE, "none")):
        train(data_dir, tmp_path / "run", config_overrides=overrides, dry_run=True, export_stock="auto")
        assert re.search(r"# stock class +(\S+)", capsys.readouterr().out)[1] == expected


def test_a_new_run_in_the_folder_leaves_no_stock_model_of_the_old_one(run, data_dir, tmp_path):
    old = shutil.copytree(run, tmp_path / "run")
    train(data_dir, old, **SHORT | {"resume_from_checkpoint": "none"})
    stock = AutoModelForCausalLM.from_pretrained(old, subfolder="stock")
    torch.testing.assert_close(logits(stock), logits(load_model(str(old))), atol=1e-5, rtol=0)
    assert not (old / "stock" / "chat_template.jinja").exists()


def test_without_a_stock_class_auto_writes_the_model_alone(run, data_dir, tmp_path):
    old = shutil.copytree(run, tmp_path / "run")
    train(data_dir, old, **SHORT | {"resume_from_checkpoint": "none"}, config_overrides=UNEXPORTABLE)
    assert (old / "model.safetensors").stat().st_mtime > (run / "model.safetensors").stat().st_mtime
    assert not (old / "stock").exists() and not list(old.glob(".*"))
    assert "subfolder" not in (old / "README.md").read_text()


def test_a_stopped_run_has_none_and_the_resumed_one_has(data_dir, tmp_path):
    train_with(config_of(data_dir, tmp_path, max_train_time="0.001", save_steps=1))
    assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "stock").exists()
    assert train_with(config_of(data_dir, tmp_path, save_steps=1))["stopped"] is None
    assert (tmp_path / "stock" / "config.json").is_file()


def test_adapters_are_in_the_stock_model_too(data_dir, tmp_path):
    base = train(data_dir, tmp_path / "base", **SHORT | {"export_stock": "false"})
    flags = {"model_name_or_path": base, "config_overrides": "", "lora_rank": 2, "learning_rate": 0.05}
    tuned = train(data_dir, tmp_path / "tuned", **SHORT | flags)
    stock = AutoModelForCausalLM.from_pretrained(tuned, subfolder="stock")
    torch.testing.assert_close(logits(stock), logits(load_model(str(tuned))), atol=1e-5, rtol=0)
    assert (logits(stock) - logits(load_model(str(base)))).abs().max() > 1e-3
    assert not (base / "stock").exists()


@pytest.mark.parametrize("choice", ["auto", "true"])
def test_a_folder_of_the_user_is_left_alone(choice, data_dir, tmp_path, capsys):
    """It appeared during the run: a folder that has it before is refused, see the next test."""

    def put_a_folder_there(event, step, **details):
        (tmp_path / "stock").mkdir(exist_ok=True)
        (tmp_path / "stock" / "prices.csv").write_text("1")

    with pytest.raises(SystemExit) if choice == "true" else contextlib.nullcontext():
        train(data_dir, tmp_path, callback=put_a_folder_there, **SHORT | {"export_stock": choice})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stock cannot be written" in line]
    assert line.startswith("error: --export_stock true" if choice == "true" else "warning: --export_stock auto")
    assert [path.name for path in (tmp_path / "stock").iterdir()] == ["prices.csv"]
    assert load_model(str(tmp_path)) and (tmp_path / "README.md").is_file() == (choice == "auto")


def test_a_folder_with_files_of_the_user_is_refused(data_dir, tmp_path):
    (tmp_path / "stock").mkdir()
    with pytest.raises(GPT2ModernError, match="contains a stock that was not written by a training run"):
        train_with(config_of(data_dir, tmp_path))


# transformers serve


@pytest.mark.slow
def test_an_openai_client_completes_text_and_chats_also_streaming(run, tmp_path):
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra serve)")
    assert "yes" in clients.continuation(run, "user: x = 1\nassistant:")
    assert clients.use_serve(run, tmp_path).startswith("text and chat, the same, also in pieces")
