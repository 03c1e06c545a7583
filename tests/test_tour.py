"""Every command and snippet of docs/tour.md runs, in order, in one folder, with smaller numbers; the upload
goes to a small Hub on the loopback interface."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpt2modern.data.manifest import find_problems
from tests.support.hub import TOKEN, USER

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "tour.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
SMALLER = {"max_documents": 12, "train_tokenizer": 400, "block_size": 32, "total_batch_size": 256, "max_steps": 6}
SMALLER |= {"warmup_steps": 2, "eval_steps": 3, "save_steps": 3, "max_new_tokens": 5}
SMALLER |= {"config_overrides": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"}


def run_command(line: str, monkeypatch) -> None:
    """Run a line `python FILE ...` or `python -m MODULE ...` in this process: to import torch takes seconds."""
    program, *words = shlex.split(line)
    assert program == "python", line
    for name, value in SMALLER.items():
        words = [
            str(value) if f"--{name}" == before else word for before, word in zip(["", *words], words, strict=False)
        ]
    AcceleratorState._reset_state(reset_partial_state=True)
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[1:] if is_module else words)
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


def publish(hub, home: Path) -> None:
    """Run the lines for the console, as somebody who logs in first; the token is what the first one asks for."""
    environment = {name: value for name, value in hub.environment(home).items() if name != "HF_TOKEN"}
    program = shutil.which("hf", path=str(Path(sys.executable).parent))
    (lines,) = [text.strip().splitlines() for language, text in BLOCKS if language == "console"]
    assert len(lines) == 3 and lines[0] == "hf auth login"
    for words in map(shlex.split, [f"{lines[0]} --token {TOKEN}", *lines[1:]]):
        words = [word.replace("your-name", USER) for word in words[1:]]
        subprocess.run([program, *words], env=environment, check=True, capture_output=True, timeout=120)


def test_the_tour(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"the reader is asked: {question}"))
    commands = 0
    for language, text in BLOCKS:
        if language == "bash":
            for line in text.replace("\\\n", " ").strip().splitlines():
                run_command(line, monkeypatch)
                commands += 1
        elif language == "python":
            exec(compile(text, "docs/tour.md", "exec"), {})
    assert commands == PAGE.count("\npython ") == 7
    assert not find_problems(Path("data/tour"))
    summary = json.loads(Path("out/tour/summary.json").read_text())
    measured = json.loads(Path("out/tour-perplexity.json").read_text())
    assert measured["loss"] == pytest.approx(summary["eval_loss"], abs=1e-3) and summary["steps"] == 6
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert not list(Path("out/tour-stock").glob("*.py"))
    publish(hub, tmp_path / "home")
    for name in ("tour", "tour-stock"):
        uploaded = hub.repositories[f"models/{USER}/{name}"].at().files
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= uploaded.keys()
        assert not [path for path in uploaded if path.startswith("checkpoints/")]
        model = AutoModelForCausalLM.from_pretrained(f"{USER}/{name}", trust_remote_code=name == "tour")
        expected = load_file(Path("out", name, "model.safetensors"))
        found = model.state_dict()
        assert expected and all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
