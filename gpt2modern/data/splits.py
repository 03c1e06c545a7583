"""Choose the documents, or parts of documents, that are held out for validation.

By hash: a document is held out if the 64-bit hash of its text is below the requested share of the range of hashes. So
the choice does not change when documents are added or the seed changes, and equal texts are in the same split. If this
would hold out fewer than 10 documents on average, the last part of each document, cut at a line break, is held out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

# With fewer expected validation documents, their actual number would be mostly chance.
MIN_HELD_OUT_DOCUMENTS = 10


@dataclass(frozen=True)
class ValidationRule:
    """Describe what is held out: by `hash`, documents; by `tail`, the end of each; by `file`, nothing (it is given)."""

    by: Literal["file", "hash", "tail"]
    fraction: float = 0.0

    def __str__(self) -> str:
        return {
            "file": "the documents of --validation_file",
            "hash": f"documents whose hash is below {self.fraction:.4g} of its range",
            "tail": f"the last {self.fraction:.4g} of each document, from a line break on",
        }[self.by]

    def split(self, documents: pa.Array, hashes: np.ndarray) -> tuple[pa.Array, pa.Array, np.ndarray]:
        """Split non-empty documents by their (n,) hashes. Returns training ones, held-out ones, and their hashes."""
        if self.by == "hash":
            below = hashes < np.uint64(self.fraction * 2**64)
            return documents.filter(pa.array(~below)), documents.filter(pa.array(below)), hashes[below]
        if self.by == "tail":
            pairs = [_cut(document, self.fraction) for document in documents.to_pylist()]
            has_tail = np.array([len(tail) > 0 for _, tail in pairs], dtype=bool)
            heads = pa.array([head for head, _ in pairs if len(head)], documents.type)
            return heads, pa.array([tail for _, tail in pairs if len(tail)], documents.type), hashes[has_tail]
        return documents, documents.slice(0, 0), hashes[:0]


def choose_rule(documents: Iterable[pa.Array], percentage: float, has_validation: bool) -> ValidationRule:
    """Return the rule `file` if there are validation files, `hash` if there are enough documents, otherwise `tail`."""
    if has_validation:
        return ValidationRule("file")
    fraction, found = percentage / 100, 0
    for some in documents:
        found += int(is_not_empty(some).sum())
        if found * fraction >= MIN_HELD_OUT_DOCUMENTS:
            return ValidationRule("hash", fraction)
    return ValidationRule("tail", fraction)


def training_texts(documents: Iterable[pa.Array], rule: ValidationRule) -> Iterator[list[str]]:
    """Yield the texts of the training split, as one list per array of `documents`."""
    for some in documents:
        filled = some.filter(pa.array(is_not_empty(some)))
        yield rule.split(filled, hash_documents(filled))[0].to_pylist()


def is_not_empty(documents: pa.Array) -> np.ndarray:
    """Return for each document whether it has any text or tokens: (documents,) bool."""
    return np.diff(offsets_of(documents)) > 0


def hash_documents(documents: pa.Array) -> np.ndarray:
    """Return the xxh3-64 hash of each document's UTF-8 bytes or token bytes: (documents,) uint64."""
    values = documents.buffers()[-1]
    itemsize = 1 if pa.types.is_large_string(documents.type) else documents.type.value_type.bit_width // 8
    view = memoryview(values if values is not None else b"")
    edges = (offsets_of(documents) * itemsize).tolist()
    digests = [xxh3_64_intdigest(view[start:end]) for start, end in pairwise(edges)]
    return np.array(digests, dtype=np.uint64)


def offsets_of(documents: pa.Array) -> np.ndarray:
    """Return where each document starts in the array's values, and where the last one ends: (documents + 1,) int64.

    documents: of a type with 64-bit offsets (large_string, large_binary, large_list)."""
    if not len(documents):
        return np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(documents.buffers()[1], dtype=np.int64)
    return offsets[documents.offset : documents.offset + len(documents) + 1]


def _cut(document, fraction: float):
    """Cut a document into (head, tail): text at a line break (tail is empty without one), a list of tokens anywhere."""
    target = int(len(document) * (1 - fraction))
    if isinstance(document, str):
        target = document.rfind("\n", 0, target) + 1 or document.find("\n", target) + 1 or len(document)
    return document[:target], document[target:]
