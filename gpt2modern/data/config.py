"""Define the flags of prepare_data.py: which documents to prepare, with which tokenizer, and the output folder.

The `identity` of a field says when it decides the bytes of the output: ALWAYS, only if the source is a dataset of the
HUB, or only if it is FILES. A run with another value of such a field cannot resume the folder.
"""

from dataclasses import dataclass
from typing import Literal

from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_ranges, setting

ALWAYS, HUB, FILES = "always", "hub", "files"  # when a setting decides the bytes
MOST = 2**63 - 1
MOST_TOKENS = 1 << 24  # entries of a vocabulary; a tokenizer that claims more is damaged
SOURCE, READING, TOKENS, OUTPUT = "which documents", "how they are read", "tokens and blocks", "what is written"


# fmt: off
@dataclass
class PrepareConfig:
    """Hold the flags of prepare_data.py. Raises ValueError if a value or a combination of flags is invalid."""

    output_dir: str = setting(help="Folder to create, or an unfinished one to resume.", group=OUTPUT)
    dataset_name: str | None = setting(
        None, "'stdlib' (the source code of Python's standard library) or the name of a dataset on the Hub: texts, or "
        "files of tokens such as kjj0/fineweb10B-gpt2.",
        group=SOURCE, identity=ALWAYS)
    dataset_config_name: str | None = setting(None, "Configuration of the Hub dataset.", group=SOURCE, identity=HUB)
    dataset_split: str = setting("train", "Split of the Hub dataset to train on.", group=SOURCE, identity=HUB)
    dataset_revision: str | None = setting(
        None, "Branch, tag or commit of the Hub dataset.", group=SOURCE, identity=HUB)
    streaming: bool = setting(
        False, "Read only the first documents of the Hub dataset; the rest is not downloaded.",
        group=SOURCE, identity=HUB)
    max_tokens: int | None = setting(
        None, "With --streaming or files of tokens: stop after the document that brings the total to this many tokens.",
        group=SOURCE, identity=ALWAYS, least=1, most=MOST)
    max_documents: int | None = setting(
        None, "Use at most this many documents, the first.", group=SOURCE, identity=ALWAYS, least=1, most=MOST)
    train_file: list[str] | None = setting(
        None, "Files to read instead of a dataset: txt, jsonl, json, csv, parquet, arrow, or bin (GPT-2 tokens as in "
        "kjj0/fineweb10B-gpt2, or nanoGPT's), the text formats also as .gz or .zst; globs; folders with such files, or "
        "saved by `save_to_disk`.", group=SOURCE)
    validation_file: list[str] | None = setting(
        None, "Files of the validation split; without them, part of the training documents is held out.", group=SOURCE)
    validation_split_percentage: float = setting(
        5.0, "Percentage of the documents to hold out for validation if --validation_file is not given.", group=SOURCE)
    file_format: str = setting(
        "auto", "Format of the files (text, json, csv, parquet, arrow, tokens); auto takes it from each extension.",
        group=READING, identity=FILES)
    text_column: str = setting(
        "text", "Column with the text in json, csv, parquet, arrow and Hub data.", group=READING, identity=FILES)
    chat_column: str | None = setting(
        None, "Column with conversations, read instead of --text_column; the chat template renders them as text.",
        group=READING, identity=FILES)
    chat_template: str | None = setting(
        None, "File with a Jinja chat template; it replaces the one of the tokenizer.", group=READING)
    sample_by: Literal["document", "line", "paragraph"] = setting(
        "document", "What is one document in a txt file: the complete file, a line, or a paragraph.",
        group=READING, identity=FILES)
    separator: str | None = setting(
        None, "String that separates the documents of a txt file, such as '<|endoftext|>'.",
        group=READING, identity=FILES)
    token_dtype: Literal["uint16", "uint32"] | None = setting(
        None, "Type of the ids in a bin file without a header, such as nanoGPT's (uint16).",
        group=READING, identity=FILES)
    encoding_errors: Literal["strict", "replace"] = setting(
        "strict", "For bytes that are not UTF-8: strict raises an error, replace inserts U+FFFD.",
        group=READING, identity=ALWAYS)
    train_tokenizer: int | None = setting(
        None, "Train a byte-level BPE tokenizer with this many entries on the training split (257 are bytes and EOS).",
        group=TOKENS, identity=ALWAYS, least=257, most=MOST_TOKENS)
    tokenizer_name: str | None = setting(None, "Existing tokenizer to use: folder or Hub name.", group=TOKENS)
    tokenizer_engine: Literal["auto", "gigatoken", "tokenizers"] = setting(
        "auto", "Library that encodes; auto: gigatoken if it supports the tokenizer. The ids are equal.", group=TOKENS)
    parse_special_tokens: bool = setting(
        False, "Encode text that spells a special token, such as '<|endoftext|>', as that token instead of as text; "
        "with --chat_column this is always so.", group=TOKENS, identity=ALWAYS)
    block_size: int = setting(
        1024, "Tokens per block (training sequence length).", group=TOKENS, identity=ALWAYS, least=1, most=1 << 24)
    packing: Literal["concat", "best_fit"] = setting(
        "concat", "concat cuts one stream into blocks; best_fit does not cut documents that fit into a block.",
        group=TOKENS, identity=ALWAYS)
    shuffle_seed: int = setting(
        0, "Seed that shuffles the training documents.", group=TOKENS, identity=ALWAYS, least=0, most=MOST)
    num_shards: int | None = setting(
        None, "Number of shards (files) of the training split; default: about one per 128 MB, a power of two.",
        group=OUTPUT, identity=ALWAYS, least=1, most=100_000)
    shard_index: int | None = setting(
        None, "Write only this shard; when all are written, a run without this flag finishes the folder.", group=OUTPUT)
    num_proc: int | None = setting(
        None, "Number of processes that write shards; default: one per core. It does not change the output.",
        group=OUTPUT, least=1, most=4096)
    push_to_hub: bool = setting(False, "Upload the finished folder to the Hub as a dataset.", group=OUTPUT)
    hub_dataset_id: str | None = setting(None, "Name of the uploaded dataset: user/name.", group=OUTPUT)
    hub_private_repo: bool = setting(False, "Create the uploaded dataset as private.", group=OUTPUT)
    # fmt: on

    def __post_init__(self):
        if (self.train_tokenizer is None) == (self.tokenizer_name is None):
            raise ValueError("give exactly one of --train_tokenizer (such as 8192) and --tokenizer_name")
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)
        if not 0 < self.validation_split_percentage < 100:
            percentage = self.validation_split_percentage
            raise ValueError(f"--validation_split_percentage {percentage} must be greater than 0 and less than 100")
        if self.separator is not None and self.sample_by != "document":
            raise ValueError(f"--separator and --sample_by {self.sample_by} exclude each other; omit one of them")
        if self.streaming and self.dataset_name in (None, "stdlib"):
            raise ValueError("--streaming works only with a dataset of the Hub; name one with --dataset_name")
        if self.streaming and self.max_tokens is None and self.max_documents is None:
            raise ValueError("--streaming needs a limit; give --max_tokens or --max_documents")
        if self.max_tokens is not None and self.tokenizer_name is None:
            raise ValueError("--max_tokens needs --tokenizer_name, to count tokens; it excludes --train_tokenizer")
        if self.shard_index is not None:
            if self.num_shards is None or not 0 <= self.shard_index < self.num_shards:
                limit = "; give it, too" if self.num_shards is None else f" {self.num_shards}"
                raise ValueError(f"--shard_index {self.shard_index} must be at least 0 and below --num_shards{limit}")
            if self.tokenizer_name is None:
                raise ValueError("--shard_index needs --tokenizer_name, or each machine would train its own tokenizer")
        if self.chat_template is not None and self.chat_column is None:
            raise ValueError(f"--chat_template {self.chat_template} works only with --chat_column; give both or none")
        if self.chat_column is not None and self.train_tokenizer is not None:
            raise ValueError("--chat_column needs --tokenizer_name, because a new tokenizer has no chat template")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise ValueError("--push_to_hub needs the name of the dataset: --hub_dataset_id user/name")
