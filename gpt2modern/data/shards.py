"""Write shards, the files of a split: one process reads, encodes, packs and writes a shard, completely or not at all.

The documents of a shard pass through `datasets.map`, which encodes them and marks those held out for validation; then
they are collected to windows of about 32 MB of text, and each window is shuffled, packed and written as an Arrow file.
A shard is built under a temporary name and renamed; then its receipt (a file with its counts and checksums) is written,
with which a resumed run finds and verifies finished shards. The content of a shard depends only on the settings, not on
the number of processes or machines.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2modern.data.config import PrepareConfig
from gpt2modern.data.documents import COLUMN, array_of
from gpt2modern.data.packing import PACKERS
from gpt2modern.data.rows import RowWriter, schema_of
from gpt2modern.data.sources import Source
from gpt2modern.data.splits import ValidationRule, hash_documents, is_not_empty, offsets_of
from gpt2modern.data.tokenizing import Encoder, check_engine
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import atomic_file, atomic_folder, described, locked, sha256_of, write_json

WINDOW_BYTES = 32 << 20  # of text, shuffled together and so held in memory by a process
BATCH_BYTES = 8 << 20  # of text, encoded together
RECEIPT_FILE = "receipt.json"
HELD_OUT_FILE = "held_out_tokens.arrow"
HELD_OUT_SCHEMA = pa.schema({"tokens": pa.large_binary(), "bytes": pa.int64(), "hash": pa.uint64()})


@dataclass
class Job:
    """Hold what a process needs to write any shard of a run."""

    source: Source
    rule: ValidationRule
    encoder: Encoder
    config: PrepareConfig
    num_shards: int
    output_dir: Path
    workspace: Path  # for unfinished files; in output_dir, so that a rename can move them

    def shard_path(self, index: int) -> Path:
        return self.output_dir / "train" / f"data-{index:05d}-of-{self.num_shards:05d}.arrow"

    def receipt_dir(self, index: int) -> Path:
        """Return the folder of a shard's receipt (counts, sha256) and held-out documents, kept until the run ends."""
        return self.workspace / f"shard-{index:05d}"


class Stopped(Exception):
    """Signal that a shard was not finished because another process failed; that process raises the actual error."""


@dataclass
class Counts:
    """Hold the counts of a shard. document_lengths[i]: number of documents with 2**i to 2**(i+1) - 1 tokens."""

    read_documents: int = 0  # read from the source, including empty and held-out ones
    documents: int = 0
    empty_documents: int = 0
    special_tokens: int = 0  # that the text of documents spells, also of held-out ones
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    cut_documents: int = 0
    document_lengths: tuple[int, ...] = (0,) * 40
    fingerprint: int = 0  # sum of the hashes of all documents read, including held-out ones

    def add(self, encoded: "Encoded") -> None:
        """Add documents that are written to the shard to the counts of documents, tokens, bytes and lengths."""
        self.documents += len(encoded.lengths)
        self.tokens += int(encoded.lengths.sum())
        self.bytes += int(encoded.num_bytes.sum())
        added = np.bincount(np.log2(encoded.lengths).astype(np.int64), minlength=len(self.document_lengths))
        self.document_lengths = tuple(int(a + b) for a, b in zip(self.document_lengths, added, strict=True))


def write_shard(job: Job, index: int, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Write training shard `index` and, in its receipt folder, the documents held out of it for validation.

    Does nothing if both exist and are valid. Raises Stopped soon after `is_stopped` returns True.
    """
    with locked(job.workspace / f"shard-{index:05d}.lock"):
        if is_finished(job, index):
            return
        receipt_dir, path = job.receipt_dir(index), job.shard_path(index)
        shutil.rmtree(receipt_dir, ignore_errors=True)
        counts = Counts()
        with atomic_folder(receipt_dir) as build:
            with pa.ipc.new_stream(str(build / HELD_OUT_FILE), HELD_OUT_SCHEMA) as held_out:
                documents = encode_documents(job, job.source, job.rule, counts, index, held_out, is_stopped)
                receipt = write_rows(documents, build, path, job, counts)
            receipt["held_out_tokens_sha256"] = sha256_of(build / HELD_OUT_FILE)
            write_json(build / RECEIPT_FILE, receipt)


def write_validation(job: Job, source: Source | None) -> dict:
    """Write the validation shard and return its receipt. source: its documents; None: those held out for validation."""
    path, counts = job.output_dir / "validation" / "data-00000-of-00001.arrow", Counts()
    rule = ValidationRule("file")
    documents = held_out_documents(job) if source is None else encode_documents(job, source, rule, counts)
    receipt = write_rows(documents, job.workspace, path, job, counts)
    if not counts.documents:
        given = "--validation_file or --validation_split_percentage"
        raise GPT2ModernError(f"the validation split has no documents; give another {given}")
    return receipt


def read_receipt(job: Job, index: int) -> dict:
    """Return the receipt of a finished shard: its counts, and its file with size and sha256."""
    return json.loads((job.receipt_dir(index) / RECEIPT_FILE).read_text(encoding="utf-8"))


def keep_filled_shards(job: Job) -> list[dict]:
    """Remove the training shards that have no documents, such as beside one huge document, and return the receipts of
    the others, of which the first also counts what was read for the removed ones. GPT2ModernError if none is left."""
    receipts = [read_receipt(job, index) for index in range(job.num_shards)]
    filled = [receipt for receipt in receipts if receipt["documents"]]
    if not filled:
        raise GPT2ModernError("the training split has no documents; give more text, or less to the validation split")
    for receipt in receipts:
        if not receipt["documents"]:
            (job.output_dir / receipt["shard"]["path"]).unlink(missing_ok=True)
            for name in ("read_documents", "empty_documents", "special_tokens", "fingerprint"):
                filled[0][name] += receipt[name]
    if len(filled) < job.num_shards:
        print(f"note: {len(filled)} shards are written, not {job.num_shards}, because the others have no documents")
    return filled


def is_finished(job: Job, index: int) -> bool:
    """Return whether a shard, its held-out documents and its receipt exist and all files have the recorded sha256."""
    try:
        receipt = read_receipt(job, index)
        checksums = {
            job.shard_path(index): receipt["file"]["sha256"],
            job.receipt_dir(index) / HELD_OUT_FILE: receipt["held_out_tokens_sha256"],
        }
        return all(sha256_of(path) == checksum for path, checksum in checksums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Encoded(NamedTuple):
    """Hold encoded documents: ids of all in sequence, each with EOS; tokens of each, with EOS; text bytes of each."""

    ids: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray

    @classmethod
    def of(cls, table: pa.Table, dtype: str) -> "Encoded":
        """Return the documents of a table with the columns tokens and bytes (see `encode_batch`)."""
        tokens = array_of(table, "tokens")
        offsets = offsets_of(tokens)
        ids = np.frombuffer(tokens.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].view(dtype)
        return cls(ids, np.diff(offsets) // ids.itemsize, table["bytes"].to_numpy())


def encode_documents(
    job: Job,
    source: Source,
    rule: ValidationRule,
    counts: Counts,
    index: int | None = None,
    held_out: pa.RecordBatchStreamWriter | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Encoded]:
    """Encode the documents of training shard `index`, shuffled WINDOW_BYTES at a time, or, if `index` is None, all
    documents of the source in order. Documents that the rule holds out are written to `held_out`."""
    documents, step = source.documents(None if index is None else job.config.shuffle_seed), (1, 0)
    if index is not None and documents.num_shards >= job.num_shards:
        documents = documents.shard(job.num_shards, index)
    elif index is not None:
        step = job.num_shards, index

    def encode(table: pa.Table, indices: list[int]) -> pa.Table:
        if is_stopped():
            raise Stopped
        batch = array_of(table, COLUMN)
        if step[0] > 1:  # every step[0]-th document, from number step[1] on
            batch = batch.take(pa.array(np.arange((step[1] - indices[0]) % step[0], len(batch), step[0])))
        return encode_batch(batch, job.encoder, source.name, rule, counts)

    mapped = documents.with_format("arrow").map(
        encode, batched=True, batch_size=source.batch_rows, with_indices=True, remove_columns=COLUMN
    )
    for number, window in enumerate(_windows(mapped.iter(source.batch_rows))):
        if pc.any(window["is_held_out"]).as_py():
            held_out.write_table(window.filter(window["is_held_out"]).select(HELD_OUT_SCHEMA.names))
            window = window.filter(pc.invert(window["is_held_out"]))
        if index is not None:
            order = np.random.default_rng([job.config.shuffle_seed, index, number]).permutation(len(window))
            window = window.take(pa.array(order))
        yield Encoded.of(window, job.encoder.dtype)


def encode_batch(documents: pa.Array, encoder: Encoder, name: str, rule: ValidationRule, counts: Counts) -> pa.Table:
    """Encode a batch of documents, and add what was read to `counts`. name: of the source, for error messages.

    Returns a table with a row for each document that has text: tokens (the ids with EOS, as bytes, which Arrow copies
    faster than lists), bytes (of the text), is_held_out, and hash (0 if not held out).
    """
    if not counts.read_documents and len(documents):
        check_engine(encoder, documents, name)
    filled = is_not_empty(documents)
    counts.read_documents += len(documents)
    counts.empty_documents += int((~filled).sum())
    documents = documents if filled.all() else documents.filter(pa.array(filled))
    hashes = hash_documents(documents)
    counts.fingerprint = (counts.fingerprint + int(hashes.sum(dtype=np.uint64))) % 2**64
    train, held_out, held_out_hashes = rule.split(documents, hashes)
    documents = pa.concat_arrays([train, held_out])
    num_bytes = encoder.text_bytes(documents, name)
    parts = [(np.empty(0, encoder.dtype), np.empty(0, np.int64))]
    for part in np.array_split(np.arange(len(documents)), documents.nbytes // BATCH_BYTES + 1):
        if len(part):
            *encoded, special_tokens = encoder.encode(documents.slice(part[0], len(part)))
            counts.special_tokens += special_tokens
            parts.append(encoded)
    ids, lengths = (np.concatenate(each) for each in zip(*parts, strict=True))
    offsets = np.append(0, np.cumsum(lengths * ids.itemsize))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(ids)]
    return pa.table(
        {
            "tokens": pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths), buffers),
            "bytes": num_bytes,
            "is_held_out": np.arange(len(documents)) >= len(train),
            "hash": np.append(np.zeros(len(train), np.uint64), held_out_hashes),
        }
    )


def held_out_documents(job: Job) -> Iterator[Encoded]:
    """Yield the encoded documents that the training shards held out, sorted by the hash of the document."""
    parts = [datasets.Dataset.from_file(str(job.receipt_dir(i) / HELD_OUT_FILE)) for i in range(job.num_shards)]
    if not (parts := [part for part in parts if len(part)]):
        return
    held_out = datasets.concatenate_datasets(parts)
    order = np.argsort(held_out.data.column("hash").to_numpy(), kind="stable")
    for table in held_out.select(order).with_format("arrow").iter(job.source.batch_rows):
        yield Encoded.of(table, job.encoder.dtype)


def _windows(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables to windows of at least WINDOW_BYTES; the last one may be smaller."""
    pending, size = [], 0
    for table in tables:
        pending.append(table)
        size += pc.sum(table["bytes"]).as_py() or 0
        if size >= WINDOW_BYTES:
            yield pa.concat_tables(pending)
            pending, size = [], 0
    if pending:
        yield pa.concat_tables(pending)


def write_rows(documents: Iterator[Encoded], build_in: Path, path: Path, job: Job, counts: Counts) -> dict:
    """Pack documents and write them to the file `path`, which is built in the folder `build_in` and then moved. Returns
    the receipt of the shard: `counts`, updated here, and the file's size and sha256."""
    config = job.config
    packer = PACKERS[config.packing](config.block_size, job.encoder.eos_token_id, job.encoder.dtype)
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path, build_in) as built:
        with RowWriter(built, schema_of(job.encoder.dtype, config.packing)) as writer:
            for encoded in documents:
                counts.add(encoded)
                writer.write(packer.add(encoded.ids, encoded.lengths))
            writer.write(packer.finish())
        counts.rows, counts.cut_documents = writer.num_rows, packer.cut_documents
        file = described(built)
    shard = {"path": path.relative_to(job.output_dir).as_posix(), "rows": counts.rows, "tokens": counts.tokens}
    return asdict(counts) | {"shard": shard, "file": file}
