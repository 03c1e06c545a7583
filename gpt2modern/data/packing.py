"""Pack encoded documents into rows of at most block_size tokens.

Each token of each document, and of the EOS that follows it, is in exactly one row. Only the last row of "concat"
repeats tokens, so that it is as long as the others.
"""

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Hold rows. input_ids: tokens of all rows in sequence, uint16 or uint32; lengths: (rows,) int64 tokens per row;
    previous_tokens: (rows,) the token before each row in its document, EOS if the row starts with a document."""

    input_ids: np.ndarray
    lengths: np.ndarray
    previous_tokens: np.ndarray


class ConcatPacker:
    """Join documents to one stream and cut it every block_size tokens.

    The last row ends with the stream and starts block_size tokens before, so that all rows have the same length unless
    the stream is shorter than one row. cut_documents: number of documents that are spread over more than one row.
    """

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.cut_documents = block_size, 0
        self._written = np.empty(0, dtype=dtype)  # the last row
        self._rest = np.empty(0, dtype=dtype)  # tokens that do not fill a row yet
        self._previous = np.array([eos_token_id], dtype=dtype)
        self._tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """Add documents and return the rows that are now full. ids: of all documents; lengths: tokens of each one."""
        ends = self._tokens + np.cumsum(lengths)
        self.cut_documents += int(((ends - lengths) // self.block_size != (ends - 1) // self.block_size).sum())
        self._tokens += len(ids)
        tokens = np.concatenate([self._rest, ids])
        count = len(tokens) // self.block_size
        full, self._rest = np.split(tokens, [count * self.block_size])
        return self._rows(full, count)

    def finish(self) -> Rows:
        """Return the last row, or no row if no tokens are left."""
        repeated = self._written[len(self._rest) :] if len(self._rest) else self._rest
        return self._rows(np.concatenate([repeated, self._rest]), min(len(self._rest), 1))

    def _rows(self, tokens: np.ndarray, count: int) -> Rows:
        rows = tokens.reshape(count, -1) if count else tokens.reshape(0, self.block_size)
        previous = np.concatenate([self._previous, rows[:, -1]])
        self._previous = previous[-1:]
        self._written = rows[-1].copy() if count else self._written
        return Rows(tokens, np.full(count, rows.shape[1]), previous[:-1])


class BestFitPacker:
    """Pack by best-fit-decreasing (arXiv:2404.10830): a document that fits, with its EOS, into a block is not cut.

    Longer documents are cut every block_size tokens. At least WINDOW_TOKENS tokens are collected and packed together;
    then memory is freed.
    """

    WINDOW_TOKENS = 1 << 24

    def __init__(self, block_size: int, eos_token_id: int, dtype: str):
        self.block_size, self.eos_token_id, self.dtype, self.cut_documents = block_size, eos_token_id, dtype, 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> Rows:
        """Add documents as `ConcatPacker.add` does. Returns no rows until WINDOW_TOKENS are collected, then all."""
        self._waiting.append((ids, lengths))
        full = sum(len(ids) for ids, _ in self._waiting) >= self.WINDOW_TOKENS
        return self.finish() if full else Rows(*(np.empty(0, dtype) for dtype in (self.dtype, np.int64, self.dtype)))

    def finish(self) -> Rows:
        """Pack the collected documents and return their rows."""
        ids = np.concatenate([np.empty(0, self.dtype), *(ids for ids, _ in self._waiting)])
        lengths = np.concatenate([np.empty(0, np.int64), *(lengths for _, lengths in self._waiting)])
        self._waiting = []
        self.cut_documents += int((lengths > self.block_size).sum())
        starts, lengths, continued = self._parts(lengths)
        bins, offsets, count = best_fit(lengths, self.block_size)
        row_lengths = np.bincount(bins, weights=lengths, minlength=count).astype(np.int64)
        # Token k of part p goes from ids[starts[p] + k] to place row_starts[bins[p]] + offsets[p] + k.
        places = (np.cumsum(row_lengths) - row_lengths)[bins] + offsets
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        packed = np.empty_like(ids)
        packed[np.repeat(places, lengths) + within] = ids[np.repeat(starts, lengths) + within]
        previous = np.full(count, self.eos_token_id, dtype=self.dtype)
        first = continued & (offsets == 0)
        previous[bins[first]] = ids[starts[first] - 1]
        return Rows(packed, row_lengths, previous)

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
