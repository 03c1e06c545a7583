"""Read Parquet: each row holds a document, a text or a conversation; a piece is one row group."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Return the row groups of a file, each as a range [group, group + 1)."""
    with reading.errors_named(path, "parquet"):
        file = pyarrow.parquet.ParquetFile(path)
    reading.require_column(file.schema_arrow, options, str(path))
    return [(group, group + 1) for group in range(file.num_row_groups)]


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield the documents of a row group, in arrays of about 4 MB."""
    with reading.errors_named(piece.name, "parquet"):
        file = pyarrow.parquet.ParquetFile(piece.origin)
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        group = file.metadata.row_group(piece.start)
        size = group.num_rows * reading.READ_BYTES // max(group.total_byte_size, 1) + 1
        for batch in file.iter_batches(size, row_groups=[piece.start], columns=[options.column], use_threads=False):
            yield reading.text_of_column(batch.column(0), options, piece.name, row)
            row += len(batch)


FORMATS["parquet"] = Format((".parquet",), pieces, read, holds_chats=True)
