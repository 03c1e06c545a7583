"""One piece of a source to Arrow arrays of documents: `large_string`, or lists of uint16 for token files.

Text is never a Python list on its way from a file to the encoder, except where a parser stumbles and the place of the
error has to be found.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from gpt2modern.data.files import (
    ReadOptions,
    compression_of,
    csv_delimiter,
    format_of,
    map_tokens,
    open_stream,
    overlaps_itself,
    read_bytes,
    separator_of,
    unreadable,
)
from gpt2modern.data.texts import as_text, checked, column_of, is_json_array, json_documents, load_json_array

if TYPE_CHECKING:
    from gpt2modern.data.sources import Piece, Source

READ_BYTES = 4 << 20  # of a stream at a time
SCANNED_TOKENS = 1 << 20  # at a time, for the next EOS
MAX_CSV_ROW_BYTES = 1 << 30


def _read_file(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    """A file that is one document."""
    path = source.origins[piece.source]
    yield as_text([read_bytes(path)], source.options, path, [0])


def _read_span(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    """The lines, or what stands between separators, that begin in a byte range."""
    path, options = source.origins[piece.source], source.options
    separator = separator_of(options, format_of(Path(path), options.file_format))
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begin = _document_start(data, piece.start, separator)
            end = _document_start(data, piece.stop, separator) if piece.stop < len(data) else len(data)
            block = data[begin:end]
    except (OSError, ValueError) as error:
        raise unreadable(path, "a file", error) from error
    yield _documents_in(block, separator, source, piece, begin)


def _document_start(data: mmap.mmap, position: int, separator: bytes) -> int:
    """Offset of the first document that begins at `position` or later."""
    if position == 0:
        return 0
    found = data.find(separator, max(0, position - len(separator)))
    return len(data) if found < 0 else found + len(separator)


def _read_stream(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    """A file from its beginning: compressed, a JSON array, or cut at a separator that overlaps itself."""
    path, options = source.origins[piece.source], source.options
    format = format_of(Path(path), options.file_format)
    separator = separator_of(options, format)
    if format == "json" and is_json_array(Path(path)):
        objects = load_json_array(Path(path), options.encoding_errors)
        yield column_of(objects, [f"{path}: object {number}" for number in range(len(objects))], options)
        return
    if separator is None:
        yield as_text([read_bytes(path)], options, path, [0])
        return
    offset, rest = 0, b""
    try:
        with open_stream(Path(path)) as stream:
            while block := stream.read(READ_BYTES):
                data = rest + block
                # Cut from the left, so that what a separator is does not depend on how the stream arrives.
                rest = data.rsplit(separator, 1)[-1] if not overlaps_itself(separator) else data.split(separator)[-1]
                complete = data[: len(data) - len(rest)]
                if complete:
                    yield _documents_in(complete, separator, source, piece, offset)
                offset += len(complete)
    except (OSError, pa.ArrowException, EOFError) as error:
        raise unreadable(path, "a compressed file" if compression_of(Path(path)) else "a file", error) from error
    if rest:
        yield _documents_in(rest, separator, source, piece, offset)


def _documents_in(block: bytes, separator: bytes, source: "Source", piece: "Piece", offset: int) -> pa.Array:
    """Documents of a block that ends with a separator or with its file; `offset` is where it begins."""
    path, options = source.origins[piece.source], source.options
    if format_of(Path(path), options.file_format) == "json":
        return json_documents(block, options, path, offset)
    if block.endswith(separator):
        block = block[: -len(separator)]
    elif not block:
        return pa.array([], pa.large_string())
    documents = block.split(separator)
    if separator == b"\n":
        documents = [line.removesuffix(b"\r") for line in documents]
    offsets = [offset]
    for document in documents[:-1]:
        offsets.append(offsets[-1] + len(document) + len(separator))
    return as_text(documents, options, path, offsets)


def _read_csv(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    path, options = source.origins[piece.source], source.options
    rows, block_bytes = 0, READ_BYTES
    while True:
        try:
            for documents in _csv_documents(path, options, block_bytes, rows):
                yield documents
                rows += len(documents)
            return
        except (pa.ArrowException, OSError) as error:
            # Arrow refuses a row that is longer than a block: read on from there in larger ones.
            if "straddling" not in str(error) or block_bytes >= MAX_CSV_ROW_BYTES:
                raise unreadable(path, "csv", error) from error
            block_bytes = min(8 * block_bytes, MAX_CSV_ROW_BYTES)


def _csv_documents(path: str, options: ReadOptions, block_bytes: int, first_row: int) -> Iterator[pa.Array]:
    import pyarrow.csv

    convert = pyarrow.csv.ConvertOptions(
        include_columns=[options.text_column],
        column_types={options.text_column: pa.large_binary()},
        strings_can_be_null=False,
        check_utf8=False,
    )
    with open_stream(Path(path)) as stream:
        reader = pyarrow.csv.open_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(block_size=block_bytes, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=csv_delimiter(Path(path))),
            convert_options=convert,
        )
        rows = 0
        for batch in reader:
            documents = batch.column(0).slice(max(0, first_row - rows))
            yield checked(documents, options, f"{path}: row {{row}}", max(rows, first_row))
            rows += len(batch)


def _read_parquet(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    import pyarrow.parquet

    path, options = source.origins[piece.source], source.options
    column = options.chat_column or options.text_column
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        group = file.metadata.row_group(piece.start)
        batch_size = group.num_rows * READ_BYTES // max(group.total_byte_size, 1) + 1
        for batch in file.iter_batches(batch_size, row_groups=[piece.start], columns=[column], use_threads=False):
            yield checked(batch.column(0), options, f"{path}: row {{row}}", rows)
            rows += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, "parquet", error) from error


def _read_table(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    table = source.tables[piece.source].with_format("arrow")[piece.start : piece.stop]
    column = table.column(0)
    documents = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(documents, pa.ChunkedArray):
        documents = pa.concat_arrays(documents.chunks)
    yield checked(documents, source.options, f"{source.origins[piece.source]}: row {{row}}", piece.start)


def _read_tokens(source: "Source", piece: "Piece") -> Iterator[pa.Array]:
    """Documents of a token file; each begins after an EOS, which the encoder puts back at its end."""
    tokens = map_tokens(source.origins[piece.source])
    eos_token_id = source.options.eos_token_id

    def start_after(position: int) -> int:
        if position == 0 and tokens[0] != eos_token_id:
            return 0
        while position < len(tokens):
            found = np.flatnonzero(tokens[position : position + SCANNED_TOKENS] == eos_token_id)
            if len(found):
                return position + int(found[0]) + 1
            position += SCANNED_TOKENS
        return len(tokens) + 1  # one past the end, as if an EOS stood there

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


READERS = {
    "file": _read_file, "span": _read_span, "stream": _read_stream, "csv": _read_csv, "parquet": _read_parquet,
    "table": _read_table, "tokens": _read_tokens,
}  # fmt: skip
