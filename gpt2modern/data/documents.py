"""Turn pieces (ranges of a file or table) into a `datasets.IterableDataset` of documents, one shard per piece.

The builder has its own module, because `datasets` replaces `open` and `Path` in the module of every builder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets
import pyarrow as pa
from datasets.builder import Key

from gpt2modern.data.formats import FORMATS, Piece, ReadOptions
from gpt2modern.data.formats.reading import check_unchanged

COLUMN = "document"  # large_string, or lists of ids from files of tokens


class Documents(datasets.ArrowBasedBuilder):
    """Build a dataset with the one column `document` from pieces; get it by `as_streaming_dataset("train")`."""

    def __init__(self, pieces: Sequence[Piece], options: ReadOptions, cache_dir: str | None = None):
        self.pieces, self.options = list(pieces), options
        super().__init__(cache_dir=cache_dir)

    def _info(self) -> datasets.DatasetInfo:
        holds_tokens = bool(self.pieces) and FORMATS[self.pieces[0].format].holds_tokens
        ids = datasets.LargeList(datasets.Value(self.options.token_dtype or "uint16"))
        kind = ids if holds_tokens else datasets.Value("large_string")
        return datasets.DatasetInfo(features=datasets.Features({COLUMN: kind}))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", gen_kwargs={"pieces": self.pieces})]

    def _generate_tables(self, pieces: list[Piece]) -> Iterator[tuple[Key, pa.Table]]:
        for number, piece in enumerate(pieces):
            for part, documents in enumerate(read_piece(piece, self.options)):
                yield Key(number, part), pa.table({COLUMN: documents})


def read_piece(piece: Piece, options: ReadOptions) -> Iterator[pa.Array]:
    """Yield arrays of the documents of one piece, at most `piece.limit`. GPT2ModernError names the file and place, or a
    file that was changed since it was opened."""
    seen = 0
    check_unchanged(piece.stats)  # before a memory-mapped table is read that was truncated, which ends the process
    try:
        for documents in FORMATS[piece.format].read(piece, options):
            if documents := documents.slice(0, None if piece.limit is None else piece.limit - seen):
                yield documents
            seen += len(documents)
            if seen == piece.limit:
                return
    finally:  # also after an error, whose cause it may be
        check_unchanged(piece.stats)


def array_of(table: pa.Table, column: str) -> pa.Array:
    """Return a table's column as one array, joining its chunks."""
    chunks = table.column(column).chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def first_tokens(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """Return the pieces of files of tokens in which the first `count` tokens lie. The document in which number `count`
    lies is read to its end."""
    kept: list[Piece] = []
    for piece in pieces:
        if count > 0:
            kept.append(replace(piece, stop=min(piece.stop, piece.start + count)))
        count -= piece.stop - piece.start
    return kept


def first_documents(pieces: Sequence[Piece], options: ReadOptions, count: int) -> list[Piece]:
    """Return the pieces that hold the first `count` documents. The last piece is limited to the documents needed."""
    kept: list[Piece] = []
    for piece in pieces:
        if count > 0:
            found = sum(len(array) for array in read_piece(replace(piece, limit=count), options))
            kept.append(replace(piece, limit=found))
            count -= found
    return kept
