"""Formats of files that documents are read from. A new one is a module here and its name in the first import."""

from gpt2modern.data.formats import text, json, csv, parquet, arrow, tokens  # isort: skip  # noqa: F401
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions

__all__ = ["FORMATS", "Format", "Piece", "ReadOptions"]
