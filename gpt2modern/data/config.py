"""The settings of prepare_data.py: what to prepare, with which tokenizer, and where to.

`identity` says of a field that it decides the bytes of the result: ALWAYS, or where the source is a dataset of the HUB,
or FILES. A folder that was made with another value holds other data.
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
    """Say what to prepare; raises ValueError for combinations that mean nothing."""

    output_dir: str = setting(help="Folder to create, or to resume.", group=OUTPUT)
    dataset_name: str | None = setting(
        None, "'stdlib' (the source of Python's standard library) or a dataset of the Hub.",
        group=SOURCE, identity=ALWAYS)
    dataset_config_name: str | None = setting(None, "Configuration of the Hub dataset.", group=SOURCE, identity=HUB)
    dataset_split: str = setting("train", "Split of the Hub dataset that is read.", group=SOURCE, identity=HUB)
    dataset_revision: str | None = setting(
        None, "Branch, tag or commit of the Hub dataset.", group=SOURCE, identity=HUB)
    streaming: bool = setting(
        False, "Take the Hub dataset's first documents without downloading the rest.", group=SOURCE, identity=HUB)
    max_tokens: int | None = setting(
        None, "With --streaming: stop after the document that reaches this many tokens.",
        group=SOURCE, identity=ALWAYS, least=1, most=MOST)
    max_documents: int | None = setting(
        None, "Use only the first so many documents.", group=SOURCE, identity=ALWAYS, least=1, most=MOST)
    train_file: list[str] | None = setting(
        None, "Files instead of a dataset: txt, jsonl, json, csv, parquet, arrow, bin (GPT-2 tokens as in "
        "kjj0/fineweb10B-gpt2), also .gz or .zst; globs; folders of such files or of `save_to_disk`.", group=SOURCE)
    validation_file: list[str] | None = setting(
        None, "Files of the validation split; without them it is held out of the rest.", group=SOURCE)
    validation_split_percentage: float = setting(
        5.0, "Percentage of the documents that is held out without --validation_file.", group=SOURCE)
    file_format: str = setting(
        "auto", "Format of the files (text, json, csv, parquet, arrow, tokens) where extensions do not say it.",
        group=READING, identity=FILES)
    text_column: str = setting("text", "Column of json, csv, parquet and Hub data.", group=READING, identity=FILES)
    chat_column: str | None = setting(
        None, "Column with conversations instead of text; the tokenizer's chat template renders them.",
        group=READING, identity=FILES)
    chat_template: str | None = setting(
        None, "File with a Jinja chat template, for a tokenizer without one.", group=READING)
    sample_by: Literal["document", "line", "paragraph"] = setting(
        "document", "What one document is in a txt file: all of it, a line, a paragraph.",
        group=READING, identity=FILES)
    separator: str | None = setting(
        None, "What stands between the documents of a txt file, such as '<|endoftext|>'.",
        group=READING, identity=FILES)
    encoding_errors: Literal["strict", "replace"] = setting(
        "strict", "Text that is not UTF-8: stop, or put U+FFFD in its place.", group=READING, identity=ALWAYS)
    train_tokenizer: int | None = setting(
        None, "Train a byte-level BPE of this many entries on the training split; bytes and <|endoftext|> take 257.",
        group=TOKENS, identity=ALWAYS, least=257, most=MOST_TOKENS)
    tokenizer_name: str | None = setting(None, "Or use this tokenizer: folder or Hub name.", group=TOKENS)
    tokenizer_engine: Literal["auto", "gigatoken", "tokenizers"] = setting(
        "auto", "What encodes; auto is gigatoken where it serves. The ids are the same.", group=TOKENS)
    block_size: int = setting(
        1024, "Tokens per block; rows carry one more.", group=TOKENS, identity=ALWAYS, least=1, most=1 << 24)
    packing: Literal["concat", "best_fit"] = setting(
        "concat", "One stream cut into blocks, or documents kept whole where they fit.",
        group=TOKENS, identity=ALWAYS)
    shuffle_seed: int = setting(
        0, "Seed of the order of the training documents.", group=TOKENS, identity=ALWAYS, least=0, most=MOST)
    num_shards: int | None = setting(
        None, "Folders the training split is written to; default: one per 128 MB, a power of two.",
        group=OUTPUT, identity=ALWAYS, least=1, most=100_000)
    shard_index: int | None = setting(
        None, "Write only this shard; a call without it, when all are there, finishes the folder.", group=OUTPUT)
    num_proc: int | None = setting(
        None, "Processes, each writing shards; default: one per core. The bytes are the same.",
        group=OUTPUT, least=1, most=4096)
    push_to_hub: bool = setting(False, "Upload the finished folder as a dataset of the Hub.", group=OUTPUT)
    hub_dataset_id: str | None = setting(None, "Its name there: user/name.", group=OUTPUT)
    hub_private_repo: bool = setting(False, "Create it as a private dataset.", group=OUTPUT)
    # fmt: on

    def __post_init__(self):
        if (self.train_tokenizer is None) == (self.tokenizer_name is None):
            raise ValueError("give exactly one of --train_tokenizer (such as 8192) and --tokenizer_name")
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage}: must be in (0, 100)")
        if self.separator is not None and self.sample_by != "document":
            raise ValueError(f"give one of --separator and --sample_by {self.sample_by}")
        if self.max_tokens is not None and not self.streaming and (self.dataset_name or self.train_file):
            raise ValueError(f"--max_tokens {self.max_tokens}: is for --streaming; otherwise use --max_documents")
        if self.streaming and self.dataset_name in (None, "stdlib"):
            raise ValueError("--streaming: is for a dataset of the Hub, named with --dataset_name")
        if self.streaming and self.max_tokens is None and self.max_documents is None:
            raise ValueError("--streaming: give --max_tokens (or --max_documents), or it would never end")
        if self.max_tokens is not None and self.tokenizer_name is None:
            raise ValueError("--max_tokens: tokens are counted with --tokenizer_name; a new tokenizer comes too late")
        if self.shard_index is not None:
            if self.num_shards is None or not 0 <= self.shard_index < self.num_shards:
                raise ValueError(f"--shard_index {self.shard_index}: must be in [0, --num_shards {self.num_shards})")
            if self.tokenizer_name is None:
                raise ValueError("--shard_index: needs --tokenizer_name, or each machine would train its own tokenizer")
        if self.chat_template is not None and self.chat_column is None:
            raise ValueError(f"--chat_template {self.chat_template}: is for --chat_column, which is not given")
        if self.chat_column is not None and self.train_tokenizer is not None:
            raise ValueError("--chat_column: needs --tokenizer_name; a new tokenizer has no chat template")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise ValueError("--push_to_hub: needs --hub_dataset_id user/name")
