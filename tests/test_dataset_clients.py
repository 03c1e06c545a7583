"""A prepared folder is a `datasets` dataset: datasets, Trainer, TRL and transformers' own script take it as it is."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset, load_from_disk
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from tests.support.folders import make_texts, run, streams_of, write_jsonl
from tests.support.models import TINY

BLOCK_SIZE = 64  # the number of learned positions, too
ARGUMENTS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 1}


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def folder(request, tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    texts = write_jsonl(path / "a.jsonl", make_texts(300))
    flags = ("--train_file", texts, "--tokenizer_name", tokenizer_dir, "--block_size", BLOCK_SIZE, "--num_shards", 2)
    run(path / "data", *flags, "--packing", request.param)
    return path / "data"


def tiny_model() -> GPT2ModernForCausalLM:
    torch.manual_seed(0)
    return GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("gpt2", **(TINY | {"vocab_size": 400})))


def test_datasets_opens_the_folder_and_each_split(folder, tmp_path):
    whole = load_from_disk(str(folder))
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path))
    streamed = load_dataset(str(folder), streaming=True, split="validation")
    assert list(whole) == list(loaded) == ["train", "validation"]
    for split, rows in whole.items():
        assert rows["labels"][:] == rows["input_ids"][:] == load_from_disk(str(folder / split))["input_ids"][:]
        assert loaded[split].to_dict() == rows.to_dict()
        assert all(0 < len(row) <= BLOCK_SIZE for row in rows["input_ids"])
    assert list(streamed) == list(whole["validation"])
    (stream,) = streams_of(folder, "validation")
    tokens = [token for row in whole["validation"]["input_ids"] for token in row]
    assert tokens[: len(stream) // BLOCK_SIZE * BLOCK_SIZE] == stream[: len(stream) // BLOCK_SIZE * BLOCK_SIZE]


def test_caches_that_datasets_writes_beside_the_rows_are_not_read_as_rows(folder, tmp_path):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    rows = load_from_disk(str(data / "train"))
    rows.map(lambda row: {"labels": row["labels"]})
    rows.shuffle(seed=1)
    assert list((data / "train").glob("cache-*.arrow"))
    assert load_dataset(str(data), cache_dir=str(tmp_path / "cache"), split="train").num_rows == len(rows)


def test_rows_become_tensors_that_a_model_takes(folder):
    rows = load_from_disk(str(folder))["train"].with_format("torch")
    assert rows[0]["input_ids"].dtype == torch.int64 and torch.equal(rows[0]["input_ids"], rows[0]["labels"])
    output = tiny_model()(input_ids=rows[0]["input_ids"][None], labels=rows[0]["labels"][None])
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("has_collator", [False, True])
def test_trainer_trains_and_evaluates_on_the_folder(folder, tmp_path, has_collator):
    data = load_from_disk(str(folder))
    is_ragged = len({len(row) for row in data["train"]["input_ids"]}) > 1
    if is_ragged and not has_collator:
        pytest.skip("rows of best_fit have different lengths, which default_data_collator cannot stack")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    data = data.select_columns("input_ids") if has_collator else data
    trainer = Trainer(
        tiny_model(),
        TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=4, **ARGUMENTS),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False) if has_collator else None,
    )
    assert trainer.train().training_loss > 0
    assert 0 < trainer.evaluate()["eval_loss"] < 10


@pytest.mark.parametrize("options", [{}, {"padding_free": True}])
def test_sft_trainer_trains_and_evaluates_on_the_folder(folder, tmp_path, options):
    data = load_from_disk(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "max_length": None, "bf16": False}
    trainer = SFTTrainer(
        tiny_model(),
        SFTConfig(tmp_path, **arguments, **options, **ARGUMENTS),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss > 0
    assert 0 < trainer.evaluate()["eval_loss"] < 10
