"""benchmarks.data: its text is what it says, its peers do the same work, and its table says what was measured."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from benchmarks import data
from benchmarks.data import (
    TimedRun,
    read_documents,
    resident_gib,
    table_rows,
    write_text,
)
from benchmarks.data_tiktoken import tiktoken_encoding
from gpt2modern.errors import GPT2ModernError

DOCUMENTS = [
    f"def function_{index}(a, b):\n    return a * {index} + b  # na\u00efve \u4e2d\n" * 6 for index in range(400)
]


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(DOCUMENTS):
        (folder / f"{index:03d}.py").write_text(text, encoding="utf-8")
    return folder


def test_documents_are_those_of_the_folders_first_and_no_two_are_equal(text_dir, tmp_path):
    size = sum(len(text.encode()) for text in DOCUMENTS)
    documents = read_documents([text_dir], size, [])
    assert sorted(documents) == sorted(DOCUMENTS) and documents != DOCUMENTS
    for name in ("a.py", "b.md", "c.csv"):
        (tmp_path / name).write_text("the same")
    (tmp_path / "d.txt").write_text("spells <|endoftext|>")
    (tmp_path / "e.txt").write_bytes(b"not UTF-8: \xff")
    (tmp_path / "g.txt").write_text("")
    (tmp_path / "h.rst").write_text("last")
    assert sorted(read_documents([tmp_path], 12, ["<|endoftext|>"])) == ["last", "the same"]


def test_what_is_installed_follows_the_folders(tmp_path):
    documents = read_documents([tmp_path], 50_000, [])
    assert len(set(documents)) == len(documents) and sum(len(text.encode()) for text in documents) >= 50_000
    assert read_documents([tmp_path], 50_000, []) == documents


def test_both_formats_hold_the_same_documents(tmp_path):
    write_text(DOCUMENTS, tmp_path)
    in_json = [
        [json.loads(line)["text"] for line in path.open(encoding="utf-8")] for path in sorted(tmp_path.glob("*.jsonl"))
    ]
    in_parquet = [pyarrow.parquet.read_table(path)["text"].to_pylist() for path in sorted(tmp_path.glob("*.parquet"))]
    assert in_json == in_parquet == [DOCUMENTS[index::8] for index in range(8)]


def test_tiktoken_gives_the_ids_of_tokenizers(data_dir):
    path = data_dir / "tokenizer" / "tokenizer.json"
    encoding, tokenizer = tiktoken_encoding(path), Tokenizer.from_file(str(path))
    for text in [
        *DOCUMENTS[:3],
        "  \n\n\t x",
        "it's 1234567",
        "\x00\x7f\xa0\xad",
        "\U0001f468\u200d\U0001f469 \u05d0\u05d1",
        "",
    ]:
        assert encoding.encode_ordinary(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoding.eot_token == tokenizer.token_to_id("<|endoftext|>")


def test_memory_of_a_process_below_the_started_one_is_seen():
    child = "x = bytearray(300 << 20); print('full', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"full\n"
        resident = resident_gib(process.pid)
        process.stdin.close()
    assert 300 / 1024 < resident < 400 / 1024


def test_the_table_compares_whole_processes():
    runs = {
        "prepare_data jsonl": [TimedRun(seconds, 4, seconds, 0) for seconds in (2.0, 2.4, 9.0)],
        "tiktoken": [TimedRun(seconds, 50, 1, 0, seconds - 1) for seconds in (26.0, 31.0, 30.0)],
        "run_clm": [TimedRun(120, 40, 1, 0, 100), TimedRun(124, 40, 1, 0, 100)],
    }
    ours, tiktoken, _ = table_rows(runs, 150)
    assert ours == ["prepare_data jsonl", "2.40 (2.00 to 9.00)", "62.50", "-", "4.0", "9.00", "12.5", "50.8"]
    assert tiktoken == ["tiktoken", "30.00 (26.00 to 31.00)", "5.00", "5.17", "50.0", "1.00", "-", "-"]


def test_programs_that_find_other_tokens_are_not_compared(monkeypatch, tmp_path):
    tokens = {"prepare_data jsonl": 51_000, "tiktoken": 51_000, "run_clm": 50_999}
    monkeypatch.setattr(data, "measure", lambda name, *_: TimedRun(1, 1, 1, tokens[name]))
    assert len(data.time_programs(["prepare_data jsonl", "tiktoken"], 2, tmp_path, 1)["tiktoken"]) == 2
    with pytest.raises(GPT2ModernError, match="run_clm counted 50999 tokens, but prepare_data jsonl counted 51000"):
        data.time_programs(list(tokens), 1, tmp_path, 1)


@pytest.mark.slow
def test_a_small_run_measures_every_program_on_the_same_tokens(data_dir, text_dir, tmp_path):
    """Each program once, on all 400 documents: as many tokens as `tokenizers` and one EOS a document give."""
    megabytes = sum(len(text.encode()) for text in DOCUMENTS) / 1e6
    flags = f"--tokenizer_name {data_dir / 'tokenizer'} --text_dir {text_dir} --megabytes {megabytes} --repetitions 1"
    data.main([*flags.split(), "--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "reports")])

    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    tokens = sum(len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(DOCUMENTS, add_special_tokens=False))
    (path,) = (tmp_path / "reports").glob("*_data_cpu.md")
    report, results = path.read_text(), json.loads(path.with_suffix(".json").read_text())["results"]
    assert results["documents"] == 400 and results["seconds"].keys() == {*data.OURS, *data.PEERS}
    assert all(run["tokens"] == tokens for runs in results["runs"].values() for run in runs)
    assert f"400 documents, no two equal. All\nprograms counted {tokens:,} tokens." in report
    lines = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")][2:]
    assert [line[0] for line in lines] == ["| prepare_data jsonl", "| prepare_data parquet", "| tiktoken", "| run_clm"]
    assert all(float(cell.strip("| ")) >= 0 for line in lines[:2] for cell in line[-4:])
    assert str(tmp_path) not in report
    assert os.listdir(tmp_path / "work") == []


def test_a_program_that_fails_ends_the_benchmark_with_its_last_line(data_dir, tmp_path):
    (tmp_path / "text-00.jsonl").write_text("not json\n")
    shutil.copytree(data_dir / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(GPT2ModernError, match=r"tiktoken ended with exit code 1: json\.decoder\.JSONDecodeError"):
        data.measure("tiktoken", tmp_path, 2)
