"""Where documents come from: files of several formats, Arrow folders, the Hub, the standard library.

A source is a list of pieces, about a megabyte each where the format allows it: a byte range of a jsonl or line-wise
text file, a row group of a parquet file, rows of an Arrow table. Pieces are what is shuffled and dealt to shards, so
that no machine reads more than its share, and `read_piece` is what turns one into Arrow arrays of documents: text is
never a Python list on its way to the encoder.
"""

import codecs
import csv
import glob
import json
import mmap
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from command_line import UserError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".bin": "tokens",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
READ_BYTES = 4 << 20  # of a stream at a time
PIECE_BYTES = 1 << 20
MAX_PIECES = 100_000  # the list of them is in memory
MAX_CSV_ROW_BYTES = 1 << 30

# The header of the speedrun community's shards (kjj0/fineweb10B-gpt2): 256 int32, of which three say something.
TOKEN_FILE_MAGIC, TOKEN_FILE_VERSION, TOKEN_FILE_HEADER = 20240520, 1, 256 * 4


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the names are those of the flags of prepare_data.py."""

    text_column: str = "text"
    chat_column: str | None = None
    sample_by: Literal["document", "line", "paragraph"] = "document"
    separator: str | None = None
    encoding_errors: Literal["strict", "replace"] = "strict"
    file_format: str = "auto"
    eos_token_id: int | None = None  # what divides documents in a file of tokens
    chat_template: str | None = None  # Jinja; renders `chat_column`


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
        """Arrays of documents: `large_string`, or lists of uint16 for token files. UserError names file and place."""
        remaining = piece.limit
        for documents in _READERS[piece.format](self, piece):
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


# Opening


def open_files(names: Sequence[str], options: ReadOptions, num_shards: int | None) -> Source:
    """The source that `names` (files, globs, folders that `datasets` saved) stand for, in the order given.

    Raises UserError for what is not there, is empty, or has no column `options.text_column`.
    """
    source = Source(options)
    paths = expand(names)
    formats = [_format_of(path, options.file_format) for path in paths]
    if "tokens" in formats and set(formats) != {"tokens"}:
        raise UserError(f"{paths[formats.index('tokens')]}: tokens cannot be mixed with text; prepare them separately")
    source.size = sum(path.stat().st_size for path in paths if path.is_file())
    piece_bytes = _piece_bytes(source.size, num_shards)
    for path, format in zip(paths, formats, strict=True):
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"{path}: is empty; leave it out")
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
    """Globs become their sorted matches, folders their known files; UserError where nothing is left."""
    paths: list[Path] = []
    for name in names:
        if glob.has_magic(name) and not Path(name).exists():
            found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not found:
                raise UserError(f"{name}: no file matches")
            paths += found
        elif Path(name).is_dir() and not _is_saved_dataset(Path(name)):
            found = sorted(path for path in Path(name).rglob("*") if path.is_file() and _suffix(path) in FORMATS)
            if not found:
                raise UserError(f"{name}: holds no file with a known extension ({', '.join(FORMATS)})")
            paths += found
        elif Path(name).exists():
            paths.append(Path(name))
        else:
            raise UserError(f"{name}: no such file")
    return paths


def _format_of(path: Path, file_format: str) -> str:
    if path.is_dir():
        return "arrow"
    if file_format != "auto":
        return file_format
    format = FORMATS.get(_suffix(path))
    if format is None:
        raise UserError(f"{path}: unknown extension; known are {', '.join(FORMATS)}; or name its --file_format")
    if format in ("parquet", "arrow", "tokens") and compression_of(path):
        raise UserError(f"{path}: {format} files cannot be read compressed; unpack it")
    return format


def _suffix(path: Path) -> str:
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: Path) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())


def _piece_bytes(total: int, num_shards: int | None) -> int:
    """A few pieces per shard at least, a megabyte at most; more only where their number would grow out of hand."""
    return max(min(PIECE_BYTES, total // (8 * (num_shards or 1)) + 1), total // MAX_PIECES, 4096)


def separator_of(options: ReadOptions, format: str) -> bytes | None:
    """What stands between the documents of a file; None: the file is one document."""
    if format == "json":
        return b"\n"
    if options.separator is not None:
        return options.separator.encode()
    return {"document": None, "line": b"\n", "paragraph": b"\n\n"}[options.sample_by]


def _overlaps_itself(separator: bytes) -> bool:
    """Whether text can be cut in two ways at it: then a file is read from its beginning."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


# Pieces of each format


def _text_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    format = _format_of(path, options.file_format)
    size = path.stat().st_size
    separator = separator_of(options, format)
    is_array = False
    if format == "json":
        try:
            is_array = _is_json_array(path)
            _require_column(_first_json_keys(path, is_array), None, options, str(path))
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(str(path), "json", error) from error
    else:
        _refuse_chats(options, path, format)
    if compression_of(path) or is_array:
        return [Piece(0, "stream", 0, size)]
    if separator is None:
        return [Piece(0, "file", 0, size)]
    if _overlaps_itself(separator):
        return [Piece(0, "stream", 0, size)]
    return [Piece(0, "span", start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)]


def _csv_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    _refuse_chats(options, path, "csv")
    try:
        with _open_stream(path) as stream:
            lines = (line.decode("utf-8-sig", "replace") + "\n" for line in _lines_of(stream))
            columns = next((row for row in csv.reader(lines, delimiter=_csv_delimiter(path)) if row), [])
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise _unreadable(str(path), "csv", error) from error
    _require_column(columns, None, options, str(path))
    return [Piece(0, "csv", 0, path.stat().st_size)]


def _parquet_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(str(path), "parquet", error) from error
    column = options.chat_column or options.text_column
    names = file.schema_arrow.names
    _require_column(names, file.schema_arrow.field(column).type if column in names else None, options, str(path))
    return [Piece(0, "parquet", group, group + 1) for group in range(file.num_row_groups)]


def _token_pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    _refuse_chats(options, path, "token")
    tokens = len(_map_tokens(str(path)))
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
        raise _unreadable(str(path), "an Arrow table", error) from error
    if isinstance(table, DatasetDict):
        raise UserError(f"{path}: holds the splits {', '.join(table)}; name one of its folders")
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
        raise UserError(f"{origin}: no column {column!r}; {flag} can be one of {', '.join(names)}")
    if type is None or options.chat_column:
        return
    if not (pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_null(type)):
        raise UserError(f"{origin}: column {column!r} holds {type}, not text; name another with {flag}")


def _refuse_chats(options: ReadOptions, path: Path, format: str) -> None:
    if options.chat_column:
        raise UserError(f"{path}: {format} files hold no conversations; --chat_column reads json, parquet and arrow")


def _first_json_keys(path: Path, is_array: bool) -> list[str]:
    """The keys of a file's first object."""
    if is_array:
        objects = _load_json_array(path)
        if not objects or not isinstance(objects[0], dict):
            raise UserError(f"{path}: its array does not begin with an object, {{...}}")
        return list(objects[0])
    line, offset = b"", 0
    with _open_stream(path) as stream:
        for line in _lines_of(stream):
            if line.strip():
                break
            offset += len(line) + 1
    return list(_json_object(line, str(path), offset, "replace"))


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


def _is_json_array(path: Path) -> bool:
    with _open_stream(path) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


# Reading


def _read_file(source: Source, piece: Piece) -> Iterator[pa.Array]:
    """A file that is one document."""
    path = source.origins[piece.source]
    yield _as_text([_read_bytes(path)], source.options, path, [0])


def _read_span(source: Source, piece: Piece) -> Iterator[pa.Array]:
    """The lines, or what stands between separators, that begin in a byte range."""
    path, options = source.origins[piece.source], source.options
    separator = separator_of(options, _format_of(Path(path), options.file_format))
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begin = _document_start(data, piece.start, separator)
            end = _document_start(data, piece.stop, separator) if piece.stop < len(data) else len(data)
            block = data[begin:end]
    except (OSError, ValueError) as error:
        raise _unreadable(path, "a file", error) from error
    yield _documents_in(block, separator, source, piece, begin)


def _document_start(data: mmap.mmap, position: int, separator: bytes) -> int:
    """Offset of the first document that begins at `position` or later."""
    if position == 0:
        return 0
    found = data.find(separator, max(0, position - len(separator)))
    return len(data) if found < 0 else found + len(separator)


def _read_stream(source: Source, piece: Piece) -> Iterator[pa.Array]:
    """A file from its beginning: compressed, a JSON array, or cut at a separator that overlaps itself."""
    path, options = source.origins[piece.source], source.options
    format = _format_of(Path(path), options.file_format)
    separator = separator_of(options, format)
    if format == "json" and _is_json_array(Path(path)):
        objects = _load_json_array(Path(path), options.encoding_errors)
        yield _column_of(objects, [f"{path}: object {number}" for number in range(len(objects))], options)
        return
    if separator is None:
        yield _as_text([_read_bytes(path)], options, path, [0])
        return
    offset, rest = 0, b""
    try:
        with _open_stream(Path(path)) as stream:
            while block := stream.read(READ_BYTES):
                data = rest + block
                # Cut from the left, so that what a separator is does not depend on how the stream arrives.
                rest = data.rsplit(separator, 1)[-1] if not _overlaps_itself(separator) else data.split(separator)[-1]
                complete = data[: len(data) - len(rest)]
                if complete:
                    yield _documents_in(complete, separator, source, piece, offset)
                offset += len(complete)
    except (OSError, pa.ArrowException, EOFError) as error:
        raise _unreadable(path, "a compressed file" if compression_of(Path(path)) else "a file", error) from error
    if rest:
        yield _documents_in(rest, separator, source, piece, offset)


def _documents_in(block: bytes, separator: bytes, source: Source, piece: Piece, offset: int) -> pa.Array:
    """Documents of a block that ends with a separator or with its file; `offset` is where it begins."""
    path, options = source.origins[piece.source], source.options
    if _format_of(Path(path), options.file_format) == "json":
        return _json_documents(block, options, path, offset)
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
    return _as_text(documents, options, path, offsets)


def _read_csv(source: Source, piece: Piece) -> Iterator[pa.Array]:
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
                raise _unreadable(path, "csv", error) from error
            block_bytes = min(8 * block_bytes, MAX_CSV_ROW_BYTES)


def _csv_documents(path: str, options: ReadOptions, block_bytes: int, first_row: int) -> Iterator[pa.Array]:
    import pyarrow.csv

    convert = pyarrow.csv.ConvertOptions(
        include_columns=[options.text_column],
        column_types={options.text_column: pa.large_binary()},
        strings_can_be_null=False,
        check_utf8=False,
    )
    with _open_stream(Path(path)) as stream:
        reader = pyarrow.csv.open_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(block_size=block_bytes, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=_csv_delimiter(Path(path))),
            convert_options=convert,
        )
        rows = 0
        for batch in reader:
            documents = batch.column(0).slice(max(0, first_row - rows))
            yield _checked(documents, options, f"{path}: row {{row}}", max(rows, first_row))
            rows += len(batch)


def _csv_delimiter(path: Path) -> str:
    return "\t" if _suffix(path) == ".tsv" else ","


def _read_parquet(source: Source, piece: Piece) -> Iterator[pa.Array]:
    import pyarrow.parquet

    path, options = source.origins[piece.source], source.options
    column = options.chat_column or options.text_column
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        group = file.metadata.row_group(piece.start)
        batch_size = group.num_rows * READ_BYTES // max(group.total_byte_size, 1) + 1
        for batch in file.iter_batches(batch_size, row_groups=[piece.start], columns=[column], use_threads=False):
            yield _checked(batch.column(0), options, f"{path}: row {{row}}", rows)
            rows += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from error


def _read_table(source: Source, piece: Piece) -> Iterator[pa.Array]:
    table = source.tables[piece.source].with_format("arrow")[piece.start : piece.stop]
    column = table.column(0)
    documents = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(documents, pa.ChunkedArray):
        documents = pa.concat_arrays(documents.chunks)
    yield _checked(documents, source.options, f"{source.origins[piece.source]}: row {{row}}", piece.start)


def _read_tokens(source: Source, piece: Piece) -> Iterator[pa.Array]:
    """Documents of a token file; each begins after an EOS, which the encoder puts back at its end."""
    tokens = _map_tokens(source.origins[piece.source])
    eos_token_id = source.options.eos_token_id

    def start_after(position: int) -> int:
        if position == 0 and tokens[0] != eos_token_id:
            return 0
        while position < len(tokens):
            found = np.flatnonzero(tokens[position : position + PIECE_BYTES] == eos_token_id)
            if len(found):
                return position + int(found[0]) + 1
            position += PIECE_BYTES
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


def _map_tokens(path: str) -> np.ndarray:
    """The tokens of a speedrun shard, mapped; UserError if its header or its length is another."""
    try:
        header = np.fromfile(path, dtype="<i4", count=3)
        size = Path(path).stat().st_size
    except OSError as error:
        raise _unreadable(path, "tokens", error) from error
    if len(header) < 3 or header[0] != TOKEN_FILE_MAGIC or header[1] != TOKEN_FILE_VERSION:
        raise UserError(
            f"{path}: not a file of GPT-2 tokens (its header should begin with {TOKEN_FILE_MAGIC} and version "
            f"{TOKEN_FILE_VERSION}, it begins with {header.tolist()})"
        )
    expected = TOKEN_FILE_HEADER + 2 * int(header[2])
    if size != expected or not header[2]:
        raise UserError(f"{path}: has {size} bytes, its header announces {header[2]} tokens, which take {expected}")
    return np.memmap(path, dtype="<u2", mode="r", offset=TOKEN_FILE_HEADER)


_READERS = {
    "file": _read_file, "span": _read_span, "stream": _read_stream, "csv": _read_csv, "parquet": _read_parquet,
    "table": _read_table, "tokens": _read_tokens,
}  # fmt: skip


# JSON


def _json_documents(block: bytes, options: ReadOptions, path: str, offset: int) -> pa.Array:
    """The text column of JSON lines: by Arrow's parser, and line by line where it stumbles, to name the place."""
    import pyarrow.json

    if not block.strip():
        return pa.array([], pa.large_string())
    if options.chat_column is None:
        schema = pa.schema([(options.text_column, pa.large_string())])
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(block),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
            documents = pa.concat_arrays(table.column(0).chunks)
            documents.validate(full=True)  # the parser passes bytes on as they are
            return documents.fill_null("") if documents.null_count else documents
        except pa.ArrowInvalid:
            pass
    objects, places = [], []
    for line in block.split(b"\n"):
        if line.strip():
            objects.append(_json_object(line, path, offset, options.encoding_errors))
            places.append(f"{path}: the line at byte {offset}")
        offset += len(line) + 1
    return _column_of(objects, places, options)


def _json_object(line: bytes, path: str, offset: int, encoding_errors: str) -> dict:
    """The object that a line spells; `offset` is where the line begins in its file."""
    place = f"{path}: byte {offset}"
    if offset == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(line.decode("utf-8", encoding_errors))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: this line is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: this line is not a JSON object but {type(value).__name__}")
    return value


def _load_json_array(path: Path, encoding_errors: str = "replace") -> list:
    try:
        return json.loads(_read_bytes(str(path)).decode("utf-8-sig", encoding_errors))
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def _column_of(objects: list, places: list[str], options: ReadOptions) -> pa.Array:
    """The texts of decoded JSON; `places` is where each object stands, for messages."""
    texts = []
    for value, place in zip(objects, places, strict=True):
        text = value.get(options.chat_column or options.text_column) if isinstance(value, dict) else None
        if options.chat_column:
            text = render_chat(text, options, place)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place}: {options.text_column!r} holds {type(text).__name__}, not text ({text!r:.60})")
        texts.append(_without_surrogates(text or "", options, place))
    return pa.array(texts, pa.large_string())


def _without_surrogates(text: str, options: ReadOptions, place: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if options.encoding_errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise UserError(
            f"{place}: character {error.start} of its text is the lone surrogate {text[error.start]!a}; "
            "--encoding_errors replace puts U+FFFD in its place"
        ) from None


def render_chat(messages: object, options: ReadOptions, place: str) -> str:
    """A conversation, [{"role": ..., "content": ...}, ...], as the text that the tokenizer's chat template makes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{place}: {options.chat_column!r} is not a list of messages ({messages!r:.60})")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=options.chat_template)
    except Exception as error:  # jinja's, or what a template raises by itself
        raise UserError(f"{place}: the chat template refuses these messages ({cause_of(error)})") from None
    return rendered[0]


# Bytes and text


def _open_stream(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=compression_of(path))


def _read_bytes(path: str) -> bytes:
    try:
        with _open_stream(Path(path)) as stream:
            return stream.read()
    except (OSError, pa.ArrowException, EOFError) as error:
        raise _unreadable(path, "a file", error) from error


def _as_text(documents: list[bytes], options: ReadOptions, path: str, offsets: list[int]) -> pa.Array:
    """UTF-8 checked; with the byte offset in the file where it is not."""
    binary = pa.array(documents, pa.large_binary())
    try:
        return binary.cast(pa.large_string())
    except pa.ArrowInvalid:
        if options.encoding_errors == "replace":
            return pa.array([document.decode("utf-8", "replace") for document in documents], pa.large_string())
    for document, offset in zip(documents, offsets, strict=True):
        try:
            codecs.decode(document, "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, error.reason) from None
    raise AssertionError("Arrow and Python disagree on UTF-8")


def _checked(documents: pa.Array, options: ReadOptions, place: str, first_row: int) -> pa.Array:
    """A column as `large_string`, chats rendered, UTF-8 checked, nulls empty; `place` has a field for the row."""
    if options.chat_column:
        rows = documents.to_pylist()
        texts = [render_chat(row, options, place.format(row=first_row + i)) for i, row in enumerate(rows)]
        return pa.array(texts, pa.large_string())
    if pa.types.is_null(documents.type):
        return pa.array([""] * len(documents), pa.large_string())
    documents = documents.fill_null("") if documents.null_count else documents
    binary = documents.cast(pa.large_binary())
    try:
        return binary.cast(pa.large_string())
    except pa.ArrowInvalid:
        pass
    texts = []
    for row, value in enumerate(binary.to_pylist(), start=first_row):
        try:
            texts.append(value.decode("utf-8", options.encoding_errors))
        except UnicodeDecodeError as error:
            raise _not_utf8(place.format(row=row), error.start, error.reason) from None
    return pa.array(texts, pa.large_string())


def _not_utf8(place: str, offset: int, reason: str) -> UserError:
    return UserError(
        f"{place}: byte {offset} is not UTF-8 ({reason}); convert the file, or --encoding_errors replace puts U+FFFD "
        "in its place"
    )


def _unreadable(path: str, kind: str, error: BaseException) -> UserError:
    return UserError(f"{path}: cannot be read as {kind} ({cause_of(error)})")


def cause_of(error: BaseException) -> str:
    """The innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


# The standard library, the Hub


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
    """A `Dataset`, or an `IterableDataset`; UserError when it cannot be had."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the network, the Hub, the dataset's own files: none of it is a defect of ours
        raise UserError(
            f"--dataset_name {name}: cannot be loaded ({cause_of(error)}); "
            "check the name and the network, or use --dataset_name stdlib or --train_file"
        ) from error
