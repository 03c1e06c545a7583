"""JSON: an object on each line, or one array of objects; a document is the text column, or a conversation, of each."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.json

from gpt2modern.data.formats import reading
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions, compression_of
from gpt2modern.data.formats.text import blocks_of, byte_ranges
from gpt2modern.errors import GPT2ModernError


def pieces(path: Path, options: ReadOptions, piece_bytes: int) -> list[tuple[int, int]]:
    """Cut a file of JSON lines into byte ranges; an array, or a compressed file, stays whole."""
    with reading.errors_named(path, "json"):
        is_array = _is_array(path)
        reading.require_column(_first_keys(path, is_array), None, options, str(path))
    if compression_of(path) or is_array:
        return reading.whole_file(path, options, piece_bytes)
    return byte_ranges(path, piece_bytes)


def read(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Read the documents of the lines that begin in a byte range, or of an array."""
    if piece.start == 0 and _is_array(piece.origin):
        objects = _load_array(piece.origin, options.encoding_errors)
        places = [f"{piece.name}: object {number}" for number in range(len(objects))]
        yield _texts_of(objects, places, options)
        return
    for block, offset in blocks_of(piece, b"\n"):
        yield _texts_of_lines(block, options, piece.name, offset)


def lines_of(stream: pa.NativeFile) -> Iterator[bytes]:
    """Split a stream into lines without their line breaks."""
    begun: list[bytes] = []  # the parts of a line that has not ended: joined once, or a long line takes quadratic time
    while block := stream.read(1 << 16):
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    yield b"".join(begun)


def _texts_of_lines(block: bytes, options: ReadOptions, name: str, offset: int) -> pa.Array:
    """Parse lines by Arrow, and one by one where it stumbles, to name the place."""
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
            objects.append(_object_of(line, name, offset, options.encoding_errors))
            places.append(f"{name}: the line at byte {offset}")
        offset += len(line) + 1
    return _texts_of(objects, places, options)


def _object_of(line: bytes, name: str, offset: int, encoding_errors: str) -> dict:
    place = f"{name}: byte {offset}"
    if offset == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(line.decode("utf-8", encoding_errors))
    except UnicodeDecodeError as error:
        raise reading.not_utf8(name, offset + error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise GPT2ModernError(f"{place}: this line is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise GPT2ModernError(f"{place}: this line is not a JSON object but {type(value).__name__}")
    return value


def _load_array(path: Path, encoding_errors: str = "replace") -> list:
    try:
        return json.loads(reading.read_bytes(path).decode("utf-8-sig", encoding_errors))
    except UnicodeDecodeError as error:
        raise reading.not_utf8(str(path), error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise GPT2ModernError(f"{path}: not JSON ({error})") from None


def _is_array(path: Path) -> bool:
    with reading.open_stream(path) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _first_keys(path: Path, is_array: bool) -> list[str]:
    """Return the keys of a file's first object."""
    if is_array:
        objects = _load_array(path)
        if not objects or not isinstance(objects[0], dict):
            raise GPT2ModernError(f"{path}: its array does not begin with an object, {{...}}")
        return list(objects[0])
    line, offset = b"", 0
    with reading.open_stream(path) as stream:
        for line in lines_of(stream):
            if line.strip():
                break
            offset += len(line) + 1
    return list(_object_of(line, str(path), offset, "replace"))


def _texts_of(objects: list, places: list[str], options: ReadOptions) -> pa.Array:
    """Take the texts out of decoded JSON; places: where each object stands, for messages."""
    texts = []
    for value, place in zip(objects, places, strict=True):
        text = value.get(options.column) if isinstance(value, dict) else None
        if options.chat_column:
            text = reading.render_chat(text, options, place)
        if text is not None and not isinstance(text, str):
            raise GPT2ModernError(f"{place}: {options.column!r} holds {type(text).__name__}, not text ({text!r:.60})")
        texts.append(_without_surrogates(text or "", options, place))
    return pa.array(texts, pa.large_string())


def _without_surrogates(text: str, options: ReadOptions, place: str) -> str:
    """Refuse or replace half a surrogate pair: JSON can spell one, but it is no character and has no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if options.encoding_errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise GPT2ModernError(
            f"{place}: character {error.start} of its text is the lone surrogate {text[error.start]!a}; "
            "--encoding_errors replace puts U+FFFD in its place"
        ) from None


FORMATS["json"] = Format((".json", ".jsonl", ".ndjson"), pieces, read, holds_chats=True, may_be_compressed=True)
