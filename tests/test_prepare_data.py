"""prepare_data.py: what is in the blocks is the text, and mistakes leave one line and nothing else."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from preparation.encoding import Encoder
from preparation.sources import standard_library_files
from prepare_data import main

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "cat", "sat", "on", "a", "mat\nand;", "saw", "1984", "birds", "over\tthere", "<|endoftext|>"]
WORDS += ["\u00e9t\u00e9", "\u6771\u4eac", "\U0001f642"]


def make_texts(count: int, offset: int = 0) -> list[str]:
    """`count` different documents of 5 to 40 words; document i depends on offset + i only."""
    texts = []
    for seed in range(offset, offset + count):
        rng = np.random.default_rng(seed)
        texts.append(f"{seed}: " + " ".join(rng.choice(WORDS, size=rng.integers(5, 40))))
    return texts


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return path


def run(output_dir: Path, *flags: object) -> dict:
    main([*map(str, flags), "--output_dir", str(output_dir)])
    return json.loads((output_dir / "manifest.json").read_text())


def refusal(capsys, *flags: object) -> str:
    """The one line with which `main` refuses."""
    with pytest.raises(SystemExit) as caught:
        main([str(flag) for flag in flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"\n{error}".count("\nerror: ") == 1 and "Traceback" not in error
    return error.rstrip("\n").splitlines()[-1].removeprefix("error: ")


def rows_of(data_dir: Path, split: str) -> np.ndarray:
    """(rows, block_size + 1), read with `datasets` alone."""
    shards = sorted((data_dir / split).iterdir())
    return np.concatenate([np.array(load_from_disk(str(shard))["input_ids"]) for shard in shards])


def targets_of(data_dir: Path, split: str) -> list[int]:
    """The real targets of all rows, in order."""
    shards = [load_from_disk(str(shard)) for shard in sorted((data_dir / split).iterdir())]
    return [token for shard in shards for row in shard for token in row["input_ids"][1 : row["num_tokens"] + 1]]


def documents_of(data_dir: Path, split: str) -> list[str]:
    """The documents of a split.

    The texts here hold "<|endoftext|>", which becomes EOS: each piece of a text counts as a document, on both sides.
    """
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    return pieces([tokenizer.decode(targets_of(data_dir, split)).removesuffix("<|endoftext|>")])


def pieces(texts: list[str]) -> list[str]:
    return [piece for text in texts for piece in text.split("<|endoftext|>")]


def reference_ids(data_dir: Path, texts: list[str]) -> list[int]:
    """What `tokenizers` makes of the texts, each followed by EOS."""
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, eos]]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(300))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory, corpus) -> Path:
    output_dir = tmp_path_factory.mktemp("tokenizer") / "data"
    run(output_dir, "--train_file", corpus, "--train_tokenizer", 400, "--block_size", 32)
    return output_dir / "tokenizer"


# What is in the blocks


def test_blocks_decode_to_the_source_in_order(tmp_path, corpus, tokenizer_dir):
    texts = make_texts(40, offset=1000)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    run(tmp_path / "data", *flags, "--block_size", 16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    decoded = tokenizer.decode(targets_of(tmp_path / "data", "validation"))
    assert decoded == "".join(text + "<|endoftext|>" for text in texts)


def test_every_token_is_a_target_exactly_once(tmp_path, corpus, tokenizer_dir):
    texts = make_texts(40, offset=1000)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 16)["splits"]["validation"]
    stream = reference_ids(tmp_path / "data", texts)
    assert targets_of(tmp_path / "data", "validation") == stream
    rows = -(-len(stream) // 16)
    assert (manifest["tokens"], manifest["rows"], manifest["padding"]) == (len(stream), rows, rows * 16 - len(stream))
    assert (rows_of(tmp_path / "data", "validation")[-1, 1 + 16 - manifest["padding"] :] == 0).all()


def test_cut_documents_lie_in_more_than_one_row(tmp_path, corpus, tokenizer_dir):
    texts = make_texts(40, offset=1000)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 64)["splits"]["validation"]
    ends = np.cumsum([len(reference_ids(tmp_path / "data", [text])) for text in texts]).tolist()
    rows = [{token // 64 for token in range(start, end)} for start, end in zip([0, *ends], ends, strict=False)]
    assert manifest["cut_documents"] == sum(len(touched) > 1 for touched in rows)
    assert 0 < manifest["cut_documents"] < 40


def test_a_split_shorter_than_a_block_is_one_padded_row(tmp_path, corpus, tokenizer_dir):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["a cat"])
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 64)["splits"]["validation"]
    assert (manifest["rows"], manifest["cut_documents"]) == (1, 0) and manifest["padding"] == 64 - manifest["tokens"]
    assert targets_of(tmp_path / "data", "validation") == reference_ids(tmp_path / "data", ["a cat"])


def test_a_row_begins_with_the_last_token_of_the_one_before_and_the_first_with_eos(tokenizer_dir):
    rows = rows_of(tokenizer_dir.parent, "train")
    assert rows[0, 0] == 0 and (rows[1:, 0] == rows[:-1, -1]).all()


def test_training_documents_are_all_there_shuffled(tmp_path, corpus, tokenizer_dir):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(5, offset=1000))
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    run(tmp_path / "data", *flags, "--block_size", 1)
    found, expected = documents_of(tmp_path / "data", "train"), pieces(make_texts(300))
    assert found != expected and sorted(found) == sorted(expected)


def test_manifest_counts_bytes_documents_and_empty_documents(tmp_path, tokenizer_dir):
    texts = make_texts(20)
    flags = ("--train_file", write_jsonl(tmp_path / "a.jsonl", ["", *texts, None, ""]), "--block_size", 8)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(5, offset=1000))
    manifest = run(tmp_path / "data", *flags, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    assert manifest["splits"]["train"]["documents"] == 20
    assert manifest["splits"]["train"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert (manifest["source"]["documents"], manifest["source"]["empty_documents"]) == (23, 3)


def test_shards_partition_the_documents(tmp_path, corpus, tokenizer_dir):
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    run(tmp_path / "one", *flags)
    manifest = run(tmp_path / "three", *flags, "--num_shards", 3)
    one, three = (sorted(documents_of(tmp_path / name, "train")) for name in ("one", "three"))
    assert one == three
    assert targets_of(tmp_path / "one", "validation") == targets_of(tmp_path / "three", "validation")
    paths = [shard["path"] for shard in manifest["splits"]["train"]["shards"]]
    assert paths == [f"train/shard-0000{index}-of-00003" for index in range(3)]


def test_manifest_describes_the_files(tokenizer_dir):
    data_dir = tokenizer_dir.parent
    manifest = json.loads((data_dir / "manifest.json").read_text())
    for split in ("train", "validation"):
        for shard in manifest["splits"][split]["shards"]:
            files = {path.name: path for path in (data_dir / shard["path"]).iterdir()}
            assert set(files) == set(shard["files"])
            for name, recorded in shard["files"].items():
                content = files[name].read_bytes()
                assert recorded == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer"]["sha256"] == digest


# Splits


def test_validation_is_disjoint_and_stays_when_documents_are_added(tmp_path, corpus, tokenizer_dir):
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(200, offset=500))
    flags = ("--tokenizer_name", tokenizer_dir, "--block_size", 1)
    run(tmp_path / "before", "--train_file", corpus, *flags)
    run(tmp_path / "after", "--train_file", more, corpus, *flags, "--shuffle_seed", 7)
    # The first piece of a document begins with its number, which no other document has.
    before, after = (
        {
            split: {text for text in documents_of(tmp_path / name, split) if ": " in text}
            for split in ("train", "validation")
        }
        for name in ("before", "after")
    )
    assert not before["train"] & before["validation"] and not after["train"] & after["validation"]
    assert before["validation"] < after["validation"] and before["train"] < after["train"]


def test_equal_texts_never_stand_on_both_sides(tmp_path, tokenizer_dir):
    texts = [text.replace("<|endoftext|>", "") for text in make_texts(100)]
    twice = write_jsonl(tmp_path / "twice.jsonl", [*texts, *texts])
    run(tmp_path / "data", "--train_file", twice, "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    train, validation = (documents_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert validation and not set(train) & set(validation)


def test_few_documents_are_cut_at_a_line_break(tmp_path, tokenizer_dir):
    text = "".join(f"line {number}\n" for number in range(200))
    (tmp_path / "one.txt").write_text(text)
    flags = ("--train_file", tmp_path / "one.txt", "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    manifest = run(tmp_path / "data", *flags, "--validation_split_percentage", 10)
    (head,), (tail,) = (documents_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert head + tail == text and head.endswith("\n") and tail.startswith("line ")
    assert 0.09 < len(tail) / len(text) < 0.12
    assert manifest["validation_rule"] == "the last 0.1 of each document, from a line break on"


# Determinism


def test_equal_settings_give_equal_bytes(tmp_path, corpus):
    flags = ("--train_file", corpus, "--train_tokenizer", 300, "--block_size", 16, "--num_shards", 2)
    run(tmp_path / "first", *flags)
    run(tmp_path / "second", *flags)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("flags", [("--num_proc", 2), ("--tokenizer_engine", "tokenizers")], ids=lambda flags: flags[0])
def test_processes_and_engine_do_not_change_the_bytes(tmp_path, corpus, tokenizer_dir, flags):
    common = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    run(tmp_path / "plain", *common)
    run(tmp_path / "other", *common, *flags)
    assert contents(tmp_path / "plain") == contents(tmp_path / "other")


def test_another_seed_gives_another_order_and_the_same_validation(tmp_path, corpus, tokenizer_dir):
    common = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    run(tmp_path / "seed0", *common)
    run(tmp_path / "seed1", *common, "--shuffle_seed", 1)
    assert targets_of(tmp_path / "seed0", "train") != targets_of(tmp_path / "seed1", "train")
    assert sorted(targets_of(tmp_path / "seed0", "train")) == sorted(targets_of(tmp_path / "seed1", "train"))
    assert targets_of(tmp_path / "seed0", "validation") == targets_of(tmp_path / "seed1", "validation")


# Tokenizers and engines

texts_with_specials = st.lists(st.one_of(st.text(), st.sampled_from(["<|endoftext|>", " ", "a" * 300, "\0", "\r\n"])))


@pytest.fixture(scope="module")
def encoder(tokenizer_dir) -> Encoder:
    return Encoder(tokenizer_dir / "tokenizer.json", engine="gigatoken", dtype="uint16", eos_token_id=0)


@pytest.fixture(scope="module")
def reference(tokenizer_dir) -> Encoder:
    return Encoder(tokenizer_dir / "tokenizer.json", engine="tokenizers", dtype="uint16", eos_token_id=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts=st.lists(texts_with_specials.map("".join), min_size=1, max_size=4))
def test_engines_agree_on_any_text(encoder, reference, texts):
    documents = pa.array(texts, pa.large_string())
    for found, expected in zip(encoder.encode(documents), reference.encode(documents), strict=True):
        assert np.array_equal(found, expected)


def test_encoded_documents_end_with_eos(encoder, tokenizer_dir):
    texts = ["", "\u00e9t\u00e9", "a <|endoftext|> b"]
    ids, lengths = encoder.encode(pa.array(texts, pa.large_string()))
    assert ids.tolist() == reference_ids(tokenizer_dir.parent, texts) and ids.dtype == np.uint16
    assert lengths.sum() == len(ids) and lengths[0] == 1
    assert ids[-lengths[2] :].tolist().count(0) == 2  # text that spells EOS is EOS


def test_an_engine_that_differs_stops_the_run_with_the_document_named(tmp_path, tokenizer_dir, capsys, monkeypatch):
    correct = Encoder.ids_and_lengths

    def wrong_about_zebras(self, texts):
        ids, lengths = correct(self, texts)
        zebras = np.array(["zebra" in text for text in texts.to_pylist()], dtype=ids.dtype)
        return ids + (self.engine == "gigatoken") * np.repeat(zebras, lengths), lengths

    corpus = write_jsonl(tmp_path / "a.jsonl", ["a cat", "a zebra", "a dog"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["a bird", "a zebra finch", "a hen"])
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 1, "--validation_file")
    monkeypatch.setattr(Encoder, "ids_and_lengths", wrong_about_zebras)
    line = refusal(capsys, *flags, corpus, "--output_dir", tmp_path / "data")
    assert f"a document of {corpus} differently (it begins 'a zebra'); use --tokenizer_engine tokenizers" in line
    write_jsonl(corpus, ["a cat", "a dog"])
    line = refusal(capsys, *flags, held_out, "--output_dir", tmp_path / "data")
    assert "a document of the validation split differently (it begins 'a zebra finch')" in line
    run(tmp_path / "data", *flags, held_out, "--tokenizer_engine", "tokenizers")


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_tokens_that_a_tokenizer_adds_around_a_text_are_not_in_the_blocks(tmp_path, tokenizer_dir, engine):
    adding = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    adding.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=adding, eos_token="<|endoftext|>").save_pretrained(tmp_path / "adding")
    corpus, held_out = (write_jsonl(tmp_path / name, ["a cat", "a dog"]) for name in ("a.jsonl", "b.jsonl"))
    flags = ("--train_file", corpus, "--validation_file", held_out, "--block_size", 1, "--tokenizer_engine", engine)
    run(tmp_path / "data", *flags, "--tokenizer_name", tmp_path / "adding")
    assert targets_of(tmp_path / "data", "validation").count(0) == 2


def test_trained_tokenizer_has_the_asked_size_and_one_special_token(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert len(tokenizer) == 400 and tokenizer.model_max_length == 32
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text())
def test_trained_tokenizer_decodes_any_text_to_itself(trained_tokenizer, text):
    assert trained_tokenizer.decode(trained_tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def trained_tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_trained_tokenizer_says_not_to_clean_up_spaces(tokenizer_dir):
    assert json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False


def test_trained_tokenizer_loads_without_a_word(trained_tokenizer, tokenizer_dir, capfd, recwarn):
    AutoTokenizer.from_pretrained(tokenizer_dir)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path, corpus):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["quizzical"] * 1000)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--train_tokenizer", 350, "--block_size", 8)
    run(tmp_path / "data", *flags)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer").tokenize("quizzical")) > 4


def test_a_corpus_too_small_for_the_entries_gives_fewer_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc abc abc\n" * 20)
    flags = ("--train_file", tmp_path / "a.txt", "--train_tokenizer", 5000, "--block_size", 4)
    manifest = run(tmp_path / "data", *flags)
    assert 257 < manifest["vocab_size"] < 300
    assert f"the corpus gives {manifest['vocab_size']} tokenizer entries" in capsys.readouterr().out


def test_a_large_vocabulary_is_stored_in_32_bits_and_encoded_without_gigatoken(tmp_path, capsys):
    # WordLevel is a kind of tokenizer that gigatoken does not serve.
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70_000)}, "<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("w69999 w1 w65536\n" * 100)
    flags = ("--train_file", tmp_path / "a.txt", "--tokenizer_name", tmp_path / "words", "--block_size", 3)
    manifest = run(tmp_path / "data", *flags)
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", 70_000)
    assert targets_of(tmp_path / "data", "train")[:3] == [69999, 1, 65536]
    assert "note: encoding with tokenizers" in capsys.readouterr().out
    line = refusal(capsys, *flags, "--tokenizer_engine", "gigatoken", "--output_dir", tmp_path / "other")
    assert line.startswith("--tokenizer_engine gigatoken: cannot serve this tokenizer")


# Sources


def test_files_of_several_kinds_are_read_together(tmp_path, tokenizer_dir):
    texts = [text.replace("<|endoftext|>", "") for text in make_texts(6)]
    (tmp_path / "a.txt").write_text(texts[0])
    write_jsonl(tmp_path / "b.jsonl", texts[1:3], column="body")
    (tmp_path / "c.json").write_text(json.dumps([{"body": texts[3]}]))
    pq.write_table(pa.table({"n": [1], "body": pa.array([texts[4]], pa.large_string())}), tmp_path / "d.parquet")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts[5:], column="body")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.json", "d.parquet")]
    flags = ("--train_file", *files, "--validation_file", held_out, "--text_column", "body", "--block_size", 1)
    run(tmp_path / "data", *flags, "--tokenizer_name", tokenizer_dir)
    assert sorted(documents_of(tmp_path / "data", "train")) == sorted(texts[:5])
    assert documents_of(tmp_path / "data", "validation") == texts[5:]


@pytest.mark.parametrize(("sample_by", "documents"), [("document", 1), ("line", 4), ("paragraph", 2)])
def test_sample_by_says_what_a_document_is(tmp_path, tokenizer_dir, sample_by, documents):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(2))
    flags = ("--train_file", tmp_path / "a.txt", "--validation_file", held_out, "--sample_by", sample_by)
    manifest = run(tmp_path / "data", *flags, "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    assert manifest["splits"]["train"]["documents"] == documents


def test_max_documents_takes_the_first(tmp_path, corpus, tokenizer_dir):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(2))
    flags = ("--train_file", corpus, "--validation_file", held_out, "--max_documents", 7, "--block_size", 1)
    run(tmp_path / "data", *flags, "--tokenizer_name", tokenizer_dir)
    assert sorted(documents_of(tmp_path / "data", "train")) == sorted(pieces(make_texts(7)))


def test_standard_library_is_prepared_without_installed_packages(tmp_path):
    files = standard_library_files()
    assert len(files) > 500 and not any("site-packages" in path.parts for path in files)
    flags = ("--dataset_name", "stdlib", "--max_documents", 12, "--train_tokenizer", 300, "--block_size", 64)
    manifest = run(tmp_path / "data", *flags)
    assert manifest["source"]["name"] == "stdlib" and manifest["source"]["documents"] == 12
    counted = sum(split["bytes"] for split in manifest["splits"].values())
    assert counted == sum(path.stat().st_size for path in files[:12])


# What is there already


def test_a_finished_folder_with_the_same_settings_is_left_alone(tmp_path, corpus, tokenizer_dir, capsys):
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    run(tmp_path / "data", *flags)
    before = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    run(tmp_path / "data", *flags)
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == before
    assert "already prepared" in capsys.readouterr().out


def test_a_finished_folder_with_other_settings_is_refused_with_the_difference(tmp_path, corpus, tokenizer_dir, capsys):
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "data")
    main([*map(str, flags), "--block_size", "16"])
    before = contents(tmp_path)
    line = refusal(capsys, *flags, "--block_size", 32, "--shuffle_seed", 3)
    assert "block_size is 16 there, 32 here" in line and "shuffle_seed is 0 there, 3 here" in line
    assert contents(tmp_path) == before


def test_a_finished_folder_of_another_format_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    manifest = run(tmp_path / "data", *flags)
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert f"format_version 1, this code writes 2; remove {tmp_path / 'data'} and prepare the data again" in line


def test_a_changed_source_file_is_another_setting(tmp_path, tokenizer_dir, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(250))
    flags = ("--train_file", source, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    run(tmp_path / "data", *flags)
    write_jsonl(source, make_texts(251))
    assert "train_file is " in refusal(capsys, *flags, "--output_dir", tmp_path / "data")


def test_a_folder_that_is_something_else_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "mine")
    assert "not a prepared dataset" in refusal(capsys, *flags)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


# Refusals


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, tokenizer_dir) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "latin.txt").write_bytes(b"x" * 2_000_000 + b"caf\xe9 au lait")
    (folder / "cut.txt").write_bytes(b"abc\xf0\x9f")
    (folder / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a cat\na mat\na hat\n")
    (folder / "no_breaks.txt").write_text("a cat " * 50)
    (folder / "table.xyz").write_text("text\na\n")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": oops\n')
    (folder / "broken.parquet").write_text("PAR1")
    write_jsonl(folder / "body.jsonl", ["a"], column="body")
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), folder / "body.parquet")
    (folder / "numbers.jsonl").write_text('{"text": 1}\n')
    (folder / "not_a_tokenizer").mkdir()
    (folder / "not_a_tokenizer" / "config.json").write_text("{}")
    no_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")))
    no_eos.save_pretrained(folder / "no_eos")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give exactly one of --dataset_name (such as stdlib) and --train_file"),
        ("--dataset_name stdlib --train_file short.txt", "give exactly one of --dataset_name"),
        ("--train_file short.txt --train_tokenizer 300", "give exactly one of --train_tokenizer"),
        ("--train_file missing.txt", "missing.txt: no such file"),
        ("--train_file short.txt --validation_file missing.txt", "missing.txt: no such file"),
        ("--train_file table.xyz", "table.xyz: unknown extension; known are .txt, .md, "),
        ("--train_file latin.txt", "latin.txt: byte 2000003 is not UTF-8"),
        ("--train_file cut.txt", "cut.txt: byte 3 is not UTF-8 (unexpected end of data)"),
        ("--train_file short.txt latin.txt", "latin.txt: byte 2000003 is not UTF-8"),
        ("--train_file latin.jsonl", "latin.jsonl: byte 30 is not UTF-8 (invalid continuation byte)"),
        ("--train_file latin.parquet", "latin.parquet: row 0: byte 3 is not UTF-8"),
        ("--train_file broken.jsonl", "broken.jsonl: byte 17: this line is not JSON"),
        ("--train_file broken.parquet", "broken.parquet: cannot be read as parquet"),
        ("--train_file body.jsonl", "body.jsonl: no column 'text'; --text_column can be one of id, body"),
        ("--train_file body.parquet", "body.parquet: no column 'text'; --text_column can be one of title, body"),
        ("--train_file numbers.jsonl", "numbers.jsonl: 'text' holds int, not text (1)"),
        ("--train_file empty.txt", "empty.txt: is empty; leave it out"),
        ("--train_file no_breaks.txt", "no document is left for validation; give --validation_file"),
        ("--train_file short.txt --block_size 0", "--block_size 0 must be at least 1"),
        (
            "--train_file short.txt --block_size 1 --num_shards 2",
            "--num_shards 2: shard 1 gets no training documents; use fewer shards",
        ),
        ("--train_file short.txt --validation_split_percentage 100", "--validation_split_percentage 100.0: must be in"),
        (
            "--train_file short.txt --tokenizer_name not_a_tokenizer",
            "--tokenizer_name not_a_tokenizer: not a tokenizer",
        ),
        ("--train_file short.txt --tokenizer_name no/such/folder", "--tokenizer_name no/such/folder: not a tokenizer"),
        ("--train_file short.txt --tokenizer_name no_eos", "--tokenizer_name no_eos: has no EOS token"),
        ("--train_file short.txt --blok_size 4", "unknown argument '--blok_size' (did you mean '--block_size'?)"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(bad_files, tokenizer_dir, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(bad_files)
    before = sorted(os.listdir())
    flags = flags.split()
    if "--tokenizer_name" not in flags:
        flags += ["--tokenizer_name", tokenizer_dir]
    assert refusal(capsys, *flags, "--output_dir", "out").startswith(message)
    assert sorted(os.listdir()) == before


def test_a_tokenizer_smaller_than_the_bytes_is_refused(bad_files, capsys):
    flags = ("--train_file", bad_files / "short.txt", "--train_tokenizer", 100, "--output_dir", bad_files / "out")
    assert refusal(capsys, *flags).startswith("--train_tokenizer 100: a byte-level BPE has at least 257 entries")


def test_a_hub_name_offline_gets_one_line_from_the_command(tmp_path, tokenizer_dir):
    flags = ["--dataset_name", "someone/some-corpus", "--tokenizer_name", str(tokenizer_dir), "--output_dir", "out"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and os.listdir(tmp_path) == []
    assert result.stderr.startswith("error: --dataset_name someone/some-corpus: cannot be loaded")
    assert result.stderr.count("\n") == 1


def test_importing_the_command_does_not_import_the_heavy_libraries():
    code = "import sys, prepare_data; print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in result.stdout and "datasets" not in result.stdout and "pyarrow" not in result.stdout
