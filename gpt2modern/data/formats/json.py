"""Read JSON: one object per line, or one array of objects; each object holds a document, a text or a conversation."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions, compression_of
from gpt2modern.data.formats.text import blocks_of, byte_ranges
from gpt2modern.errors import GPT2ModernError


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Divide a file of JSON lines into byte ranges [start, stop); an array or a compressed file is one piece."""
    with reading.errors_named(path, "json"), reading.open_stream(path) as stream:
        is_array = _is_array(path)
        if is_array:
            objects = enumerate(_parse(stream.read(), str(path), 0, "replace"))
        else:
            objects = _objects_of(io.BufferedReader(stream), str(path), 0, "replace")
        _, first = next(objects, (None, None))
    if not isinstance(first, dict):
        raise GPT2ModernError(
            f"{path}: the {'array' if is_array else 'file'} does not start with a JSON object; give one per document"
        )
    reading.require_column(list(first), options, str(path))
    if compression_of(path) or is_array:
        return reading.whole_file(path, options, piece_bytes)
    return byte_ranges(path, piece_bytes)


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield arrays of the documents of the lines that start in a byte range, or of an array of objects."""
    if piece.start == 0 and _is_array(piece.origin):
        objects = _parse(reading.read_bytes(piece.origin), piece.name, 0, options.encoding_errors)
        yield _texts_of(((f"{piece.name}: object {number}", each) for number, each in enumerate(objects)), options)
        return
    for block, offset in blocks_of(piece, b"\n"):
        documents = _read_by_arrow(block, options) if options.chat_column is None and block.strip() else None
        if documents is None:
            documents = _texts_of(_objects_of(io.BytesIO(block), piece.name, offset, options.encoding_errors), options)
        yield documents


def _read_by_arrow(lines: bytes, options: ReadOptions) -> pa.Array | None:
    """Parse lines with Arrow. Returns None if Arrow fails; then they are parsed one by one, to name the invalid one."""
    schema = pa.schema([(options.text_column, pa.large_string())])
    one_block = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    parsing = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        documents = pyarrow.json.read_json(pa.BufferReader(lines), one_block, parsing).column(0).combine_chunks()
        documents.validate(full=True)  # the parser does not check UTF-8
        return documents.fill_null("") if documents.null_count else documents
    except pa.ArrowInvalid:
        return None


def _is_array(path: Path) -> bool:
    with reading.open_stream(path) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _objects_of(lines: Iterable[bytes], name: str, offset: int, encoding_errors: str) -> Iterator[tuple[str, Any]]:
    """Yield each line's place, for messages, and its parsed value. offset: of the first line, in bytes of the file."""
    for line in lines:
        if line.strip():
            yield f"{name}: the line at byte {offset}", _parse(line, name, offset, encoding_errors)
        offset += len(line)


def _parse(data: bytes, name: str, offset: int, encoding_errors: str) -> Any:
    """Parse a line, or a complete file. offset: of its first byte in the file, for the GPT2ModernError if it fails."""
    try:
        return json.loads(data.decode("utf-8" if offset else "utf-8-sig", encoding_errors))
    except UnicodeDecodeError as error:
        raise reading.not_utf8(name, offset, error) from None
    except (ValueError, RecursionError) as error:
        raise GPT2ModernError(f"{name}: the JSON at byte {offset} is not valid ({error}); correct the file") from None


def _texts_of(objects: Iterable[tuple[str, Any]], options: ReadOptions) -> pa.Array:
    """Return the texts of parsed objects, which come in pairs (place, object). The place is for error messages."""
    texts = []
    for place, value in objects:
        if not isinstance(value, dict):
            raise GPT2ModernError(
                f"{place} is not a JSON object {{...}} but {type(value).__name__}; give one object per document"
            )
        text = value.get(options.column)
        if options.chat_column:
            text = reading.render_chat(text, options, place)
        if text is not None and not isinstance(text, str):
            found = f"{options.column!r} is {type(text).__name__}, not text ({text!r:.60})"
            raise GPT2ModernError(f"{place}: {found}; name another column with --text_column")
        texts.append(_without_surrogates(text or "", options, place))
    return pa.array(texts, pa.large_string())


def _without_surrogates(text: str, options: ReadOptions, place: str) -> str:
    """Return the text, with lone surrogates (which UTF-8 cannot encode) replaced if --encoding_errors is replace.
    Otherwise raises GPT2ModernError that names the first one."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if options.encoding_errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise GPT2ModernError(
            f"{place}: character {error.start} of the text is the lone surrogate {text[error.start]!a}, which is "
            "invalid; correct the file, or use --encoding_errors replace to insert U+FFFD"
        ) from None


FORMATS["json"] = Format((".json", ".jsonl", ".ndjson"), pieces, read, holds_chats=True, may_be_compressed=True)
