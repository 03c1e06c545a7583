"""The scripts of examples/ run as their first lines say, on tiny data, what they write loads again; so does GRPO."""

import json
import math
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.support import clients
from tests.support.folders import run, write_jsonl
from tests.support.trainer import TINY, train

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = {"max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "lr_scheduler_type": "constant"}
TRAINING |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Run a script of examples/ in this process, with these flags, and return its variables.

    transformers knows nothing of the model, as where the library is not installed, and must not ask for its code."""

    questions = []

    def run_example(name: str, **flags) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [f"--{flag}={value}" for flag, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [f"examples/{name}", *words])
        monkeypatch.delitem(CONFIG_MAPPING._extra_content, "gpt2modern", raising=False)
        monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
        monkeypatch.chdir(tmp_path)
        ran = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert not questions
        return ran

    return run_example


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory) -> Path:
    wide = f"{TINY},initializer_range=0.2"  # adapters cannot widen the frozen embedding of so narrow a model
    return train(data_dir, tmp_path_factory.mktemp("base"), config_overrides=wide, save_steps=0, eval_steps=0)


def logged(ran: dict, name: str = "loss") -> list[float]:
    return [row[name] for row in ran["trainer"].state.log_history if name in row]


def assert_loads(folder: Path, model: torch.nn.Module, auto_class=AutoModelForCausalLM) -> None:
    """The saved folder has the weights of the model that was trained, the code that they need, and a tokenizer."""
    loaded, tokenizer = (
        auto_class.from_pretrained(folder, trust_remote_code=True),
        AutoTokenizer.from_pretrained(folder),
    )
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_every_example_is_short_and_tested():
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 35, path.name
        assert f'"{path.name}",' in source, path.name
        assert f"python examples/{path.name} --" in path.read_text(), f"{path.name} shows no command"


def test_trainer(example, data_dir, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    ran = example("trainer.py", data_dir=data_dir, output_dir=tmp_path / "out", **sizes, **TRAINING)
    evaluation = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert logged(ran)[-1] < logged(ran)[0] - 1 and evaluation["eval_loss"] < math.log(300) - 0.5
    assert ran["config"].hidden_size == 64 and ran["config"].num_hidden_layers == 2
    assert_loads(tmp_path / "out", ran["model"])


def test_in_memory(example, tmp_path, capsys):
    text = "\n\n".join(
        f"The {animal} number {index} sat on the mat." for index in range(200) for animal in ("cat", "dog")
    )
    (tmp_path / "text.txt").write_text(text)
    ran = example("in_memory.py", text_file=tmp_path / "text.txt", output_dir=tmp_path / "out", max_steps=14)
    manifest = json.loads((tmp_path / "out" / "data" / "manifest.json").read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == 400
    printed = capsys.readouterr().out
    loss = json.loads((tmp_path / "out" / "model" / "summary.json").read_text())["eval_loss"]
    assert f"loss on the validation split: {loss}" in printed and loss < math.log(manifest["vocab_size"]) - 1
    assert_loads(tmp_path / "out" / "model", ran["generate"].model)


def test_sft_learns_the_assistant_s_turns_and_no_other(example, model_dir, tmp_path):
    answer = {"role": "assistant", "content": "return x"}
    rows = [{"messages": [{"role": "user", "content": f"x = {n}"}, answer] * 2} for n in range(8)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = example("sft.py", model=model_dir, chat_file=chats, output_dir=tmp_path / "out", **TRAINING)
    trainer = ran["trainer"]
    (batch, *_) = trainer.get_train_dataloader()
    learned = trainer.processing_class.decode(batch["labels"][0][batch["labels"][0] != -100])
    eos = trainer.processing_class.eos_token
    assert learned == f"return x{eos}return x{eos}"
    assert logged(ran)[-1] < logged(ran)[0] - 1
    assert_loads(tmp_path / "out", trainer.model)
    assert "generation" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_lora(example, model_dir, tmp_path):
    data = tmp_path / "data"
    texts = write_jsonl(tmp_path / "texts.jsonl", ["x = 1\n" * 20] * 40)
    run(data, "--train_file", texts, "--tokenizer_name", model_dir, "--block_size", 32)
    ran = example("lora.py", model=model_dir, data_dir=data, output_dir=tmp_path / "out", rank=4, **TRAINING)
    assert logged(ran)[-1] < logged(ran)[0] - 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_loads(tmp_path / "out", ran["trainer"].model, AutoPeftModelForCausalLM)


def test_dpo_prefers_the_chosen_answer(example, model_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "def f(x):\n", "chosen": "return x", "rejected": "pass"}
    pairs.write_text((json.dumps(row) + "\n") * 8)
    ran = example("dpo.py", model=model_dir, preference_file=pairs, output_dir=tmp_path / "out", **TRAINING)
    assert logged(ran)[0] == pytest.approx(math.log(2), abs=0.02)  # the model is its own reference
    assert logged(ran)[-1] < 0.3 and logged(ran, "rewards/margins")[-1] > 1
    assert_loads(tmp_path / "out", ran["trainer"].model)


def test_grpo_raises_the_reward_of_what_the_model_writes(model_dir, tmp_path):
    """TRL generates several answers to a prompt, with the model's cache, and prefers those with more "e"."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = TRAINING | {"max_steps": 40, "num_generations": 4, "max_completion_length": 8, "seed": 2}
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True),
        reward_funcs=lambda completions, **_: [float(text.count("e")) for text in completions],
        args=GRPOConfig(str(tmp_path), **flags),
        train_dataset=Dataset.from_dict({"prompt": ["def f", "class A"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert min(rewards[-5:]) > max(rewards[:5]) + 1


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_evaluate_with_lm_eval(example, model_dir, tmp_path):
    clients.write_task(tmp_path / "tasks", ["def f(x): return x", "import os"])
    ran = example(
        "evaluate_with_lm_eval.py",
        model=model_dir,
        tasks="texts",
        include_path=tmp_path / "tasks",
        device="cpu",
        output=tmp_path / "results.json",
    )
    assert ran["results"]["n-samples"]["texts"]["effective"] == 2
    assert json.loads((tmp_path / "results.json").read_text())["texts"]["bits_per_byte,none"] > 1
