"""Where documents come from: files of several formats, Arrow folders, the Hub, the standard library.

A source is a list of pieces, about a megabyte each where the format allows it: a byte range of a jsonl or line-wise
text file, a row group of a parquet file, rows of an Arrow table. Pieces are what is shuffled and dealt to shards, so
that no machine reads more than its share.
"""

import csv
import glob
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import (
    FORMATS,
    ReadOptions,
    cause_of,
    compression_of,
    csv_delimiter,
    format_of,
    map_tokens,
    open_stream,
    overlaps_itself,
    separator_of,
    suffix,
    unreadable,
)
from gpt2modern.data.readers import READERS
from gpt2modern.data.texts import is_json_array, json_object, load_json_array

if TYPE_CHECKING:
    from datasets import Dataset

PIECE_BYTES = 1 << 20
MAX_PIECES = 100_000  # the list of them is in memory


@dataclass(frozen=True)
class Piece:
    """A part of one file or table. [start, stop): bytes of text and json, row groups of parquet, rows of a table,
    tokens of a token file; a document belongs to the piece in which it begins. limit: only its first documents."""

    source: int  # index into Source.paths or Source.tables
    format: str
    start: int = 0
    stop: int = 0
    limit: int | None = None


@dataclass
class Source:
    """Files and tables, and the pieces they are read in. Pickling a table carries its path, not its rows."""

    options: ReadOptions
    origins: list[str] = field(default_factory=list)  # a name for messages, one per file or table
    tables: "list[Dataset | None]" = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0  # bytes on disk

    def read(self, piece: Piece) -> Iterator[pa.Array]:
        """Arrays of documents: `large_string`, or lists of uint16 for token files. GPT2ModernError names file and place."""
        remaining = piece.limit
        for documents in READERS[piece.format](self, piece):
            if remaining is not None:
                documents = documents.slice(0, remaining)
                remaining -= len(documents)
            if len(documents):
                yield documents
            if remaining == 0:
                return

    def first(self, count: int) -> "Source":
        """The same source, only its first `count` documents."""
        kept: list[Piece] = []
        for piece in self.pieces:
            if count <= 0:
                break
            documents = sum(len(array) for array in self.read(replace(piece, limit=count)))
            kept.append(replace(piece, limit=documents))
            count -= documents
        return replace(self, pieces=kept)


def open_files(names: Sequence[str], options: ReadOptions, num_shards: int | None) -> Source:
    """The source that `names` (files, globs, folders that `datasets` saved) stand for, in the order given.

    Raises GPT2ModernError for what is not there, is empty, or has no column `options.text_column`.
    """
    source = Source(options)
    paths = expand(names)
    formats = [format_of(path, options.file_format) for path in paths]
    if "tokens" in formats and set(formats) != {"tokens"}:
        raise GPT2ModernError(f"{paths[formats.index('tokens')]}: tokens cannot be mixed with text; prepare them separately")
    source.size = sum(path.stat().st_size for path in paths if path.is_file())
    piece_bytes = _piece_bytes(source.size, num_shards)
    for path, format in zip(paths, formats, strict=True):
        if path.is_file() and not path.stat().st_size:
            raise GPT2ModernError(f"{path}: is empty; leave it out")
        if format == "arrow":
            _add_table(source, str(path), _open_table(path), piece_bytes)
            continue
        index = len(source.origins)
        source.origins.append(str(path))
        source.tables.append(None)
        source.pieces += [replace(piece, source=index) for piece in _PIECES[format](path, options, piece_bytes)]
    return source


def open_table(name: str, table: "Dataset", options: ReadOptions, num_shards: int | None) -> Source:
    """A `datasets.Dataset` as a source; `name` stands in messages."""
    source = Source(options)
    source.size = table.data.nbytes if table._indices is None else len(table) * 1024
    _add_table(source, name, table, _piece_bytes(source.size, num_shards))
    return source


def expand(names: Sequence[str]) -> list[Path]:
    """Globs become their sorted matches, folders their known files; GPT2ModernError where nothing is left."""
    paths: list[Path] = []
    for name in names:
        if glob.has_magic(name) and not Path(name).exists():
            found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not found:
                raise GPT2ModernError(f"{name}: no file matches")
            paths += found
        elif Path(name).is_dir() and not _is_saved_dataset(Path(name)):
            found = sorted(path for path in Path(name).rglob("*") if path.is_file() and suffix(path) in FORMATS)
            if not found:
                raise GPT2ModernError(f"{name}: holds no file with a known extension ({', '.join(FORMATS)})")
            paths += found
        elif Path(name).exists():
            paths.append(Path(name))
        else:
            raise GPT2ModernError(f"{name}: no such file")
    return paths


def _piece_bytes(total: int, num_shards: int | None) -> int:
    """A few pieces per shard at least, a megabyte at most; more only where their number would grow out of hand."""
    return max(min(PIECE_BYTES, total // (8 * (num_shards or 1)) + 1), total // MAX_PIECES, 4096)


def _text_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    format = format_of(path, options.file_format)
    size = path.stat().st_size
    separator = separator_of(options, format)
    is_array = False
    if format == "json":
        try:
            is_array = is_json_array(path)
            _require_column(_first_json_keys(path, is_array), None, options, str(path))
        except (OSError, pa.ArrowException) as error:
            raise unreadable(str(path), "json", error) from error
    else:
        _refuse_chats(options, path, format)
    if compression_of(path) or is_array:
        return [Piece(0, "stream", 0, size)]
    if separator is None:
        return [Piece(0, "file", 0, size)]
    if overlaps_itself(separator):
        return [Piece(0, "stream", 0, size)]
    return [Piece(0, "span", start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)]


def _csv_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    _refuse_chats(options, path, "csv")
    try:
        with open_stream(path) as stream:
            lines = (line.decode("utf-8-sig", "replace") + "\n" for line in _lines_of(stream))
            columns = next((row for row in csv.reader(lines, delimiter=csv_delimiter(path)) if row), [])
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise unreadable(str(path), "csv", error) from error
    _require_column(columns, None, options, str(path))
    return [Piece(0, "csv", 0, path.stat().st_size)]


def _parquet_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(str(path), "parquet", error) from error
    column = options.chat_column or options.text_column
    names = file.schema_arrow.names
    _require_column(names, file.schema_arrow.field(column).type if column in names else None, options, str(path))
    return [Piece(0, "parquet", group, group + 1) for group in range(file.num_row_groups)]


def _token_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    _refuse_chats(options, path, "token")
    tokens = len(map_tokens(str(path)))
    per_piece = max(1, piece_bytes // 2)
    return [Piece(0, "tokens", start, min(start + per_piece, tokens)) for start in range(0, tokens, per_piece)]


_PIECES = {
    "text": _text_pieces, "json": _text_pieces, "csv": _csv_pieces, "parquet": _parquet_pieces, "tokens": _token_pieces,
}  # fmt: skip


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _open_table(path: Path) -> "Dataset":
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    except Exception as error:  # each layer below raises its own
        raise unreadable(str(path), "an Arrow table", error) from error
    if isinstance(table, DatasetDict):
        raise GPT2ModernError(f"{path}: holds the splits {', '.join(table)}; name one of its folders")
    return table


def _add_table(source: Source, name: str, table: "Dataset", piece_bytes: int) -> None:
    column = source.options.chat_column or source.options.text_column
    types = table.data.schema
    _require_column(
        table.column_names, types.field(column).type if column in table.column_names else None, source.options, name
    )
    table = table.select_columns([column])
    rows_per_piece = max(1, len(table) * piece_bytes // max(1, table.data.nbytes))
    source.pieces += [
        Piece(len(source.origins), "table", start, min(start + rows_per_piece, len(table)))
        for start in range(0, len(table), rows_per_piece)
    ]
    source.origins.append(name)
    source.tables.append(table)


def _require_column(names: Sequence[str], type: pa.DataType | None, options: ReadOptions, origin: str) -> None:
    column = options.chat_column or options.text_column
    flag = "--chat_column" if options.chat_column else "--text_column"
    if column not in names:
        raise GPT2ModernError(f"{origin}: no column {column!r}; {flag} can be one of {', '.join(names)}")
    if type is None or options.chat_column:
        return
    if not (pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_null(type)):
        raise GPT2ModernError(f"{origin}: column {column!r} holds {type}, not text; name another with {flag}")


def _refuse_chats(options: ReadOptions, path: Path, format: str) -> None:
    if options.chat_column:
        raise GPT2ModernError(f"{path}: {format} files hold no conversations; --chat_column reads json, parquet and arrow")


def _first_json_keys(path: Path, is_array: bool) -> list[str]:
    """The keys of a file's first object."""
    if is_array:
        objects = load_json_array(path)
        if not objects or not isinstance(objects[0], dict):
            raise GPT2ModernError(f"{path}: its array does not begin with an object, {{...}}")
        return list(objects[0])
    line, offset = b"", 0
    with open_stream(path) as stream:
        for line in _lines_of(stream):
            if line.strip():
                break
            offset += len(line) + 1
    return list(json_object(line, str(path), offset, "replace"))


def _lines_of(stream: pa.NativeFile) -> Iterator[bytes]:
    begun: list[bytes] = []  # the parts of a line that has not ended: joined once, or a long line takes quadratic time
    while block := stream.read(1 << 16):
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    yield b"".join(begun)


def standard_library_files() -> list[Path]:
    """The .py files of the running Python's standard library, sorted by relative path, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def open_standard_library(options: ReadOptions, num_shards: int | None) -> Source:
    """About 1,700 documents, 31 MB; test files that are not UTF-8 on purpose are left out."""
    source = Source(options)
    for path in standard_library_files():
        data = path.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if data:
            source.pieces.append(Piece(len(source.origins), "file", 0, len(data)))
            source.origins.append(str(path))
            source.tables.append(None)
            source.size += len(data)
    return source


def load_hub_dataset(name: str, config_name: str | None, split: str, revision: str | None, streaming: bool):
    """A `Dataset`, or an `IterableDataset`; GPT2ModernError when it cannot be had."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the network, the Hub, the dataset's own files: none of it is a defect of ours
        raise GPT2ModernError(
            f"--dataset_name {name}: cannot be loaded ({cause_of(error)}); "
            "check the name and the network, or use --dataset_name stdlib or --train_file"
        ) from error
