"""Open files of all formats, turn their bytes into text; what is wrong becomes an error that names file and place."""

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from transformers.utils.chat_template_utils import render_jinja_template

from gpt2modern.data.formats.registry import ReadOptions, compression_of
from gpt2modern.errors import GPT2ModernError, first_line

READ_BYTES = 4 << 20  # of a file at a time


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
    """Turn what Arrow, `datasets` and the system raise in the block into a GPT2ModernError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError, csv.Error) as error:
        raise GPT2ModernError(f"{name}: cannot be read as {kind} ({cause_of(error)})") from error


def not_utf8(place: str, offset: int, error: UnicodeDecodeError) -> GPT2ModernError:
    """Build the error for bytes that are not text; offset: of what was decoded."""
    return GPT2ModernError(
        f"{place}: byte {offset + error.start} is not UTF-8 ({error.reason}); convert the file, or --encoding_errors "
        "replace puts U+FFFD in its place"
    )


def cause_of(error: BaseException) -> str:
    """Say the innermost cause of an error on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error) if str(error) else 'no message'}"


def require_column(columns: pa.Schema | Sequence[str], options: ReadOptions, name: str) -> None:
    """Raise GPT2ModernError unless the asked column is among `columns` and, where its type is known, holds text."""
    flag = "--chat_column" if options.chat_column else "--text_column"
    names = columns.names if isinstance(columns, pa.Schema) else columns
    if options.column not in names:
        raise GPT2ModernError(f"{name}: no column {options.column!r}; {flag} can be one of {', '.join(names)}")
    if isinstance(columns, pa.Schema) and not options.chat_column:
        kind = columns.field(options.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise GPT2ModernError(f"{name}: column {options.column!r} holds {kind}, not text; name another with {flag}")


def text_of_bytes(documents: list[bytes], options: ReadOptions, name: str, offsets: Iterable[int]) -> pa.Array:
    """Turn documents in UTF-8 into an array; offsets: where each begins in its file, for the error where one is not."""
    return _decoded(pa.array(documents, pa.large_binary()), options, ((name, offset) for offset in offsets))


def text_of_column(column: pa.Array, options: ReadOptions, name: str, first_row: int) -> pa.Array:
    """Turn a column of text or of conversations into `large_string`, nulls empty; first_row: its number, for errors."""
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
    """Decode UTF-8; places: name and offset of each document, for the error where one is not."""
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
    """Render a conversation, [{"role": ..., "content": ...}, ...], by the tokenizer's chat template."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise GPT2ModernError(f"{place}: {options.chat_column!r} is not a list of messages ({messages!r:.60})")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=options.chat_template)
    except Exception as error:  # jinja's, or what a template raises by itself
        raise GPT2ModernError(f"{place}: the chat template refuses these messages ({cause_of(error)})") from None
    return rendered[0]
