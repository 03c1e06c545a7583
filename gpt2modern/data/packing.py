"""Packing: encoded documents to rows of block_size + 1 tokens.

A row's first token is context only; its next `num_tokens` are targets, each token of each document exactly once; the
rest, if any, is padding with EOS. Documents come in windows, each followed by its EOS.
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """input_ids: (rows, block_size + 1), dtype of the ids; num_tokens: (rows,) int32, targets in each row."""

    input_ids: np.ndarray
    num_tokens: np.ndarray


class ConcatPacker:
    """Cut one stream every block_size tokens: no padding but in the last row, documents cut where a row ends.

    A row begins with the last token of the one before, the first with EOS, so that the stream can be cut again to any
    other block size. cut_documents: how many lie in more than one row.
    """

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.eos_token_id, self.cut_documents = block_size, eos_token_id, 0
        self._rest = np.array([eos_token_id], dtype=dtype)  # context, and the targets that do not fill a row yet
        self._tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """ids: documents one after the other; lengths: tokens of each. Returns the rows that are full."""
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
        """The last row, padded; none if nothing is left."""
        left = len(self._rest) - 1
        row = np.full((1, self.block_size + 1), self.eos_token_id, dtype=self._rest.dtype)
        row[0, : left + 1] = self._rest
        return Rows(row[: min(left, 1)], np.array([left], dtype=np.int32)[: min(left, 1)])


class BestFitPacker:
    """Best-fit-decreasing (arXiv:2404.10830): a document is whole in one row if it fits, with its EOS, in a block.

    Longer ones are cut every block_size tokens. Each row begins with EOS, or where it continues a document with that
    document's previous token. WINDOW_TOKENS are packed at a time, so that memory does not grow with the corpus.
    """

    WINDOW_TOKENS = 1 << 24

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.eos_token_id, self.dtype, self.cut_documents = block_size, eos_token_id, dtype, 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """As `ConcatPacker.add`; no rows until a window is full, then all of it."""
        self._waiting.append((ids, lengths))
        full = sum(len(ids) for ids, _ in self._waiting) >= self.WINDOW_TOKENS
        return self.finish() if full else Rows(np.empty((0, self.block_size + 1), self.dtype), np.empty(0, np.int32))

    def finish(self) -> Rows:
        """The rows of what is waiting."""
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
        """Documents cut to block_size: where each part starts in the ids, its tokens, whether it continues one."""
        counts = -(-lengths // self.block_size)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.repeat(np.cumsum(lengths), counts)
        starts = ends - np.repeat(lengths, counts) + number * self.block_size
        return starts, np.minimum(ends - starts, self.block_size), number > 0


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Put items, the longest first, each into the fullest bin that still takes it.

    Returns the bin of each item, its offset there, and the number of bins. Raises nothing: lengths are in
    [1, capacity]. About a microsecond per item: which free spaces exist is the bits of one integer.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    offsets = np.empty(len(lengths), dtype=np.int64)
    bins_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = count = 0
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
