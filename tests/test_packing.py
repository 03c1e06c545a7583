"""Packing: every token is a target exactly once, and best fit cuts only documents that are longer than a block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gpt2modern.data.packing import PACKERS, BestFitPacker, Rows, best_fit
from tests.support.folders import make_texts, refusal, rows_of, run, targets_of, write_jsonl

EOS = 0
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=60)
few_examples = settings(max_examples=150, deadline=None, derandomize=True)


def documents_of_lengths(lengths: list[int]) -> list[np.ndarray]:
    """Every token but the EOS at the ends is another number, so that each can be found again."""
    numbers = iter(range(1, sum(lengths) + 1))
    return [np.array([*(next(numbers) for _ in range(n - 1)), EOS], dtype=np.uint16) for n in lengths]


def pack(name: str, lengths: list[int], block_size: int, batches: int = 1) -> tuple[Rows, int]:
    """All rows of documents that come in several batches, and how many documents were cut."""
    packer = PACKERS[name](block_size, EOS, "uint16")
    documents = documents_of_lengths(lengths)
    rows = []
    for part in np.array_split(np.arange(len(lengths)), batches):
        if len(part):
            ids = np.concatenate([documents[i] for i in part])
            rows.append(packer.add(ids, np.array([len(documents[i]) for i in part])))
    rows.append(packer.finish())
    return Rows(*(np.concatenate(each) for each in zip(*rows, strict=True))), packer.cut_documents


def targets(rows: Rows) -> list[list[int]]:
    return [row.tolist() for row in np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])]


@few_examples
@given(lengths=lengths_of_documents, block_size=st.integers(1, 16), batches=st.integers(1, 4))
def test_concat_is_the_stream_in_order(lengths, block_size, batches):
    rows, _ = pack("concat", lengths, block_size, batches)
    stream = np.concatenate(documents_of_lengths(lengths)).tolist()
    *full, last = targets(rows)
    assert [token for row in full for token in row] + last == stream[: block_size * len(full)] + stream[-block_size:]
    assert len(full) == (len(stream) - 1) // block_size and all(len(row) == block_size for row in full)
    assert rows.previous_tokens.tolist() == [EOS, *(row[-1] for row in full)]


@few_examples
@given(lengths=lengths_of_documents, block_size=st.integers(1, 16), batches=st.integers(1, 4))
def test_concat_counts_documents_that_lie_in_more_than_one_row(lengths, block_size, batches):
    _, cut = pack("concat", lengths, block_size, batches)
    ends = np.cumsum(lengths)
    assert cut == sum((end - n) // block_size != (end - 1) // block_size for end, n in zip(ends, lengths, strict=True))


@few_examples
@given(lengths=lengths_of_documents, block_size=st.integers(1, 16), batches=st.integers(1, 4))
def test_best_fit_keeps_every_document_whole_that_fits(lengths, block_size, batches):
    rows, cut = pack("best_fit", lengths, block_size, batches)
    found = targets(rows)
    for document in documents_of_lengths(lengths):
        tokens = document.tolist()
        parts = [tokens[i : i + block_size] for i in range(0, len(tokens), block_size)]
        for part in parts:
            if part != [EOS]:  # which has no number to be found by
                (row,) = (row for row in found if part[0] in row)
                assert row[row.index(part[0]) :][: len(part)] == part
    assert cut == sum(length > block_size for length in lengths)
    assert sorted(token for row in found for token in row) == sorted(np.concatenate(documents_of_lengths(lengths)))


@few_examples
@given(lengths=lengths_of_documents, block_size=st.integers(1, 16))
def test_the_token_before_a_best_fit_row_is_eos_or_that_of_its_document(lengths, block_size):
    rows, _ = pack("best_fit", lengths, block_size)
    before = {}
    for document in documents_of_lengths(lengths):
        for i in range(block_size, len(document), block_size):
            before[tuple(document[i : i + block_size].tolist())] = int(document[i - 1])
    for real, previous in zip(targets(rows), rows.previous_tokens, strict=True):
        continued = [part for part in before if part != (EOS,) and real[: len(part)] == list(part)]
        if continued:
            assert previous == before[continued[0]]
        elif real[0] != EOS:
            assert previous == EOS


@few_examples
@given(lengths=st.lists(st.integers(1, 12), max_size=50), spare=st.integers(0, 5))
def test_best_fit_fills_the_bins_of_the_plain_algorithm(lengths, spare):
    capacity = max([1, *lengths]) + spare
    bins, offsets, count = best_fit(np.array(lengths, dtype=np.int64), capacity)
    expected: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [each for each in expected if sum(each) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            expected.append([length])
    filled = [0] * count
    for item in np.lexsort((offsets, bins)):
        assert offsets[item] == filled[bins[item]]
        filled[bins[item]] += lengths[item]
    # Which of two equally full bins is taken does not change how full the bins get.
    assert sorted(filled) == sorted(sum(each) for each in expected)


def test_best_fit_packs_a_window_at_a_time(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 30, size=200).tolist()
    whole, _ = pack("best_fit", lengths, 16, batches=20)
    monkeypatch.setattr(BestFitPacker, "WINDOW_TOKENS", 100)
    windows, _ = pack("best_fit", lengths, 16, batches=20)
    assert len(windows.lengths) > len(whole.lengths)
    assert sorted(np.concatenate(targets(windows))) == sorted(np.concatenate(targets(whole)))


@pytest.fixture(scope="module")
def best_fit_data(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("best_fit")
    texts = [text.replace("<|endoftext|>", "") for text in make_texts(200)]
    held_out = write_jsonl(
        folder / "held_out.jsonl", [text.replace("<|endoftext|>", "") for text in make_texts(9, 900)]
    )
    flags = ("--train_file", write_jsonl(folder / "a.jsonl", texts), "--validation_file", held_out, "--num_shards", 2)
    flags += ("--tokenizer_name", tokenizer_dir, "--block_size", 64, "--packing", "best_fit")
    return texts, flags, run(folder / "data", *flags, "--num_proc", 1), folder / "data"


def test_best_fit_documents_are_whole_in_the_blocks_of_a_folder(best_fit_data):
    texts, _, manifest, data_dir = best_fit_data
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    rows = [tokenizer.decode(row) for row in rows_of(data_dir, "train")]
    whole = [text for text in texts if len(tokenizer(text)["input_ids"]) < 64]
    assert 50 < len(whole) < 200 and manifest["splits"]["train"]["cut_documents"] == 200 - len(whole)
    for text in whole:
        assert sum(f"{text}<|endoftext|>" in row for row in rows) == 1


def test_best_fit_counts_its_padding(best_fit_data):
    _, _, manifest, data_dir = best_fit_data
    for split, counts in manifest["splits"].items():
        assert counts["padding"] == 64 * len(rows_of(data_dir, split)) - len(targets_of(data_dir, split)) > 0
        assert counts["tokens"] == len(targets_of(data_dir, split))


def test_folders_of_another_packing_are_refused(best_fit_data, capsys):
    _, flags, _, data_dir = best_fit_data
    line = refusal(capsys, *flags, "--packing", "concat", "--output_dir", data_dir)
    assert "packing was best_fit, now concat" in line
