"""Read token files like those of kjj0/fineweb10B-gpt2: a header, then uint16 ids with EOS before each document.

The header is 256 int32, of which three are used: magic number, version, number of tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions
from gpt2modern.errors import GPT2ModernError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
SCANNED_TOKENS = 1 << 20  # searched at once for the next EOS


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Divide a file into ranges of tokens [start, stop). GPT2ModernError if it is damaged or no tokenizer is named."""
    if options.eos_token_id is None:
        raise GPT2ModernError(f"{path} holds token ids; name their tokenizer with --tokenizer_name")
    tokens, per_piece = len(_map_tokens(path)), max(1, piece_bytes // 2)
    return [(start, min(start + per_piece, tokens)) for start in range(0, tokens, per_piece)]


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield one array of the documents that start in a range of tokens, without their EOS."""
    tokens, eos_token_id = _map_tokens(piece.origin), options.eos_token_id

    def start_after(position: int) -> int:
        if position == 0 and tokens[0] != eos_token_id:
            return 0
        while position < len(tokens):
            found = np.flatnonzero(tokens[position : position + SCANNED_TOKENS] == eos_token_id)
            if len(found):
                return position + int(found[0]) + 1
            position += SCANNED_TOKENS
        return len(tokens) + 1  # one past the end, as if there were an EOS

    begin, end = start_after(piece.start), start_after(piece.stop)
    if begin > len(tokens) or begin >= end:
        return
    block = np.asarray(tokens[begin : end - 1])
    ends = np.append(np.flatnonzero(block == eos_token_id), len(block))
    starts = np.append(0, ends[:-1] + 1)
    kept = np.ones(len(block), dtype=bool)
    kept[ends[:-1]] = False
    offsets = np.append(0, np.cumsum(ends - starts))
    yield pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(block[kept]))


def _map_tokens(path: Path) -> np.ndarray:
    """Return the memory-mapped tokens of a file. Raises GPT2ModernError if its header or its size is wrong."""
    with reading.errors_named(path, "tokens"):
        header, size = np.fromfile(path, dtype="<i4", count=3).tolist(), path.stat().st_size
    if len(header) < 3 or header[:2] != [MAGIC, VERSION]:
        raise GPT2ModernError(
            f"{path} is not a file of GPT-2 tokens: its header starts with {header}, not with the magic number {MAGIC} "
            f"and version {VERSION}; give files in the format of kjj0/fineweb10B-gpt2"
        )
    expected = HEADER_BYTES + 2 * header[2]
    if size != expected or not header[2]:
        raise GPT2ModernError(
            f"{path} has {size} bytes, but its header promises {header[2]} tokens, which take {expected} bytes; copy "
            "the file again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


FORMATS["tokens"] = Format((".bin",), pieces, read, holds_tokens=True)
