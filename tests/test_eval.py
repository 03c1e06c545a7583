"""Evaluation: exact losses, reproducible samples."""

import html
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from eval import generate, perplexity
from gpt2modern.conversion import convert_folder
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.evaluation.generation import generate_text
from gpt2modern.evaluation.loss import bits_per_byte, evaluate_loss
from gpt2modern.loading import load_model
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import export_fresh_model

REPOSITORY = Path(__file__).resolve().parent.parent


class UniformModel(nn.Module):
    """Gives every id the same probability: the loss of any text is ln(vocab_size)."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, shift_labels, num_items_in_batch, **kwargs):
        logits = self.weight.expand(*input_ids.shape, self.vocab_size)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")
        return SimpleNamespace(loss=loss / num_items_in_batch)


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory):
    return export_fresh_model(data_dir, tmp_path_factory.mktemp("model"), "modern")


def run(main, *argv):
    main([str(argument) for argument in argv])


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_uniform_probabilities_have_loss_ln_vocab_size(data_dir, batch_size):
    blocks = PackedBlocks(data_dir, "validation")
    loss = evaluate_loss(UniformModel(blocks.vocab_size), blocks, batch_size=batch_size)
    assert loss == pytest.approx(math.log(blocks.vocab_size), rel=1e-6)


def test_perplexity_agrees_with_logits_computed_one_block_at_a_time(data_dir, model_dir, tmp_path, capsys):
    run(perplexity.main, "--model", model_dir, "--data", data_dir, "--output", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    model, blocks = load_model(str(model_dir)), PackedBlocks(data_dir, "validation")
    with torch.no_grad():
        per_block = []
        for index, block in enumerate(blocks):
            block = block[: blocks.num_targets([index]) + 1]  # without padding
            logits = model(block[None, :-1]).logits[0]
            per_block.append(nn.functional.cross_entropy(logits, block[1:], reduction="sum").item())
    assert blocks.tokens < len(blocks) * blocks.block_size
    assert result["loss"] == pytest.approx(sum(per_block) / blocks.tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == blocks.tokens
    counts = blocks.manifest["splits"]["validation"]
    expected = result["loss"] / math.log(2) * counts["tokens"] / counts["bytes"]
    assert result["bits_per_byte"] == pytest.approx(expected)
    assert json.loads(capsys.readouterr().out) == result


def evaluated(model, data_dir, tmp_path, *flags):
    run(perplexity.main, "--model", model, "--data", data_dir, "--output", tmp_path / "result.json", *flags)
    return json.loads((tmp_path / "result.json").read_text())["loss"]


def test_a_stock_export_has_the_loss_of_its_original(data_dir, model_dir, tmp_path):
    convert_folder(model_dir, tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "llama"
    expected = evaluated(model_dir, data_dir, tmp_path)
    assert evaluated(tmp_path / "stock", data_dir, tmp_path) == pytest.approx(expected, rel=1e-6)
    assert evaluated(tmp_path / "stock", data_dir, tmp_path, "--per_device_eval_batch_size", 3) == pytest.approx(
        expected
    )


def test_a_stock_model_has_the_loss_of_its_import(data_dir, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "stock"
    )
    GPT2ModernForCausalLM.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    expected = evaluated(tmp_path / "ours", data_dir, tmp_path)
    assert evaluated(tmp_path / "stock", data_dir, tmp_path) == pytest.approx(expected, rel=1e-6)


def test_data_with_more_ids_than_a_padded_model_is_refused(data_dir, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "padded")
    config = json.loads((model_dir / "config.json").read_text()) | {"unpadded_vocab_size": 299}
    (tmp_path / "padded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "padded", data_dir, tmp_path)
    assert "padded is only 299; prepare the data with the model's tokenizer" in capsys.readouterr().err


def test_dropout_is_off_during_evaluation(data_dir):
    blocks = PackedBlocks(data_dir, "validation")
    model = UniformModel(blocks.vocab_size)
    model.register_forward_pre_hook(lambda module, arguments: pytest.fail("training mode") if module.training else None)
    evaluate_loss(model.train(), blocks, batch_size=4)


@pytest.mark.fault("F21 samples and evaluations change nothing")
def test_evaluation_leaves_training_mode_and_random_state_alone(data_dir):
    blocks = PackedBlocks(data_dir, "validation")
    model = UniformModel(blocks.vocab_size).train()
    before = torch.get_rng_state()
    evaluate_loss(model, blocks, batch_size=4)
    assert model.training and torch.equal(torch.get_rng_state(), before)


class RecordingBlocks(PackedBlocks):
    """Blocks that remember which of them were read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __getitems__(self, rows):
        self.read += rows
        return super().__getitems__(rows)


@pytest.mark.parametrize("from_start", [False, True])
def test_a_limit_takes_blocks_from_the_whole_split_or_its_start(data_dir, from_start):
    blocks = RecordingBlocks(data_dir, "validation")
    evaluate_loss(UniformModel(blocks.vocab_size), blocks, batch_size=2, max_blocks=5, from_start=from_start)
    assert blocks.read == [index if from_start else len(blocks) * index // 5 for index in range(5)]


def test_a_limit_beyond_the_split_is_the_whole_split(data_dir):
    blocks = RecordingBlocks(data_dir, "validation")
    evaluate_loss(UniformModel(blocks.vocab_size), blocks, batch_size=4, max_blocks=10**6, from_start=True)
    assert blocks.read == list(range(len(blocks)))


def test_one_bit_per_byte_is_ln_2_nats_over_one_byte_tokens():
    assert bits_per_byte(math.log(2), bytes_per_token=1.0) == pytest.approx(1.0)
    assert bits_per_byte(math.log(2), bytes_per_token=4.0) == pytest.approx(0.25)


def samples(model_dir, tmp_path, *flags):
    run(generate.main, "--model", model_dir, "--output", tmp_path / "samples.json", "--max_new_tokens", 12, *flags)
    return [row["text"] for row in json.loads((tmp_path / "samples.json").read_text())["samples"]]


def test_a_prompt_is_printed_in_an_encoding_that_lacks_its_characters(model_dir):
    command = [
        sys.executable,
        "-m",
        "eval.generate",
        "--model",
        model_dir,
        "--prompt",
        "\u00e9t\u00e9",
        "--max_new_tokens",
        "4",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0 and "\\xe9t\\xe9" in finished.stdout, finished.stderr


def test_a_seed_fixes_the_sample(model_dir, tmp_path):
    first = samples(model_dir, tmp_path, "--prompt", "def f", "--seed", 1)
    assert first == samples(model_dir, tmp_path, "--prompt", "def f", "--seed", 1)
    assert first != samples(model_dir, tmp_path, "--prompt", "def f", "--seed", 2)


def test_temperature_zero_and_top_k_one_are_greedy(model_dir, tmp_path):
    greedy = samples(model_dir, tmp_path, "--prompt", "def f", "--temperature", 0, "--seed", 1)
    assert greedy == samples(model_dir, tmp_path, "--prompt", "def f", "--temperature", 0, "--seed", 2)
    assert greedy == samples(model_dir, tmp_path, "--prompt", "def f", "--top_k", 1, "--seed", 3)
    assert greedy == samples(model_dir, tmp_path, "--prompt", "def f", "--top_p", 1e-6, "--seed", 4)


def test_several_prompts_and_the_empty_one_are_continued(model_dir, tmp_path, capsys):
    texts = samples(model_dir, tmp_path, "--prompt", "def f", "", "--seed", 1)
    assert len(texts) == 2 and all(texts)
    assert "def f" + texts[0] in capsys.readouterr().out


def test_models_are_compared_on_the_same_prompts_and_seeds(model_dir, tmp_path, capsys):
    """A text is the one that its model alone generates; Markdown and HTML show the models next to each other."""
    shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((model_dir / "config.json").read_text()) | {"norm_eps": 1e-2}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    flags = ("--prompt", "def <f>", "x", "--num_samples", 2, "--seed", 5, "--max_new_tokens", 8)
    for suffix in (".json", ".md", ".html"):
        run(generate.main, "--model", model_dir, tmp_path / "other", "--output", tmp_path / f"both{suffix}", *flags)
    both = json.loads((tmp_path / "both.json").read_text())["samples"]
    assert [(each["prompt"], each["seed"]) for each in both] == [("def <f>", 5), ("def <f>", 6), ("x", 5), ("x", 6)] * 2
    alone = samples(tmp_path / "other", tmp_path, "--prompt", "x", "--seed", 6, "--max_new_tokens", 8)
    assert [both[-1]["text"]] == alone
    page, markdown = (tmp_path / "both.html").read_text(), (tmp_path / "both.md").read_text()
    assert page.startswith("<!doctype html>") and "<h1>Samples</h1>" in page
    assert page.count("<tr>") == 5 and page.count("<b>") == 8 and "<b>def &lt;f&gt;</b>" in page
    assert both[0]["text"] in html.unescape(page)
    assert markdown.count("## ") == 4 and markdown.count("```text") == 12 and f"def <f>{both[0]['text']}" in markdown
    assert f"seed 6 ({tmp_path / 'other'})" in capsys.readouterr().out


def test_a_chat_answers_each_line_with_the_whole_conversation(model_dir, tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(SystemExit):
        run(generate.main, "--model", model_dir, "--chat")
    assert f"--chat: {model_dir} has no chat template" in capsys.readouterr().err
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    shutil.copytree(model_dir, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f\nclass\n"))
    run(generate.main, "--model", tmp_path / "chat", "--chat", "--max_new_tokens", 6)
    shown = capsys.readouterr().out
    model, first = load_model(str(model_dir)), "user: def f\nassistant:"
    answer = generate_text(model, tokenizer, first, max_new_tokens=6)
    second = f"user: def f\nassistant: {answer}\nuser: class\nassistant:"
    assert shown == f"> {answer}\n> {generate_text(model, tokenizer, second, max_new_tokens=6, seed=1)}\n> \n"
