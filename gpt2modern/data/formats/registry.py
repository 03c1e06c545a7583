"""The registry of file formats: a format owns its extensions, the pieces that a file is read in, and how one is read.

To add one, put a `Format` into FORMATS under its --file_format name, in a module of this package that `__init__` imports
or, from outside, anywhere before `prepare` is called. The functions here open files and turn bytes into text for all of
them; whatever is wrong with a file becomes a GPT2ModernError that names the file and the place.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from transformers.utils.chat_template_utils import render_jinja_template

from gpt2modern.errors import GPT2ModernError, first_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
READ_BYTES = 4 << 20  # of a file at a time


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the names are those of the flags of prepare_data.py."""

    text_column: str = "text"
    chat_column: str | None = None
    sample_by: Literal["document", "line", "paragraph"] = "document"
    separator: str | None = None
    encoding_errors: Literal["strict", "replace"] = "strict"
    file_format: str = "auto"
    eos_token_id: int | None = None  # ends a document in a file of tokens
    chat_template: str | None = None  # Jinja, for the conversations of `chat_column`

    @property
    def column(self) -> str:
        """Name of the column that holds the documents."""
        return self.chat_column or self.text_column


@dataclass(frozen=True)
class Piece:
    """Name a part of a file or table that is read at once: what is shuffled and shared out among shards.

    origin: what the format's `open` gave. [start, stop) counts what the format counts: bytes, row groups, rows, tokens.
    A document belongs to the piece in which it begins. limit: only its first so many documents.
    """

    format: str
    origin: Any
    name: str  # of the file or table, for messages
    start: int
    stop: int
    limit: int | None = None


@dataclass(frozen=True)
class Format:
    """Describe one file format.

    extensions: in lower case, ".csv". pieces: (origin, options, most bytes of a piece) -> [(start, stop), ...]; it raises
    GPT2ModernError for a file that cannot be read. read: (piece, options) -> Arrow arrays of documents, `large_string`, or
    lists of uint16 token ids where `holds_tokens`. open: (path, options) -> origin; by default the path itself.
    """

    extensions: tuple[str, ...]
    pieces: Callable[[Any, ReadOptions, int], list[tuple[int, int]]]
    read: Callable[[Piece, ReadOptions], Iterator[pa.Array]]
    open: Callable[[Path, ReadOptions], Any] = lambda path, options: path
    holds_chats: bool = False
    holds_tokens: bool = False
    may_be_compressed: bool = False


FORMATS: dict[str, Format] = {}


def format_of(path: Path, file_format: str = "auto") -> str:
    """Return the name of a file's format, by its extension unless `file_format` names one."""
    if path.is_dir():
        return "arrow"
    if file_format != "auto":
        if file_format not in FORMATS:
            raise GPT2ModernError(f"--file_format {file_format} is unknown; choose from auto, {', '.join(FORMATS)}")
        return file_format
    for name, format in FORMATS.items():
        if suffix(path) in format.extensions:
            if compression_of(path) and not format.may_be_compressed:
                raise GPT2ModernError(f"{path}: {name} files cannot be read compressed; unpack it")
            return name
    raise GPT2ModernError(f"{path}: unknown extension; known are {', '.join(extensions())}; or name its --file_format")


def extensions() -> list[str]:
    """List the extensions of all formats."""
    return [extension for format in FORMATS.values() for extension in format.extensions]


def suffix(path: Path) -> str:
    """Return the extension of a file in lower case, without the one of its compression."""
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: Path) -> str | None:
    """Return Arrow's name of the compression that a file's extension stands for."""
    return COMPRESSIONS.get(path.suffix.lower())


def whole_file(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Make a file one piece."""
    return [(0, path.stat().st_size)]


def open_stream(path: Path) -> pa.NativeFile:
    """Open a file for reading from its beginning, unpacking it where its extension names a compression."""
    return pa.input_stream(str(path), compression=compression_of(path))


def read_bytes(path: Path) -> bytes:
    """Read a whole file, unpacked."""
    with errors_named(path, "a file"), open_stream(path) as stream:
        return stream.read()


@contextlib.contextmanager
def errors_named(name: Path | str, kind: str) -> Iterator[None]:
    """Turn what Arrow and the system raise in the block into a GPT2ModernError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(name, kind, error) from error


def unreadable(name: Path | str, kind: str, error: BaseException) -> GPT2ModernError:
    """Build the error for a file that is not what its format says."""
    return GPT2ModernError(f"{name}: cannot be read as {kind} ({cause_of(error)})")


def not_utf8(place: str, offset: int, reason: str) -> GPT2ModernError:
    """Build the error for bytes that are not text."""
    return GPT2ModernError(
        f"{place}: byte {offset} is not UTF-8 ({reason}); convert the file, or --encoding_errors replace puts U+FFFD "
        "in its place"
    )


def cause_of(error: BaseException) -> str:
    """Say the innermost cause of an error on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error) if str(error) else 'no message'}"


def require_column(names: Sequence[str], kind: pa.DataType | None, options: ReadOptions, name: str) -> None:
    """Raise GPT2ModernError unless the asked column is among `names` and, where its type is known, holds text or chats."""
    flag = "--chat_column" if options.chat_column else "--text_column"
    if options.column not in names:
        raise GPT2ModernError(f"{name}: no column {options.column!r}; {flag} can be one of {', '.join(names)}")
    if kind is None or options.chat_column:
        return
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise GPT2ModernError(f"{name}: column {options.column!r} holds {kind}, not text; name another with {flag}")


def text_of_bytes(documents: list[bytes], options: ReadOptions, name: str, offsets: list[int]) -> pa.Array:
    """Turn documents in UTF-8 into an array; offsets: where each begins in its file, for the error where one is not."""
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
            raise not_utf8(name, offset + error.start, error.reason) from None
    raise AssertionError("Arrow and Python disagree on UTF-8")


def text_of_column(column: pa.Array, options: ReadOptions, name: str, first_row: int) -> pa.Array:
    """Turn a column of text or of conversations into `large_string`, nulls empty; first_row: its number, for errors."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if options.chat_column:
        rows = column.to_pylist()
        texts = [render_chat(row, options, f"{name}: row {number}") for number, row in enumerate(rows, first_row)]
        return pa.array(texts, pa.large_string())
    if pa.types.is_null(column.type):
        return pa.array([""] * len(column), pa.large_string())
    binary = (column.fill_null("") if column.null_count else column).cast(pa.large_binary())
    try:
        return binary.cast(pa.large_string())
    except pa.ArrowInvalid:
        pass
    texts = []
    for row, value in enumerate(binary.to_pylist(), first_row):
        try:
            texts.append(value.decode("utf-8", options.encoding_errors))
        except UnicodeDecodeError as error:
            raise not_utf8(f"{name}: row {row}", error.start, error.reason) from None
    return pa.array(texts, pa.large_string())


def render_chat(messages: object, options: ReadOptions, place: str) -> str:
    """Render a conversation, [{"role": ..., "content": ...}, ...], by the tokenizer's chat template."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise GPT2ModernError(f"{place}: {options.chat_column!r} is not a list of messages ({messages!r:.60})")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=options.chat_template)
    except Exception as error:  # jinja's, or what a template raises by itself
        raise GPT2ModernError(f"{place}: the chat template refuses these messages ({cause_of(error)})") from None
    return rendered[0]
