"""The settings of prepare_data.py: what to prepare, with which tokenizer, and where to.

`identity` says of a field that it decides the bytes of the result: "always", "hub" (of a dataset of the Hub), or
"reading" (how files and datasets are read). A folder that was made with another value holds other data.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gpt2modern.cli import check_ranges, setting
from gpt2modern.data.manifest import MOST_TOKENS
from gpt2modern.files import check_writable_folder

MOST_DOCUMENTS = 2**63 - 1


def _where(default=dataclasses.MISSING, help: str = "", **metadata):
    return setting(default, help, group="where to", **metadata)


def _source(default, help: str, **metadata):
    return setting(default, help, group="which documents", **metadata)


def _reading(default, help: str, **metadata):
    return setting(default, help, group="how documents are read", identity="reading", **metadata)


def _tokens(default, help: str, **metadata):
    return setting(default, help, group="tokens and blocks", **metadata)


@dataclass
class PrepareConfig:
    """Say what to prepare; raises ValueError for combinations that mean nothing."""

    output_dir: str = _where(help="Folder to create, or to resume.")
    dataset_name: str | None = _source(
        None, "'stdlib' (the source of Python's standard library) or a dataset of the Hub.", identity="always"
    )
    dataset_config_name: str | None = _source(None, "Configuration of the Hub dataset.", identity="hub")
    dataset_split: str = _source("train", "Split of the Hub dataset that is read.", identity="hub")
    dataset_revision: str | None = _source(None, "Branch, tag or commit of the Hub dataset.", identity="hub")
    streaming: bool = _source(
        False, "Take the Hub dataset's first documents without downloading the rest of it.", identity="hub"
    )
    max_tokens: int | None = _source(
        None,
        "With --streaming: stop after the document that reaches this many tokens.",
        least=1,
        most=MOST_DOCUMENTS,
        identity="always",
    )
    max_documents: int | None = _source(
        None, "Use only the first so many documents.", least=1, most=MOST_DOCUMENTS, identity="always"
    )
    train_file: list[str] | None = _source(
        None,
        "Files instead of a dataset: txt, jsonl, json, csv, parquet, arrow, bin (GPT-2 tokens as in "
        "kjj0/fineweb10B-gpt2), also .gz or .zst; globs; folders of such files or of `save_to_disk`.",
    )
    validation_file: list[str] | None = _source(
        None, "Files of the validation split; without them it is held out of the rest."
    )
    validation_split_percentage: float = _source(
        5.0, "Percentage of the documents that is held out without --validation_file."
    )
    file_format: str = _reading(
        "auto", "What the files are (text, json, csv, parquet, arrow, tokens), where their extensions do not say it."
    )
    text_column: str = _reading("text", "Column of json, csv, parquet and Hub data.")
    chat_column: str | None = _reading(
        None, "Column with conversations instead of text; the tokenizer's chat template renders them."
    )
    chat_template: str | None = setting(
        None, "File with a Jinja chat template, for a tokenizer without one.", group="how documents are read"
    )
    sample_by: Literal["document", "line", "paragraph"] = _reading(
        "document", "What one document is in a txt file: all of it, a line, a paragraph."
    )
    separator: str | None = _reading(
        None, "What stands between the documents of a txt file, such as '<|endoftext|>'.", may_be_empty=True
    )
    encoding_errors: Literal["strict", "replace"] = setting(
        "strict",
        "Text that is not UTF-8: stop, or put U+FFFD in its place.",
        group="how documents are read",
        identity="always",
    )
    train_tokenizer: int | None = _tokens(
        None,
        "Train a byte-level BPE of this many entries on the training split.",
        most=MOST_TOKENS,
        least=1,
        identity="always",
    )
    tokenizer_name: str | None = _tokens(None, "Or use this tokenizer: folder or Hub name.")
    tokenizer_engine: Literal["auto", "gigatoken", "tokenizers"] = _tokens(
        "auto", "What encodes; auto is gigatoken where it serves. The ids are the same."
    )
    block_size: int = _tokens(1024, "Tokens per block; rows carry one more.", least=1, most=1 << 24, identity="always")
    packing: Literal["concat", "best_fit"] = _tokens(
        "concat", "One stream cut into blocks, or documents kept whole where they fit.", identity="always"
    )
    shuffle_seed: int = _tokens(
        0, "Seed of the order of the training documents.", least=0, most=2**63 - 1, identity="always"
    )
    num_shards: int | None = _where(
        None,
        "Folders the training split is written to; default: one per 128 MB, a power of two.",
        least=1,
        most=100_000,
        identity="always",
    )
    shard_index: int | None = _where(
        None, "Write only this shard; a call without it, when all are there, finishes the folder."
    )
    num_proc: int | None = _where(
        None, "Processes, each writing shards; default: one per core. The bytes are the same.", least=1, most=4096
    )
    push_to_hub: bool = _where(False, "Upload the finished folder as a dataset of the Hub.")
    hub_dataset_id: str | None = _where(None, "Its name there: user/name.")
    hub_private_repo: bool = _where(False, "Create it as a private dataset.")

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("give exactly one of --dataset_name (such as stdlib) and --train_file")
        if (self.train_tokenizer is None) == (self.tokenizer_name is None):
            raise ValueError("give exactly one of --train_tokenizer (such as 8192) and --tokenizer_name")
        if self.train_tokenizer is not None and self.train_tokenizer < 257:
            raise ValueError(
                f"--train_tokenizer {self.train_tokenizer}: a byte-level BPE has at least 257 entries, "
                "256 bytes and <|endoftext|>"
            )
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage}: must be in (0, 100)")
        if self.separator == "":
            raise ValueError("--separator '': must not be empty")
        if self.separator is not None and self.sample_by != "document":
            raise ValueError(f"give one of --separator and --sample_by {self.sample_by}")
        self._check_streaming()
        self._check_shard_index()
        if self.chat_template is not None and self.chat_column is None:
            raise ValueError(f"--chat_template {self.chat_template}: is for --chat_column, which is not given")
        if self.chat_column is not None and self.train_tokenizer is not None:
            raise ValueError("--chat_column: needs --tokenizer_name; a new tokenizer has no chat template")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise ValueError("--push_to_hub: needs --hub_dataset_id user/name")

    def _check_streaming(self) -> None:
        of_the_hub = self.dataset_name not in (None, "stdlib")
        from_python = self.dataset_name is None and self.train_file is None
        if self.max_tokens is not None and not self.streaming and not from_python:
            raise ValueError(f"--max_tokens {self.max_tokens}: is for --streaming; otherwise use --max_documents")
        if self.streaming and not of_the_hub:
            raise ValueError("--streaming: is for a dataset of the Hub, named with --dataset_name")
        if self.streaming and self.max_tokens is None and self.max_documents is None:
            raise ValueError("--streaming: give --max_tokens (or --max_documents), or it would never end")
        if self.max_tokens is not None and self.tokenizer_name is None:
            raise ValueError("--max_tokens: tokens are counted with --tokenizer_name; a new tokenizer comes too late")

    def _check_shard_index(self) -> None:
        if self.shard_index is None:
            return
        if self.num_shards is None or not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"--shard_index {self.shard_index}: must be in [0, --num_shards {self.num_shards})")
        if self.tokenizer_name is None:
            raise ValueError("--shard_index: needs --tokenizer_name, or each machine would train its own tokenizer")
