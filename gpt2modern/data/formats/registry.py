"""The registry of file formats: a format owns its extensions, the pieces that a file is read in, and how one is read.

To add one, put a `Format` into FORMATS under its --file_format name: in a module of this package that `__init__`
imports, or from outside, anywhere before `prepare` is called. `reading` has what most of them need.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from gpt2modern.data.config import PrepareConfig
from gpt2modern.errors import GPT2ModernError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


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

    @classmethod
    def of(cls, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast | None) -> "ReadOptions":
        """Collect what the formats need to know to read files; tokenizer: None where it is trained on them."""
        flags = ("text_column", "chat_column", "sample_by", "separator", "encoding_errors", "file_format")
        options = cls(**{name: getattr(config, name) for name in flags})
        if tokenizer is None:
            return options
        return replace(options, eos_token_id=tokenizer.eos_token_id, chat_template=tokenizer.chat_template)

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

    extensions: in lower case, ".csv". pieces: (origin, options, most bytes of a piece) -> [(start, stop), ...]; it
    raises GPT2ModernError for a file that cannot be read. read: (piece, options) -> Arrow arrays of documents,
    `large_string`, or lists of uint16 ids where `holds_tokens`. open: (path, options) -> origin, by default the path.
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
        if suffix(path) in format.extensions and (format.may_be_compressed or not compression_of(path)):
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
