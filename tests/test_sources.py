"""Sources: what a document is in each format, wherever a file is cut, and what is said of files that are wrong."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared_folders import documents_of, make_texts, pieces, run, write_jsonl

from preparation.sources import standard_library_files

# In the blocks


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
