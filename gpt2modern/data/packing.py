"""Pack encoded documents into rows of block_size + 1 tokens.

A row's first token is context only; its next `num_tokens` tokens are targets; the rest, if any, is padding with EOS.
Each token of each document, and of the EOS that follows it, is a target exactly once.
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Hold rows. input_ids: (rows, block_size + 1), uint16 or uint32; num_tokens: (rows,) int32 targets per row."""

    input_ids: np.ndarray
    num_tokens: np.ndarray


class ConcatPacker:
    """Join documents to one stream and cut it every block_size tokens; only the last row has padding.

    A row starts with the last token of the previous row (the first row with EOS), so that the stream can be cut again
    to another block size. cut_documents: number of documents that are spread over more than one row.
    """

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.eos_token_id, self.cut_documents = block_size, eos_token_id, 0
        self._rest = np.array([eos_token_id], dtype=dtype)  # context, and the targets that do not fill a row yet
        self._tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """Add documents and return the rows that are now full. ids: of all documents; lengths: tokens of each one."""
        ends = self._tokens + np.cumsum(lengths)
        self.cut_documents += int(((ends - lengths) // self.block_size != (ends - 1) // self.block_size).sum())
        self._tokens += len(ids)
        tokens = np.concatenate([self._rest, ids])
        count = (len(tokens) - 1) // self.block_size
        self._rest = tokens[count * self.block_size :].copy()
        rows = np.lib.stride_tricks.as_strided(
            tokens, (count, self.block_size + 1), (self.block_size * tokens.itemsize, tokens.itemsize), writeable=False
        )
        return Rows(rows, np.full(count, self.block_size, dtype=np.int32))

    def finish(self) -> Rows:
        """Return the last row, padded with EOS, or no row if no tokens are left."""
        left = len(self._rest) - 1
        row = np.full((1, self.block_size + 1), self.eos_token_id, dtype=self._rest.dtype)
        row[0, : left + 1] = self._rest
        return Rows(row[: min(left, 1)], np.array([left], dtype=np.int32)[: min(left, 1)])


class BestFitPacker:
    """Pack by best-fit-decreasing (arXiv:2404.10830): a document that fits, with its EOS, into a block is not cut.

    Longer documents are cut every block_size tokens. A row starts with EOS, or, if it continues a document, with that
    document's previous token. At least WINDOW_TOKENS tokens are collected and packed together; then memory is freed.
    """

    WINDOW_TOKENS = 1 << 24

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.eos_token_id, self.dtype, self.cut_documents = block_size, eos_token_id, dtype, 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """Add documents as `ConcatPacker.add` does. Returns no rows until WINDOW_TOKENS are collected, then all."""
        self._waiting.append((ids, lengths))
        full = sum(len(ids) for ids, _ in self._waiting) >= self.WINDOW_TOKENS
        return self.finish() if full else Rows(np.empty((0, self.block_size + 1), self.dtype), np.empty(0, np.int32))

    def finish(self) -> Rows:
        """Pack the collected documents and return their rows."""
        ids = np.concatenate([np.empty(0, self.dtype), *(ids for ids, _ in self._waiting)])
        lengths = np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in self._waiting)])
        self._waiting = []
        self.cut_documents += int((lengths > self.block_size).sum())
        starts, lengths, continued = self._parts(lengths)
        bins, offsets, count = best_fit(lengths, self.block_size)
        # Token k of part p goes from starts[p] + k of the ids to 1 + offsets[p] + k of its row.
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = np.full((count, self.block_size + 1), self.eos_token_id, dtype=self.dtype)
        places = np.repeat(bins * (self.block_size + 1) + 1 + offsets, lengths) + within
        rows.ravel()[places] = ids[np.repeat(starts, lengths) + within]
        first = continued & (offsets == 0)
        rows[bins[first], 0] = ids[starts[first] - 1]
        return Rows(rows, np.bincount(bins, weights=lengths, minlength=count).astype(np.int32))

    def _parts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut documents into parts of at most block_size tokens. Returns each part's start in the ids, its number of
        tokens, and whether it continues a document."""
        counts = -(-lengths // self.block_size)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.repeat(np.cumsum(lengths), counts)
        starts = ends - np.repeat(lengths, counts) + number * self.block_size
        return starts, np.minimum(ends - starts, self.block_size), number > 0


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Put items of `lengths`, each in [1, capacity], into bins: longest first, each into the fullest bin that fits.

    Returns the bin of each item, its offset in the bin, and the number of bins.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    offsets = np.empty(len(lengths), dtype=np.int64)
    bins_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = count = 0  # bit i of spaces: there is a bin with i free
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_with_space[space].pop()
            if not bins_with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, chosen = capacity, count
            count += 1
        bins[item], offsets[item] = chosen, capacity - space
        if space > length:
            bins_with_space[space - length].append(chosen)
            spaces |= 1 << (space - length)
    return bins, offsets, count


PACKERS = {"concat": ConcatPacker, "best_fit": BestFitPacker}
