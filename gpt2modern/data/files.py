"""What the files of a source are: their formats by extension, how they are opened, what is wrong with them.

The other modules of this package raise their errors through `unreadable` and `not_utf8`, which name file and place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from gpt2modern.errors import GPT2ModernError

FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".bin": "tokens",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}

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


def format_of(path: Path, file_format: str) -> str:
    if path.is_dir():
        return "arrow"
    if file_format != "auto":
        return file_format
    format = FORMATS.get(suffix(path))
    if format is None:
        raise GPT2ModernError(f"{path}: unknown extension; known are {', '.join(FORMATS)}; or name its --file_format")
    if format in ("parquet", "arrow", "tokens") and compression_of(path):
        raise GPT2ModernError(f"{path}: {format} files cannot be read compressed; unpack it")
    return format


def suffix(path: Path) -> str:
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: Path) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())


def separator_of(options: ReadOptions, format: str) -> bytes | None:
    """What stands between the documents of a file; None: the file is one document."""
    if format == "json":
        return b"\n"
    if options.separator is not None:
        return options.separator.encode()
    return {"document": None, "line": b"\n", "paragraph": b"\n\n"}[options.sample_by]


def overlaps_itself(separator: bytes) -> bool:
    """Whether text can be cut in two ways at it: then a file is read from its beginning."""
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def csv_delimiter(path: Path) -> str:
    return "\t" if suffix(path) == ".tsv" else ","


def map_tokens(path: str) -> np.ndarray:
    """The tokens of a speedrun shard, mapped; GPT2ModernError if its header or its length is another."""
    try:
        header = np.fromfile(path, dtype="<i4", count=3)
        size = Path(path).stat().st_size
    except OSError as error:
        raise unreadable(path, "tokens", error) from error
    if len(header) < 3 or header[0] != TOKEN_FILE_MAGIC or header[1] != TOKEN_FILE_VERSION:
        raise GPT2ModernError(
            f"{path}: not a file of GPT-2 tokens (its header should begin with {TOKEN_FILE_MAGIC} and version "
            f"{TOKEN_FILE_VERSION}, it begins with {header.tolist()})"
        )
    expected = TOKEN_FILE_HEADER + 2 * int(header[2])
    if size != expected or not header[2]:
        raise GPT2ModernError(f"{path}: has {size} bytes, its header announces {header[2]} tokens, which take {expected}")
    return np.memmap(path, dtype="<u2", mode="r", offset=TOKEN_FILE_HEADER)


def open_stream(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=compression_of(path))


def read_bytes(path: str) -> bytes:
    try:
        with open_stream(Path(path)) as stream:
            return stream.read()
    except (OSError, pa.ArrowException, EOFError) as error:
        raise unreadable(path, "a file", error) from error


def not_utf8(place: str, offset: int, reason: str) -> GPT2ModernError:
    return GPT2ModernError(
        f"{place}: byte {offset} is not UTF-8 ({reason}); convert the file, or --encoding_errors replace puts U+FFFD "
        "in its place"
    )


def unreadable(path: str, kind: str, error: BaseException) -> GPT2ModernError:
    return GPT2ModernError(f"{path}: cannot be read as {kind} ({cause_of(error)})")


def cause_of(error: BaseException) -> str:
    """The innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
