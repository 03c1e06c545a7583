"""Read text files: a document is the complete file, a line, a paragraph, or the text between separators.

The documents are those of `str.split` on the complete text; they do not depend on the division into pieces.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions, compression_of

FIRST_READ = 1 << 14  # bytes read beyond a piece at first, for the end of its last document


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Divide a text file into byte ranges [start, stop). It is one piece if it is one document or compressed, or if
    matches of the separator can overlap."""
    separator = separator_of(path, options)
    if separator is None or compression_of(path) or overlaps_itself(separator):
        return reading.whole_file(path, options, piece_bytes)
    return byte_ranges(path, piece_bytes)


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield arrays of the documents that start in a byte range."""
    separator = separator_of(piece.origin, options)
    if separator is None:
        yield reading.text_of_bytes([reading.read_bytes(piece.origin)], options, piece.name, [0])
        return
    for block, offset in blocks_of(piece, separator):
        yield _documents_in(block, separator, options, piece.name, offset)


def separator_of(path: Path, options: ReadOptions) -> bytes | None:
    """Return the bytes that separate the documents of a text file, or None if the file is one document."""
    if options.separator is not None:
        return options.separator.encode()
    if options.sample_by == "paragraph":
        with reading.errors_named(path, "a file"), reading.open_stream(path) as stream:
            return b"\r\n\r\n" if b"\r\n" in stream.read(FIRST_READ) else b"\n\n"
    return {"document": None, "line": b"\n"}[options.sample_by]


def overlaps_itself(separator: bytes) -> bool:
    """Return whether matches of a separator can overlap, as of b"aa"; then a file must be read from its start."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def byte_ranges(path: Path, piece_bytes: int) -> list[tuple[int, int]]:
    """Return ranges [start, stop) of `piece_bytes` bytes (the last one is shorter) that cover a file."""
    size = path.stat().st_size
    return [(start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)]


def blocks_of(piece: Piece, separator: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of complete documents with their separators, and the offset in bytes of each block in the file."""
    path = piece.origin
    whole = compression_of(path) or (piece.start, piece.stop) == (0, path.stat().st_size)
    return _stream_blocks(path, separator) if whole else _range_block(piece, separator)


def _range_block(piece: Piece, separator: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the documents that start in a range of bytes as one block. Only its last document is read beyond the range,
    so that no other piece than that in which a document starts reads it all."""
    before, size = len(separator), FIRST_READ
    offset, end = max(0, piece.start - before), piece.stop
    with reading.errors_named(piece.name, "a file"), open(piece.origin, "rb") as file:
        file.seek(offset)
        data = file.read(piece.stop - offset)
        found = data.find(separator) if piece.start else -before
        begin = offset + found + before if piece.start else 0
        if piece.start and (found < 0 or begin >= piece.stop):
            return
        while not data.endswith(separator) and (more := file.read(size)):
            rest = data[max(0, len(data) - before + 1) :] + more  # a separator may lie across the border
            found = rest.find(separator)
            data, size = (rest, min(2 * size, reading.READ_BYTES)) if found < 0 else (separator, size)
            end += len(more) - (len(rest) - found - before if found >= 0 else 0)
        file.seek(begin)  # reading twice takes less memory than joining parts
        yield file.read(end - begin), begin


def _stream_blocks(path: Path, separator: bytes) -> Iterator[tuple[bytes, int]]:
    # Overlapping separators are matched from the left, so that the result does not depend on the blocks of the stream.
    from_the_left = overlaps_itself(separator)
    offset, rest = 0, b""
    kind = "a compressed file" if compression_of(path) else "a file"
    with reading.errors_named(path, kind), reading.open_stream(path) as stream:
        while block := stream.read(reading.READ_BYTES):
            data = rest + block
            rest = (data.split(separator) if from_the_left else data.rsplit(separator, 1))[-1]
            complete = data[: len(data) - len(rest)]
            if complete:
                yield complete, offset
            offset += len(complete)
    if rest:
        yield rest, offset


def _documents_in(block: bytes, separator: bytes, options: ReadOptions, name: str, offset: int) -> pa.Array:
    if not block:
        return pa.array([], pa.large_string())
    parts = block.removesuffix(separator).split(separator)
    offsets = itertools.accumulate((len(part) + len(separator) for part in parts), initial=offset)
    documents = [line.removesuffix(b"\r") for line in parts] if separator == b"\n" else parts
    return reading.text_of_bytes(documents, options, name, offsets)


FORMATS["text"] = Format((".txt", ".md", ".rst"), pieces, read, may_be_compressed=True)
