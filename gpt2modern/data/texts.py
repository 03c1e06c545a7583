"""Bytes, JSON and conversations to Arrow arrays of text that is UTF-8, or an error that names the place."""

import codecs
import json
from pathlib import Path

import pyarrow as pa

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import ReadOptions, cause_of, not_utf8, open_stream, read_bytes


def json_documents(block: bytes, options: ReadOptions, path: str, offset: int) -> pa.Array:
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
            objects.append(json_object(line, path, offset, options.encoding_errors))
            places.append(f"{path}: the line at byte {offset}")
        offset += len(line) + 1
    return column_of(objects, places, options)


def json_object(line: bytes, path: str, offset: int, encoding_errors: str) -> dict:
    """The object that a line spells; `offset` is where the line begins in its file."""
    place = f"{path}: byte {offset}"
    if offset == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(line.decode("utf-8", encoding_errors))
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise GPT2ModernError(f"{place}: this line is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise GPT2ModernError(f"{place}: this line is not a JSON object but {type(value).__name__}")
    return value


def load_json_array(path: Path, encoding_errors: str = "replace") -> list:
    try:
        return json.loads(read_bytes(str(path)).decode("utf-8-sig", encoding_errors))
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error.start, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise GPT2ModernError(f"{path}: not JSON ({error})") from None


def is_json_array(path: Path) -> bool:
    with open_stream(path) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def column_of(objects: list, places: list[str], options: ReadOptions) -> pa.Array:
    """The texts of decoded JSON; `places` is where each object stands, for messages."""
    texts = []
    for value, place in zip(objects, places, strict=True):
        text = value.get(options.chat_column or options.text_column) if isinstance(value, dict) else None
        if options.chat_column:
            text = render_chat(text, options, place)
        if text is not None and not isinstance(text, str):
            raise GPT2ModernError(f"{place}: {options.text_column!r} holds {type(text).__name__}, not text ({text!r:.60})")
        texts.append(without_surrogates(text or "", options, place))
    return pa.array(texts, pa.large_string())


def without_surrogates(text: str, options: ReadOptions, place: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
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


def render_chat(messages: object, options: ReadOptions, place: str) -> str:
    """A conversation, [{"role": ..., "content": ...}, ...], as the text that the tokenizer's chat template makes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise GPT2ModernError(f"{place}: {options.chat_column!r} is not a list of messages ({messages!r:.60})")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=options.chat_template)
    except Exception as error:  # jinja's, or what a template raises by itself
        raise GPT2ModernError(f"{place}: the chat template refuses these messages ({cause_of(error)})") from None
    return rendered[0]


def as_text(documents: list[bytes], options: ReadOptions, path: str, offsets: list[int]) -> pa.Array:
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
            raise not_utf8(path, offset + error.start, error.reason) from None
    raise AssertionError("Arrow and Python disagree on UTF-8")


def checked(documents: pa.Array, options: ReadOptions, place: str, first_row: int) -> pa.Array:
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
            raise not_utf8(place.format(row=row), error.start, error.reason) from None
    return pa.array(texts, pa.large_string())
