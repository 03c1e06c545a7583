"""HellaSwag and LAMBADA: by hand, as lm-eval, the same for every batch and number of processes, in a training run."""

import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
from transformers.utils import ModelOutput

from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.curves import plot_training_curves
from gpt2modern.evaluation.scoring import Row, batches_of, score_rows
from gpt2modern.evaluation.tasks import TASKS, choice_accuracy, evaluate_tasks, last_word_accuracy, prepare_tasks
from gpt2modern.loading import load_model
from gpt2modern.training.card import public_settings
from tests.support.models import FLAG_SETS, export_fresh_model, random_ids, tiny_model
from tests.support.tasks import hellaswag_documents, write_hellaswag, write_lambada, write_lines
from tests.support.trainer import (
    REPOSITORY,
    TINY,
    TORCHRUN,
    assert_same_weights,
    command,
    config_of,
    environment,
    metrics,
    train,
)

needs_evaluate = pytest.mark.skipif(importlib.util.find_spec("evaluate") is None, reason="evaluate is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write both tasks as flags of a run: name=FILE."""
    folder = tmp_path_factory.mktemp("tasks")
    hellaswag, lambada = write_hellaswag(folder / "hellaswag.jsonl"), write_lambada(folder / "lambada.jsonl")
    return [f"hellaswag={hellaswag}", f"lambada={lambada}"]


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory):
    return export_fresh_model(data_dir, tmp_path_factory.mktemp("model"), "modern")


def rows_with_shared_contexts(choices=4):
    """Return rows of contexts of 1 to 30 tokens, with continuations of 1 to 11."""
    rows = []
    for seed, length in enumerate([1, 2, 7, 7, 7, 20, 20, 30]):
        context = tuple(random_ids(length, seed=seed).tolist())
        for choice in range(choices):
            count = 1 + (5 * seed + 3 * choice) % 11
            rows.append(Row(context, tuple(random_ids(count, seed=100 * seed + choice).tolist())))
    return rows


def one_row_at_a_time(model, rows):
    scores = []
    for row in rows:
        ids = torch.tensor([row.context + row.continuation])
        with torch.no_grad():
            log_probs = model(ids).logits[0, len(row.context) - 1 : -1].float().log_softmax(-1)
        targets = ids[0, len(row.context) :]
        scores.append([log_probs.gather(1, targets[:, None]).sum(), (log_probs.argmax(-1) == targets).all()])
    return torch.tensor(scores, dtype=torch.float64)


def models():
    stock = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    mamba = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    return {name: lambda name=name: tiny_model(name) for name in FLAG_SETS} | {
        "stock": lambda: GPT2LMHeadModel(stock),
        "mamba": lambda: MambaForCausalLM(mamba),  # its cache is no list of keys and values
    }


@pytest.mark.parametrize("name", models())
def test_a_context_computed_once_gives_the_scores_of_one_row_at_a_time(name):
    torch.manual_seed(0)
    model, rows = models()[name]().eval(), rows_with_shared_contexts()
    expected = one_row_at_a_time(model, rows)
    for batch_size in (1, 8, 1000):
        scores = score_rows(model, rows, batch_size=batch_size)
        assert torch.allclose(scores[:, 0], expected[:, 0], rtol=0, atol=1e-4)
        assert torch.equal(scores[:, 1], expected[:, 1])
        assert scores[:, 0].view(-1, 4).argmax(1).tolist() == expected[:, 0].view(-1, 4).argmax(1).tolist()


def test_a_context_is_computed_once_and_never_padded():
    """HellaSwag's shape, about 60 tokens and endings of 20: half of the tokens and of the passes, or fewer."""
    rows = []
    for seed in range(3):
        context = tuple(random_ids(40 + seed, seed=seed).tolist())
        rows += [Row(context, tuple(random_ids(12 + n, seed=10 * seed + n).tolist())) for n in range(4)]
    model, shapes = tiny_model(max_position_embeddings=128), []

    def note(module, arguments, keywords):
        shapes.append(tuple(keywords["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    score_rows(model, rows, batch_size=4)
    assert shapes == [(1, 41), (4, 15), (1, 40), (4, 15), (1, 39), (4, 15)]  # the longest first; one token less
    assert len(shapes) == len(rows) / 2
    assert sum(math.prod(shape) for shape in shapes) < sum(len(row.context + row.continuation) for row in rows) / 2
    for batch in batches_of(rows_with_shared_contexts(), batch_size=12):
        assert len({len(rows_with_shared_contexts()[index].context) for index in batch}) == 1 and len(batch) <= 12


class TableModel(nn.Module):
    """Predicts the next token from the last one alone, with the probabilities in a table."""

    def __init__(self, probabilities):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())
        self.config = SimpleNamespace(vocab_size=len(probabilities), max_position_embeddings=64)
        self.device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return ModelOutput(logits=self.table[input_ids])


class Words:
    """Makes a token of each word, in whatever case and before whatever mark."""

    bos_token_id, eos_token_id, known = None, 0, ("eos", "run", "jump", "fly")

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[self.known.index(word.strip(":.").lower()) for word in text.split()])


PROBABILITIES = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]]


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """Return a function that evaluates a task on documents, and what its metric was called with."""
    monkeypatch.setattr("gpt2modern.evaluation.tasks.load_tokenizer", lambda name: Words())
    model, columns = TableModel(PROBABILITIES), []

    def evaluate(name, documents):
        file = write_lines(tmp_path / "file.jsonl", documents)
        tasks = prepare_tasks([f"{name}={file}"], model, "words")
        metric = TASKS[name].metric
        noted = {"metric_of": lambda name: lambda **found: columns.append(found) or metric(**found)}
        return evaluate_tasks(tasks, model, batch_size=2, **noted), columns

    return evaluate


def test_a_hand_made_item_scores_as_computed_by_hand(by_hand):
    """After "run": "fly" has the highest sum, "run run" the highest per token, three jumps that per character."""
    item = {"activity_label": "Fly", "ctx_a": "Eos.", "ctx_b": "run", "ctx": "eos run"}
    endings = ["fly", "run run", "jump jump jump"]
    results, columns = by_hand("hellaswag", [item | {"endings": endings, "label": label} for label in (0, 2, 2)])
    for found in columns:
        assert np.allclose(found["log_probs"], [np.log([0.1, 0.3 * 0.3, 0.2 * 0.25 * 0.25])] * 3, atol=1e-6)
        assert found["tokens"] == [[1, 2, 3]] * 3 and found["characters"] == [[3, 7, 14]] * 3
    third = 1 / 3
    assert results == pytest.approx(
        {
            "hellaswag_acc": third, "hellaswag_acc_stderr": third, "hellaswag_acc_norm": 2 / 3,
            "hellaswag_acc_norm_stderr": third, "hellaswag_completion_sum": third,
            "hellaswag_completion_sum_stderr": third, "hellaswag_completion_mean": 0.0,
            "hellaswag_completion_mean_stderr": 0.0,
        }
    )  # fmt: skip


def test_hand_made_last_words_score_as_computed_by_hand(by_hand):
    texts = ["jump run eos", "jump run fly", "eos fly eos"]
    results, _ = by_hand("lambada", [{"text": text} for text in texts])
    logs = np.log([0.4, 0.1, 0.7])
    expected = {"lambada_acc": 2 / 3, "lambada_acc_stderr": 1 / 3, "lambada_perplexity": np.exp(-logs.mean())}
    error = np.exp(-logs.mean()) * logs.std(ddof=1) / 3**0.5
    assert results == pytest.approx(expected | {"lambada_perplexity_stderr": error}, rel=1e-6)


def test_the_text_is_prepared_as_in_lm_eval_or_left_as_it_is():
    _, (cleaned, completion) = TASKS["hellaswag"].ask(hellaswag_documents()[2])
    assert cleaned == (
        "Baking: How to bake bread. Mix flour and water Use a bowl.",
        ["  Stir it well.", " Drive north. Sleep.", " Count to ten.", " Sell the bowl."],
        True,
    )
    assert completion[0] == "[header] How to bake bread [title] Mix flour and water [step] Use a bowl."
    assert completion[1][0] == " [substeps] Stir  it well."


def test_a_single_item_has_no_standard_error():
    assert last_word_accuracy([-1.0], [True]) == {
        "acc": 1.0,
        "acc_stderr": None,
        "perplexity": math.e,
        "perplexity_stderr": None,
    }


def test_a_context_beyond_the_positions_is_cut_from_the_left(model_dir, tmp_path):
    """Also where one ending leaves more of it than another: they then share nothing."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    file = write_hellaswag(tmp_path / "file.jsonl")
    (task,) = prepare_tasks([f"hellaswag={file}"], model, model_dir)
    tokenizer, document = AutoTokenizer.from_pretrained(model_dir), hellaswag_documents()[0]
    for row, ending in zip(task.rows[1][0], document["endings"], strict=True):
        ids = tokenizer(document["ctx"]).input_ids + tokenizer(f" {ending}").input_ids
        assert row.context + row.continuation == tuple(ids[-33:])  # the last is not an input
    assert len({row.context for row in task.rows[1][0]}) > 1
    results = evaluate_tasks([task], model, batch_size=8)
    assert results == evaluate_tasks([task], model, batch_size=8)
    too_few = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=4, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(GPT2ModernError, match="but the model has 4 positions"):
        prepare_tasks([f"hellaswag={file}"], too_few, model_dir)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("hellaswag", None, "cannot be read (No such file or directory)"),
        ("hellaswag", "", "is empty; give a JSON-lines file with the columns of Rowan/hellaswag"),
        ("hellaswag", "{", "document 1: Expecting property name"),
        ("hellaswag", "[1]", "document 1: 'ctx' is missing or of another type"),
        ("hellaswag", {"ctx_b": None}, "document 1: 'ctx_b' is missing or of another type"),
        ("hellaswag", {"label": 4}, "its label 4 is none of the 4 endings"),
        ("hellaswag", {"label": -1}, "its label -1 is none of the 4 endings"),
        ("hellaswag", {"label": ""}, "its label  is none of the 4 endings"),
        ("hellaswag", {"endings": ["a", 3]}, "are not two or more texts"),
        ("hellaswag", {"endings": ["a", " "]}, "are not two or more texts"),
        ("lambada", '{"text": "word"}', "is not a context, a space and a word"),
        ("lambada", '{"text": "word "}', "is not a context, a space and a word"),
        ("arc", "", "the task 'arc' is unknown; choose from hellaswag, lambada"),
    ],
)
def test_a_wrong_file_is_named_with_the_document(model_dir, tmp_path, name, content, expected):
    if isinstance(content, dict):
        content = json.dumps(hellaswag_documents()[0] | content)
    if content is not None:
        (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(GPT2ModernError) as caught:
        prepare_tasks([f"{name}={tmp_path / 'file.jsonl'}"], tiny_model(), model_dir)
    assert expected in str(caught.value)


def test_the_hub_that_cannot_be_reached_is_named(model_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GPT2ModernError, match=r"Rowan/hellaswag cannot be read .* give a JSON-lines file"):
        prepare_tasks(["hellaswag"], tiny_model(), model_dir)


def test_the_results_are_those_of_lm_eval(model_dir, tmp_path):
    """On files with contexts that are cut, tags, and spaces at the end of a context."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    huggingface = importlib.import_module("lm_eval.models.huggingface")

    model = load_model(str(model_dir))
    documents = hellaswag_documents(labels=(0, 1, 2, 0, 3))  # Arrow wants one type
    files = {"validation": write_lines(tmp_path / "h.jsonl", documents), "test": write_lambada(tmp_path / "l.jsonl")}
    ours = evaluate_tasks(
        prepare_tasks([f"hellaswag={files['validation']}", f"lambada={files['test']}"], model, model_dir),
        model,
        batch_size=8,
    )
    lm = huggingface.HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_dir), batch_size=2)
    for name, split in (("hellaswag", "validation"), ("lambada_openai", "test")):
        (included,) = (Path(lm_eval.__file__).parent / "tasks").rglob(f"{name}.yaml")  # its own, on other data
        data = {"dataset_path": "json", "dataset_name": None, "training_split": None}
        data |= {"dataset_kwargs": {"data_files": {split: str(files[split])}}}
        content = json.dumps({"include": str(included), "task": f"local_{name}"} | data)
        (tmp_path / f"{name}.yaml").write_text(content)
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("hellaswag", "lambada_openai")]
    theirs = lm_eval.simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=2, cache_requests=False)["results"]
    for name, (task, result) in {
        "hellaswag_acc": ("hellaswag", "acc,none"),
        "hellaswag_acc_norm": ("hellaswag", "acc_norm,none"),
        "hellaswag_acc_norm_stderr": ("hellaswag", "acc_norm_stderr,none"),
        "lambada_acc": ("lambada_openai", "acc,none"),
        "lambada_acc_stderr": ("lambada_openai", "acc_stderr,none"),
        "lambada_perplexity": ("lambada_openai", "perplexity,none"),
    }.items():
        assert ours[name] == pytest.approx(theirs[f"local_{task}"][result], rel=1e-6), name
    assert 0 < ours["hellaswag_acc"] < 1


RUN = {"config_overrides": TINY + ",hidden_dropout=0.1", "eval_steps": 4, "max_steps": 6, "save_steps": 6}
TASK_FLAGS = ("--eval_tasks_steps", "2", "--eval_tasks_limit", "4", "--eval_tasks")


@pytest.fixture(scope="module")
def run_with_tasks(files, data_dir, tmp_path_factory):
    """Train with dropout; tasks at steps 2, 4 and 6, evaluations at 4 and 6 without them too."""
    return train(data_dir, tmp_path_factory.mktemp("run"), extra=[*TASK_FLAGS, *files], **RUN)


def columns_of_tasks(output_dir):
    rows = {row["step"]: row for row in metrics(output_dir)}
    found = {step: {k: v for k, v in row.items() if k.startswith(("hella", "lambada"))} for step, row in rows.items()}
    return {step: columns for step, columns in found.items() if columns}


def test_a_run_records_its_tasks_when_they_are_due(run_with_tasks, data_dir, files):
    columns = columns_of_tasks(run_with_tasks)
    assert list(columns) == [2, 4, 6]
    model = load_model(str(run_with_tasks))
    again = evaluate_tasks(prepare_tasks(files, model, run_with_tasks, limit=4), model, batch_size=8)
    assert columns[6] == pytest.approx(again, rel=1e-6) and len(again) == 12
    summary = json.loads((run_with_tasks / "summary.json").read_text())
    assert {name: summary[name] for name in again} == columns[6]
    card = (run_with_tasks / "README.md").read_text()
    config = config_of(data_dir, run_with_tasks, eval_tasks=[*files, "lambada"])
    assert public_settings(config)["eval_tasks"] == ["hellaswag=hellaswag.jsonl", "lambada=lambada.jsonl", "lambada"]
    accuracy, error = columns[6]["hellaswag_acc_norm"], columns[6]["hellaswag_acc_norm_stderr"]
    assert f"| hellaswag_acc_norm | {accuracy:.4g}{f' +- {error:.2g}' if error else ''} |" in card


@pytest.mark.fault("F21 samples and evaluations change nothing")
def test_training_does_not_notice_its_tasks(run_with_tasks, data_dir, tmp_path):
    silent = train(data_dir, tmp_path, **RUN)
    assert_same_weights(run_with_tasks, silent)
    assert [row["loss"] for row in metrics(run_with_tasks)] == [row["loss"] for row in metrics(silent)]
    assert not columns_of_tasks(silent)


def test_a_run_that_is_stopped_in_its_tasks_loses_and_repeats_nothing(run_with_tasks, files, data_dir, tmp_path):
    """The signal comes in the evaluation of step 4, whose row then has no results until the run is resumed."""
    calls = []

    def stop(event, step, **details):
        calls.append((event, step))
        if (event, step) == ("evaluating", 4):
            os.kill(os.getpid(), signal.SIGTERM)

    flags = dict(extra=[*TASK_FLAGS, *files], **(RUN | {"save_steps": 2}))
    with pytest.raises(SystemExit) as stopped:
        train(data_dir, tmp_path, callback=stop, **flags)
    assert stopped.value.code == 75 and list(columns_of_tasks(tmp_path)) == [2]
    train(data_dir, tmp_path, callback=lambda event, step, **details: calls.append((event, step)), **flags)
    assert columns_of_tasks(tmp_path) == columns_of_tasks(run_with_tasks)
    assert_same_weights(tmp_path, run_with_tasks)
    assert [step for event, step in calls if event == "evaluating"] == [2, 4, 4, 6]


@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["ddp", "fsdp2"])
def test_two_processes_have_the_results_of_one_exactly(files, data_dir, tmp_path, variables):
    """At a learning rate of 0, so that the weights are those of the seed; a batch is left over for one of the two."""
    flags = {"learning_rate": 0, "warmup_steps": 0, "max_steps": 1, "save_steps": 0, "eval_tasks": files[1]}
    one = train(data_dir, tmp_path / "one", **flags)
    run = [*command(data_dir, tmp_path / "two", *TORCHRUN, "2", **flags)]
    finished = subprocess.run(run, env=environment(**variables), capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert columns_of_tasks(tmp_path / "two") == columns_of_tasks(one)
    assert columns_of_tasks(one)[1]["lambada_perplexity"] > 1


def test_the_curves_have_a_panel_where_there_are_results(tmp_path):
    rows = [{"step": n, "tokens_seen": n, "loss": 3.0, "learning_rate": 0.1, "eval_loss": 3.0} for n in (1, 2)]
    heights = []
    for more in ({}, {"hellaswag_acc_norm": 0.3, "lambada_acc": 0.2}):
        plot_training_curves([rows[0], rows[1] | more], tmp_path / "curves.png")
        heights.append(struct.unpack(">I", (tmp_path / "curves.png").read_bytes()[20:24])[0])
    assert heights == [720, 1080]


@needs_evaluate
@pytest.mark.parametrize("name", TASKS)
def test_a_metric_loads_with_evaluate_and_computes_the_same(name):
    of_task = {
        "hellaswag": {
            "log_probs": [[-4.0, -3.0, -9.0], [-1.0, -2.0, -2.5]],
            "tokens": [[2, 1, 9], [1, 4, 2]],
            "characters": [[9, 3, 9], [3, 4, 9]],
            "labels": [1, 2],
        },
        "lambada": {"log_prob": [-1.25, -0.1], "is_greedy": [False, True]},
    }[name]
    evaluate = importlib.import_module("evaluate")
    found = evaluate.load(str(REPOSITORY / "eval" / "metrics" / name), keep_in_memory=True).compute(**of_task)
    assert found == TASKS[name].metric(**of_task)


@pytest.fixture
def copied_run(run_with_tasks, tmp_path):
    return Path(shutil.copytree(run_with_tasks, tmp_path / run_with_tasks.name))


@needs_evaluate
def test_the_report_reaches_card_and_curves_and_survives_a_new_export(copied_run, files, data_dir, tmp_path):
    run = importlib.import_module("eval.run")
    flags = [f"--{text}" for text in files]
    curves = (copied_run / "training_curves.png").read_bytes()
    command = ["--model", copied_run, "--data", data_dir, "--update_card", "true", "--output", tmp_path / "out.json"]
    for _ in range(2):  # the section is replaced
        run.main([*map(str, command), *flags])
    report = json.loads((copied_run / "eval.json").read_text())
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["protocol"]["hellaswag"]["items"] == 5 and report["protocol"]["perplexity"]["tokens"] > 0
    model = load_model(str(copied_run))
    expected = evaluate_tasks(prepare_tasks(files, model, copied_run), model, batch_size=8)
    assert {name: report["results"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    card = (copied_run / "README.md").read_text()
    assert card.count("## Evaluation by eval.run") == 1 and card.index("## Evaluation by") < card.index("## Data")
    assert (copied_run / "training_curves.png").read_bytes() != curves
    train(data_dir, copied_run, extra=[*TASK_FLAGS, *files], **RUN)  # finished: only exported again
    assert (copied_run / "README.md").read_text() == card
    report["weights_sha256"] = "of other weights"
    (copied_run / "eval.json").write_text(json.dumps(report))
    train(data_dir, copied_run, extra=[*TASK_FLAGS, *files], **RUN)
    assert "## Evaluation by eval.run" not in (copied_run / "README.md").read_text()


@needs_evaluate
def test_the_command_of_a_task_is_that_of_all(run_with_tasks, files, tmp_path, capsys):
    for name, file in (text.split("=") for text in files):
        main = importlib.import_module(f"eval.{name}").main
        output = tmp_path / f"{name}.json"
        main(["--model", str(run_with_tasks), "--data", file, "--limit", "3", "--output", str(output)])
        report = json.loads(output.read_text())
        assert report["protocol"][name]["items"] == 3 and list(report["protocol"]) == [name]
        assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    "characters, label", [([9], 1), ([9, 0], 1), ([9, 3], 2), ([9, 3], -1)], ids=["lengths", "empty", "above", "below"]
)
def test_numbers_that_do_not_fit_together_are_no_accuracy(characters, label):
    assert choice_accuracy([[-4.0, -3.0]], [[2, 1]], [[9, 3]], [1])["acc"] == 1.0
    with pytest.raises(ValueError, match="do not fit"):
        choice_accuracy([[-4.0, -3.0]], [[2, 1]], [characters], [label])
