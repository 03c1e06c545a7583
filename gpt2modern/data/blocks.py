"""Read a folder written by prepare_data.py: blocks of tokens, each read from its place in a file."""

import bisect
import io
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from gpt2modern.data.manifest import file_problem, local_folder, read_manifest, read_tokenizer_files, recorded_files
from gpt2modern.data.rows import schema_of
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import sha256_of

IGNORE_INDEX = -100  # transformers' label for "no target"


class PackedBlocks(torch.utils.data.Dataset):
    """Read the blocks of one split of a prepared folder: block_size + 1 tokens each, so each position has a target.

    Every token on disk is a target once. The token before the first target is the previous one of the text, or EOS at
    the start of a document or shard. Data packed "concat" is one stream per shard and can be read with any `block_size`
    (the last block of a shard is padded); "best_fit" has one block size, and a block is one row. Padding is returned as
    IGNORE_INDEX. data_dir: a folder, or the name of a dataset on the Hub. Pickling keeps only the arguments: a worker
    process opens the files again.

    manifest: content of manifest.json. tokens: number of real targets in the split. bytes_per_token: mean UTF-8 bytes
    of text per token, which converts nats per token to bits per byte.
    Raises GPT2ModernError that names the file if the manifest is missing or of another format, or if a shard is
    missing or differs in size, columns or counts. Only `verify_checksums` reads every byte.
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int | None = None):
        self.data_dir, self.split = local_folder(data_dir), split
        self.manifest = read_manifest(self.data_dir)
        splits = self.manifest["splits"]
        _require(split in splits, f"{self.data_dir} has no split {split!r}; its splits are {', '.join(splits)}")
        counts = splits[split]
        self.row_size: int = self.manifest["block_size"]
        self.block_size: int = self.row_size if block_size is None else block_size
        self.eos_token_id: int = self.manifest["eos_token_id"]
        self.packing: str = self.manifest["packing"]
        _require(self.block_size >= 1, f"--block_size {block_size} must be at least 1")
        _require(
            self.packing == "concat" or self.block_size == self.row_size,
            f"--block_size {block_size}: {self.data_dir} was packed {self.packing} for {self.row_size}; omit the flag, "
            f"or prepare the data with --block_size {block_size} or --packing concat",
        )
        _require(counts["tokens"] > 0, f"{self.data_dir}: the split {split!r} has no tokens; prepare it from more text")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.tokens: int = counts["tokens"]
        self.bytes_per_token: float = counts["bytes"] / counts["tokens"]

        self._check_files(checksum=False)
        self.tokenizer_files = read_tokenizer_files(self.data_dir)
        self._segments: list[Segment] = []
        # Entry i: number of tokens before segment i, before shard i, before block i of best_fit. The last is the total.
        self._segment_starts = [0]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # each shard keeps a file open; often 1024 may be
        wanted = soft + len(counts["shards"])
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(hard, wanted), hard))
        opened = [self._open_shard(shard) for shard in counts["shards"]]
        self._shard_starts = _starts([shard["tokens"] for shard in counts["shards"]])
        if self.packing == "best_fit":
            self._row_starts = _starts(np.concatenate([lengths for lengths, _ in opened]))
            self._previous_tokens = np.concatenate([previous for _, previous in opened])
            self._block_starts = _starts([shard["rows"] for shard in counts["shards"]])
        else:
            self._block_starts = _starts(-(-np.diff(self._shard_starts) // self.block_size))

    def __len__(self) -> int:
        return int(self._block_starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return one block: (block_size + 1,) int64. Raises IndexError if `index` is not in [-len, len)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Return blocks in the order of `indices`: (len(indices), block_size + 1) int64, IGNORE_INDEX where there is
        padding. A DataLoader calls this once per batch; give the DataLoader an identity `collate_fn`."""
        blocks = self._checked(indices)
        starts, sizes, previous = self._places(blocks)
        out = np.empty((len(blocks), self.block_size + 1), dtype=np.int64)
        for block, start, size, token in zip(out, starts.tolist(), sizes.tolist(), previous.tolist(), strict=True):
            is_read = token < 0  # with the targets, as it is the token before them in the file
            block[0] = token
            self._read(block[1 - is_read : 1 + size], start - is_read)
            block[1 + size :] = IGNORE_INDEX
        return self._as_ids(out)

    def stream(self, start: int, stop: int) -> torch.Tensor:
        """Return tokens number `start` to `stop` - 1 of the split as one text: (stop - start,) int64; -1 is an EOS."""
        out = np.full(stop - start, self.eos_token_id, dtype=np.int64)
        self._read(out[max(0, -start) :], max(0, start))
        return self._as_ids(out)

    def _as_ids(self, out: np.ndarray) -> torch.Tensor:
        if (largest := out.max(initial=0)) >= self.vocab_size:  # an embedding would read beyond its table
            raise GPT2ModernError(
                f"{self.data_dir / self.split} has token id {largest}, but the manifest says vocab_size "
                f"{self.vocab_size}; prepare the data again"
            )
        return torch.from_numpy(out)

    def __reduce__(self):
        return type(self), (self.data_dir, self.split, self.block_size)

    def num_targets(self, indices: Sequence[int]) -> int:
        """Return the total number of real targets in the given blocks, by which to divide their summed loss."""
        _, sizes, _ = self._places(self._checked(indices))
        return int(sizes.sum())

    @property
    def num_shards(self) -> int:
        return len(self._shard_starts) - 1

    def shard_tokens(self, index: int, size: int = 1 << 24) -> Iterator[np.ndarray]:
        """Yield the tokens of one shard in order, int64, at most `size` at a time. Repeated tokens are yielded once."""
        start, stop = self._shard_starts[index : index + 2].tolist()
        for first in range(start, stop, size):
            tokens = np.empty(min(size, stop - first), dtype=np.int64)
            self._read(tokens, first)
            yield tokens

    @property
    def tokenizer_path(self) -> Path:
        """Return the folder of the tokenizer, for `AutoTokenizer.from_pretrained`."""
        return self.data_dir / "tokenizer"

    def verify_checksums(self) -> None:
        """Check the sha256 of all files of the split and the tokenizer. Raises GPT2ModernError for a mismatch."""
        self._check_files(checksum=True)

    def _check_files(self, *, checksum: bool) -> None:
        """Raise GPT2ModernError if a file has another size or, with `checksum` (always for tokenizer.json), sha256."""
        for path, recorded in recorded_files(self.data_dir, self.manifest, [self.split]):
            problem = file_problem(path, recorded, checksum=checksum or path.name == "tokenizer.json")
            _require(problem is None, problem)

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        """Return (n,) block numbers in [0, len); negative ones count from the end. Raises IndexError for any other."""
        blocks = np.asarray(indices, dtype=np.int64)
        blocks = np.where(blocks < 0, blocks + len(self), blocks)
        if blocks.size and not (blocks.min() >= 0 and blocks.max() < len(self)):
            raise IndexError(f"block index out of range: the split {self.split} has {len(self)} blocks")
        return blocks

    def _places(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for (n,) block numbers the place of their first target in the split, their number of targets, and the
        token before the first target, or -1 if that is the previous one of the split; all int64."""
        if self.packing == "best_fit":
            starts = self._row_starts[blocks]
            return starts, self._row_starts[blocks + 1] - starts, self._previous_tokens[blocks].astype(np.int64)
        shard = np.searchsorted(self._block_starts, blocks, side="right") - 1
        starts = self._shard_starts[shard] + (blocks - self._block_starts[shard]) * self.block_size
        sizes = np.minimum(self._shard_starts[shard + 1] - starts, self.block_size)
        return starts, sizes, np.where(starts == self._shard_starts[shard], self.eos_token_id, -1)

    def _read(self, out: np.ndarray, start: int) -> None:
        """Copy the tokens of the split from number `start` on to `out`, (n,) int64."""
        while len(out):
            index = bisect.bisect_right(self._segment_starts, start) - 1
            tokens = self._segments[index].read(start - self._segment_starts[index], len(out))
            out[: len(tokens)] = tokens
            out, start = out[len(tokens) :], start + len(tokens)

    def _open_shard(self, shard: dict) -> tuple[np.ndarray, np.ndarray]:
        """Open a shard and add its segments. Returns (rows,) tokens per row and, for best_fit, (rows,) previous tokens.

        The file is mapped only during this call, for about a millisecond. Raises GPT2ModernError if the columns or
        counts differ from those in the manifest.
        """
        path = self.data_dir / shard["path"]
        is_concat, dtype = self.packing == "concat", np.dtype(self.manifest["dtype"])
        size, expected = self.manifest["files"][shard["path"]]["size"], schema_of(dtype.name, self.packing)
        segments, lengths, previous = [], [np.empty(0, np.int64)], [np.empty(0, dtype)]
        try:
            file, mapped = path.open("rb", buffering=0), pa.memory_map(str(path)).read_buffer()
            if not mapped.size == size == os.fstat(file.fileno()).st_size:
                raise OSError("it has changed since its size was checked")
            table = pa.ipc.open_stream(mapped).read_all()
            found, wanted = (", ".join(f"{f.name} {f.type}" for f in each) for each in (table.schema, expected))
            problem = f"mixed formats: the shard has the columns {found}, but the manifest says {wanted}"
            _require(table.schema.equals(expected), f"{path}: {problem}; prepare the data again")
            for chunk in table["input_ids"].chunks:
                chunk.validate(full=True)  # the offsets
                offsets = _view(chunk.offsets, "<i4")
                place = chunk.values.buffers()[1].address - mapped.address + int(offsets[0]) * dtype.itemsize
                segments.append(Segment(file, place, int(offsets[-1] - offsets[0]), dtype))
                lengths.append(np.diff(offsets))
            for chunk in [] if is_concat else table["previous_token"].chunks:
                previous.append(_view(chunk, dtype).copy())
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise GPT2ModernError(f"{path}: cannot be read ({error}); prepare the data again") from error
        lengths = np.concatenate(lengths)
        full = lengths[:-1] if is_concat else lengths[:0]
        if (full != self.row_size).any() or (lengths < 1).any() or (lengths > self.row_size).any():
            raise GPT2ModernError(
                f"{path}: mixed formats: the rows have {lengths.min()} to {lengths.max()} tokens, which is invalid for "
                f"packing {self.packing} with block size {self.row_size}; prepare the data again"
            )
        last = int(lengths[-1]) if is_concat and len(lengths) else 1
        repeated = int(lengths.sum()) - shard["tokens"]  # by the last row of concat
        tokens = shard["tokens"] if 0 <= repeated < last else lengths.sum()
        for name, count in {"rows": len(lengths), "tokens": tokens}.items():
            problem = f"{path} has {count} {name}, but the manifest says {shard[name]}; prepare the data again"
            _require(count == shard[name], problem)
        if repeated:
            before, row = segments[-1].split(segments[-1].size - last)
            segments[-1:] = [before, row.split(repeated)[1]]
        for segment in segments:
            if segment.size:
                self._segments.append(segment)
                self._segment_starts.append(self._segment_starts[-1] + segment.size)
        return lengths, np.concatenate(previous)


class Segment(NamedTuple):
    """Locate consecutive tokens in an open file. place: byte of the first token; size: number of tokens."""

    file: io.FileIO
    place: int
    size: int
    dtype: np.dtype

    def split(self, size: int) -> tuple["Segment", "Segment"]:
        """Divide the segment after `size` tokens."""
        place = self.place + size * self.dtype.itemsize
        return self._replace(size=size), self._replace(place=place, size=self.size - size)

    def read(self, offset: int, count: int) -> np.ndarray:
        """Return at most `count` tokens from number `offset` of the segment on. Raises GPT2ModernError if the file
        cannot be read or was truncated; with a memory map, that would end the process by SIGBUS."""
        item = self.dtype.itemsize
        size = min(count, self.size - offset) * item
        try:
            data, problem = os.pread(self.file.fileno(), size, self.place + offset * item), "it was truncated"
        except OSError as error:
            data, problem = b"", error.strerror
        if len(data) != size:
            problem = f"{self.file.name}: cannot be read ({problem}); prepare the data again, then resume the run"
            raise GPT2ModernError(problem)
        return np.frombuffer(data, self.dtype)


def _view(array: pa.Array, dtype: np.dtype | str) -> np.ndarray:
    """Return the values of an Arrow array. Its own method to_numpy would import pandas, which takes 0.2 s."""
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Return (len(sizes) + 1,) int64: how many items are before each part of the given sizes, and in total."""
    return np.append(0, np.cumsum(sizes, dtype=np.int64))


def _require(condition: bool, problem: str | None) -> None:
    if not condition:
        raise GPT2ModernError(problem)


def refuse_other_tokenizer(model: str, blocks: PackedBlocks) -> None:
    """Raise GPT2ModernError if the folder `model` has a tokenizer.json that differs from the one of the data."""
    path, expected = Path(model) / "tokenizer.json", blocks.manifest["tokenizer"]["sha256"]
    _require(
        not path.is_file() or sha256_of(path) == expected,
        f"{blocks.data_dir} was prepared with another tokenizer than {path}; prepare it with --tokenizer_name {model}",
    )


def refuse_larger_vocabulary(model: str, vocab_size: int, blocks: PackedBlocks) -> None:
    """Raise GPT2ModernError if the data's vocabulary is larger than `vocab_size`. model: its name in the message."""
    _require(
        blocks.vocab_size <= vocab_size,
        f"{blocks.data_dir / 'manifest.json'}: the data has {blocks.vocab_size} token ids, but the vocab_size of "
        f"{model} is only {vocab_size}; prepare the data with the model's tokenizer",
    )
