"""Read Arrow: files and folders saved by `datasets`, or a `Dataset` of the Hub or from Python, in ranges of rows."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_from_disk

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions
from gpt2modern.errors import GPT2ModernError


def open_table(path: Path, options: ReadOptions) -> Dataset:
    """Open a saved dataset, memory-mapped, with only the column of the documents. GPT2ModernError if that fails."""
    with reading.errors_named(path, "an Arrow table"):
        table = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    if isinstance(table, DatasetDict):
        raise GPT2ModernError(f"{path} holds the splits {', '.join(table)}; name the folder of one split")
    return text_column_of(table, options, str(path))


def text_column_of(table: Dataset, options: ReadOptions, name: str) -> Dataset:
    """Return the table with only the column of the documents. GPT2ModernError if it is missing. name: for messages."""
    reading.require_column(table.data.schema, options, name)
    return table.select_columns([options.column])


def pieces(table: Dataset, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Divide a table into ranges of rows [start, stop), each of about `piece_bytes` bytes."""
    rows = max(1, len(table.data) * piece_bytes // max(1, table.data.nbytes))
    return [(start, min(start + rows, len(table))) for start in range(0, len(table), rows)]


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield the documents of a range of rows as one array."""
    column = piece.origin.with_format("arrow")[piece.start : piece.stop].column(0)
    yield reading.text_of_column(column, options, piece.name, piece.start)


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was saved by `save_to_disk` of `datasets`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


FORMATS["arrow"] = Format((".arrow",), pieces, read, open=open_table, holds_chats=True)
