"""Shards: each is read, encoded, packed and written by one process, and is either complete or not there.

The documents of a shard flow through `datasets`: `documents.shard(num_shards, index)` in the Arrow format, `map` to
token ids; then windows of them are shuffled, packed and written in the format of `datasets`. A shard is built under a
temporary name, flushed to disk and renamed; a receipt with its counts and checksums follows. A run that was killed
finds the finished shards by their receipts, verifies them and writes only the others. What a shard holds follows from
the settings alone, so any number of processes or machines writes the same bytes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2modern.data.documents import COLUMN, array_of
from gpt2modern.data.packing import PACKERS, Rows
from gpt2modern.data.sources import Source
from gpt2modern.data.splits import ValidationRule, hash_documents, is_not_empty
from gpt2modern.data.tokenizing import Encoder, check_engine
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import atomic_folder, locked, sha256_of, write_json

WINDOW_BYTES = 32 << 20  # of text: what is shuffled at a time, and so what a process holds
PACKED_BYTES = 4 << 20  # of tokens, packed and written at a time
ROWS_PER_BATCH = 1000  # of an Arrow record batch, as `datasets` writes
DATA_FILE = "data-00000-of-00001.arrow"
RECEIPT_FILE = "receipt.json"
HELD_OUT_FILE = "held_out_tokens.arrow"
HELD_OUT_SCHEMA = pa.schema({"tokens": pa.large_binary(), "bytes": pa.int64(), "hash": pa.uint64()})


@dataclass
class Job:
    """Hold what it takes to write any shard."""

    source: Source
    rule: ValidationRule
    encoder: Encoder
    packing: str
    block_size: int
    num_shards: int
    shuffle_seed: int
    output_dir: Path
    workspace: Path  # for what is not finished; in output_dir, so that a rename moves it

    def shard_path(self, index: int) -> Path:
        """Return the folder of a training shard."""
        return self.output_dir / "train" / f"shard-{index:05d}-of-{self.num_shards:05d}"

    def receipt_dir(self, index: int) -> Path:
        """Return the folder of what is kept about a training shard until all are there."""
        return self.workspace / f"shard-{index:05d}"


class Stopped(Exception):
    """A shard is left unwritten, because another process has failed and says why."""


@dataclass
class Counts:
    """Count what is seen while a shard is written. document_lengths[i]: documents of 2**i to 2**(i+1) - 1 tokens."""

    read_documents: int = 0  # of the source, with those that are empty or held out
    documents: int = 0
    empty_documents: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    cut_documents: int = 0
    document_lengths: tuple[int, ...] = (0,) * 40
    fingerprint: int = 0  # sum of the hashes of all documents read, the held-out ones included

    def add(self, lengths: np.ndarray, num_bytes: int) -> None:
        """Count documents of so many tokens each, and bytes of text together, that go into the shard."""
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.bytes += num_bytes
        added = np.bincount(np.log2(lengths).astype(np.int64), minlength=len(self.document_lengths))
        self.document_lengths = tuple(int(a + b) for a, b in zip(self.document_lengths, added, strict=True))


def write_shard(job: Job, index: int, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Write training shard `index`, and aside the documents held out of it, unless both are there and verify.

    Raises Stopped soon after `is_stopped` says so.
    """
    with locked(job.workspace / f"shard-{index:05d}.lock"):
        if is_finished(job, index):
            return
        receipt_dir, path = job.receipt_dir(index), job.shard_path(index)
        for stale in (receipt_dir, path):
            shutil.rmtree(stale, ignore_errors=True)
        documents, counts = job.source.documents(job.shuffle_seed), Counts()
        step = (job.num_shards, index)
        if documents.num_shards >= job.num_shards:
            documents, step = documents.shard(job.num_shards, index), (1, 0)
        with atomic_folder(receipt_dir) as receipt_build, atomic_folder(path, job.workspace) as build:
            with pa.ipc.new_stream(str(receipt_build / HELD_OUT_FILE), HELD_OUT_SCHEMA) as held_out:
                encoded = encode_documents(documents, job, counts, job.source, held_out.write_table, step, is_stopped)
                files = write_rows(_shuffled(encoded, job, index), build, job, counts)
            if not counts.documents:
                raise GPT2ModernError(
                    f"--num_shards {job.num_shards}: shard {index} gets no training documents; use fewer shards"
                )
            receipt = asdict(counts) | {"shard": _described(job, path, counts, files)}
            receipt["held_out_tokens_sha256"] = sha256_of(receipt_build / HELD_OUT_FILE)
            write_json(receipt_build / RECEIPT_FILE, receipt)


def write_validation(job: Job, source: Source | None) -> dict:
    """Write the one validation shard, of `source` or of what the training shards held out; returns its counts."""
    path, counts = job.output_dir / "validation" / "shard-00000-of-00001", Counts()
    shutil.rmtree(path, ignore_errors=True)
    encoded = encode_documents(source.documents(), job, counts, source) if source is not None else _held_out(job)
    with atomic_folder(path, job.workspace) as build:
        files = write_rows(encoded, build, job, counts)
        if not counts.documents:
            raise GPT2ModernError(
                "no document is left for validation; give --validation_file or another --validation_split_percentage"
            )
    return asdict(counts) | {"shard": _described(job, path, counts, files)}


def print_missing_shards(job: Job, index: int) -> None:
    """Say that a shard is written, and how many others are missing."""
    missing = sum(not job.receipt_dir(other).exists() for other in range(job.num_shards))
    left = f"; {missing} of {job.num_shards} shards are still missing" if missing else ""
    print(f"{job.shard_path(index)} is written{left}; the same call without --shard_index finishes")


def read_receipt(job: Job, index: int) -> dict:
    """Return what was written about a finished shard."""
    return json.loads((job.receipt_dir(index) / RECEIPT_FILE).read_text(encoding="utf-8"))


def is_finished(job: Job, index: int) -> bool:
    """Tell whether the shard is there with what was held out of it, and each file has its sha256."""
    try:
        receipt = read_receipt(job, index)
        checksums = {job.shard_path(index) / name: file["sha256"] for name, file in receipt["shard"]["files"].items()}
        checksums[job.receipt_dir(index) / HELD_OUT_FILE] = receipt["held_out_tokens_sha256"]
        return all(sha256_of(path) == checksum for path, checksum in checksums.items())
    except (OSError, ValueError, KeyError):
        return False


def _described(job: Job, path: Path, counts: Counts, files: dict[str, dict]) -> dict:
    relative = path.relative_to(job.output_dir).as_posix()
    return {"path": relative, "rows": counts.rows, "tokens": counts.tokens, "files": files}


# Documents to token ids


def encode_documents(
    documents: datasets.IterableDataset,
    job: Job,
    counts: Counts,
    source: Source,
    hold_out: Callable[[pa.Table], None] | None = None,
    step: tuple[int, int] = (1, 0),
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[pa.Table]:
    """Encode documents through `map`, EOS after each, empty ones left out: tables as `_encoded` makes.

    hold_out takes those that are held out for validation, with their hashes; None: nothing is. step: (n, i) takes every
    n-th document from the i-th on. source: where the documents are from. Adds what is read to `counts`.
    """
    name = source.name

    def encode(table: pa.Table, indices: list[int]) -> pa.Table:
        if is_stopped():
            raise Stopped
        texts = array_of(table, COLUMN)
        if step[0] > 1:
            texts = texts.take(pa.array(np.arange((step[1] - indices[0]) % step[0], len(texts), step[0])))
        filled = is_not_empty(texts)
        if not counts.read_documents and filled.any():
            check_engine(job.encoder, texts, name)
        counts.read_documents += len(texts)
        counts.empty_documents += int((~filled).sum())
        texts = texts if filled.all() else texts.filter(pa.array(filled))
        if hold_out is None:
            return _encoded(texts, job.encoder, name)
        hashes = hash_documents(texts)
        counts.fingerprint = (counts.fingerprint + int(hashes.sum(dtype=np.uint64))) % 2**64
        train, held_out, held_out_hashes = job.rule.split(texts, hashes)
        both = _encoded(pa.concat_arrays([train, held_out]), job.encoder, name)
        if len(held_out):
            hold_out(both.slice(len(train)).append_column("hash", pa.array(held_out_hashes)))
        return both.slice(0, len(train))

    documents = documents.with_format("arrow")
    encoded = documents.map(encode, batched=True, batch_size=source.batch_rows, with_indices=True)
    return encoded.iter(source.batch_rows)


def _encoded(documents: pa.Array, encoder: Encoder, name: str) -> pa.Table:
    """Encode to the columns tokens (the ids as bytes, which Arrow copies faster than lists) and bytes (of the text)."""
    num_bytes, ids, lengths = np.empty(0, np.int64), np.empty(0, encoder.dtype), np.empty(0, np.int64)
    if len(documents):
        num_bytes = encoder.text_bytes(documents, name)
        ids, lengths = encoder.encode(documents)
    offsets = np.append(0, np.cumsum(lengths)) * ids.itemsize
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(ids)]
    return pa.table({"tokens": pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers), "bytes": num_bytes})


def _ids_and_lengths(encoded: pa.Table, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all documents one after the other, and how many each has."""
    tokens, itemsize = array_of(encoded, "tokens"), np.dtype(dtype).itemsize
    _, offsets, values = tokens.buffers()
    edges = np.frombuffer(offsets, np.int64)[tokens.offset : tokens.offset + len(tokens) + 1] // itemsize
    return np.frombuffer(values or b"", dtype)[edges[0] : edges[-1]], np.diff(edges)


def _shuffled(encoded: Iterator[pa.Table], job: Job, index: int) -> Iterator[pa.Table]:
    """Shuffle documents, WINDOW_BYTES of text at a time."""
    for number, window in enumerate(_windows(encoded)):
        order = np.random.default_rng([job.shuffle_seed, index, number]).permutation(len(window))
        for part in np.array_split(order, min(len(order), window.nbytes // PACKED_BYTES + 1)):
            yield window.take(pa.array(part))


def _windows(encoded: Iterator[pa.Table]) -> Iterator[pa.Table]:
    pending, size = [], 0
    for table in encoded:
        pending.append(table)
        size += pc.sum(table.column("bytes")).as_py()
        if size >= WINDOW_BYTES:
            yield pa.concat_tables(pending).combine_chunks()
            pending, size = [], 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _held_out(job: Job) -> Iterator[pa.Table]:
    """Read what the shards held out, in the order of the documents' hashes."""
    parts = [datasets.Dataset.from_file(str(job.receipt_dir(i) / HELD_OUT_FILE)) for i in range(job.num_shards)]
    if parts := [part for part in parts if len(part)]:
        held_out = datasets.concatenate_datasets(parts)
        order = np.argsort(held_out.data.column("hash").to_numpy(), kind="stable")
        yield from held_out.select(order).with_format("arrow").iter(job.source.batch_rows)


# Token ids to files


def write_rows(encoded: Iterator[pa.Table], folder: Path, job: Job, counts: Counts) -> dict[str, dict]:
    """Pack encoded documents into the `datasets` folder `folder`; returns its files with size and sha256.

    Adds to `counts` what is written.
    """
    dtype, row_size = job.encoder.dtype, job.block_size + 1
    kinds = {"input_ids": datasets.List(datasets.Value(dtype), length=row_size), "num_tokens": datasets.Value("int32")}
    features = datasets.Features(kinds)
    packer = PACKERS[job.packing](job.block_size, job.encoder.eos_token_id, dtype)
    unnamed = folder / ".data.tmp"
    with pa.ipc.new_stream(str(unnamed), features.arrow_schema) as writer:

        def write(rows: Rows) -> None:
            counts.rows += len(rows.input_ids)
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(rows.input_ids.ravel()), row_size), rows.num_tokens]
            writer.write_table(pa.table(columns, features.arrow_schema), max_chunksize=ROWS_PER_BATCH)

        for table in encoded:
            ids, lengths = _ids_and_lengths(table, dtype)
            counts.add(lengths, pc.sum(table.column("bytes")).as_py())
            write(packer.add(ids, lengths))
        write(packer.finish())
    counts.cut_documents += packer.cut_documents
    digest = sha256_of(unnamed)
    # What surrounds the data file is written by `datasets` itself, for an empty table of the same features.
    empty = datasets.Dataset(pa.table(features.arrow_schema.empty_table()), fingerprint=digest[:16])
    with _no_progress_bar():
        empty.save_to_disk(folder, num_shards=1)
    unnamed.replace(folder / DATA_FILE)
    known = {DATA_FILE: digest}
    return {
        path.name: {"size": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path)}
        for path in sorted(folder.iterdir())
    }


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
