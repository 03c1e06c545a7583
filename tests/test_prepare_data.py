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
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import prepare_data
from gpt2modern.data.folder import settings_of
from gpt2modern.data.splits import choose_rule
from prepare_data import main
from tests.support.folders import (
    contents,
    documents_of,
    make_texts,
    reference_ids,
    refusal,
    rows_of,
    run,
    targets_of,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parent.parent
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
    assert [row for row in rows_of(tmp_path / "data", "validation")][-1] == stream[-16:]


def test_cut_documents_lie_in_more_than_one_row(tmp_path, corpus, tokenizer_dir):
    texts = make_texts(40, offset=1000)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts)
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 64)["splits"]["validation"]
    ends = np.cumsum([len(reference_ids(tmp_path / "data", [text])) for text in texts]).tolist()
    rows = [{token // 64 for token in range(start, end)} for start, end in zip([0, *ends], ends, strict=False)]
    assert manifest["cut_documents"] == sum(len(touched) > 1 for touched in rows)
    assert 0 < manifest["cut_documents"] < 40


def test_a_split_shorter_than_a_block_is_one_short_row(tmp_path, corpus, tokenizer_dir):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["a cat"])
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 64)["splits"]["validation"]
    assert (manifest["rows"], manifest["cut_documents"]) == (1, 0) and manifest["padding"] == 64 - manifest["tokens"]
    assert targets_of(tmp_path / "data", "validation") == reference_ids(tmp_path / "data", ["a cat"])


def test_training_documents_are_all_there_shuffled(tmp_path, corpus, tokenizer_dir):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(5, offset=1000))
    flags = ("--train_file", corpus, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    run(tmp_path / "data", *flags, "--block_size", 1)
    found, expected = documents_of(tmp_path / "data", "train"), make_texts(300)
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
    assert paths == [f"train/data-0000{index}-of-00003.arrow" for index in range(3)]


def test_manifest_describes_the_files(tokenizer_dir):
    data_dir = tokenizer_dir.parent
    manifest = json.loads((data_dir / "manifest.json").read_text())
    files = {name: path for name in contents(data_dir) for path in [data_dir / name]}
    assert set(files) - set(manifest["files"]) == {"manifest.json", "README.md", "report.html"}
    for name, recorded in manifest["files"].items():
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
    before, after = (
        {split: set(documents_of(tmp_path / name, split)) for split in ("train", "validation")}
        for name in ("before", "after")
    )
    assert not before["train"] & before["validation"] and not after["train"] & after["validation"]
    assert before["validation"] < after["validation"] and before["train"] < after["train"]


def test_equal_texts_never_stand_on_both_sides(tmp_path, tokenizer_dir):
    texts = make_texts(100)
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
    assert "block_size was 16, now 32" in line and "shuffle_seed was 0, now 3" in line
    assert contents(tmp_path) == before


def test_a_finished_folder_of_another_format_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    manifest = run(tmp_path / "data", *flags)
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert (
        f"the file has format_version 1, but this code reads only 3; prepare the data again: remove {tmp_path}" in line
    )


@pytest.mark.parametrize("content", ["{", "[1]", "\xe9"])
def test_damaged_settings_of_an_unfinished_folder_are_refused(tmp_path, corpus, tokenizer_dir, capsys, content):
    (tmp_path / "data" / ".preparing").mkdir(parents=True)
    (tmp_path / "data" / ".preparing" / "settings.json").write_text(content, encoding="latin-1")
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "data")
    line = refusal(capsys, *flags)
    assert "settings.json is damaged (" in line and f"remove {tmp_path / 'data'} and run the same command" in line


def test_a_changed_source_file_is_another_setting(tmp_path, tokenizer_dir, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(250))
    flags = ("--train_file", source, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    run(tmp_path / "data", *flags)
    write_jsonl(source, make_texts(251))
    assert "train_file was " in refusal(capsys, *flags, "--output_dir", tmp_path / "data")


def test_a_byte_changed_in_a_large_source_file_is_another_setting(tmp_path, tokenizer_dir, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i}: " + "a cat sat on a mat " * 20 for i in range(14_000)])
    flags = ("--train_file", source, "--tokenizer_name", tokenizer_dir, "--max_documents", 300, "--block_size", 64)
    run(tmp_path / "data", *flags)
    stat = source.stat()
    with source.open("r+b") as file:
        file.seek(stat.st_size // 2 + 12_345)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(b"o" if byte == b"a" else b"a")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert stat.st_size > 5e6 and "train_file was " in refusal(capsys, *flags, "--output_dir", tmp_path / "data")


def test_a_file_that_is_cut_while_it_is_read_is_named_and_nothing_is_left(tmp_path, tokenizer_dir, capsys, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(400))

    def choose_rule_and_cut(*args):
        rule = choose_rule(*args)
        lines = source.read_bytes().splitlines(keepends=True)
        source.write_bytes(b"".join(lines[:200]))
        return rule

    monkeypatch.setattr(prepare_data, "choose_rule", choose_rule_and_cut)
    flags = ("--train_file", source, "--tokenizer_name", tokenizer_dir, "--block_size", 16, "--num_shards", 3)
    for num_proc in (1, 2):
        line = refusal(capsys, *flags, "--num_proc", num_proc, "--output_dir", tmp_path / "data")
        assert line.startswith(f"{source} was changed while it was read; when it is complete, prepare the data again")
        assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_file_that_changes_between_fingerprint_and_reading_is_named(tmp_path, tokenizer_dir, capsys, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(400))

    def fingerprint_and_append(*args):
        settings = settings_of(*args)
        write_jsonl(source, make_texts(401))
        return settings

    monkeypatch.setattr(prepare_data, "settings_of", fingerprint_and_append)
    flags = ("--train_file", source, "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert line.startswith(f"{source} was changed while it was read") and os.listdir(tmp_path) == ["a.jsonl"]


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
        ("--train_file table.xyz", "table.xyz has an unknown extension; known are .txt, .md, "),
        ("--train_file latin.txt", "latin.txt: byte 2000003 is not UTF-8"),
        ("--train_file cut.txt", "cut.txt: byte 3 is not UTF-8 (unexpected end of data)"),
        ("--train_file short.txt latin.txt", "latin.txt: byte 2000003 is not UTF-8"),
        ("--train_file latin.jsonl", "latin.jsonl: byte 30 is not UTF-8 (invalid continuation byte)"),
        ("--train_file latin.parquet", "latin.parquet: row 0: byte 3 is not UTF-8"),
        ("--train_file broken.jsonl", "broken.jsonl: the JSON at byte 17 is not valid"),
        ("--train_file broken.parquet", "broken.parquet cannot be read as parquet"),
        ("--train_file body.jsonl", "body.jsonl has no column 'text'; choose --text_column from id, body"),
        ("--train_file body.parquet", "body.parquet has no column 'text'; choose --text_column from title, body"),
        ("--train_file numbers.jsonl", "numbers.jsonl: the line at byte 0: 'text' is int, not text (1)"),
        ("--train_file empty.txt", "empty.txt is an empty file; omit it"),
        ("--train_file no_breaks.txt", "the validation split has no documents; give another --validation_file"),
        ("--train_file short.txt --block_size 0", "--block_size 0 must be at least 1"),
        (
            "--train_file short.txt --validation_split_percentage 100",
            "--validation_split_percentage 100.0 must be greater than 0",
        ),
        (
            "--train_file short.txt --tokenizer_name not_a_tokenizer",
            "--tokenizer_name not_a_tokenizer is not a tokenizer",
        ),
        (
            "--train_file short.txt --tokenizer_name no/such/folder",
            "--tokenizer_name no/such/folder is not a tokenizer",
        ),
        ("--train_file short.txt --tokenizer_name no_eos", "--tokenizer_name no_eos has no EOS token"),
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
    assert refusal(capsys, *flags).startswith("--train_tokenizer 100 must be at least 257")


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
    assert result.stderr.startswith("error: --dataset_name someone/some-corpus cannot be loaded")
    assert result.stderr.count("\n") == 1


def test_preparing_does_not_import_torch(tmp_path, corpus, tokenizer_dir):
    """It takes longer than to prepare 100 MB."""
    flags = [
        "--train_file",
        str(corpus),
        "--tokenizer_name",
        str(tokenizer_dir),
        "--output_dir",
        str(tmp_path / "data"),
    ]
    code = "import sys, time, prepare_data; prepare_data.main(); import psutil; "
    code += "print(time.time() - psutil.Process().create_time(), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = result.stdout.splitlines()
    seconds, imports_torch = last.split()
    (printed,) = (float(line.split()[0]) for line in lines if "s in total" in line)
    assert imports_torch == "False"
    assert abs(printed - float(seconds)) < 0.3, "the printed time leaves out the imports"
