"""benchmarks.data: its text is what it says, its peers do the same work, and its table says what was measured."""

import json
import os
import subprocess
import sys

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from benchmarks import data
from benchmarks.data import MemoryPoll, Task, TimedRun, check_tokens, results_table
from benchmarks.data_corpora import Corpus, read_documents, write_corpus
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


def read(folder, text_bytes, left_out=(), seed=0):
    return read_documents([folder], text_bytes, left_out, seed)


def test_documents_are_those_of_the_folders_first_and_no_two_are_equal(text_dir, tmp_path):
    size = sum(len(text.encode()) for text in DOCUMENTS)
    documents, origins = read(text_dir, size)
    assert sorted(documents) == sorted(DOCUMENTS) and documents != DOCUMENTS
    assert origins == {f"--text_dir {text_dir.name}": size}
    for name in ("a.py", "b.md", "c.csv"):
        (tmp_path / name).write_text("the same")
    (tmp_path / "d.txt").write_text("spells <|endoftext|>")
    (tmp_path / "e.txt").write_bytes(b"not UTF-8: \xff")
    (tmp_path / "g.txt").write_text("")
    (tmp_path / "h.rst").write_text("last")
    assert sorted(read(tmp_path, 12, ["<|endoftext|>"])[0]) == ["last", "the same"]


def test_what_is_installed_follows_the_folders(tmp_path):
    documents, origins = read(tmp_path, 50_000)
    assert len(set(documents)) == len(documents) and sum(len(text.encode()) for text in documents) >= 50_000
    assert set(origins) <= {"installed packages", "standard library"}
    assert read(tmp_path, 50_000)[0] == documents != read(tmp_path, 50_000, seed=1)[0]


def test_both_formats_hold_the_same_documents_and_repetition_is_in_another_order(tmp_path):
    size = sum(len(text.encode()) for text in DOCUMENTS)
    once = write_corpus("once", None, DOCUMENTS, ["jsonl", "parquet"], tmp_path, 3)
    twice = write_corpus("twice", 2 * size / 1e6, DOCUMENTS, ["jsonl"], tmp_path, 3)
    in_json = [[json.loads(line)["text"] for line in path.open(encoding="utf-8")] for path in once.files["jsonl"]]
    in_parquet = [pyarrow.parquet.read_table(path)["text"].to_pylist() for path in once.files["parquet"]]
    assert in_json == in_parquet == [DOCUMENTS[index::3] for index in range(3)]
    assert (once.documents, once.text_bytes, once.passes) == (400, size, 1.0)
    lines = [path.read_text(encoding="utf-8").splitlines() for path in twice.files["jsonl"]]
    texts = [json.loads(lines[index % 3][index // 3])["text"] for index in range(twice.documents)]
    assert texts[:400] == DOCUMENTS and texts[400:] != DOCUMENTS and sorted(texts[400:]) == sorted(DOCUMENTS)
    assert (twice.text_bytes, twice.passes) == (2 * size, 2.0)


@pytest.mark.parametrize("documents", [DOCUMENTS[:299], []])
def test_too_few_documents_are_refused(tmp_path, documents):
    with pytest.raises(GPT2ModernError, match=f"the unique text has {len(documents)} documents, at least 300"):
        write_corpus("unique", None, documents, ["jsonl"], tmp_path, 2)


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


@pytest.mark.parametrize("damage", ["other_order", "no_bytes"])
def test_tiktoken_refuses_a_vocabulary_it_cannot_serve(data_dir, tmp_path, damage):
    content = json.loads((data_dir / "tokenizer" / "tokenizer.json").read_text())
    if damage == "other_order":
        content["model"]["merges"].reverse()
    else:
        content["model"]["vocab"]["\u4e2d"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the ids do not follow the merges|not a byte-level BPE"):
        tiktoken_encoding(tmp_path / "tokenizer.json")


def test_memory_of_a_process_below_the_started_one_is_seen():
    child = "x = bytearray(300 << 20); print('full', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"full\n"
        memory = MemoryPoll(process.pid)
        memory.start()
        memory.stop()
        process.stdin.close()
    assert all(300 << 10 < memory.peak_kib[name] < 400 << 10 for name in ("VmHWM", "RssAnon", "Pss"))


def corpus(name, megabytes):
    return Corpus(name, {}, int(megabytes * 1e6), 1000, 1.0)


def test_the_table_holds_our_whole_process_against_the_peers_work():
    corpora = {"sample": corpus("sample", 20), "unique": corpus("unique", 150)}
    runs = {
        Task("run_clm", "sample"): [TimedRun(25, 40, 1, 1, 1, 0, 20), TimedRun(24, 40, 1, 1, 1, 0, 20)],
        Task("prepare_data", "unique"): [TimedRun(seconds, 4, 1, 1, seconds, 0) for seconds in (2.0, 2.4, 9.0)],
        Task("tiktoken", "unique"): [TimedRun(seconds, 50, 1, 1, 1, 0, seconds - 1) for seconds in (26.0, 31.0, 30.0)],
    }
    _, _, _, ours, tiktoken = results_table(runs, corpora).splitlines()
    assert (
        "| prepare_data | unique | 150.0 | jsonl | 2.40 (2.00 to 9.00) | 62.50 |  | 4.0 | 1.00 | 1.00 | 9.00 |" in ours
    )
    assert ours.endswith("| 62.5 (76.6) | 12.1 (12.5) |")
    assert "| 30.00 (26.00 to 31.00) | 5.00 | 5.17 |" in tiktoken and tiktoken.endswith("|  |  |")


def test_programs_that_find_other_tokens_are_not_compared():
    expected: dict[str, int] = {}
    check_tokens(Task("prepare_data", "unique"), TimedRun(1, 1, 1, 1, 1, 51_000), expected, corpus("unique", 1))
    check_tokens(Task("run_clm", "unique"), TimedRun(1, 1, 1, 1, 1, 50_000), expected, corpus("unique", 1))
    with pytest.raises(GPT2ModernError, match="tiktoken finds 50999 tokens in the unique text"):
        check_tokens(Task("tiktoken", "unique"), TimedRun(1, 1, 1, 1, 1, 50_999), expected, corpus("unique", 1))


@pytest.mark.slow
def test_a_small_run_measures_every_program_on_the_same_tokens(data_dir, text_dir, tmp_path):
    """Each program once, on all 400 documents: as many tokens as `tokenizers` and one EOS a document give."""
    megabytes = sum(len(text.encode()) for text in DOCUMENTS) / 1e6
    flags = f"--tokenizer_name {data_dir / 'tokenizer'} --text_dir {text_dir} --repeated_megabytes 0 --block_size 64"
    flags += f" --unique_megabytes {megabytes} --sample_megabytes {megabytes} --repetitions 1"
    flags += f" --work_dir {tmp_path / 'work'} --output {tmp_path / 'reports'}"
    data.main(flags.split())

    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    tokens = sum(len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(DOCUMENTS, add_special_tokens=False))
    record, report = (path.read_text() for path in sorted((tmp_path / "reports").iterdir()))
    runs = json.loads(record)["runs"]
    found = {(run["program"], run["corpus"], run["file_format"]): run["repetitions"][0] for run in runs}
    assert {name: run["tokens"] for name, run in found.items()} == {
        ("prepare_data", "sample", "jsonl"): tokens,
        ("run_clm", "sample", "jsonl"): tokens - len(DOCUMENTS),
        ("prepare_data", "unique", "jsonl"): tokens,
        ("prepare_data", "unique", "parquet"): tokens,
        ("tiktoken", "unique", "jsonl"): tokens,
    }
    assert all(0 < (run["work_s"] or 1e-9) < run["seconds"] for run in found.values())
    assert len(json.loads(record)["reading_mtok_per_s"]) == 5
    assert report.count("| prepare_data |") == 3 and "| tiktoken | unique |" in report
    assert str(tmp_path) not in report and str(tmp_path) not in record
    assert os.listdir(tmp_path / "work") == []


def test_a_program_that_fails_ends_the_benchmark_with_its_last_line(data_dir, tmp_path):
    (tmp_path / "broken-00.jsonl").write_text("not json\n")
    broken = Corpus("unique", {"jsonl": [tmp_path / "broken-00.jsonl"]}, 9, 1, 1.0)
    config = data.DataBenchmarkConfig(tokenizer_name="-")
    with pytest.raises(
        GPT2ModernError, match=r"tiktoken on unique ended with exit code 1: json\.decoder\.JSONDecodeError"
    ):
        data.measure(Task("tiktoken", "unique"), broken, data_dir / "tokenizer", tmp_path / "out", config)
