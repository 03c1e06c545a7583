"""transformers' Trainer, its example scripts and a plain Accelerate loop train and evaluate the model."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.utils.generic import find_labels

import modeling_gpt2modern
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import export_fresh_model, random_ids, tiny_model

ROWS = [{"input_ids": row, "labels": row} for row in random_ids(8, 10).tolist()]
LOSS_NAMES = {
    "GPT2ModernForCausalLM": ["labels"],
    "GPT2ModernForSequenceClassification": ["labels"],
    "GPT2ModernForTokenClassification": ["labels"],
    "GPT2ModernForQuestionAnswering": ["start_positions", "end_positions"],
}


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_trainer_finds_the_labels_of_each_head(name):
    """Without all labels that `forward` names, Trainer's evaluation has no loss."""
    assert find_labels(getattr(modeling_gpt2modern, name)) == LOSS_NAMES[name]


def next_token_loss(model: GPT2ModernForCausalLM, rows: list[dict]) -> float:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model.eval()(input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).item()


def accuracy(prediction) -> dict[str, float]:
    """Compute what run_clm.py computes, which flattens labels and predictions of the next token."""
    labels = prediction.label_ids[:, 1:].reshape(-1)
    return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1].reshape(-1) == labels).mean())}


@pytest.mark.parametrize("flag_set", ["gpt2", "modern", "padded_vocabulary", "speedrun"])
def test_trainer_evaluates_and_keeps_the_best_model(flag_set, tmp_path):
    """The highest loss counts as the best, so that the best model is the first one and not the last."""
    model = tiny_model(flag_set)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], compute_metrics=accuracy)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(next_token_loss(tiny_model(flag_set), ROWS[:4]), rel=1e-5)
    assert 0 <= before["eval_accuracy"] <= 1

    trainer.train()
    losses = {f"checkpoint-{row['step']}": row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1" and losses["checkpoint-1"] > losses["checkpoint-3"]
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses["checkpoint-1"], rel=1e-5)
    assert trainer.predict(ROWS[:4]).predictions.shape == (4, 10, model.config.vocab_size)


def test_accelerate_loop_trains_and_evaluates():
    """The loop of run_clm_no_trainer.py: the batches of transformers' collator, the loss of the model."""
    model, accelerator = tiny_model("padded_vocabulary"), Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(ROWS, batch_size=2, collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    before = next_token_loss(model, ROWS)
    for batch in loader:
        with accelerator.accumulate(model.train()):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        losses = [accelerator.gather_for_metrics(model.eval()(**batch).loss.repeat(2)) for batch in loader]
    assert torch.cat(losses).mean().item() == pytest.approx(next_token_loss(model, ROWS), rel=1e-5)
    assert next_token_loss(model, ROWS) < before - 0.1


# transformers' own scripts

EXAMPLES = os.environ.get("TRANSFORMERS_EXAMPLES")
COMMAND = (
    "git clone --depth 1 https://github.com/huggingface/transformers && "
    "TRANSFORMERS_EXAMPLES=transformers/examples/pytorch/language-modeling python -m pytest tests/test_trainer.py"
)
NEEDS_EXAMPLES = pytest.mark.skipif(not EXAMPLES, reason=f"transformers' package has no scripts: {COMMAND}")

# run_clm.py takes its metric from the Hub, which tests never ask.
METRIC = """
class Accuracy:
    def compute(self, predictions, references):
        return {"accuracy": float((predictions == references).mean())}

def load(name, cache_dir=None):
    assert name == "accuracy"
    return Accuracy()
"""


def run_example(script: str, model_dir: Path, folder: Path, *flags: str, data: Path | None = None) -> str:
    """Train and evaluate the model in `model_dir` with a script of transformers, and return its output.

    data: a prepared folder, instead of a text. What the script does to make rows of tokens out of text is then cut out.
    """
    text = (Path(sysconfig.get_path("stdlib")) / "json" / "encoder.py").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(text[:200]))
    (folder / "validation.txt").write_text("\n".join(text[200:260]))
    (folder / "evaluate.py").write_text(METRIC)
    # Released accelerate has no DistributedType.TPU any more, which the script asks for before it trains any model.
    source = (Path(EXAMPLES) / script).read_text().replace("DistributedType.TPU", "DistributedType.XLA")
    arguments = ["--model_name_or_path", model_dir, "--trust_remote_code", "--block_size", "32"]
    if data is None:
        arguments += ["--train_file", folder / "train.txt", "--validation_file", folder / "validation.txt"]
    else:
        before, rest = source.split("    # Preprocessing the datasets.\n")
        source = f"{before}    lm_datasets = raw_datasets\n    train_dataset = {rest.split('train_dataset = ', 1)[1]}"
        arguments += ["--dataset_name", data]
    (folder / script).write_text(source)
    arguments += ["--per_device_train_batch_size", "4", "--output_dir", folder / "out", *flags]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(
        [sys.executable, folder / script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout + finished.stderr


@NEEDS_EXAMPLES
@pytest.mark.parametrize("preset", ["gpt2", "speedrun"])
def test_run_clm_trains_evaluates_and_keeps_the_best_model(preset, data_dir, tmp_path):
    """The speedrun preset has padded rows, and code of its own that the script loads from the folder."""
    model_dir = export_fresh_model(data_dir, tmp_path / "model", preset)
    flags = "--do_train --do_eval --max_steps 4 --eval_strategy steps --eval_steps 2 --save_steps 2 --use_cpu"
    flags += " --load_best_model_at_end --report_to none --learning_rate 0.01"
    run_example("run_clm.py", model_dir, tmp_path, *flags.split())
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert 0 < results["eval_accuracy"] < 1 and results["eval_loss"] < math.log(300)
    best = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["best_model_checkpoint"]
    weights, kept = (load_file(Path(path) / "model.safetensors") for path in (tmp_path / "out", best))
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


@NEEDS_EXAMPLES
def test_run_clm_no_trainer_trains_and_evaluates(data_dir, tmp_path):
    model_dir = export_fresh_model(data_dir, tmp_path / "model", "speedrun")
    flags = ["--max_train_steps", "4", "--learning_rate", "0.01", "--checkpointing_steps", "2"]
    output = run_example("run_clm_no_trainer.py", model_dir, tmp_path, *flags)
    assert "epoch 0: perplexity:" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 1 < results["perplexity"] < 300
    assert (tmp_path / "out" / "step_2").is_dir() and (tmp_path / "out" / "modeling_gpt2modern.py").exists()


@NEEDS_EXAMPLES
def test_run_clm_no_trainer_takes_a_prepared_folder(data_dir, tmp_path):
    model_dir = export_fresh_model(data_dir, tmp_path / "model", "gpt2")
    flags = ["--max_train_steps", "4", "--learning_rate", "0.01"]
    output = run_example("run_clm_no_trainer.py", model_dir, tmp_path, *flags, data=data_dir)
    assert "epoch 0: perplexity:" in output
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 1 < results["perplexity"] < 300
