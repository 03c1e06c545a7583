"""Which documents, or parts of them, are held out for validation.

By hash: a document belongs to the validation split when the 64-bit hash of its text falls below the asked share of the
range, whatever the other documents and the seed are: the choice stays when data is added, and equal texts never stand
on both sides. Where this would hold out fewer than 10 documents on average, the
last part of each document is held out instead, cut at a line break.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

# Below this many expected validation documents their number, and with it the split, is mostly chance.
MIN_HELD_OUT_DOCUMENTS = 10


@dataclass(frozen=True)
class ValidationRule:
    """Say what is held out. by: `file` (nothing, --validation_file is there), `hash` or `tail` of each document."""

    by: Literal["file", "hash", "tail"]
    fraction: float = 0.0

    def __str__(self) -> str:
        return {
            "file": "the documents of --validation_file",
            "hash": f"documents whose hash is below {self.fraction:.4g} of its range",
            "tail": f"the last {self.fraction:.4g} of each document, from a line break on",
        }[self.by]

    def split(self, documents: pa.Array, hashes: np.ndarray) -> tuple[pa.Array, pa.Array, np.ndarray]:
        """Split documents, none empty, by their hashes or at their tails: train, held out, hashes of the held out."""
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
    """Choose the rule after reading as many documents as it takes to know that there are enough for the one by hash."""
    if has_validation:
        return ValidationRule("file")
    fraction, found = percentage / 100, 0
    for some in documents:
        found += int(is_not_empty(some).sum())
        if found * fraction >= MIN_HELD_OUT_DOCUMENTS:
            return ValidationRule("hash", fraction)
    return ValidationRule("tail", fraction)


def training_texts(documents: Iterable[pa.Array], rule: ValidationRule) -> Iterator[list[str]]:
    """Give the texts of the training split, some at a time."""
    for some in documents:
        filled = some.filter(pa.array(is_not_empty(some)))
        yield rule.split(filled, hash_documents(filled))[0].to_pylist()


def is_not_empty(documents: pa.Array) -> np.ndarray:
    """Tell of each document whether it has text or tokens."""
    return np.diff(_offsets(documents)) > 0


def hash_documents(documents: pa.Array) -> np.ndarray:
    """Hash each document's UTF-8, or its tokens, by xxh3-64: uint64."""
    values = documents.buffers()[-1]
    itemsize = 1 if pa.types.is_large_string(documents.type) else documents.type.value_type.bit_width // 8
    view = memoryview(values if values is not None else b"")
    edges = (_offsets(documents) * itemsize).tolist()
    digests = [xxh3_64_intdigest(view[begin:end]) for begin, end in pairwise(edges)]
    return np.array(digests, dtype=np.uint64)


def _offsets(documents: pa.Array) -> np.ndarray:
    """Return where each document begins in the array's values: (documents + 1,)."""
    if not len(documents):
        return np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(documents.buffers()[1], dtype=np.int64)
    return offsets[documents.offset : documents.offset + len(documents) + 1]


def _cut(document, fraction: float):
    """Cut a document into (head, tail): text at a line break (without one it is all head), lists of tokens anywhere."""
    target = int(len(document) * (1 - fraction))
    if isinstance(document, str):
        target = document.rfind("\n", 0, target) + 1 or document.find("\n", target) + 1 or len(document)
    return document[:target], document[target:]
