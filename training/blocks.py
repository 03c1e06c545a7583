"""Reading what prepare_data.py wrote: memory-mapped blocks of tokens, in O(1) and at any block size."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from command_line import UserError

FORMAT_VERSION = 1  # of manifest.json; equal to prepare_data.FORMAT_VERSION


class PackedBlocks(torch.utils.data.Dataset):
    """The blocks of one split of a prepared folder; a block is block_size + 1 tokens, so each position has a target.

    Rows on disk hold the manifest's block size + 1 tokens, the last one repeated at the start of the next row. Another
    `block_size` cuts the stream that they form again, within each shard; less than a block is left over per shard.
    Pickling carries the arguments only: a worker maps the files again.

    manifest: what prepare_data.py wrote; tokens: targets served, len(self) x block_size; bytes_per_token: UTF-8 bytes
    of the split's text per token of it, which turns nats per token into bits per byte.
    Raises UserError naming the file for a folder without a manifest or of another format, and for a missing, cut or
    altered shard (size and rows; `verify_checksums` reads every byte).
    """

    def __init__(self, data_dir: str | Path, split: str, block_size: int | None = None):
        self.data_dir = Path(data_dir)
        self.split = split
        self.manifest = read_manifest(self.data_dir)
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.data_dir}: no split {split!r}; there is {', '.join(self.manifest['splits'])}")
        counts = self.manifest["splits"][split]
        self.row_size: int = self.manifest["block_size"]
        self.block_size: int = self.row_size if block_size is None else block_size
        if self.block_size < 1:
            raise UserError(f"--block_size {block_size}: must be at least 1")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eos_token_id: int = self.manifest["eos_token_id"]
        self.bytes_per_token: float = counts["bytes"] / (counts["tokens"] + counts["dropped_tokens"])

        self._check_sizes()
        self._chunks: list[np.ndarray] = []  # (rows, row_size + 1) views of the files, one per Arrow record batch
        for shard in counts["shards"]:
            self._chunks += self._map_shard(shard)
        # Entry i: where chunk i begins among all rows, shard i among all rows and among all blocks; the end comes last.
        self._chunk_starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])
        shard_rows = np.array([shard["rows"] for shard in counts["shards"]])
        self._row_starts = np.concatenate([[0], np.cumsum(shard_rows)])
        self._block_starts = np.concatenate([[0], np.cumsum(shard_rows * self.row_size // self.block_size)])
        self.tokens: int = len(self) * self.block_size
        if not len(self):
            raise UserError(
                f"--block_size {self.block_size}: no shard of {self.data_dir / split} is that long "
                f"(the longest has {shard_rows.max() * self.row_size} tokens); use a smaller one"
            )

    def __len__(self) -> int:
        return int(self._block_starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        """One block: (block_size + 1,) int64; raises IndexError outside of [-len, len)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Blocks in the order asked: (len(indices), block_size + 1) int64. A DataLoader calls it once per batch; give
        it an identity `collate_fn`."""
        blocks = np.asarray(indices, dtype=np.int64)
        blocks = np.where(blocks < 0, blocks + len(self), blocks)
        if blocks.size and not (blocks.min() >= 0 and blocks.max() < len(self)):
            raise IndexError(f"block index out of range: {self.split} has {len(self)} blocks")
        tokens = self._rows(blocks) if self.block_size == self.row_size else self._recut(blocks)
        if tokens.size and tokens.max() >= self.vocab_size:  # an embedding would read beyond its table
            raise UserError(
                f"{self.data_dir / self.split}: has token id {tokens.max()}, but the manifest says vocab_size "
                f"{self.vocab_size}; prepare the data again"
            )
        return torch.from_numpy(tokens)

    def __reduce__(self):
        return type(self), (self.data_dir, self.split, self.block_size)

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer, for `AutoTokenizer.from_pretrained`."""
        return self.data_dir / "tokenizer"

    def verify_checksums(self) -> None:
        """Read every file of the split, and tokenizer.json; UserError for the first whose sha256 differs."""
        expected = {self.tokenizer_path / "tokenizer.json": self.manifest["tokenizer"]["sha256"]}
        for path, recorded in self._files():
            expected[path] = recorded["sha256"]
        for path, digest in expected.items():
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; prepare the data again") from None
            if found != digest:
                raise UserError(f"{path}: altered since it was written (sha256 differs); prepare the data again")

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """(n,) row numbers -> (n, row_size + 1) int64."""
        out = np.empty((len(rows), self.row_size + 1), dtype=np.int64)
        chunk_of_row = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        for chunk in np.unique(chunk_of_row):
            here = chunk_of_row == chunk
            out[here] = self._chunks[chunk][rows[here] - self._chunk_starts[chunk]]
        return out

    def _recut(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) block numbers -> (n, block_size + 1) int64, from the rows that each block touches."""
        shard = np.searchsorted(self._block_starts, blocks, side="right") - 1
        start = (blocks - self._block_starts[shard]) * self.block_size  # of the block, in its shard's stream
        first_row, offset = np.divmod(start, self.row_size)
        touched = np.arange((self.block_size + self.row_size - 2) // self.row_size + 1)
        # A block touches `touched` rows at most; past the shard's end the last row stands in and is not looked at.
        rows = np.minimum(self._row_starts[shard][:, None] + first_row[:, None] + touched, self._last_rows(shard))
        rows = self._rows(rows.ravel()).reshape(len(blocks), len(touched), self.row_size + 1)
        # Without their first tokens, rows are the stream of targets: nothing twice, nothing missing.
        targets = rows[:, :, 1:].reshape(len(blocks), -1)
        first_tokens = rows[np.arange(len(blocks)), 0, offset]
        following = np.take_along_axis(targets, offset[:, None] + np.arange(self.block_size), axis=1)
        return np.concatenate([first_tokens[:, None], following], axis=1)

    def _last_rows(self, shard: np.ndarray) -> np.ndarray:
        return self._row_starts[shard + 1][:, None] - 1

    def _files(self) -> list[tuple[Path, dict]]:
        return [
            (self.data_dir / shard["path"] / name, recorded)
            for shard in self.manifest["splits"][self.split]["shards"]
            for name, recorded in shard["files"].items()
        ]

    def _check_sizes(self) -> None:
        if not (self.tokenizer_path / "tokenizer.json").is_file():
            raise UserError(f"{self.tokenizer_path / 'tokenizer.json'}: missing; prepare the data again")
        for path, recorded in self._files():
            if not path.is_file():
                raise UserError(f"{path}: missing; prepare the data again")
            if path.stat().st_size != recorded["size"]:
                raise UserError(
                    f"{path}: has {path.stat().st_size} bytes, the manifest says {recorded['size']}; "
                    "prepare the data again"
                )

    def _map_shard(self, shard: dict) -> list[np.ndarray]:
        """Views of the shard's record batches, without a copy: (rows, row_size + 1) in the manifest's dtype."""
        from datasets import load_from_disk

        path = self.data_dir / shard["path"]
        try:
            column = load_from_disk(str(path)).data.column("input_ids")
            chunks = [
                chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), self.row_size + 1)
                for chunk in column.chunks
            ]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # pyarrow's are ValueErrors
            raise UserError(f"{path}: cannot be read ({error}); prepare the data again") from error
        if sum(map(len, chunks)) != shard["rows"]:
            raise UserError(
                f"{path}: has {sum(map(len, chunks))} rows, the manifest says {shard['rows']}; prepare the data again"
            )
        if any(chunk.dtype != self.manifest["dtype"] for chunk in chunks):
            raise UserError(f"{path}: does not hold {self.manifest['dtype']}; prepare the data again")
        return chunks


def read_manifest(data_dir: str | Path) -> dict:
    """manifest.json of a prepared folder; UserError if there is none or it is of another format."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file; --data_dir is a folder that prepare_data.py made") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); prepare the data again") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version!r}, this code reads {FORMAT_VERSION}; prepare the data again")
    required = {"block_size", "dtype", "vocab_size", "eos_token_id", "tokenizer", "source", "splits"}
    if missing := required - manifest.keys():
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}; prepare the data again")
    return manifest
