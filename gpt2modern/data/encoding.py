"""Encoding: Arrow arrays of documents to token ids, by gigatoken, with `tokenizers` as the reference.

The ids are those of `tokenizers` with `add_special_tokens=False`, which is what the saved tokenizer gives at inference:
text that spells a special token becomes that token, with either engine.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import cause_of

CHECKED_DOCUMENTS = 16  # in each shard
CHECKED_CHARACTERS = 2_000  # of each: `tokenizers` encodes about 1.5 MB/s per core


@dataclass
class Encoder:
    """Texts to ids. Pickling carries the path of the tokenizer only."""

    tokenizer_json: Path
    engine: Literal["auto", "gigatoken", "tokenizers"]
    dtype: Literal["uint16", "uint32"]
    eos_token_id: int

    def with_engine_chosen(self) -> "Encoder":
        """`auto` becomes gigatoken, or `tokenizers`, with a note, where gigatoken cannot serve; GPT2ModernError where
        gigatoken was asked for and cannot."""
        if self.engine == "tokenizers":
            return self
        try:
            chosen = replace(self, engine="gigatoken")
            chosen.load()
            return chosen
        except Exception as error:  # not installed, or a kind of tokenizer that it does not know
            if self.engine == "gigatoken":
                raise GPT2ModernError(
                    f"--tokenizer_engine gigatoken: cannot serve this tokenizer ({cause_of(error)}); "
                    "use auto or tokenizers"
                ) from error
            print(f"note: encoding with tokenizers; gigatoken cannot serve this tokenizer ({cause_of(error)})")
            return replace(self, engine="tokenizers")

    def load(self):
        """The engine's own tokenizer: `gigatoken.Tokenizer` or `tokenizers.Tokenizer`."""
        return (
            _load_gigatoken(self.tokenizer_json)
            if self.engine == "gigatoken"
            else _load_tokenizers(self.tokenizer_json)
        )

    def ids_and_lengths(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode a `large_string` array: all ids one after the other (uint32), and how many each text has (int64)."""
        if self.engine == "gigatoken":
            import awkward

            ids = self.load().encode_batch(awkward.from_arrow(texts)).layout
            return ids.content.data, np.diff(ids.offsets.data)
        encodings = self.load().encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)

    def encode(self, documents: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Ids in `dtype` with EOS after each document, and the lengths with it. Lists of ids pass through."""
        if pa.types.is_large_list(documents.type):
            ids, lengths = documents.flatten().to_numpy(), np.diff(documents.offsets.to_numpy())
        else:
            ids, lengths = self.ids_and_lengths(documents)
        eos_positions = np.cumsum(lengths) + np.arange(len(lengths))
        with_eos = np.empty(len(ids) + len(lengths), dtype=self.dtype)
        is_text = np.ones(len(with_eos), dtype=bool)
        is_text[eos_positions] = False
        with_eos[is_text] = ids
        with_eos[eos_positions] = self.eos_token_id
        return with_eos, lengths + 1


def check_engine(encoder: Encoder, documents: pa.Array, names: str) -> None:
    """Encode a sample of the documents with `tokenizers` too; GPT2ModernError for the first that differs.

    names: what the documents are, for the message.
    """
    if encoder.engine == "tokenizers" or not pa.types.is_large_string(documents.type):
        return
    reference = _load_tokenizers(encoder.tokenizer_json)
    chosen = np.unique(np.linspace(0, len(documents) - 1, CHECKED_DOCUMENTS, dtype=np.int64))
    texts = pc.utf8_slice_codeunits(documents.take(pa.array(chosen)), 0, CHECKED_CHARACTERS)
    ids, lengths = encoder.ids_and_lengths(texts)
    expected = reference.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    for text, found, encoding in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), expected, strict=True):
        if found.tolist() != encoding.ids:
            raise GPT2ModernError(
                f"{encoder.engine} and tokenizers encode a document of {names} differently "
                f"(it begins {text.as_py()[:60]!r}); use --tokenizer_engine tokenizers"
            )


# Loaded once in each process: it takes longer than the check of a shard.


@functools.cache
def _load_gigatoken(tokenizer_json: Path):
    import awkward  # noqa: F401, takes a quarter of a second: before workers are forked, not in each
    import gigatoken

    return gigatoken.Tokenizer.from_json(tokenizer_json.read_text(encoding="utf-8"))


@functools.cache
def _load_tokenizers(tokenizer_json: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def bytes_of_tokens(tokenizer_json: Path) -> np.ndarray:
    """UTF-8 bytes that each id of a byte-level BPE stands for (int64), so that token files have a size in bytes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        # In a byte-level vocabulary each character stands for one byte.
        sizes[index] = len(token.encode()) if token in added else len(token)
    return sizes
