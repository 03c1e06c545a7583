"""Pieces of files and tables as a `datasets.IterableDataset` of documents, one of its shards for each piece.

This module holds the builder alone: `datasets` replaces `open` and `Path` in the module of every builder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets
import pyarrow as pa
from datasets.builder import Key

from gpt2modern.data.formats import FORMATS, Piece, ReadOptions

COLUMN = "document"  # large_string, or lists of uint16 from files of tokens


class Documents(datasets.ArrowBasedBuilder):
    """Read pieces as Arrow tables of the one column `document`; `as_streaming_dataset` makes them a dataset."""

    def __init__(self, pieces: Sequence[Piece], options: ReadOptions, cache_dir: str | None = None):
        self.pieces, self.options = list(pieces), options
        super().__init__(cache_dir=cache_dir)

    def _info(self) -> datasets.DatasetInfo:
        holds_tokens = bool(self.pieces) and FORMATS[self.pieces[0].format].holds_tokens
        kind = datasets.LargeList(datasets.Value("uint16")) if holds_tokens else datasets.Value("large_string")
        return datasets.DatasetInfo(features=datasets.Features({COLUMN: kind}))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", gen_kwargs={"pieces": self.pieces})]

    def _generate_tables(self, pieces: list[Piece]) -> Iterator[tuple[Key, pa.Table]]:
        for number, piece in enumerate(pieces):
            for part, documents in enumerate(read_piece(piece, self.options)):
                yield Key(number, part), pa.table({COLUMN: documents})


def read_piece(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Read the documents of one piece up to its limit, as arrays; raises GPT2ModernError that names file and place."""
    seen = 0
    for documents in FORMATS[piece.format].read(piece, options):
        if documents := documents.slice(0, None if piece.limit is None else piece.limit - seen):
            yield documents
        seen += len(documents)
        if seen == piece.limit:
            return


def array_of(table: pa.Table, column: str) -> pa.Array:
    """Return a column as one array."""
    chunks = table.column(column).chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def first_documents(pieces: Sequence[Piece], options: ReadOptions, count: int) -> list[Piece]:
    """Return the pieces of the first `count` documents, the last one limited to what is left."""
    kept: list[Piece] = []
    for piece in pieces:
        if count > 0:
            found = sum(len(array) for array in read_piece(replace(piece, limit=count), options))
            kept.append(replace(piece, limit=found))
            count -= found
    return kept
