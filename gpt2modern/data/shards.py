"""Shards: each is read, encoded, packed and written by one process, and is either whole or not there.

A shard is built under a temporary name, checksummed while it is written, flushed to disk and renamed; a receipt with
its counts and checksums follows. A run that was killed finds the finished shards by their receipts, verifies them and
writes only the others. What a shard holds follows from the settings alone, so any number of
processes or machines writes the same bytes.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import flush_to_disk, sha256_of
from gpt2modern.data.encoding import Encoder, bytes_of_tokens, check_engine
from gpt2modern.data.packing import PACKERS, Rows
from gpt2modern.data.sources import Piece, Source
from gpt2modern.data.splits import ValidationRule, hash_documents, is_not_empty

WINDOW_BYTES = 32 << 20  # of text: what is shuffled at a time, and so what a process holds
BATCH_BYTES = 8 << 20  # of text: what is encoded and packed at a time; larger arrays are mapped anew for every use
FLUSH_BYTES = 16 << 20
DATA_FILE = "data-00000-of-00001.arrow"
RECEIPT_FILE = "receipt.json"
HELD_OUT_FILE = "held_out.arrow"


@dataclass
class Job:
    """What it takes to write any shard. Pickled for each process."""

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
        return self.output_dir / "train" / f"shard-{index:05d}-of-{self.num_shards:05d}"

    def receipt_dir(self, index: int) -> Path:
        return self.workspace / f"shard-{index:05d}"


class Stopped(Exception):
    """This shard is not written: another process has failed, and says why."""


@dataclass
class Counts:
    """What was seen while a shard was written. document_lengths[i]: documents of 2**i to 2**(i+1) - 1 tokens."""

    read_documents: int = 0  # of the source, with those that are empty or held out
    documents: int = 0
    empty_documents: int = 0
    bytes: int = 0
    tokens: int = 0
    rows: int = 0
    cut_documents: int = 0
    document_lengths: tuple[int, ...] = (0,) * 40
    fingerprint: int = 0  # sum of the hashes of all documents read, the held-out ones included

    def add_lengths(self, lengths: np.ndarray) -> None:
        added = np.bincount(np.log2(lengths).astype(np.int64), minlength=len(self.document_lengths))
        self.document_lengths = tuple(int(a + b) for a, b in zip(self.document_lengths, added, strict=True))


def write_shard(job: Job, index: int, stop_file: Path) -> None:
    """Write training shard `index`, and aside the documents held out of it, unless both are there and verify.

    Raises Stopped when `stop_file` appears.
    """
    _keep_freed_memory()
    with locked(job.workspace / f"shard-{index:05d}.lock"):
        if is_finished(job, index):
            return
        receipt_dir, path = job.receipt_dir(index), job.shard_path(index)
        for stale in (receipt_dir, path):
            shutil.rmtree(stale, ignore_errors=True)
        counts = Counts()
        name = job.source.origins[0] if len(job.source.origins) == 1 else "the source"
        with _built(receipt_dir) as receipt_build, _built(path, job.workspace) as build:
            with _held_out_writer(receipt_build / HELD_OUT_FILE) as hold_out:
                windows = _training_windows(job, index, counts, hold_out, stop_file)
                files = write_rows(windows, build, job.encoder, job.packing, job.block_size, counts, name)
            if not counts.documents:
                raise GPT2ModernError(
                    f"--num_shards {job.num_shards}: shard {index} gets no training documents; use fewer shards"
                )
            shard = {
                "path": path.relative_to(job.output_dir).as_posix(),
                "rows": counts.rows,
                "tokens": counts.tokens,
                "files": files,
            }
            receipt = vars(counts) | {"shard": shard, "held_out_sha256": sha256_of(receipt_build / HELD_OUT_FILE)}
            write_text(receipt_build / RECEIPT_FILE, json.dumps(receipt, indent=2))


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc reuse what large arrays leave behind instead of mapping fresh pages for each: a sixth of the time."""
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def read_receipt(job: Job, index: int) -> dict:
    """What was written about a finished shard."""
    return json.loads((job.receipt_dir(index) / RECEIPT_FILE).read_text(encoding="utf-8"))


def is_finished(job: Job, index: int) -> bool:
    """Whether the shard is there with what was held out of it, and each file has its sha256."""
    try:
        receipt = read_receipt(job, index)
        checksums = {job.shard_path(index) / name: f["sha256"] for name, f in receipt["shard"]["files"].items()}
        checksums[job.receipt_dir(index) / HELD_OUT_FILE] = receipt["held_out_sha256"]
        return all(sha256_of(path) == checksum for path, checksum in checksums.items())
    except (OSError, ValueError, KeyError):
        return False


def _training_windows(
    job: Job, index: int, counts: Counts, hold_out: Callable[[pa.Array, np.ndarray], None], stop_file: Path
) -> Iterator[pa.Array]:
    """The shard's training documents, WINDOW_BYTES of them shuffled at a time, in batches."""
    order = np.random.default_rng(job.shuffle_seed).permutation(len(job.source.pieces))
    pieces = [job.source.pieces[i] for i in order]
    if len(pieces) >= job.num_shards:
        edges = [len(pieces) * i // job.num_shards for i in (index, index + 1)]
        documents = _documents_of(job.source, pieces[slice(*edges)])
    else:  # too few pieces to share out: every shard reads them all and takes each num_shards-th document
        documents = _every(_documents_of(job.source, pieces), job.num_shards, index)
    for number, window in enumerate(_windows(documents)):
        if stop_file.exists():
            raise Stopped
        filled = is_not_empty(window)
        counts.read_documents += len(window)
        counts.empty_documents += int((~filled).sum())
        window = window if filled.all() else window.filter(pa.array(filled))
        hashes = hash_documents(window)
        counts.fingerprint = (counts.fingerprint + int(hashes.sum(dtype=np.uint64))) % 2**64
        train, held_out, held_out_hashes = job.rule.split(window, hashes)
        if len(held_out):
            hold_out(held_out, held_out_hashes)
        if len(train):
            order = np.random.default_rng([job.shuffle_seed, index, number]).permutation(len(train))
            for part in np.array_split(order, min(len(order), train.nbytes // BATCH_BYTES + 1)):
                yield train.take(pa.array(part))


def _documents_of(source: Source, pieces: list[Piece]) -> Iterator[pa.Array]:
    for piece in pieces:
        yield from source.read(piece)


def _every(arrays: Iterator[pa.Array], step: int, offset: int) -> Iterator[pa.Array]:
    """Documents offset, offset + step, ... of all."""
    seen = 0
    for array in arrays:
        first = (offset - seen) % step
        yield array.take(pa.array(np.arange(first, len(array), step)))
        seen += len(array)


def _windows(arrays: Iterator[pa.Array], size_of_each: int = WINDOW_BYTES) -> Iterator[pa.Array]:
    pending, size = [], 0
    for array in arrays:
        if len(array):
            pending.append(array)
            size += array.nbytes
        if size >= size_of_each:
            yield pa.concat_arrays(pending)
            pending, size = [], 0
    if pending:
        yield pa.concat_arrays(pending)


# Validation


def validation_windows(source: Source, counts: Counts) -> Iterator[pa.Array]:
    """The documents of --validation_file in their own order."""
    for window in _windows(_documents_of(source, source.pieces), BATCH_BYTES):
        filled = is_not_empty(window)
        counts.empty_documents += int((~filled).sum())
        if filled.any():
            yield window.filter(pa.array(filled))


def held_out_windows(job: Job) -> Iterator[pa.Array]:
    """The documents that the shards held out, in the order of their hashes."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(job.receipt_dir(index) / HELD_OUT_FILE)) for index in range(job.num_shards)]
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    held_out = concatenate_datasets(parts)
    hashes = pa.concat_arrays(held_out.data.column("hash").chunks).to_numpy()
    ordered = held_out.select(np.argsort(hashes, kind="stable")).select_columns(["document"]).with_format("arrow")
    documents = (table.column("document").combine_chunks() for table in ordered.iter(256))
    yield from _windows(
        (pa.concat_arrays(d.chunks) if isinstance(d, pa.ChunkedArray) else d for d in documents), BATCH_BYTES
    )


@contextlib.contextmanager
def _held_out_writer(path: Path) -> Iterator[Callable[[pa.Array, np.ndarray], None]]:
    """A function that appends documents and their hashes to an Arrow file."""
    with contextlib.ExitStack() as stack:
        writers: list[pa.RecordBatchStreamWriter] = []

        def write(documents: pa.Array, hashes: np.ndarray) -> None:
            batch = pa.record_batch({"document": documents, "hash": pa.array(hashes)})
            if not writers:
                stream = stack.enter_context(pa.OSFile(str(path), "wb"))
                writers.append(stack.enter_context(pa.ipc.new_stream(stream, batch.schema)))
            writers[0].write_batch(batch)

        yield write
        if not writers:
            write(pa.array([], pa.large_string()), np.empty(0, dtype=np.uint64))


# Rows


def write_rows(
    windows: Iterator[pa.Array],
    folder: Path,
    encoder: Encoder,
    packing: str,
    block_size: int,
    counts: Counts,
    name: str,
) -> dict[str, dict]:
    """Encode and pack documents into the `datasets` folder `folder`; returns its files with size and sha256.

    Adds to `counts` what was written. name: what the documents are, for messages.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"input_ids": List(Value(encoder.dtype), length=block_size + 1), "num_tokens": Value("int32")})
    token_bytes = None
    packer = PACKERS[packing](block_size, encoder.eos_token_id, encoder.dtype)
    with _HashingFile(folder / f"{DATA_FILE}.tmp") as file, ArrowWriter(features=features, stream=file) as writer:

        def write(rows: Rows) -> None:
            if len(rows.input_ids):
                ids = pa.FixedSizeListArray.from_arrays(pa.array(rows.input_ids.ravel()), block_size + 1)
                writer.write_table(pa.table({"input_ids": ids, "num_tokens": rows.num_tokens}))
                counts.rows += len(rows.input_ids)

        for number, documents in enumerate(windows):
            if not number:
                check_engine(encoder, documents, name)
            ids, lengths = encoder.encode(documents)
            counts.documents += len(documents)
            counts.tokens += len(ids)
            counts.add_lengths(lengths)
            if pa.types.is_large_string(documents.type):
                counts.bytes += pc.sum(pc.binary_length(documents)).as_py()
            else:
                token_bytes = bytes_of_tokens(encoder.tokenizer_json) if token_bytes is None else token_bytes
                if ids.max() >= len(token_bytes):
                    raise GPT2ModernError(
                        f"{name}: holds the id {ids.max()}, but --tokenizer_name has {len(token_bytes)} entries"
                    )
                counts.bytes += int(token_bytes[ids].sum()) - len(lengths) * int(token_bytes[encoder.eos_token_id])
            write(packer.add(ids, lengths))
        write(packer.finish())
        writer.finalize()
    counts.cut_documents += packer.cut_documents
    # What surrounds the data file is written by `datasets` itself, for an empty table of the same features.
    empty = Dataset(pa.table(features.arrow_schema.empty_table()), fingerprint=file.sha256[:16])
    with _no_progress_bar():
        empty.save_to_disk(folder, num_shards=1)
    (folder / f"{DATA_FILE}.tmp").replace(folder / DATA_FILE)
    known = {DATA_FILE: file.sha256}
    return {
        path.name: {"size": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path)}
        for path in sorted(folder.iterdir())
    }


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class _HashingFile:
    """A file for Arrow to write to, whose sha256 is known when it is closed.

    What is written goes to disk beside the next computation, so that the flush before the rename has little left to
    wait for: with a disk of 200 MB/s it would otherwise take as long as all the rest.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future] = []
        self._unflushed = 0
        self.sha256 = ""

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            self._flushes.append(self._flusher.submit(os.fsync, self._file.fileno()))
            self._unflushed = 0
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._flusher.shutdown()
        self._file.close()
        for flush in self._flushes:
            flush.result()  # raises its error, which the flush before the rename would not see again
        self.sha256 = self._digest.hexdigest()

    def tell(self) -> int:
        return self._file.tell()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


# Files that are whole or not there


@contextlib.contextmanager
def _built(final: Path, workspace: Path | None = None) -> Iterator[Path]:
    """A temporary folder that gets its name, flushed to disk, when the block ends well, and is removed otherwise."""
    build = (workspace or final.parent) / f".{final.name}.partial"
    shutil.rmtree(build, ignore_errors=True)  # of a process that was killed
    build.mkdir(parents=True)
    try:
        yield build
        publish(build, final)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def publish(build: Path, final: Path) -> None:
    """Flush a folder and its files to disk, and give it its name."""
    for path in [*build.rglob("*"), build]:
        flush_to_disk(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    build.rename(final)
    flush_to_disk(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole, and is on disk."""
    # Machines that share the folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process writes the same; a killed process holds no lock."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
