"""A finished model continues several prompts at once, as `pipeline` does: each text is what it is alone."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    default_data_collator,
    pipeline,
)

from tests.support.folders import make_texts, run, write_jsonl
from tests.support.models import export_fresh_model

PROMPTS = ["the cat sat on a mat", "1984", "birds over there saw the cat"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_tokenizer(folder, **settings):
    """Save a tokenizer with an EOS, whose other tokens are bytes."""
    vocabulary = {token: index for index, token in enumerate([*sorted(ALPHABET), "<eos>", "<fill>"])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>", **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that prepares data with these flags and exports a model with random weights."""

    def export(*flags):
        root = tmp_path_factory.mktemp("exported")
        corpus = write_jsonl(root / "corpus.jsonl", make_texts(60))
        run(root / "data", "--train_file", corpus, "--block_size", 32, "--validation_split_percentage", 20, *flags)
        return export_fresh_model(root / "data", root / "model", "modern")

    return export


@pytest.fixture(scope="module")
def folders(exported, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    named = {"without": {}, "right": {"pad_token": "<fill>", "padding_side": "right"}}
    given = {name: byte_tokenizer(root / name, **settings) for name, settings in named.items()}
    flags = {name: ("--tokenizer_name", folder) for name, folder in given.items()}
    return {name: exported(*more) for name, more in (flags | {"trained": ("--train_tokenizer", 300)}).items()}


@pytest.mark.parametrize(("name", "pad"), [("trained", "<|endoftext|>"), ("without", "<eos>"), ("right", "<fill>")])
def test_tokenizer_pads_on_the_left(folders, name, pad):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, "left")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert (batch.input_ids[1, :3] == tokenizer.pad_token_id).all() and not batch.attention_mask[1, :3].any()
    assert batch.attention_mask[:, -1].all()


@pytest.mark.parametrize("name", ["trained", "without", "right"])
def test_batched_pipeline_equals_one_prompt_at_a_time(folders, name):
    generate = pipeline("text-generation", model=str(folders[name]))
    arguments = {"max_new_tokens": 8, "do_sample": False}
    batched = [answer[0]["generated_text"] for answer in generate(PROMPTS, batch_size=3, **arguments)]
    assert batched == [generate(prompt, **arguments)[0]["generated_text"] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["trained", "without"])
def test_generation_settings_agree_with_the_tokenizer(folders, name):
    settings = json.loads((folders[name] / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert (settings["pad_token_id"], settings["eos_token_id"]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_padded_batch_has_the_logits_of_its_rows(folders):
    model, tokenizer = (cls.from_pretrained(folders["trained"]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        last = model(**batch).logits[:, -1]
        alone = torch.cat([model(tokenizer(prompt, return_tensors="pt").input_ids).logits[:, -1] for prompt in PROMPTS])
    torch.testing.assert_close(last, alone, atol=1e-5, rtol=0)


def test_one_collator_of_transformers_takes_eos_for_padding(folders):
    """docs/data.md says so: EOS pads, and that collator makes no target of the padding token, wherever it stands."""
    tokenizer = AutoTokenizer.from_pretrained(folders["trained"])
    row = [5, 6, tokenizer.eos_token_id, 7]
    masked = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row}])
    assert masked["labels"].tolist() == [[5, 6, -100, 7]]
    kept = default_data_collator([{"input_ids": row, "labels": row}])
    assert kept["labels"].tolist() == [row]
