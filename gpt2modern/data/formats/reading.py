"""Open files of all formats, turn their bytes into text; what is wrong becomes an error that names file and place."""

import codecs
import contextlib
from collections.abc import Iterator, Sequence
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
    """Raise GPT2ModernError unless the asked column is among `names` and, where its type is known, holds text."""
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
