"""Sources: what a document is in each format, wherever a file is cut, and what is said of files that are wrong."""

import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gpt2modern.data import sources
from gpt2modern.data.formats import FORMATS, Format, Piece, ReadOptions, reading
from gpt2modern.data.sources import open_files, standard_library_files
from gpt2modern.errors import GPT2ModernError
from prepare_data import PrepareConfig, main, prepare
from tests.support.folders import (
    contents,
    documents_of,
    make_texts,
    reference_ids,
    refusal,
    rows_of,
    run,
    write_jsonl,
)

TEXTS = [
    "one",
    "two lines\nof text",
    'a "quoted", comma',
    "\u6771\u4eac \U0001f642",
    " spaces\tand tab ",
    "NULL",
    "last",
]


def read_all(*paths: Path, num_shards: int | None = None, **options) -> list:
    """Every document of the files, in order."""
    source = open_files([str(path) for path in paths], ReadOptions(**options), num_shards)
    return [example["document"] for example in source.documents()]


def write_format(path: Path, texts: list[str]) -> None:
    """The texts in the format that the extension names, compressed where it says so."""
    stem, compression = (path.stem, path.suffix) if path.suffix in (".gz", ".zst") else (path.name, None)
    kind = Path(stem).suffix
    if kind == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
        return
    if kind == ".txt":
        text = "<|sep|>".join(texts)
    elif kind == ".jsonl":
        text = "".join(
            json.dumps({"id": i, "text": each}, ensure_ascii=i % 2 == 0) + "\n" for i, each in enumerate(texts)
        )
    elif kind == ".json":
        text = json.dumps([{"text": each} for each in texts], indent=1)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerows([["id", "text"], *enumerate(texts)])
        text = buffer.getvalue()
    if compression:
        with pa.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}[compression]) as stream:
            stream.write(text.encode())
    else:
        path.write_bytes(text.encode())


# Formats


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
def test_every_format_gives_its_documents(tmp_path, kind, compression):
    write_format(tmp_path / f"a.{kind}{compression}", TEXTS)
    assert read_all(tmp_path / f"a.{kind}{compression}", separator="<|sep|>") == TEXTS


def test_parquet_and_arrow_give_their_documents(tmp_path):
    write_format(tmp_path / "a.parquet", TEXTS)
    table = datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})
    table.save_to_disk(tmp_path / "saved")
    table.select(range(len(TEXTS) - 1, -1, -1)).flatten_indices().save_to_disk(tmp_path / "reversed")
    (arrow_file,) = (tmp_path / "saved").glob("*.arrow")
    assert read_all(tmp_path / "a.parquet") == read_all(tmp_path / "saved") == read_all(arrow_file) == TEXTS
    assert read_all(tmp_path / "reversed") == TEXTS[::-1]


def test_globs_and_folders_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl", "notes.pdf"):
        write_format(tmp_path / name.replace("pdf", "txt"), [name])
    (tmp_path / "notes.txt").rename(tmp_path / "notes.pdf")
    assert read_all(tmp_path / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert read_all(tmp_path / "**" / "*.jsonl") == ["b.jsonl", "deep/c.jsonl"]
    assert read_all(tmp_path) == ["a.jsonl.gz", "b.jsonl", "deep/c.jsonl"]


def test_file_format_names_what_an_extension_does_not(tmp_path):
    (tmp_path / "a.data").write_text('{"text": "a cat"}\n')
    assert read_all(tmp_path / "a.data", file_format="json") == ["a cat"]
    assert read_all(tmp_path / "a.data", file_format="text") == ['{"text": "a cat"}\n']


def test_a_csv_row_can_be_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ_BYTES", 1000)
    texts = ["short", "x" * 900, 'long "quoted"\n' * 20_000, "short again", "y" * 5000]
    write_format(tmp_path / "a.csv", texts)
    assert read_all(tmp_path / "a.csv") == texts


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]')
    assert read_all(tmp_path / "a.jsonl") == read_all(tmp_path / "b.json") == ["a", "b"]


# Where a file is cut

AWKWARD = ["a", "b", "aba", "\n", "\n", "\n", "\u00e9", "\U0001f642", "<|sep|>", "<|se"]
separated_text = st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=40).map("".join)


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    ("separator", "options"),
    [
        ("\n", {"sample_by": "line"}), ("\n\n", {"sample_by": "paragraph"}), ("<|sep|>", {"separator": "<|sep|>"}),
        ("aba", {"separator": "aba"}), ("\u00e9", {"separator": "\u00e9"}),
    ],
    ids=["line", "paragraph", "separator", "separator that overlaps itself", "separator of two bytes"],
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=separated_text, piece_bytes=st.integers(1, 9))
def test_documents_are_those_of_str_split_wherever_pieces_end(
    tmp_path_factory, compression, separator, options, text, piece_bytes
):
    path = tmp_path_factory.getbasetemp() / f"cut.txt{compression}"
    with pa.output_stream(path, compression="gzip" if compression else None) as stream:
        stream.write(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "piece_bytes_of", lambda total, num_shards: piece_bytes)
        patch.setattr(reading, "READ_BYTES", piece_bytes)
        found = read_all(path, **options)
    expected = text.split(separator)
    # What ends with a separator has no further, empty document behind it.
    assert found == (expected if expected[-1] else expected[:-1])


def test_paragraphs_end_with_or_without_a_carriage_return(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\nmore\r\n\r\ntw\u00f6\r\n\r\nthree".encode())
    assert read_all(tmp_path / "a.txt", sample_by="paragraph") == ["one\r\nmore", "tw\u00f6", "three"]


def test_lines_end_with_or_without_a_carriage_return(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntw\u00f6\nthree".encode())
    assert read_all(tmp_path / "a.txt", sample_by="line") == ["one", "", "tw\u00f6", "three"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=12), piece_bytes=st.integers(1, 40))
def test_json_lines_are_read_wherever_pieces_end(tmp_path_factory, texts, piece_bytes):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    write_format(path, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "piece_bytes_of", lambda total, num_shards: piece_bytes)
        assert read_all(path) == texts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_line_of_many_pieces_is_read_by_one(tmp_path, kind):
    texts = ["first", "a cat " * 4_000_000, "last"]
    path = tmp_path / f"a.{kind}"
    path.write_text("".join((json.dumps({"text": text}) if kind == "jsonl" else text) + "\n" for text in texts))

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    source = open_files([str(path)], ReadOptions(sample_by="line"), None)
    assert len(source.pieces) > 20
    before = bytes_read()
    assert [example["document"] for example in source.documents()] == texts
    assert bytes_read() - before < 3.5 * path.stat().st_size


def change(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "appended to":
        path.write_bytes(content + content)
    elif how == "overwritten":
        path.write_bytes(content[::-1])
    elif how == "replaced":
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "appended to", "overwritten", "replaced", "removed"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved", "a.bin"])
def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path, name, how):
    if name == "saved":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / name)
        (changed,) = (tmp_path / name).glob("*.arrow")
    elif name == "a.bin":
        changed = write_tokens(tmp_path / name, np.arange(300) % 10)
    else:
        changed = tmp_path / name
        write_format(changed, TEXTS)
    source = open_files([str(tmp_path / name)], ReadOptions(separator="<|sep|>", eos_token_id=0), None)
    assert list(source.documents())
    change(changed, how)
    with pytest.raises(GPT2ModernError, match=f"{changed} was changed while it was read"):
        list(source.documents())


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READ_BYTES", 16)
    path = write_jsonl(tmp_path / "a.jsonl", ["a cat"] * 100)
    documents = iter(open_files([str(path)], ReadOptions(), None).documents())
    next(documents)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:50]))
    with pytest.raises(GPT2ModernError, match=f"{path} was changed while it was read"):
        list(documents)


def test_few_pieces_are_dealt_to_many_shards(tmp_path, tokenizer_dir):
    texts = make_texts(30)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(2, 900))
    flags = ("--train_file", path, "--validation_file", held_out, "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    manifest = run(tmp_path / "data", *flags, "--num_shards", 7)
    assert sorted(documents_of(tmp_path / "data", "train")) == sorted(texts)
    assert len(manifest["splits"]["train"]["shards"]) == 7 and manifest["source"]["documents"] == 30


# Conversations


CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
CHATS = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}] for i in range(3)]


@pytest.fixture
def chat_flags(tmp_path, tokenizer_dir) -> tuple:
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    flags = ("--chat_template", tmp_path / "template.jinja", "--tokenizer_name", tokenizer_dir, "--block_size", 1)
    return (*flags, "--chat_column", "messages")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_rendered_by_the_chat_template(tmp_path, chat_flags, kind):
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    else:
        pq.write_table(pa.table({"messages": CHATS}), path)
    run(tmp_path / "data", "--train_file", path, "--validation_file", path, *chat_flags)
    assert documents_of(tmp_path / "data", "validation") == [f"user: question {i}\nassistant: yes\n" for i in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"messages": []}\n{"messages": "hello"}\n',
            "the line at byte 17: 'messages' is not a list of mes",
        ),
        (
            "a.jsonl",
            b'{"messages": []}\n{"text": "hello"}\n',
            "the line at byte 17: 'messages' is not a list of messag",
        ),
        (
            "a.csv",
            b"messages\nhello\n",
            "csv files cannot hold conversations; --chat_column works with json, parquet, arrow",
        ),
        ("a.txt", b"hello\n", "text files cannot hold conversations; --chat_column works with json, parquet, arrow"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, chat_flags, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    line = refusal(capsys, "--train_file", tmp_path / name, *chat_flags, "--output_dir", tmp_path / "data")
    assert line.startswith(f"{tmp_path / name}: {message}") and not (tmp_path / "data").exists()


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, corpus, tokenizer_dir, capsys):
    flags = ("--train_file", corpus, "--chat_column", "text", "--tokenizer_name", tokenizer_dir)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert line == f"--tokenizer_name {tokenizer_dir} has no chat template; give one with --chat_template"


# Tokens of the speedrun community


def write_tokens(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, extra: int = 0) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) + extra
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


@pytest.fixture
def token_file(tmp_path) -> tuple[Path, np.ndarray]:
    """20 documents, each after its EOS as published, ids 1 to 299; the last goes on behind the end of the file."""
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, 300, size=rng.integers(1, 30))] for _ in range(20)]
    tokens = np.concatenate(documents)
    return write_tokens(tmp_path / "tokens.bin", tokens), tokens


@pytest.mark.parametrize("piece_bytes", [2, 14, 1 << 20])
def test_documents_of_a_token_file_lie_between_its_eos(token_file, monkeypatch, piece_bytes):
    path, tokens = token_file
    monkeypatch.setattr(sources, "piece_bytes_of", lambda total, num_shards: piece_bytes)
    expected = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 0)[1:])]
    assert read_all(path, eos_token_id=0) == [part[1:] for part in expected]


@pytest.mark.parametrize("block_size", [7, 64])
def test_validation_blocks_of_a_token_file_are_those_of_the_published_layout(
    tmp_path, token_file, tokenizer_dir, block_size
):
    path, tokens = token_file
    flags = ("--train_file", path, "--validation_file", path, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", block_size)
    rows = rows_of(tmp_path / "data", "validation")
    for i in range(len(tokens) // block_size):
        assert rows[i] == tokens[1 + i * block_size : 1 + (i + 1) * block_size].tolist()
    assert manifest["splits"]["validation"]["documents"] == 20
    decoder = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    sizes = {i: len(token) for token, i in decoder.get_vocab().items() if i}
    assert manifest["splits"]["validation"]["bytes"] == sum(sizes[token] for token in tokens.tolist() if token)


def test_tokens_of_another_vocabulary_are_refused(tmp_path, tokenizer_dir, capsys):
    path = write_tokens(tmp_path / "tokens.bin", np.array([0, 5, 50_000, 6]))
    flags = ("--train_file", path, "--validation_file", path, "--tokenizer_name", tokenizer_dir)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert (
        "holds the token id 50000, but --tokenizer_name has only 400 entries" in line
        and not (tmp_path / "data").exists()
    )


# The Hub, streaming


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """`datasets.load_dataset` gives 300 local documents and writes down how it was asked."""
    asked = []

    def load_dataset(path, name=None, *, split, revision, streaming):
        asked.append({"path": path, "name": name, "split": split, "revision": revision, "streaming": streaming})
        table = datasets.Dataset.from_dict({"id": range(300), "text": make_texts(300)})
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


HUB_FLAGS = ("--dataset_name", "someone/corpus", "--dataset_config_name", "small", "--dataset_split", "test")
HUB_FLAGS += ("--dataset_revision", "v2", "--block_size", 1)


def test_a_hub_dataset_is_asked_for_by_configuration_split_and_revision(tmp_path, hub, tokenizer_dir):
    manifest = run(tmp_path / "data", *HUB_FLAGS, "--tokenizer_name", tokenizer_dir)
    expected = {"path": "someone/corpus", "name": "small", "split": "test", "revision": "v2", "streaming": False}
    assert hub == [expected] and manifest["source"]["documents"] == 300
    assert {"dataset_revision": "v2", "dataset_split": "test"}.items() <= manifest["settings"].items()


@pytest.mark.parametrize("batch", [1, 256])
def test_streaming_ends_with_the_document_that_reaches_max_tokens(tmp_path, hub, tokenizer_dir, monkeypatch, batch):
    monkeypatch.setattr(sources, "STREAM_ROWS", batch)
    totals = np.cumsum([len(reference_ids(tokenizer_dir.parent, [text])) for text in make_texts(300)])
    for bound in (totals[220], totals[220] + 1):
        flags = (*HUB_FLAGS, "--tokenizer_name", tokenizer_dir, "--streaming", "--max_tokens", bound)
        manifest = run(tmp_path / f"{bound}", *flags)
        expected = 221 + (bound > totals[220])
        assert manifest["source"]["documents"] == expected
        assert sum(split["tokens"] for split in manifest["splits"].values()) == totals[expected - 1]


def test_streaming_takes_max_documents_without_counting_tokens(tmp_path, hub):
    flags = (*HUB_FLAGS, "--train_tokenizer", 300, "--streaming", "--max_documents", 260)
    assert run(tmp_path / "data", *flags)["source"]["documents"] == 260


def test_a_finished_spool_is_used_again(tmp_path, hub, tokenizer_dir, monkeypatch):
    flags = (*HUB_FLAGS, "--tokenizer_name", tokenizer_dir, "--streaming", "--max_documents", 250, "--num_shards", 2)
    run(tmp_path / "whole", *flags)
    main([*map(str, flags), "--shard_index", "0", "--output_dir", str(tmp_path / "data")])

    def no_stream():
        raise AssertionError("the stream is read again")
        yield

    stream = datasets.IterableDataset.from_generator(no_stream)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    run(tmp_path / "data", *flags)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--text_column", "body"),
            "--dataset_name someone/corpus has no column 'body'; choose --text_column from id, text",
        ),
        (("--text_column", "id"), "--dataset_name someone/corpus: the column 'id' holds int64, not text"),
    ],
)
def test_a_streamed_column_that_is_no_text_is_refused(tmp_path, hub, tokenizer_dir, capsys, flags, message):
    flags = (*HUB_FLAGS, *flags, "--tokenizer_name", tokenizer_dir, "--streaming", "--max_documents", 9)
    assert refusal(capsys, *flags, "--output_dir", tmp_path / "data").startswith(message)
    assert not (tmp_path / "data").exists()


def test_a_stream_that_breaks_off_is_one_line(tmp_path, hub, tokenizer_dir, capsys, monkeypatch):
    def broken():
        yield {"text": "a cat"}
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(sources, "STREAM_ROWS", 1)
    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    flags = (*HUB_FLAGS, "--tokenizer_name", tokenizer_dir, "--streaming", "--max_documents", 9)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert line.startswith("--dataset_name someone/corpus: reading the stream failed: ConnectionError: reset by peer")


# Datasets from Python


PYTHON = {"validation_split_percentage": 20.0, "block_size": 1, "num_shards": 2, "num_proc": 1}


def prepared_from(output_dir: Path, tokenizer_dir: Path, dataset, **settings) -> dict:
    config = PrepareConfig(str(output_dir), tokenizer_name=str(tokenizer_dir), **PYTHON | settings)
    return prepare(config, dataset)


def stream_of(texts: list[str], num_shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards)


@pytest.mark.parametrize("num_shards", [1, 5], ids=["fewer shards than asked for", "more"])
def test_a_dataset_and_a_stream_from_python_are_prepared(tmp_path, tokenizer_dir, num_shards):
    texts = make_texts(60)
    streamed = prepared_from(tmp_path / "stream", tokenizer_dir, stream_of(texts, num_shards))
    table = prepared_from(tmp_path / "table", tokenizer_dir, datasets.Dataset.from_dict({"text": texts}))
    assert streamed["splits"]["validation"]["documents"] == table["splits"]["validation"]["documents"] > 0
    assert streamed["source"]["fingerprint"] == table["source"]["fingerprint"]
    for name in ("stream", "table"):
        found = [text for split in ("train", "validation") for text in documents_of(tmp_path / name, split)]
        assert sorted(found) == sorted(texts) and list((tmp_path / name / "train").iterdir())


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_stream_from_python_gives_the_same_bytes_again(tmp_path, tokenizer_dir, num_proc):
    for name, processes in (("one", 1), ("other", num_proc)):
        prepared_from(tmp_path / name, tokenizer_dir, stream_of(make_texts(60), 4), num_proc=processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_stream_from_python_may_have_bounds(tmp_path, tokenizer_dir):
    manifest = prepared_from(tmp_path / "data", tokenizer_dir, stream_of(make_texts(99)), max_documents=40)
    assert manifest["source"]["documents"] == 40
    manifest = prepared_from(tmp_path / "tokens", tokenizer_dir, stream_of(make_texts(99)), max_tokens=500)
    assert 500 <= sum(split["tokens"] for split in manifest["splits"].values()) < 600
    with pytest.raises(GPT2ModernError, match="--max_tokens 500 works only with --streaming or files of tokens"):
        prepared_from(tmp_path / "t", tokenizer_dir, datasets.Dataset.from_dict({"text": ["a"]}), max_tokens=500)


def test_a_dataset_dict_from_python_may_bring_its_validation(tmp_path, tokenizer_dir):
    texts = make_texts(30)
    splits = {"train": texts[:20], "validation": texts[20:]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": each}) for name, each in splits.items()})
    prepared_from(tmp_path / "data", tokenizer_dir, splits)
    assert documents_of(tmp_path / "data", "validation") == texts[20:]
    assert sorted(documents_of(tmp_path / "data", "train")) == sorted(texts[:20])
    with pytest.raises(
        GPT2ModernError, match="dataset has no split 'test'; choose dataset_split from train, validation"
    ):
        prepared_from(tmp_path / "other", tokenizer_dir, splits, dataset_split="test")


def test_mistakes_from_python_raise_and_leave_nothing(tmp_path, tokenizer_dir):
    with pytest.raises(GPT2ModernError, match="give exactly one of --dataset_name"):
        prepared_from(tmp_path / "data", tokenizer_dir, None)
    with pytest.raises(GPT2ModernError, match="dataset has no column 'text'; choose --text_column from body"):
        prepared_from(tmp_path / "data", tokenizer_dir, datasets.Dataset.from_dict({"body": ["a"]}))
    with pytest.raises(
        GPT2ModernError, match="dataset has the type list; give a Dataset, IterableDataset or DatasetDict"
    ):
        prepared_from(tmp_path / "data", tokenizer_dir, ["a text"])
    other = datasets.Dataset.from_dict({"text": make_texts(250)})
    prepared_from(tmp_path / "data", tokenizer_dir, other)
    with pytest.raises(GPT2ModernError, match="was prepared with other settings or files \\(dataset was "):
        prepared_from(tmp_path / "data", tokenizer_dir, other.select(range(240)))


# A format of one's own


def test_a_format_can_be_registered_from_outside(tmp_path, tokenizer_dir, monkeypatch):
    def read(piece: Piece, options: ReadOptions):
        paragraphs = piece.origin.read_bytes().split(b"\n\n")
        yield reading.text_of_bytes(paragraphs, options, piece.name, [0] * len(paragraphs))

    monkeypatch.setitem(FORMATS, "xyz", Format((".xyz",), pieces=reading.whole_file, read=read))
    (tmp_path / "a.xyz").write_text("one\n\ntwo\nlines\n\nthree")
    assert read_all(tmp_path / "a.xyz") == ["one", "two\nlines", "three"]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(2))
    flags = ("--train_file", tmp_path / "a.xyz", "--validation_file", held_out, "--tokenizer_name", tokenizer_dir)
    assert run(tmp_path / "data", *flags)["splits"]["train"]["documents"] == 3
    (tmp_path / "a.data").write_text("one\n\ntwo")
    assert read_all(tmp_path / "a.data", file_format="xyz") == ["one", "two"]
    with pytest.raises(GPT2ModernError, match="--file_format word is unknown; choose from auto, text, json"):
        read_all(tmp_path / "a.data", file_format="word")


# Refusals


LATIN = "caf\u00e9 au lait".encode("latin-1")


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "latin.txt").write_bytes(b"fine\nfine\n" + LATIN)
    (folder / "latin.txt.gz").write_bytes(gzip.compress(b"fine\nfine\n" + LATIN))
    (folder / "latin.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + LATIN + b'"}\n'))
    (folder / "latin.json").write_bytes(b'[{"text": "' + LATIN + b'"}]')
    (folder / "latin.csv").write_bytes(b"id,text\n0,fine\n1," + LATIN + b"\n")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([LATIN], pa.binary()).buffers())
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    (folder / "surrogate.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    for kind in ("csv", "tsv", "json"):
        write_format(folder / f"column.{kind}", ["a"])
    datasets.Dataset.from_dict({"id": [1], "text": ["a"]}).save_to_disk(folder / "column")
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": ["a"]}) for name in ("train", "test")})
    splits.save_to_disk(folder / "splits")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"a cat\n" * 100)[:-9])
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a cat"}\n' * 100)[:-9])
    (folder / "plain.jsonl.gz").write_bytes(b'{"text": "a cat"}\n')
    (folder / "deep.jsonl").write_text('{"text": "a", "b": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (folder / "array.json").write_text('["a cat"]')
    (folder / "ragged.csv").write_text("text,id\na,1\nb\n")
    tokens = np.array([0, 5, 6])
    write_tokens(folder / "magic.bin", tokens, magic=20230417)
    write_tokens(folder / "version.bin", tokens, version=2)
    write_tokens(folder / "count.bin", tokens, extra=1)
    write_tokens(folder / "tokens.bin", tokens)
    (folder / "short.txt").write_text("a cat\na mat\na hat\n")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "latin.txt",
            "latin.txt: byte 13 is not UTF-8 (invalid continuation byte); convert the file to UTF-8, or use",
        ),
        ("latin.txt --sample_by line", "latin.txt: byte 13 is not UTF-8"),
        ("latin.txt.gz", "latin.txt.gz: byte 13 is not UTF-8"),
        ("latin.txt.gz --sample_by line", "latin.txt.gz: byte 13 is not UTF-8"),
        ("latin.jsonl.gz", "latin.jsonl.gz: byte 30 is not UTF-8"),
        ("latin.json", "latin.json: byte 14 is not UTF-8"),
        ("latin.csv", "latin.csv: row 1: byte 3 is not UTF-8"),
        ("latin.parquet", "latin.parquet: row 0: byte 3 is not UTF-8"),
        (
            "surrogate.jsonl",
            "surrogate.jsonl: the line at byte 17: character 1 of the text is the lone surrogate '\\ud800'",
        ),
        ("column.csv --text_column body", "column.csv has no column 'body'; choose --text_column from id, text"),
        ("column.tsv --text_column body", "column.tsv has no column 'body'; choose --text_column from id, text"),
        ("column.json --text_column body", "column.json has no column 'body'; choose --text_column from text"),
        ("column --text_column body", "column has no column 'body'; choose --text_column from id, text"),
        ("column --text_column id", "column: the column 'id' holds int64, not text; name another with --text_column"),
        ("splits", "splits holds the splits train, test; name the folder of one split"),
        ("cut.txt.gz", "cut.txt.gz cannot be read as a file (OSError: Truncated compressed stream)"),
        ("cut.txt.gz --sample_by line", "cut.txt.gz cannot be read as a compressed file (OSError: Truncated compre"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read as json (OSError: Truncated compressed stream)"),
        ("plain.jsonl.gz", "plain.jsonl.gz cannot be read as json (OSError: zlib inflate failed"),
        ("deep.jsonl", "deep.jsonl: the JSON at byte 0 is not valid (maximum recursion depth exceeded"),
        ("array.json", "array.json: the array does not start with a JSON object"),
        ("ragged.csv", "ragged.csv cannot be read as csv (ArrowInvalid: CSV parse error: Row #3: Expected 2 columns"),
        ("magic.bin", "magic.bin is not a file of GPT-2 tokens: its header starts with"),
        ("version.bin", "version.bin is not a file of GPT-2 tokens"),
        ("count.bin", "count.bin has 1030 bytes, but its header promises 4 tokens, which take 1032"),
        (
            "tokens.bin short.txt",
            "tokens.bin holds tokens, which cannot be mixed with text files; prepare them separately",
        ),
        ("*.xyz", "*.xyz: no file matches"),
        ("short.txt --validation_file latin.txt", "latin.txt: byte 13 is not UTF-8"),
        ("short.txt --validation_file ragged.csv --text_column body", "ragged.csv has no column 'body'"),
        ("short.txt --shard_index 0", "--shard_index 0 must be at least 0 and below --num_shards; give it, too"),
        ("short.txt --shard_index 2 --num_shards 2", "--shard_index 2 must be at least 0 and below --num_shards 2"),
        ("short.txt --max_tokens 5", "--max_tokens 5 works only with --streaming or files of tokens; use --max_d"),
        ("short.txt --streaming --max_documents 5", "--streaming works only with a dataset of the Hub"),
        ("short.txt --sample_by line --separator x", "--separator and --sample_by line exclude each other"),
        ("short.txt --push_to_hub", "--push_to_hub needs the name of the dataset: --hub_dataset_id user/name"),
    ],
)
def test_a_wrong_file_gets_one_line_and_leaves_nothing(wrong_files, tokenizer_dir, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(wrong_files)
    flags = ("--train_file", *flags.split(), "--tokenizer_name", tokenizer_dir, "--block_size", 4)
    assert refusal(capsys, *flags, "--output_dir", "out").startswith(message)
    assert not Path("out").exists()


def test_streaming_without_a_bound_is_refused(tmp_path, tokenizer_dir, capsys):
    flags = ("--dataset_name", "someone/corpus", "--streaming", "--tokenizer_name", tokenizer_dir)
    line = refusal(capsys, *flags, "--output_dir", tmp_path / "data")
    assert line == "--streaming needs a limit; give --max_tokens or --max_documents"


def test_tokens_without_their_tokenizer_are_refused(wrong_files, tmp_path, capsys):
    flags = ("--train_tokenizer", 300, "--output_dir", tmp_path / "data")
    for files in (("tokens.bin",), ("short.txt", "--validation_file", wrong_files / "tokens.bin")):
        line = refusal(capsys, "--train_file", wrong_files / files[0], *files[1:], *flags)
        assert line == f"{wrong_files / 'tokens.bin'} holds token ids; name their tokenizer with --tokenizer_name"


@pytest.mark.parametrize(
    "name", ["latin.txt", "latin.txt.gz", "latin.jsonl.gz", "latin.json", "latin.csv", "latin.parquet"]
)
def test_encoding_errors_replace_goes_on(wrong_files, name):
    assert "".join(read_all(wrong_files / name, encoding_errors="replace")).endswith("caf\ufffd au lait")


def test_a_pipe_is_refused(tmp_path, tokenizer_dir, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/null"):
        for flag in ("--train_file", "--validation_file"):
            flags = (flag, path, "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "data")
            flags += ("--dataset_name", "stdlib") if flag == "--validation_file" else ()
            line = refusal(capsys, *flags)
            assert line == f"{path} is a pipe or a device, which can be read only once; save it as a file first"
            assert os.listdir(tmp_path) == ["pipe.txt"]


# In the blocks


def test_a_stray_bin_file_in_a_folder_of_text_is_omitted(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", make_texts(20))
    (tmp_path / "corpus" / "weights.bin").write_bytes(b"no tokens")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_texts(2, 900))
    flags = ("--validation_file", held_out, "--tokenizer_name", tokenizer_dir, "--block_size", 8)
    manifest = run(tmp_path / "data", "--train_file", tmp_path / "corpus", *flags)
    assert manifest["splits"]["train"]["documents"] == 20
    warned = capsys.readouterr().err
    assert warned.count(f"warning: {tmp_path / 'corpus'}: weights.bin and other files of tokens are omitted") == 1


def test_a_copy_of_the_training_file_as_validation_is_noticed(tmp_path, corpus, tokenizer_dir, capsys):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 8)
    for path in (copy, corpus):
        run(tmp_path / path.stem, *flags, "--validation_file", path)
        warned = f"warning: --validation_file {path.name} has the content of corpus.jsonl in --train_file"
        assert warned in capsys.readouterr().err
    run(tmp_path / "other", *flags, "--validation_file", write_jsonl(tmp_path / "other.jsonl", make_texts(9, 900)))
    assert "has the content" not in capsys.readouterr().err


def test_files_of_several_kinds_are_read_together(tmp_path, tokenizer_dir):
    texts = make_texts(6)
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
    assert sorted(documents_of(tmp_path / "data", "train")) == sorted(make_texts(7))


def test_standard_library_is_prepared_without_installed_packages(tmp_path):
    files = standard_library_files()
    assert len(files) > 500 and not any("site-packages" in path.parts for path in files)
    flags = ("--dataset_name", "stdlib", "--max_documents", 12, "--train_tokenizer", 300, "--block_size", 64)
    manifest = run(tmp_path / "data", *flags)
    assert manifest["source"]["name"] == "stdlib" and manifest["source"]["documents"] == 12
    counted = sum(split["bytes"] for split in manifest["splits"].values())
    assert counted == sum(path.stat().st_size for path in files[:12])
