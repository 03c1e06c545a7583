"""Register the file formats: the extensions of each, and how its files are divided into pieces and read.

To add one, put a `Format` into FORMATS under its --file_format name: in a module of this package that `__init__`
imports, or in other code before `prepare` is called. The module `reading` has helpers for formats.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from gpt2modern.data.config import PrepareConfig
from gpt2modern.errors import GPT2ModernError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


@dataclass(frozen=True)
class ReadOptions:
    """Hold the options for reading files; the fields have the names of the flags of prepare_data.py."""

    text_column: str = "text"
    chat_column: str | None = None
    sample_by: Literal["document", "line", "paragraph"] = "document"
    separator: str | None = None
    encoding_errors: Literal["strict", "replace"] = "strict"
    file_format: str = "auto"
    token_dtype: Literal["uint16", "uint32"] | None = None  # of a file of tokens without a header
    eos_token_id: int | None = None  # ends a document in a file of tokens
    chat_template: str | None = None  # Jinja, for the conversations of `chat_column`

    @classmethod
    def of(cls, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast | None) -> "ReadOptions":
        """Return the options of a run. tokenizer: of the run, or None if it is trained on the files that are read."""
        names = {field.name for field in fields(cls)} - {"eos_token_id", "chat_template"}  # of the tokenizer
        options = cls(**{name: getattr(config, name) for name in names})
        if tokenizer is None:
            return options
        return replace(options, eos_token_id=tokenizer.eos_token_id, chat_template=tokenizer.chat_template)

    @property
    def column(self) -> str:
        """Return the name of the column that holds the documents."""
        return self.chat_column or self.text_column


@dataclass(frozen=True)
class Piece:
    """Represent a part of a file or table; pieces are shuffled and distributed over the shards.

    origin: the value that the format's `open` returned. [start, stop): range of bytes, row groups, rows or tokens, as
    the format defines. A document belongs to the piece in which it starts. limit: most documents to read; None: all.
    stats: size and modification time (ns) of the files when they were opened; a change is an error.
    """

    format: str
    origin: Any
    name: str  # of the file or table, for messages
    start: int
    stop: int
    limit: int | None = None
    stats: dict[Path, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """Describe one file format.

    extensions: in lower case, such as ".csv". pieces: (origin, options, most bytes of a piece) -> [(start, stop), ...];
    it raises GPT2ModernError if the file cannot be read. read: (piece, options) -> Arrow arrays of documents, of type
    `large_string`, or lists of ids if `holds_tokens`. open: (path, options) -> origin; default: the path.
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
    """Return the name of a file's format: `file_format` unless it is auto, or by extension; a folder is always arrow.
    Raises GPT2ModernError if the format is unknown."""
    if path.is_dir():
        return "arrow"
    if file_format != "auto":
        if file_format not in FORMATS:
            raise GPT2ModernError(f"--file_format {file_format} is unknown; choose from auto, {', '.join(FORMATS)}")
        return file_format
    for name, format in FORMATS.items():
        if suffix(path) in format.extensions and (format.may_be_compressed or not compression_of(path)):
            return name
    raise GPT2ModernError(
        f"{path} has an unknown extension; known are {', '.join(extensions())}; or give --file_format"
    )


def extensions() -> list[str]:
    """Return the extensions of all formats."""
    return [extension for format in FORMATS.values() for extension in format.extensions]


def suffix(path: Path) -> str:
    """Return a file's extension in lower case; of a compressed file, the one before: ".csv" of a.csv.gz."""
    return Path(path.stem if compression_of(path) else path.name).suffix.lower()


def compression_of(path: Path) -> str | None:
    """Return Arrow's name of the compression that a file's extension names, or None if it names none."""
    return COMPRESSIONS.get(path.suffix.lower())
