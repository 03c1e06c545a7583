"""eval.perplexity: documents alone, overlapping windows, long contexts, any number of processes; its metrics."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from eval import perplexity
from gpt2modern.conversion import convert_folder
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.loading import load_model
from tests.support.folders import random_rows, targets_of, write_prepared
from tests.support.models import export_fresh_model
from tests.support.trainer import REPOSITORY, TORCHRUN, environment

METRICS = REPOSITORY / "eval" / "metrics"
BLOCK_SIZE, EOS = 32, 0


def stirred(model):
    """Move every weight away from its initial value, so that contexts matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory) -> Path:
    """Model folders: modern, its Llama export, stock models with learned positions, and some that mix documents."""
    folder = tmp_path_factory.mktemp("models")
    export_fresh_model(data_dir, folder / "modern", "modern")
    stirred(load_model(str(folder / "modern"))).save_pretrained(folder / "modern")
    convert_folder(folder / "modern", folder / "llama")
    stirred(
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=BLOCK_SIZE, n_embd=32, n_layer=2, n_head=2))
    ).save_pretrained(folder / "gpt2")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": BLOCK_SIZE}
    stirred(OPTForCausalLM(OPTConfig(**sizes))).save_pretrained(folder / "opt")
    stirred(BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2))).save_pretrained(
        folder / "bloom"
    )
    return folder


@pytest.fixture(scope="module")
def documents_dir(data_dir, tmp_path_factory) -> Path:
    """Rows of several short documents, packed best_fit."""
    rows = random_rows(7, BLOCK_SIZE, seed=0)
    for row in rows:
        row[5::9] = [EOS] * len(row[5::9])
    splits = {"train": [rows], "validation": [rows[:4], rows[4:]]}
    folder = tmp_path_factory.mktemp("documents") / "data"
    return write_prepared(folder, splits, tokenizer_dir=data_dir / "tokenizer", block_size=BLOCK_SIZE)


def scores(model, data, *flags) -> dict:
    """Run the command in this process and return what it writes."""
    output = Path(model).with_suffix(".json")
    perplexity.main([f"--model={model}", f"--data={data}", f"--output={output}", *map(str, flags)])
    return json.loads(output.read_text())


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        scores(*arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ")
    return error


def nats_of(model, tokens, scored) -> float:
    """Return the summed loss of the last `scored` of the tokens, given all before them."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    return cross_entropy(logits[-scored:], torch.tensor(tokens[-scored:]), reduction="sum").item()


@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_uniform_logits_have_loss_ln_vocab_size(data_dir, models, tmp_path, name):
    model = load_model(str(models / name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / name)
    result = scores(tmp_path / name, data_dir, "--stride", 5)
    assert result["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert result["perplexity"] == pytest.approx(300, rel=1e-5) and result["standard_error"] < 1e-6
    assert set(result["loss_by_position"]) == {"1", "2-3", "4-7", "8-15", "16-31", "32"}
    assert list(result["loss_by_position"].values()) == pytest.approx([math.log(300)] * 6, rel=1e-6)


@pytest.mark.parametrize("name", ["modern", "llama", "gpt2"])
def test_masked_documents_score_as_each_of_them_alone(documents_dir, models, name):
    model, total, first = load_model(str(models / name)), 0.0, []
    for block in PackedBlocks(documents_dir, "validation"):
        tokens = block[block >= 0].tolist()
        starts = [0, *(i + 1 for i, token in enumerate(tokens[:-2]) if token == EOS)]
        for start, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True):
            total += nats_of(model, tokens[start : end + 1], end - start)
            first.append(nats_of(model, tokens[start : start + 2], 1))
    masked = scores(models / name, documents_dir, "--document_masking", "--per_device_eval_batch_size", 3)
    assert masked["loss"] * masked["tokens"] == pytest.approx(total, rel=1e-6)
    assert masked["loss_by_position"]["1"] == pytest.approx(statistics.mean(first), rel=1e-6)
    plain = scores(models / name, documents_dir)
    assert plain["tokens"] == masked["tokens"] and abs(plain["loss"] - masked["loss"]) > 1e-3


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_model_that_mixes_documents_is_refused(documents_dir, models, name, capsys):
    """OPT restarts positions but not attention, without a word; BLOOM takes no positions."""
    assert scores(models / name, documents_dir)["loss"] > 0
    capsys.readouterr()
    error = refusal(capsys, models / name, documents_dir, "--document_masking")
    assert f"a {name} model with attention" in error and "does not keep the documents of a row apart" in error


@pytest.mark.parametrize("stride", [1, 7, 16, 32])
def test_a_stride_scores_each_token_once_after_at_least_the_rest_of_a_window(data_dir, models, stride):
    model, text = load_model(str(models / "gpt2")), [EOS, *targets_of(data_dir, "validation")]
    expected = [
        nats_of(model, text[max(0, start + stride - BLOCK_SIZE) : start + stride + 1], len(text[start + 1 :][:stride]))
        for start in range(0, len(text) - 1, stride)
    ]
    result = scores(models / "gpt2", data_dir, "--stride", stride)
    assert result["tokens"] == len(text) - 1
    assert result["loss"] == pytest.approx(sum(expected) / (len(text) - 1), rel=1e-6)


def test_a_stride_of_a_block_scores_the_blocks(data_dir, models):
    plain, strided = (scores(models / "llama", data_dir, *flags) for flags in ([], ["--stride", BLOCK_SIZE]))
    for name in ("loss", "standard_error", "bits_per_byte", "tokens"):
        assert plain[name] == pytest.approx(strided[name], rel=1e-6)


@pytest.mark.parametrize("stride", [32, 8])
def test_the_standard_error_is_that_of_the_mean_over_blocks(data_dir, models, stride):
    """Windows that overlap are no more samples than blocks."""
    model, text = load_model(str(models / "gpt2")), [EOS, *targets_of(data_dir, "validation")]
    nats, sizes = [0.0] * math.ceil((len(text) - 1) / BLOCK_SIZE), [0] * math.ceil((len(text) - 1) / BLOCK_SIZE)
    for start in range(0, len(text) - 1, stride):
        scored = len(text[start + 1 :][:stride])
        sizes[start // BLOCK_SIZE] += scored
        window = text[max(0, start + stride - BLOCK_SIZE) : start + stride + 1]
        nats[start // BLOCK_SIZE] += nats_of(model, window, scored)
    mean = sum(nats) / sum(sizes)
    deviations = [total - mean * size for total, size in zip(nats, sizes, strict=True)]
    expected = math.sqrt(len(nats)) * statistics.stdev(deviations) / sum(sizes)
    blocks = PackedBlocks(data_dir, "validation")
    assert sizes == [blocks.num_targets([index]) for index in range(len(blocks))] and sizes[-1] < BLOCK_SIZE
    for option in (stride,) if stride < BLOCK_SIZE else (stride, None):
        assert perplexity.measure(model, blocks, stride=option)["standard_error"] == pytest.approx(expected, rel=1e-5)


def test_rope_reads_longer_contexts_and_learned_positions_do_not(data_dir, models):
    modern = scores(models / "modern", data_dir, "--length_factors", 1, 2, 4)
    assert [row["block_size"] for row in modern["lengths"]] == [32, 64, 128]
    assert {name: modern[name] for name in modern["lengths"][0]} == modern["lengths"][0]
    assert [list(row["loss_by_position"])[-1] for row in modern["lengths"]] == ["32", "64", "128"]
    assert modern["lengths"][2] == perplexity.measure(
        load_model(str(models / "modern")), PackedBlocks(data_dir, "validation", 128), batch_size=2
    )
    for name in ("gpt2", "opt"):
        rows = scores(models / name, data_dir, "--length_factors", 2)["lengths"]
        assert rows[0]["block_size"] == 32 and rows[0]["loss"] > 0
        assert rows[1] == {"block_size": 64, "note": "beyond its 32 positions"}


def test_the_batch_size_changes_nothing(data_dir, models):
    first, *others = (
        scores(models / "llama", data_dir, "--stride", 9, "--per_device_eval_batch_size", size) for size in (1, 3, 1000)
    )
    for result in others:
        for name in ("loss", "standard_error", "perplexity", "bits_per_byte"):
            assert result[name] == pytest.approx(first[name], rel=1e-6)


@pytest.mark.slow
def test_two_processes_print_what_one_prints(data_dir, models, tmp_path):
    """With a fresh cache, to which both processes write the metrics at the same time."""
    arguments = [f"--model={models / 'modern'}", f"--data={data_dir}", "--per_device_eval_batch_size=3"]
    arguments += ["--document_masking", "--stride=9", "--length_factors", "1", "2"]
    printed = []
    for launcher in ((sys.executable,), (*TORCHRUN, "2")):
        result = subprocess.run(
            [*launcher, "-m", "eval.perplexity", *arguments],
            env=environment(HF_HOME=str(tmp_path / str(len(launcher))), PYTHONPATH=str(REPOSITORY)),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        printed.append(result.stdout)
    assert json.loads(printed[0])["tokens"] > 0 and printed[0] == printed[1]


def test_an_infinite_loss_is_an_error(data_dir, models, tmp_path, capsys):
    model = load_model(str(models / "gpt2"))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "overflow")
    assert "the loss is NaN or infinite" in refusal(capsys, tmp_path / "overflow", data_dir)


def test_perplexity_is_a_metric_of_evaluate():
    metric = evaluate.load(str(METRICS / "perplexity"))
    metric.add_batch(nats=[5.0, 6.0, 10.0], tokens=[2, 2, 4])
    metric.add(nats=11.0, tokens=4)
    result = metric.compute()
    assert result["loss"] == pytest.approx(32 / 12) and result["perplexity"] == pytest.approx(math.exp(32 / 12))
    equal = metric.compute(nats=[5.0, 6.0, 9.0, 4.0], tokens=[2] * 4)
    assert equal["standard_error"] == pytest.approx(statistics.stdev([2.5, 3.0, 4.5, 2.0]) / 2)
    assert metric.compute(nats=[3.0], tokens=[2])["standard_error"] is None


def test_bits_per_byte_is_a_metric_of_evaluate():
    metric = evaluate.load(str(METRICS / "bits_per_byte"))
    assert metric.compute(nats=[math.log(2), 2 * math.log(2)], bytes=[1, 5])["bits_per_byte"] == pytest.approx(0.5)
