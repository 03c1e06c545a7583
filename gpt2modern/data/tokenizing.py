"""Train or load the tokenizer of a run, and encode Arrow arrays of documents to token ids.

gigatoken encodes; `tokenizers` trains vocabularies, checks a sample of each shard, and encodes what gigatoken does not:
tokenizers that it does not support, and documents with characters that are new in its version of Unicode. So the ids
are always those of `tokenizers` with `add_special_tokens=False`. Text that spells a special token is encoded as text.
"""

import contextlib
import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gpt2modern.data.config import MOST_TOKENS, PrepareConfig
from gpt2modern.data.formats.reading import cause_of
from gpt2modern.data.splits import ValidationRule, training_texts
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import is_hub_name, move_folder, sha256_of
from gpt2modern.hub import hub_problem

END_OF_TEXT = "<|endoftext|>"
CHECKED_DOCUMENTS = 16  # in each shard
CHECKED_CHARACTERS = 2_000  # of each document: `tokenizers` encodes about 1.5 MB/s per core
# Characters that Unicode 17 (gigatoken 0.10) and Unicode 16 (`tokenizers` 0.22 and 0.23; in NFC, Unicode 9) put into
# different categories or compose differently, found by comparing both for all of Unicode.
UNEQUAL_CHARACTERS = """
295 7FD 88F 897-89F 8CA-8D3 9FE C3C C5C CDC D3B-D3C EBA 1715 1ABF-1AEB 1DF6-1DFA A7CE-A7CF A7D2 A7D4 A7F1 A82C 105C9
105D2 105DA 105E4 10940-10959 10D24-10D27 10D69-10D6D 10EAB-10EAC 10EC5-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85
11070 1133B 11383 11385 1138E 11391 113B8 113BB 113C2-113C9 113CE-113D0 1145E 11839-1183A 11930 11938 1193D-1193E
11943 119E0 11A34 11A47 11A99 11B60-11B67 11D42 11D44-11D45 11D97 11DB0-11DE9 11F41-11F42 1611E-16129 1612F
16D67-16D6A 16EA0-16ED3 16FF0-16FF6 187F8-187FF 18D09-18DF2 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF
1E5EE-1E5EF 1E6C0-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
"""
UNEQUAL_SYMBOLS = """
20C1 2B96 FBC3-FBD2 FD90-FD91 FDC8-FDCE 1CCFA-1CCFC 1CEBA-1CEF0 1F6D8 1F777-1F77A 1F8D0-1F8D8 1FA54-1FA57
1FA8A-1FA8E 1FAC8-1FACD 1FAEA-1FAEF 1FBFA
"""  # only for the few tokenizers that treat symbols and unassigned characters differently


def train_tokenizer(texts: Iterator[list[str]], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like GPT-2's, with `<|endoftext|>` (id 0) as BOS, EOS and padding.

    If the texts are too few for `vocab_size` entries, the tokenizer has fewer, and a note with the number is printed.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        few = f"the text is enough for only {bpe.get_vocab_size()} tokenizer entries"
        print(f"note: {few}, fewer than --train_tokenizer {vocab_size}")
    # EOS also pads, as is usual for GPT-2: a pad token of its own would be an embedding that is never trained.
    settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT) | {"padding_side": "left"}
    settings |= {"model_max_length": model_max_length, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **settings)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or the Hub, and let it pad on the left, as generation needs, with EOS if it has no
    pad token. Raises GPT2ModernError unless it is fast, has EOS and is undamaged."""
    folder = Path(name)
    saved = all((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    try:
        # AutoTokenizer is looked up only when needed, because it imports torch, which takes 2 s.
        tokenizer_class = PreTrainedTokenizerFast if saved else transformers.AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(name, trust_remote_code=False, padding_side="left")
    except Exception as error:  # OSError, ValueError, KeyError, ... by what is missing
        cause = hub_problem(error) if is_hub_name(name) else cause_of(error)
        raise GPT2ModernError(
            f"--tokenizer_name {name} is not a tokenizer ({cause}); give a folder with tokenizer.json and "
            "tokenizer_config.json, or a name on the Hub (which needs the network)"
        ) from error
    for argument in ("is_local", "local_files_only"):  # of from_pretrained; save_pretrained would write them
        tokenizer.init_kwargs.pop(argument, None)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    problem = None
    if not tokenizer.is_fast:
        problem = "has no fast version (tokenizer.json); choose another tokenizer"
    elif tokenizer.eos_token_id is None:
        problem = "has no EOS token; set eos_token in its tokenizer_config.json"
    elif (size := vocabulary_size(tokenizer)) > MOST_TOKENS:  # tables have one entry per id
        problem = f"has token id {size - 1}; its tokenizer.json is damaged"
    if problem:
        raise GPT2ModernError(f"--tokenizer_name {name} {problem}")
    return tokenizer


@functools.lru_cache(maxsize=1)  # the tokenizer makes a dictionary each time
def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest token id of a tokenizer plus one."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


@dataclass
class Encoder:
    """Encode text with a file tokenizer.json; a pickled encoder holds its path and sha256, not the tokenizer."""

    tokenizer_json: Path
    engine: Literal["auto", "gigatoken", "tokenizers"]
    dtype: Literal["uint16", "uint32"]
    eos_token_id: int
    sha256: str = ""  # of the file, which may be overwritten by another one
    parse_special_tokens: bool = False  # encode text that spells a special token as that token

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, folder: Path, config: PrepareConfig) -> "Encoder":
        """Return the encoder of a tokenizer saved to `folder`. The engine auto becomes gigatoken, or, with a printed
        note, `tokenizers`. Raises GPT2ModernError if the engine is gigatoken, which does not support the tokenizer."""
        dtype = "uint16" if vocabulary_size(tokenizer) < 1 << 16 else "uint32"
        path, engine = folder / "tokenizer.json", config.tokenizer_engine
        parse = config.parse_special_tokens or config.chat_column is not None  # chat templates write special tokens
        reference = cls(path, "tokenizers", dtype, tokenizer.eos_token_id, sha256_of(path), parse)
        _special_pattern(*reference._loaded)  # before processes are forked, which inherit what is loaded
        if engine == "tokenizers":
            return reference
        try:
            _load_gigatoken(*reference._loaded)
        except Exception as error:  # not installed, or an unsupported kind of tokenizer
            problem = f"cannot load this tokenizer ({cause_of(error)})"
            if engine == "gigatoken":
                raise GPT2ModernError(f"--tokenizer_engine gigatoken {problem}; use auto or tokenizers") from error
            print(f"note: encoding with tokenizers, which is slower, because gigatoken {problem}")
            return reference
        return replace(reference, engine="gigatoken")

    @property
    def _loaded(self) -> tuple[Path, str, bool]:
        return self.tokenizer_json, self.sha256, self.parse_special_tokens

    def ids_and_lengths(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray, int]:
        """Encode a `large_string` array. Returns all ids in sequence, uint32, the number of ids per text, int64, and
        how often the texts spell a special token."""
        counts = pc.count_substring_regex(texts, _special_pattern(*self._loaded))
        is_unequal = np.zeros(len(texts), dtype=bool)
        if self.engine == "gigatoken":
            pattern = _unequal_pattern(self.tokenizer_json, self.sha256)
            texts_to_search = pc.if_else(pc.string_is_ascii(texts), "", texts)
            is_unequal = pc.match_substring_regex(texts_to_search, pattern).to_numpy(zero_copy_only=False)
        return *self._encode_both(texts, is_unequal), pc.sum(counts).as_py() or 0

    def _encode_both(self, texts: pa.Array, is_unequal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts with the engine, but those of `is_unequal`, (texts,) bool, with `tokenizers`."""
        if not is_unequal.any():
            return self._encode(texts, self.engine)
        parts: list[np.ndarray] = [np.empty(0)] * len(texts)
        for chosen, engine in ((~is_unequal, self.engine), (is_unequal, "tokenizers")):
            if chosen.any():
                ids, lengths = self._encode(texts.filter(pa.array(chosen)), engine)
                for index, part in zip(chosen.nonzero()[0], np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
                    parts[index] = part
        return np.concatenate(parts), np.array([len(part) for part in parts])

    def _encode(self, texts: pa.Array, engine: str) -> tuple[np.ndarray, np.ndarray]:
        if engine == "gigatoken":
            ids = _load_gigatoken(*self._loaded)(texts)
            return ids.content.data, np.diff(ids.offsets.data)
        tokenizer = _load_tokenizers(*self._loaded)
        encodings = tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)

    def encode(self, documents: pa.Array) -> tuple[np.ndarray, np.ndarray, int]:
        """Encode texts, or take lists of ids as they are. Returns the ids in `dtype`, with EOS after each document, the
        number of ids per document, EOS included, and how often the texts spell a special token."""
        spelled = 0
        if pa.types.is_large_list(documents.type):
            ids, lengths = documents.flatten().to_numpy(), np.diff(documents.offsets.to_numpy())
        else:
            ids, lengths, spelled = self.ids_and_lengths(documents)
        eos_positions = np.cumsum(lengths) + np.arange(len(lengths))
        with_eos = np.empty(len(ids) + len(lengths), dtype=self.dtype)
        is_text = np.ones(len(with_eos), dtype=bool)
        is_text[eos_positions] = False
        with_eos[is_text] = ids
        with_eos[eos_positions] = self.eos_token_id
        return with_eos, lengths + 1, spelled

    def text_bytes(self, documents: pa.Array, name: str) -> np.ndarray:
        """Return the UTF-8 bytes of each document, (documents,) int64. GPT2ModernError if the tokenizer lacks an id."""
        if pa.types.is_large_string(documents.type):
            return pc.binary_length(documents).to_numpy()
        token_bytes = _bytes_of_tokens(self.tokenizer_json, self.sha256)
        ids, offsets = documents.flatten().to_numpy(), documents.offsets.to_numpy()
        if len(ids) and ids.max() >= len(token_bytes):
            problem = f"{name} holds the token id {ids.max()}, but --tokenizer_name has only {len(token_bytes)} entries"
            raise GPT2ModernError(f"{problem}; name the tokenizer that the tokens were made with")
        total = np.append(0, np.cumsum(token_bytes[ids]))
        return np.diff(total[offsets - offsets[0]])


def check_engine(encoder: Encoder, documents: pa.Array, name: str) -> None:
    """Check gigatoken against `tokenizers` on a sample of the documents. Raises GPT2ModernError if the ids differ.

    Does nothing for the engine `tokenizers` and for documents of token ids. name: of the source, for the message.
    """
    if encoder.engine == "tokenizers" or not pa.types.is_large_string(documents.type):
        return
    chosen = np.unique(np.linspace(0, len(documents) - 1, CHECKED_DOCUMENTS, dtype=np.int64))
    texts = pc.utf8_slice_codeunits(documents.take(pa.array(chosen)), 0, CHECKED_CHARACTERS)
    reference = replace(encoder, engine="tokenizers")
    (ids, lengths, _), (expected, expected_lengths, _) = (each.ids_and_lengths(texts) for each in (encoder, reference))
    split, expected = np.split(ids, np.cumsum(lengths)[:-1]), np.split(expected, np.cumsum(expected_lengths)[:-1])
    for text, found, correct in zip(texts, split, expected, strict=True):
        if not np.array_equal(found, correct):
            raise GPT2ModernError(
                f"{encoder.engine} and tokenizers encode a document of {name} differently "
                f"(it starts with {text.as_py()[:60]!r}); use --tokenizer_engine tokenizers"
            )


def named_tokenizer(config: PrepareConfig) -> PreTrainedTokenizerFast | None:
    """Load the tokenizer of --tokenizer_name, with --chat_template if given. Returns None if one must be trained."""
    if config.tokenizer_name is None:
        return None
    tokenizer = load_tokenizer(config.tokenizer_name)
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    if config.chat_column and not tokenizer.chat_template:
        raise GPT2ModernError(
            f"--tokenizer_name {config.tokenizer_name} has no chat template; give one with --chat_template"
        )
    return tokenizer


def get_tokenizer(
    config: PrepareConfig,
    named: PreTrainedTokenizerFast | None,
    documents: Iterable[pa.Array],
    rule: ValidationRule,
    folder: Path,
    workspace: Path,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a run and save it to `folder`: `named`, or one trained on the training documents."""
    if folder.is_dir():  # saved by a run that was killed
        return load_tokenizer(str(folder)) if named is None else named
    tokenizer = named
    if tokenizer is None:
        tokenizer = train_tokenizer(training_texts(documents, rule), config.train_tokenizer, config.block_size)
    build = workspace / f"tokenizer-{uuid.uuid4().hex}"
    tokenizer.save_pretrained(build)
    with contextlib.suppress(OSError if config.shard_index is not None else ()):  # another machine saved it first
        move_folder(build, folder)
    return tokenizer


def read_template(path: str) -> str:
    """Return the text of the file --chat_template. Raises GPT2ModernError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GPT2ModernError(f"--chat_template {path} cannot be read ({error}); name a text file in UTF-8") from None


@functools.cache  # once per process: loading takes longer than checking a shard
def _load_gigatoken(tokenizer_json: Path, sha256: str, parse: bool):
    """Return a function from `large_string` arrays to awkward's layout of their ids. Call it before workers fork.

    parse: whether text that spells a special token becomes that token, which gigatoken does for those it is told of.
    """
    import awkward  # noqa: PLC0415  optional: installed with gigatoken
    import gigatoken  # noqa: PLC0415  optional: `tokenizers` encodes without it

    values = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    if any(token["single_word"] for token in values["added_tokens"]):
        raise ValueError("gigatoken ignores single_word of an added token")
    if not parse:
        values["added_tokens"] = [token for token in values["added_tokens"] if not token["special"]]
    tokenizer = gigatoken.Tokenizer.from_json(json.dumps(values))
    return lambda texts: tokenizer.encode_batch(awkward.from_arrow(texts)).layout


@functools.cache
def _load_tokenizers(tokenizer_json: Path, sha256: str, parse: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse  # as text
    return tokenizer


@functools.cache
def _special_pattern(tokenizer_json: Path, sha256: str, parse: bool) -> str:
    """Return a regular expression (RE2) for text that spells a special token."""
    added = _load_tokenizers(tokenizer_json, sha256, parse).get_added_tokens_decoder().values()
    return "|".join(rf"\Q{token.content}\E" for token in added if token.special) or r"\z\A."


def _unequal_ranges(tokenizer_json: Path) -> list[list[int]]:
    """Return the first and the last code point of each range of characters that the engines may encode differently."""
    uses_symbols = "\\\\p{S}" in tokenizer_json.read_text(encoding="utf-8")  # in its regular expression, as JSON
    ranges = UNEQUAL_CHARACTERS + UNEQUAL_SYMBOLS * uses_symbols
    return [[int(code, 16) for code in (each.split("-") * 2)[:2]] for each in ranges.split()]


@functools.cache
def _unequal_pattern(tokenizer_json: Path, sha256: str) -> str:
    """Return a regular expression for text that has a character which the engines may encode differently."""
    return f"[{''.join(f'{chr(first)}-{chr(last)}' for first, last in _unequal_ranges(tokenizer_json))}]"


@functools.cache
def _bytes_of_tokens(tokenizer_json: Path, sha256: str) -> np.ndarray:
    """Return the number of UTF-8 bytes that each id of a BPE stands for, byte-level or SentencePiece: (ids,) int64."""
    tokenizer = _load_tokenizers(tokenizer_json, sha256, False)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    has_byte_characters = "ByteLevel" in repr(tokenizer.decoder)
    for token, index in vocabulary.items():
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte, as SentencePiece writes it
            sizes[index] = 1
        elif token in added or not has_byte_characters:
            sizes[index] = len(token.replace("\u2581", " ").encode())  # SentencePiece's space
        else:
            sizes[index] = len(token)
    return sizes
