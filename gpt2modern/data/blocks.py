"""Read what prepare_data.py wrote: memory-mapped blocks of tokens, in O(1) and at any block size."""

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
    """Give the blocks of one split of a prepared folder: block_size + 1 tokens, so that each position has a target.

    Rows on disk hold the manifest's block size + 1 tokens and how many of the targets (tokens 1, 2, ...) are real; the
    rest is padding and is served as IGNORE_INDEX. With packing "concat" a row begins with its predecessor's last
    token, so another `block_size` cuts the stream that they form again, within each shard; its last block is padded.
    Rows packed "best_fit" are independent of each other and have one block size.
    `data_dir` is a folder or the name of a dataset on the Hub. Pickling carries the arguments only: a worker maps the
    files again.

    manifest: what prepare_data.py wrote; tokens: real targets of the split; bytes_per_token: UTF-8 bytes of its text
    per token, which turns nats per token into bits per byte.
    Raises GPT2ModernError naming the file for a folder without a manifest or of another format, and for a missing, cut
    or altered shard (size, columns and counts; `verify_checksums` reads every byte).
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int | None = None):
        self.data_dir, self.split = local_folder(data_dir), split
        self.manifest = read_manifest(self.data_dir)
        splits = self.manifest["splits"]
        _require(split in splits, f"{self.data_dir}: no split {split!r}; there is {', '.join(splits)}")
        counts = splits[split]
        self.row_size: int = self.manifest["block_size"]
        self.block_size: int = self.row_size if block_size is None else block_size
        self.packing: str = self.manifest["packing"]
        _require(self.block_size >= 1, f"--block_size {block_size}: must be at least 1")
        _require(
            self.packing == "concat" or self.block_size == self.row_size,
            f"--block_size {block_size}: {self.data_dir} was packed {self.packing} for {self.row_size}; leave the flag "
            f"out, or prepare the data with --block_size {block_size} or --packing concat",
        )
        _require(counts["tokens"] > 0, f"{self.data_dir}: split {split!r} has no tokens; prepare it from more text")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eos_token_id: int = self.manifest["eos_token_id"]
        self.tokens: int = counts["tokens"]
        self.bytes_per_token: float = counts["bytes"] / counts["tokens"]

        self._check_files(checksum=False)
        self.tokenizer_files = read_tokenizer_files(self.data_dir)
        shards = [self._map_shard(shard) for shard in counts["shards"]]
        self._chunks = [chunk for chunks, _ in shards for chunk in chunks]
        # Concat has full rows and blocks up to each shard's last one; only best_fit needs its 4 bytes a row: (rows,)
        self._row_tokens = np.concatenate([tokens for _, tokens in shards]) if self.packing == "best_fit" else None
        # Entry i: where chunk i begins among all rows, shard i among all rows and among all blocks; the end comes last.
        self._chunk_starts = [0, *itertools.accumulate(map(len, self._chunks))]
        shard_rows = np.array([shard["rows"] for shard in counts["shards"]])
        self._shard_tokens = np.array([shard["tokens"] for shard in counts["shards"]])
        shard_blocks = shard_rows if self.packing == "best_fit" else -(-self._shard_tokens // self.block_size)
        self._row_starts = np.concatenate([[0], np.cumsum(shard_rows)])
        self._block_starts = np.concatenate([[0], np.cumsum(shard_blocks)])

    def __len__(self) -> int:
        return int(self._block_starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """One block: (block_size + 1,) int64; raises IndexError outside of [-len, len)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Blocks in the order asked: (len(indices), block_size + 1) int64, IGNORE_INDEX after a block's last real
        target. A DataLoader calls it once per batch; give it an identity `collate_fn`."""
        blocks = self._checked(indices)
        shard, start = self._shard_and_start(blocks)
        tokens = self._read(shard, start)
        num_targets = self._num_targets(blocks, shard, start)
        for padded in (num_targets < self.block_size).nonzero()[0]:
            tokens[padded, 1 + num_targets[padded] :] = IGNORE_INDEX
        if (largest := tokens.max(initial=0)) >= self.vocab_size:  # an embedding would read beyond its table
            where = f"{self.data_dir / self.split}: has token id {largest}"
            raise GPT2ModernError(
                f"{where}, but the manifest says vocab_size {self.vocab_size}; prepare the data again"
            )
        return torch.from_numpy(tokens)

    def __reduce__(self):
        return type(self), (self.data_dir, self.split, self.block_size)

    def num_targets(self, indices: Sequence[int]) -> int:
        """Real targets in the given blocks, all together: what their summed loss is divided by. Reads no tokens."""
        blocks = self._checked(indices)
        return int(self._num_targets(blocks, *self._shard_and_start(blocks)).sum())

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer, for `AutoTokenizer.from_pretrained`."""
        return self.data_dir / "tokenizer"

    def verify_checksums(self) -> None:
        """Read every file of the split, and tokenizer.json; GPT2ModernError for the first whose sha256 differs."""
        self._check_files(checksum=True)

    def _check_files(self, *, checksum: bool) -> None:
        """Raise GPT2ModernError for a file of another size; checksum: or sha256, which of tokenizer.json always counts."""
        for path, recorded in recorded_files(self.data_dir, self.manifest, [self.split]):
            problem = file_problem(path, recorded, checksum=checksum or path.name == "tokenizer.json")
            _require(problem is None, problem)

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        """(n,) block numbers in [0, len); IndexError for others than those and their negative names."""
        blocks = np.asarray(indices, dtype=np.int64)
        blocks = np.where(blocks < 0, blocks + len(self), blocks)
        if blocks.size and not (blocks.min() >= 0 and blocks.max() < len(self)):
            raise IndexError(f"block index out of range: {self.split} has {len(self)} blocks")
        return blocks

    def _num_targets(self, blocks: np.ndarray, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """(n,) block numbers, and where they are -> (n,) real targets of each."""
        if self._row_tokens is not None:
            return self._row_tokens[blocks]
        return np.minimum(self._shard_tokens[shard] - start, self.block_size)

    def _shard_and_start(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) block numbers -> (n,) shards, and (n,) where the blocks begin in their shard's stream of targets."""
        shard = np.searchsorted(self._block_starts, blocks, side="right") - 1
        return shard, (blocks - self._block_starts[shard]) * self.block_size

    def _read(self, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
        """(n,) places of blocks -> (n, block_size + 1) int64; what lies past the end of a shard is not filled in."""
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
        """Map a shard's files: its record batches, each (rows, row_size + 1), and (rows,) real targets of each row.

        Raises GPT2ModernError where its columns or counts are not those of the manifest.
        """
        path = self.data_dir / shard["path"]
        files = [path / name for name in sorted(shard["files"]) if name.endswith(".arrow")]
        tokens = pa.list_(pa.type_for_alias(self.manifest["dtype"]), self.row_size + 1)
        expected = pa.schema({"input_ids": tokens, "num_tokens": pa.int32()})
        try:
            table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)
            found, wanted = (", ".join(f"{f.name} {f.type}" for f in each) for each in (table.schema, expected))
            problem = f"mixed formats: has the columns {found}, the manifest says {wanted}; prepare the data again"
            _require(table.schema.equals(expected), f"{path}: {problem}")
            chunks = table["input_ids"].chunks
            rows = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1) for chunk in chunks]
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            raise GPT2ModernError(f"{[*files, path][0]}: cannot be read ({error}); prepare the data again") from error
        num_tokens = table["num_tokens"].to_numpy()
        for name, count in {"rows": len(table), "tokens": num_tokens.sum(dtype=np.int64)}.items():
            known = shard[name]
            _require(count == known, f"{path}: has {count} {name}, the manifest says {known}; prepare the data again")
        full = num_tokens[:-1] if self.packing == "concat" else num_tokens[:0]
        _require(
            (full == self.row_size).all() and ((num_tokens >= 1) & (num_tokens <= self.row_size)).all(),
            f"{path}: mixed formats: its rows have {num_tokens.min()} to {num_tokens.max()} tokens, "
            f"which packing {self.packing} for {self.row_size} does not give; prepare the data again",
        )
        return rows, num_tokens


def _require(condition: bool, problem: str | None) -> None:
    if not condition:
        raise GPT2ModernError(problem)


def refuse_other_tokenizer(model: str, blocks: PackedBlocks) -> None:
    """Raise GPT2ModernError if the model folder has another tokenizer.json than the data was encoded with."""
    path, expected = Path(model) / "tokenizer.json", blocks.manifest["tokenizer"]["sha256"]
    _require(
        not path.is_file() or sha256_of(path) == expected,
        f"{blocks.data_dir} was prepared with another tokenizer than {path}; prepare it with --tokenizer_name {model}",
    )


def refuse_larger_vocabulary(model: str, vocab_size: int, blocks: PackedBlocks) -> None:
    """Raise GPT2ModernError if the data has token ids beyond a model's `vocab_size`; model: its name in the message."""
    _require(
        blocks.vocab_size <= vocab_size,
        f"{blocks.data_dir / 'manifest.json'}: the data has {blocks.vocab_size} token ids, {model}'s vocab_size is only "
        f"{vocab_size}; prepare the data with the model's tokenizer",
    )
