"""Read CSV and TSV: each row is a document, namely the value of its text column, which may have line breaks."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions, suffix

MAX_ROW_BYTES = 1 << 30


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Return the complete file as one piece, because row starts can only be found by reading from the file's start."""
    with reading.errors_named(path, "csv"), reading.open_stream(path) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline="")
        columns = next((row for row in csv.reader(lines, delimiter=_delimiter(path)) if row), [])
    reading.require_column(columns, options, str(path))
    return reading.whole_file(path, options, piece_bytes)


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield arrays of the text column of all rows."""
    rows, block_bytes = 0, reading.READ_BYTES
    with reading.errors_named(piece.name, "csv"):
        while True:
            try:
                for documents in _read_rows(piece.origin, options, block_bytes, rows):
                    yield documents
                    rows += len(documents)
                return
            except pa.ArrowInvalid as error:
                # Arrow rejects a row that is longer than a block: continue from there with larger blocks.
                if "straddling" not in str(error) or block_bytes >= MAX_ROW_BYTES:
                    raise
                block_bytes = min(8 * block_bytes, MAX_ROW_BYTES)


def _read_rows(path: Path, options: ReadOptions, block_bytes: int, first_row: int) -> Iterator[pa.Array]:
    column, rows = options.text_column, 0
    reading_by = pyarrow.csv.ReadOptions(block_size=block_bytes, use_threads=False)
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(path))
    converting = pyarrow.csv.ConvertOptions(
        include_columns=[column], column_types={column: pa.large_binary()}, strings_can_be_null=False, check_utf8=False
    )
    with reading.open_stream(path) as stream:
        for batch in pyarrow.csv.open_csv(stream, reading_by, parsing, converting):
            documents = batch.column(0).slice(max(0, first_row - rows))
            yield reading.text_of_column(documents, options, str(path), max(rows, first_row))
            rows += len(batch)


def _delimiter(path: Path) -> str:
    return "\t" if suffix(path) == ".tsv" else ","


FORMATS["csv"] = Format((".csv", ".tsv"), pieces, read, may_be_compressed=True)
