"""The tokenizer of a run: trained on the corpus, or loaded; always fast, always with an EOS."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.files import cause_of
from gpt2modern.data.manifest import MOST_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterator[list[str]], vocab_size: int, model_max_length: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE as GPT-2's, `<|endoftext|>` (id 0) its bos and eos, any text decoding to itself.

    A corpus too small for `vocab_size` entries gives fewer, which is said; the manifest and the model follow the
    number there is.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        print(f"note: the corpus gives {bpe.get_vocab_size()} tokenizer entries, not --train_tokenizer {vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """A fast tokenizer with an EOS token from a folder or the Hub; raises GPT2ModernError for anything else."""
    folder = Path(name)
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        from transformers import PreTrainedTokenizerFast as tokenizer_class  # AutoTokenizer imports torch: 2 s
    else:
        from transformers import AutoTokenizer as tokenizer_class
    try:
        tokenizer = tokenizer_class.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, ... by what is missing
        way_out = (
            "the folder needs tokenizer.json and tokenizer_config.json"
            if folder.exists()
            else "no such folder, and the Hub does not give it: check the name and the network"
        )
        raise GPT2ModernError(f"--tokenizer_name {name}: not a tokenizer ({cause_of(error)}); {way_out}") from error
    for name_of_this_call in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name_of_this_call, None)  # or they are saved
    if not tokenizer.is_fast:
        raise GPT2ModernError(f"--tokenizer_name {name}: has no fast version (tokenizer.json); choose another tokenizer")
    if tokenizer.eos_token_id is None:
        raise GPT2ModernError(f"--tokenizer_name {name}: has no EOS token; set eos_token in its tokenizer_config.json")
    if (size := vocabulary_size(tokenizer)) > MOST_TOKENS:  # tables are as long as the largest id
        raise GPT2ModernError(f"--tokenizer_name {name}: has token id {size - 1}; its tokenizer.json is damaged")
    return tokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
