"""Read and write files of token ids: those of kjj0/fineweb10B-gpt2, and nanoGPT's, which have no header.

The first have a header of 256 int32 (magic number, version, number of tokens, zeros), then uint16 ids with EOS before
each document. nanoGPT's are ids only, with EOS after each document.
"""

from collections.abc import Iterable, Iterator
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
    tokens, per_piece = len(_map_tokens(path, options)), max(1, piece_bytes // 2)
    return [(start, min(start + per_piece, tokens)) for start in range(0, tokens, per_piece)]


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield one array of the documents that start in a range of tokens, without their EOS."""
    tokens, eos_token_id = _map_tokens(piece.origin, options), options.eos_token_id

    def start_after(position: int, limit: int) -> int:
        if position == 0 and tokens[0] != eos_token_id:
            return 0
        while position < limit:
            found = np.flatnonzero(tokens[position : min(position + SCANNED_TOKENS, limit)] == eos_token_id)
            if len(found):
                return position + int(found[0]) + 1
            position += SCANNED_TOKENS
        return limit + 1  # one past the end, as if there were an EOS

    if (begin := start_after(piece.start, piece.stop)) > piece.stop:
        return
    end = start_after(piece.stop, len(tokens))
    block = np.asarray(tokens[begin : end - 1])
    ends = np.append(np.flatnonzero(block == eos_token_id), len(block))
    starts = np.append(0, ends[:-1] + 1)
    kept = np.ones(len(block), dtype=bool)
    kept[ends[:-1]] = False
    offsets = np.append(0, np.cumsum(ends - starts))
    yield pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(block[kept]))


def _map_tokens(path: Path, options: ReadOptions) -> np.ndarray:
    """Return the memory-mapped tokens of a file. Raises GPT2ModernError if its header or its size is wrong."""
    with reading.errors_named(path, "tokens"):
        header, size = np.fromfile(path, dtype="<i4", count=3).tolist(), path.stat().st_size
    if header[:2] == [MAGIC, VERSION] and len(header) == 3:
        dtype, start, expected = "uint16", HEADER_BYTES, HEADER_BYTES + 2 * header[2]
        promised = f"its header promises {header[2]} tokens, which take"
    elif options.token_dtype:
        dtype, start = options.token_dtype, 0
        expected, promised = size - size % np.dtype(dtype).itemsize, f"whole {dtype} ids take"
    else:
        raise GPT2ModernError(
            f"{path} is not a file of GPT-2 tokens: its header starts with {header}, not with the magic number {MAGIC} "
            f"and version {VERSION} as in kjj0/fineweb10B-gpt2; if it is nanoGPT's, give --token_dtype uint16"
        )
    if size != expected or size == start:
        raise GPT2ModernError(f"{path} has {size} bytes, but {promised} {expected} bytes; copy the file again")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=start)


def write_tokens(path: Path, parts: Iterable[np.ndarray], *, has_header: bool) -> None:
    """Write a file of uint16 tokens. parts: arrays of consecutive tokens."""
    with path.open("wb") as file:
        file.write(bytes(HEADER_BYTES if has_header else 0))
        count = sum(file.write(part.astype("<u2").tobytes()) // 2 for part in parts)
        if has_header:
            file.seek(0)
            file.write(np.array([MAGIC, VERSION, count], dtype="<i4").tobytes())


FORMATS["tokens"] = Format((".bin",), pieces, read, holds_tokens=True)
