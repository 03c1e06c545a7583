"""Open files and decode their documents, for all formats; errors name the file and the place in it."""

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from transformers.utils.chat_template_utils import render_jinja_template

from gpt2modern.data.formats.registry import ReadOptions, compression_of
from gpt2modern.errors import GPT2ModernError, first_line

READ_BYTES = 4 << 20  # read from a file at once


def whole_file(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Return the complete file as the only piece: [(0, bytes of the file)]."""
    return [(0, path.stat().st_size)]


def stats_of(path: Path) -> dict[Path, tuple[int, int]]:
    """Return the size and the modification time in ns of a file, or of each file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = {file: file.stat() for file in files if file.is_file()}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def check_unchanged(stats: dict[Path, tuple[int, int]]) -> None:
    """Raise GPT2ModernError if one of the files has another size or modification time than `stats_of` returned."""
    for path, before in stats.items():
        if not path.is_file() or stats_of(path)[path] != before:
            raise GPT2ModernError(
                f"{path} was changed while it was read; when it is complete, prepare the data again in another folder"
            )


def open_stream(path: Path) -> pa.NativeFile:
    """Open a file for reading from its start; it is decompressed if its extension names a compression."""
    return pa.input_stream(str(path), compression=compression_of(path))


def read_bytes(path: Path) -> bytes:
    """Return the complete, decompressed content of a file. Raises GPT2ModernError if it cannot be read."""
    with errors_named(path, "a file"), open_stream(path) as stream:
        return stream.read()


@contextlib.contextmanager
def errors_named(name: Path | str, kind: str) -> Iterator[None]:
    """Convert errors of Arrow, `datasets` and the system in a `with` block to a GPT2ModernError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError, csv.Error) as error:
        raise GPT2ModernError(f"{name} cannot be read as {kind} ({cause_of(error)}); check the file") from error


def not_utf8(place: str, offset: int, error: UnicodeDecodeError) -> GPT2ModernError:
    """Return the error for bytes that are not UTF-8. offset: of the first decoded byte, in the file or value."""
    return GPT2ModernError(
        f"{place}: byte {offset + error.start} is not UTF-8 ({error.reason}); convert the file to UTF-8, or use "
        "--encoding_errors replace to insert U+FFFD"
    )


def cause_of(error: BaseException) -> str:
    """Return the class and the first line of the innermost cause (`__cause__`) of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error) if str(error) else 'no message'}"


def require_column(columns: pa.Schema | Sequence[str], options: ReadOptions, name: str) -> None:
    """Raise GPT2ModernError if the column of the documents is not in `columns`, or is known to hold no text."""
    flag = "--chat_column" if options.chat_column else "--text_column"
    names = columns.names if isinstance(columns, pa.Schema) else columns
    if options.column not in names:
        raise GPT2ModernError(f"{name} has no column {options.column!r}; choose {flag} from {', '.join(names)}")
    if isinstance(columns, pa.Schema) and not options.chat_column:
        kind = columns.field(options.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise GPT2ModernError(
                f"{name}: the column {options.column!r} holds {kind}, not text; name another with {flag}"
            )


def text_of_bytes(documents: list[bytes], options: ReadOptions, name: str, offsets: Iterable[int]) -> pa.Array:
    """Decode documents from UTF-8 to an array. offsets: of each in its file, for the GPT2ModernError if that fails."""
    return _decoded(pa.array(documents, pa.large_binary()), options, ((name, offset) for offset in offsets))


def text_of_column(column: pa.Array, options: ReadOptions, name: str, first_row: int) -> pa.Array:
    """Convert a column of texts or conversations to `large_string`, null to "". first_row: its number, for errors."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    places = (f"{name}: row {row}" for row in itertools.count(first_row))
    if options.chat_column:
        texts = [render_chat(row, options, place) for row, place in zip(column.to_pylist(), places, strict=False)]
        return pa.array(texts, pa.large_string())
    texts = column.cast(pa.large_string()) if pa.types.is_null(column.type) else column
    binary = (texts.fill_null("") if texts.null_count else texts).cast(pa.large_binary())
    return _decoded(binary, options, ((place, 0) for place in places))


def _decoded(binary: pa.Array, options: ReadOptions, places: Iterable[tuple[str, int]]) -> pa.Array:
    """Decode UTF-8 documents. places: name and byte offset of each, for the GPT2ModernError if one is not UTF-8."""
    try:
        return binary.cast(pa.large_string())
    except pa.ArrowInvalid:
        texts = []
    for value, (place, offset) in zip(binary.to_pylist(), places, strict=False):
        try:
            texts.append(value.decode("utf-8", options.encoding_errors))
        except UnicodeDecodeError as error:
            raise not_utf8(place, offset, error) from None
    return pa.array(texts, pa.large_string())


def render_chat(messages: object, options: ReadOptions, place: str) -> str:
    """Render a conversation, [{"role": ..., "content": ...}, ...], with the chat template, and return the text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise GPT2ModernError(f"{place}: {options.chat_column!r} is not a list of messages {{...}} ({messages!r:.60})")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=options.chat_template)
    except Exception as error:  # jinja's, or what a template raises by itself
        problem = f"the chat template cannot render these messages ({cause_of(error)})"
        raise GPT2ModernError(f"{place}: {problem}; correct them, or give another --chat_template") from None
    return rendered[0]
