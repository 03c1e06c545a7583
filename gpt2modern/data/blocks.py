"""Read a folder written by prepare_data.py: memory-mapped blocks of tokens, each read in O(1)."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from gpt2modern.data.manifest import file_problem, local_folder, read_manifest, read_tokenizer_files, recorded_files
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import sha256_of

IGNORE_INDEX = -100  # transformers' label for "no target"


class PackedBlocks(torch.utils.data.Dataset):
    """Read the blocks of one split of a prepared folder: block_size + 1 tokens each, so each position has a target.

    A row on disk holds the manifest's block size + 1 tokens and the number of its real targets (tokens 1, 2, ...); the
    rest is padding, which is returned as IGNORE_INDEX. Data packed "concat" is one stream per shard and can be read
    with any `block_size` (the last block of a shard is padded). Data packed "best_fit" has one block size.
    data_dir: a folder, or the name of a dataset on the Hub. Pickling keeps only the arguments: a worker process maps
    the files again.

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
        self.packing: str = self.manifest["packing"]
        _require(self.block_size >= 1, f"--block_size {block_size} must be at least 1")
        _require(
            self.packing == "concat" or self.block_size == self.row_size,
            f"--block_size {block_size}: {self.data_dir} was packed {self.packing} for {self.row_size}; omit the flag, "
            f"or prepare the data with --block_size {block_size} or --packing concat",
        )
        _require(counts["tokens"] > 0, f"{self.data_dir}: the split {split!r} has no tokens; prepare it from more text")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eos_token_id: int = self.manifest["eos_token_id"]
        self.tokens: int = counts["tokens"]
        self.bytes_per_token: float = counts["bytes"] / counts["tokens"]

        self._check_files(checksum=False)
        self.tokenizer_files = read_tokenizer_files(self.data_dir)
        shards = [self._map_shard(shard) for shard in counts["shards"]]
        self._chunks = [chunk for chunks, _ in shards for chunk in chunks]
        # (rows,) real targets of each row; concat needs no array, as only the last row of a shard is not full.
        self._row_tokens = np.concatenate([tokens for _, tokens in shards]) if self.packing == "best_fit" else None
        # Entry i: number of rows before chunk i; of rows, and of blocks, before shard i. The last entry is the total.
        self._chunk_starts = [0, *itertools.accumulate(map(len, self._chunks))]
        shard_rows = np.array([shard["rows"] for shard in counts["shards"]])
        self._shard_tokens = np.array([shard["tokens"] for shard in counts["shards"]])
        shard_blocks = shard_rows if self.packing == "best_fit" else -(-self._shard_tokens // self.block_size)
        self._row_starts = np.concatenate([[0], np.cumsum(shard_rows)])
        self._block_starts = np.concatenate([[0], np.cumsum(shard_blocks)])

    def __len__(self) -> int:
        return int(self._block_starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return one block: (block_size + 1,) int64. Raises IndexError if `index` is not in [-len, len)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Return blocks in the order of `indices`: (len(indices), block_size + 1) int64, IGNORE_INDEX where there is
        padding. A DataLoader calls this once per batch; give the DataLoader an identity `collate_fn`."""
        blocks = self._checked(indices)
        shard, start = self._shard_and_start(blocks)
        tokens = self._read(shard, start)
        num_targets = self._num_targets(blocks, shard, start)
        for padded in (num_targets < self.block_size).nonzero()[0]:
            tokens[padded, 1 + num_targets[padded] :] = IGNORE_INDEX
        if (largest := tokens.max(initial=0)) >= self.vocab_size:  # an embedding would read beyond its table
            raise GPT2ModernError(
                f"{self.data_dir / self.split} has token id {largest}, but the manifest says vocab_size "
                f"{self.vocab_size}; prepare the data again"
            )
        return torch.from_numpy(tokens)

    def __reduce__(self):
        return type(self), (self.data_dir, self.split, self.block_size)

    def num_targets(self, indices: Sequence[int]) -> int:
        """Return the total number of real targets in the given blocks, by which to divide their summed loss."""
        blocks = self._checked(indices)
        return int(self._num_targets(blocks, *self._shard_and_start(blocks)).sum())

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

    def _num_targets(self, blocks: np.ndarray, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return (n,) real targets per block, given the blocks' numbers, shards and starts (see `_shard_and_start`)."""
        if self._row_tokens is not None:
            return self._row_tokens[blocks]
        return np.minimum(self._shard_tokens[shard] - start, self.block_size)

    def _shard_and_start(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for (n,) block numbers their (n,) shards and (n,) offsets, in targets, from the start of the shard."""
        shard = np.searchsorted(self._block_starts, blocks, side="right") - 1
        return shard, (blocks - self._block_starts[shard]) * self.block_size

    def _read(self, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Return (n, block_size + 1) int64 tokens of blocks; positions past the end of a shard stay uninitialized."""
        rows, offsets = np.divmod(start, self.row_size)
        rows, ends = rows + self._row_starts[shard], self._row_starts[shard + 1]
        out = np.empty((len(rows), self.block_size + 1), dtype=np.int64)
        # One copy a row: gathering whole rows by index arrays is 2 to 10 times slower where another size is cut.
        for block, row, offset, end in zip(out, rows.tolist(), offsets.tolist(), ends.tolist(), strict=True):
            filled = 0
            while filled <= self.block_size and row < end:
                chunk = bisect.bisect_right(self._chunk_starts, row) - 1
                piece = self._chunks[chunk][row - self._chunk_starts[chunk], offset : offset + len(block) - filled]
                block[filled : filled + len(piece)] = piece
                filled += len(piece)
                row, offset = row + 1, 1  # the first token of the next row is the last one of this
        return out

    def _map_shard(self, shard: dict) -> tuple[list[np.ndarray], np.ndarray]:
        """Memory-map a shard. Returns its record batches, each (rows, row_size + 1), and (rows,) real targets per row.

        Raises GPT2ModernError if the columns or counts differ from those in the manifest.
        """
        path = self.data_dir / shard["path"]
        files = [path / name for name in sorted(shard["files"]) if name.endswith(".arrow")]
        tokens = pa.list_(pa.type_for_alias(self.manifest["dtype"]), self.row_size + 1)
        expected = pa.schema({"input_ids": tokens, "num_tokens": pa.int32()})
        try:
            table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)
            found, wanted = (", ".join(f"{f.name} {f.type}" for f in each) for each in (table.schema, expected))
            problem = f"mixed formats: the shard has the columns {found}, but the manifest says {wanted}"
            _require(table.schema.equals(expected), f"{path}: {problem}; prepare the data again")
            chunks = table["input_ids"].chunks
            rows = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1) for chunk in chunks]
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise GPT2ModernError(f"{[*files, path][0]}: cannot be read ({error}); prepare the data again") from error
        num_tokens = table["num_tokens"].to_numpy()
        for name, count in {"rows": len(table), "tokens": num_tokens.sum(dtype=np.int64)}.items():
            problem = f"{path} has {count} {name}, but the manifest says {shard[name]}; prepare the data again"
            _require(count == shard[name], problem)
        full = num_tokens[:-1] if self.packing == "concat" else num_tokens[:0]
        _require(
            (full == self.row_size).all() and ((num_tokens >= 1) & (num_tokens <= self.row_size)).all(),
            f"{path}: mixed formats: the rows have {num_tokens.min()} to {num_tokens.max()} tokens, which is invalid "
            f"for packing {self.packing} with block size {self.row_size}; prepare the data again",
        )
        return rows, num_tokens


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
