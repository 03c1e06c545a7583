"""Read documents from files of several formats. To add a format, add a module here and its name to the first import."""

from gpt2modern.data.formats import text, json, csv, parquet, arrow, tokens  # isort: skip  # noqa: F401
from gpt2modern.data.formats.registry import FORMATS, Format, Piece, ReadOptions

__all__ = ["FORMATS", "Format", "Piece", "ReadOptions"]
