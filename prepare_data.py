"""Text to packed blocks: read documents, hold out a validation split, get a tokenizer, encode, pack, write.

    python prepare_data.py --dataset_name stdlib --train_tokenizer 8192 --block_size 256 --output_dir data/stdlib
    python prepare_data.py --train_file a.txt 'b/*.jsonl.gz' c.parquet --tokenizer_name data/stdlib/tokenizer \\
        --block_size 1024 --output_dir data/mine
    python prepare_data.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \\
        --tokenizer_name openai-community/gpt2 --num_shards 100 --num_proc 16 --output_dir data/fineweb-edu
    python prepare_data.py verify data/mine

What is written, and what training reads (`gpt2modern.data.blocks.PackedBlocks`):

    manifest.json                          settings, counts, sha256 of shards and tokenizer; there when all is finished
    report.html                            the counts, and how long the documents are
    tokenizer/                             a transformers tokenizer
    train/shard-00000-of-00001/            `datasets` folder: input_ids, block_size + 1 tokens a row, and num_tokens
    validation/shard-00000-of-00001/

Order. The pieces of the source are shuffled with `--shuffle_seed` and dealt to the shards; in a shard, documents are
shuffled again, 32 MB at a time. Shards depend on the settings alone: any number of processes, or of machines with
`--shard_index`, writes the same bytes, and a run that was killed goes on where it was.

Tokens. Each document ends with EOS, and each shard begins with one more, as if a document came before. `concat` cuts a
stream into rows of block_size + 1 tokens whose last token is the next row's first: every token of every document is a
target exactly once, and the stream can be cut again to any other block size. `best_fit` keeps every document whole that
fits into a block.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.settings import WORKSPACE, finished_manifest, read_template, settings_of
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import check_writable_folder
from gpt2modern.settings import check_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gpt2modern.data.encoding import Encoder
    from gpt2modern.data.files import ReadOptions
    from gpt2modern.data.shards import Job
    from gpt2modern.data.sources import Source

SHARD_BYTES = 128 << 20  # of the source, per shard, where --num_shards is not given
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class PrepareConfig:
    """What to prepare, with which tokenizer, and where to; raises ValueError for combinations that mean nothing."""

    output_dir: str = field(metadata={"help": "Folder to create, or to go on with."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "'stdlib' (the source of Python's standard library) or a dataset of the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset that is read."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub dataset."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Take the Hub dataset's first documents without downloading the rest of it."},
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "With --streaming: stop after the document that reaches this many tokens."}
    )
    max_documents: int | None = field(default=None, metadata={"help": "Use only the first so many documents."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files instead of a dataset: txt, jsonl, json, csv, parquet, arrow, bin (GPT-2 tokens as in "
            "kjj0/fineweb10B-gpt2), also .gz or .zst; globs; folders of such files or of `save_to_disk`."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files of the validation split; without them it is held out of the rest."}
    )
    file_format: Literal["auto", "text", "json", "csv", "parquet", "arrow", "tokens"] = field(
        default="auto", metadata={"help": "What the files are, where their extensions do not say it."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of json, csv, parquet and Hub data."})
    chat_column: str | None = field(
        default=None,
        metadata={"help": "Column with conversations instead of text; the tokenizer's chat template renders them."},
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template, for a tokenizer without one."}
    )
    sample_by: Literal["document", "line", "paragraph"] = field(
        default="document", metadata={"help": "What one document is in a txt file: all of it, a line, a paragraph."}
    )
    separator: str | None = field(
        default=None, metadata={"help": "What stands between the documents of a txt file, such as '<|endoftext|>'."}
    )
    encoding_errors: Literal["strict", "replace"] = field(
        default="strict", metadata={"help": "Text that is not UTF-8: stop, or put U+FFFD in its place."}
    )
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE of this many entries on the training split."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Or use this tokenizer: folder or Hub name."})
    tokenizer_engine: Literal["auto", "gigatoken", "tokenizers"] = field(
        default="auto", metadata={"help": "What encodes; auto is gigatoken where it serves. The ids are the same."}
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens per block; rows carry one more."})
    packing: Literal["concat", "best_fit"] = field(
        default="concat", metadata={"help": "One stream cut into blocks, or documents kept whole where they fit."}
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Percentage of the documents that is held out without --validation_file."}
    )
    shuffle_seed: int = field(default=0, metadata={"help": "Seed of the order of the training documents."})
    num_shards: int | None = field(
        default=None,
        metadata={"help": "Folders the training split is written to; default: one per 128 MB, a power of two."},
    )
    shard_index: int | None = field(
        default=None,
        metadata={"help": "Write only this shard; a call without it, when all are there, finishes the folder."},
    )
    num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes, each writing shards; default: one per core. The bytes are the same."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished folder as a dataset of the Hub."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Its name there: user/name."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Create it as a private dataset."})

    def __post_init__(self):
        from gpt2modern.data.manifest import MOST_TOKENS

        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("give exactly one of --dataset_name (such as stdlib) and --train_file")
        if (self.train_tokenizer is None) == (self.tokenizer_name is None):
            raise ValueError("give exactly one of --train_tokenizer (such as 8192) and --tokenizer_name")
        if self.train_tokenizer is not None and self.train_tokenizer < 257:
            raise ValueError(
                f"--train_tokenizer {self.train_tokenizer}: a byte-level BPE has at least 257 entries, "
                "256 bytes and <|endoftext|>"
            )
        check_range("--train_tokenizer", self.train_tokenizer, 257, MOST_TOKENS)
        most_of = {"block_size": 1 << 24, "num_shards": 100_000, "num_proc": 4096, "max_documents": 2**63 - 1}
        for name, most in (most_of | {"max_tokens": 2**63 - 1}).items():
            check_range(f"--{name}", getattr(self, name), 1, most)
        check_range("--shuffle_seed", self.shuffle_seed, 0, 2**63 - 1)
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
        if self.max_tokens is not None and not self.streaming:
            raise ValueError(f"--max_tokens {self.max_tokens}: is for --streaming; otherwise use --max_documents")
        if self.streaming and (self.dataset_name in (None, "stdlib")):
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


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        verify(argv[1:])
        return
    config = parse_arguments(PrepareConfig, argv, description="\n\n".join(__doc__.split("\n\n")[:2]))
    prepare(config)


def verify(folders: list[str]) -> None:
    """Read every byte of finished folders; GPT2ModernError that names each file that is not as it was written."""
    from gpt2modern.data.manifest import find_problems, local_folder

    if not folders or folders[0].startswith("-"):
        raise GPT2ModernError("usage: python prepare_data.py verify FOLDER [FOLDER ...]")
    problems = [problem for folder in folders for problem in find_problems(local_folder(folder))]
    if problems:
        raise GPT2ModernError("; ".join(problems))
    print(f"{', '.join(folders)}: every file is as it was written")


def prepare(config: PrepareConfig) -> dict | None:
    """Write `config.output_dir`; returns its manifest, or None where other shards are still to be written.

    Shards that are there, of a run with the same settings, are verified and kept. Raises GPT2ModernError for whatever its
    user can mend; a folder that this call began is then removed.
    """
    from gpt2modern.data.processes import only_user_of

    started = time.perf_counter()
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise GPT2ModernError(f"--output_dir {output_dir}: is a file; choose another folder")
    settings = settings_of(config)
    existed = output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with only_user_of(output_dir, shared=config.shard_index is not None):
            manifest = finished_manifest(output_dir, settings)
            if manifest is None:
                manifest = _begin_or_go_on(config, settings, output_dir, started)
            else:
                shutil.rmtree(output_dir / WORKSPACE, ignore_errors=True)  # of a run killed while it tidied up
                print(f"{output_dir} is already prepared with these settings; nothing to do")
            publish(config, output_dir, manifest)
            return manifest
    except GPT2ModernError:
        if not existed and not os.listdir(output_dir):
            output_dir.rmdir()
        raise
    except OSError as error:
        way_out = "make room and run" if error.errno in FULL else "run"
        raise GPT2ModernError(
            f"--output_dir {output_dir}: {error.strerror or error}; what is finished is kept: {way_out} the same "
            "command again"
        ) from error


def _begin_or_go_on(config: PrepareConfig, settings: dict, output_dir: Path, started: float) -> dict | None:
    from gpt2modern.data.shards import write_text

    _quieten_libraries()
    workspace = output_dir / WORKSPACE
    begins = not (workspace / "settings.json").exists()
    try:
        workspace.mkdir(exist_ok=True)
        write_text(workspace / "settings.json", json.dumps(settings, indent=2))
        return _build(config, settings, workspace, started)
    except GPT2ModernError:
        if begins and config.shard_index is None:
            for name in ("train", "validation", "tokenizer", WORKSPACE):
                shutil.rmtree(output_dir / name, ignore_errors=True)
        elif begins and not (output_dir / "tokenizer").exists():  # nothing is written: a corrected call may have others
            (workspace / "settings.json").unlink(missing_ok=True)
        raise


def _build(config: PrepareConfig, settings: dict, workspace: Path, started: float) -> dict | None:
    from gpt2modern.data.processes import write_shards
    from gpt2modern.data.report import print_summary, write_report
    from gpt2modern.data.shards import Job, read_receipt, write_text
    from gpt2modern.data.splits import choose_rule
    from gpt2modern.files import flush_to_disk

    output_dir = Path(config.output_dir)
    tokenizer = None
    if config.tokenizer_name:
        tokenizer = named_tokenizer(config)
    options = read_options(config, tokenizer)
    source = open_source(config, options, tokenizer, workspace)
    validation = open_validation_files(config, options)
    rule = choose_rule(source, config.validation_split_percentage, validation is not None)
    encoder, vocab_size = build_encoder(config, tokenizer, source, rule, workspace)
    num_shards = config.num_shards or default_num_shards(source)
    job = Job(
        source=source,
        rule=rule,
        encoder=encoder,
        packing=config.packing,
        block_size=config.block_size,
        num_shards=num_shards,
        shuffle_seed=config.shuffle_seed,
        output_dir=output_dir,
        workspace=workspace,
    )
    if validation is not None and config.shard_index is None:  # first, so that its mistakes are seen at once
        held_out = write_validation(job, validation)
    write_shards(job, [config.shard_index] if config.shard_index is not None else range(num_shards), config.num_proc)
    if config.shard_index is not None:
        missing = [index for index in range(num_shards) if not job.receipt_dir(index).exists()]
        left = f"; {len(missing)} of {num_shards} shards are still missing" if missing else ""
        print(f"{job.shard_path(config.shard_index)} is written{left}; the same call without --shard_index finishes")
        return None

    if validation is None:
        held_out = write_validation(job, None)
    receipts = [read_receipt(job, index) for index in range(num_shards)]
    manifest = build_manifest(config, settings, job, vocab_size, receipts, held_out)
    write_report(output_dir / "report.html", manifest)
    write_text(workspace / "manifest.json", json.dumps(manifest, indent=2))
    (workspace / "manifest.json").rename(output_dir / "manifest.json")
    flush_to_disk(output_dir)
    shutil.rmtree(workspace)
    print_summary(output_dir, manifest, time.perf_counter() - started)
    return manifest


# Source and tokenizer


def named_tokenizer(config: PrepareConfig) -> "PreTrainedTokenizerFast":
    from gpt2modern.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer_name)
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    if config.chat_column and not tokenizer.chat_template:
        raise GPT2ModernError(
            f"--tokenizer_name {config.tokenizer_name}: has no chat template; give one by --chat_template"
        )
    return tokenizer


def read_options(config: PrepareConfig, tokenizer: "PreTrainedTokenizerFast | None") -> "ReadOptions":
    from gpt2modern.data.files import ReadOptions

    return ReadOptions(
        text_column=config.text_column,
        chat_column=config.chat_column,
        sample_by=config.sample_by,
        separator=config.separator,
        encoding_errors=config.encoding_errors,
        file_format=config.file_format,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
        chat_template=tokenizer.chat_template if tokenizer and config.chat_column else None,
    )


def open_source(
    config: PrepareConfig, options: "ReadOptions", tokenizer: "PreTrainedTokenizerFast | None", workspace: Path
) -> "Source":
    """What --dataset_name or --train_file names, cut to --max_documents; GPT2ModernError if it has no text at all."""
    from gpt2modern.data.sources import load_hub_dataset, open_files, open_standard_library, open_table
    from gpt2modern.data.splits import is_not_empty

    if config.dataset_name is None:
        source = open_files(config.train_file, options, config.num_shards)
        _refuse_tokens_without_tokenizer(source, options)
    elif config.dataset_name == "stdlib":
        source = open_standard_library(replace(options, chat_column=None), config.num_shards)
    else:
        table = load_hub_dataset(
            config.dataset_name,
            config.dataset_config_name,
            config.dataset_split,
            config.dataset_revision,
            config.streaming,
        )
        if config.streaming:
            table = spool_stream(table, config, options, tokenizer, workspace)
        source = open_table(f"--dataset_name {config.dataset_name}", table, options, config.num_shards)
    if config.max_documents is not None:
        source = source.first(config.max_documents)
    documents = (array for piece in source.pieces for array in source.read(piece))
    if not any(is_not_empty(array).any() for array in documents):
        raise GPT2ModernError("the corpus is empty: no document has any text; check the source")
    return source


def open_validation_files(config: PrepareConfig, options: "ReadOptions") -> "Source | None":
    from gpt2modern.data.sources import expand, open_files

    if config.validation_file is None:
        return None
    trained_on = {os.path.realpath(path) for path in expand(config.train_file or [])}
    for path in expand(config.validation_file):
        if os.path.realpath(path) in trained_on:
            warn(f"--validation_file {path}: is trained on too; its loss says nothing of other text")
    source = open_files(config.validation_file, options, None)
    _refuse_tokens_without_tokenizer(source, options)
    return source


def _refuse_tokens_without_tokenizer(source: "Source", options: "ReadOptions") -> None:
    if options.eos_token_id is None and source.pieces and source.pieces[0].format == "tokens":
        raise GPT2ModernError(f"{source.origins[0]}: holds tokens; name their tokenizer with --tokenizer_name")


def spool_stream(
    stream, config: PrepareConfig, options: "ReadOptions", tokenizer: "PreTrainedTokenizerFast | None", workspace: Path
):
    """The first documents of a Hub dataset that is streamed, as a table on disk."""
    import pyarrow as pa

    from gpt2modern.data.encoding import Encoder
    from gpt2modern.data.shards import locked
    from gpt2modern.data.streaming import spool
    from gpt2modern.data.texts import render_chat

    name = f"--dataset_name {config.dataset_name}"

    def count_tokens(documents: list) -> list[int]:
        if config.chat_column:
            documents = [render_chat(messages, options, name) for messages in documents]
        texts = pa.array([text or "" for text in documents], pa.large_string())
        return (encoder.ids_and_lengths(texts)[1] + 1).tolist()

    with locked(workspace / "spool.lock"):  # machines that share the folder share the spool
        if config.max_tokens is not None:
            tokenizer.save_pretrained(workspace / "spool-tokenizer")
            path = workspace / "spool-tokenizer" / "tokenizer.json"
            encoder = Encoder(path, config.tokenizer_engine, "uint32", tokenizer.eos_token_id).with_engine_chosen()
        return spool(
            stream,
            workspace / "spool",
            name=name,
            column=config.chat_column or config.text_column,
            max_documents=config.max_documents,
            max_tokens=config.max_tokens,
            count_tokens=count_tokens,
        )


def build_encoder(config: PrepareConfig, tokenizer, source: "Source", rule, workspace: Path) -> "tuple[Encoder, int]":
    """The encoder, and the size of its vocabulary; the tokenizer is trained if it is not there, and saved."""
    from gpt2modern.data.encoding import Encoder
    from gpt2modern.data.shards import publish
    from gpt2modern.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size

    folder = Path(config.output_dir) / "tokenizer"
    if tokenizer is None and folder.is_dir():  # of a run that was killed
        tokenizer = load_tokenizer(str(folder))
    elif tokenizer is None:
        tokenizer = train_tokenizer(_training_texts(source, rule), config.train_tokenizer, config.block_size)
    if not folder.is_dir():
        build = workspace / f"tokenizer-{uuid.uuid4().hex}"
        tokenizer.save_pretrained(build)
        with contextlib.suppress(OSError if config.shard_index is not None else ()):  # another machine was first
            publish(build, folder)
    vocab_size = vocabulary_size(tokenizer)
    encoder = Encoder(
        tokenizer_json=folder / "tokenizer.json",
        engine=config.tokenizer_engine,
        dtype="uint16" if vocab_size < 1 << 16 else "uint32",
        eos_token_id=tokenizer.eos_token_id,
    )
    return encoder.with_engine_chosen(), vocab_size


def _training_texts(source: "Source", rule) -> Iterator[list[str]]:
    import pyarrow as pa

    from gpt2modern.data.splits import hash_documents, is_not_empty

    for piece in source.pieces:
        for documents in source.read(piece):
            documents = documents.filter(pa.array(is_not_empty(documents)))
            yield rule.split(documents, hash_documents(documents)).train.to_pylist()


# Writing


def default_num_shards(source: "Source") -> int:
    """A power of two, so that the shards share out evenly among the usual numbers of cores."""
    wanted = 2 ** math.ceil(math.log2(max(1.0, source.size / SHARD_BYTES)))
    return max(1, min(wanted, len(source.pieces)))


def write_validation(job: "Job", source: "Source | None") -> dict:
    """Write the one validation shard, of `source` or of what the training shards held out; returns its counts."""
    from gpt2modern.data.shards import Counts, held_out_windows, publish, validation_windows, write_rows

    counts = Counts()
    windows = held_out_windows(job) if source is None else validation_windows(source, counts)
    path = job.output_dir / "validation" / "shard-00000-of-00001"
    build = job.workspace / "validation"
    for stale in (path, build):
        shutil.rmtree(stale, ignore_errors=True)
    build.mkdir()
    files = write_rows(windows, build, job.encoder, job.packing, job.block_size, counts, "the validation split")
    if not counts.documents:
        raise GPT2ModernError(
            "no document is left for validation; give --validation_file or another --validation_split_percentage"
        )
    publish(build, path)
    relative = path.relative_to(job.output_dir).as_posix()
    return vars(counts) | {"shard": {"path": relative, "rows": counts.rows, "tokens": counts.tokens, "files": files}}


def build_manifest(
    config: PrepareConfig, settings: dict, job: "Job", vocab_size: int, receipts: list[dict], validation: dict
) -> dict:
    from gpt2modern.data.manifest import FORMAT_VERSION, checksum_of
    from gpt2modern.files import sha256_of

    summed = ("documents", "bytes", "tokens", "rows", "cut_documents")
    splits = {}
    for split, shards in {"train": receipts, "validation": [validation]}.items():
        counts = {name: sum(shard[name] for shard in shards) for name in summed}
        counts["padding"] = counts["rows"] * config.block_size - counts["tokens"]
        lengths = [sum(each) for each in zip(*(shard["document_lengths"] for shard in shards), strict=True)]
        counts["document_lengths"] = {str(2**i): count for i, count in enumerate(lengths) if count}
        splits[split] = counts | {"shards": [shard["shard"] for shard in shards]}
    names = [Path(name).name for name in config.train_file or []]
    tokenizer_files = sorted(job.encoder.tokenizer_json.parent.iterdir())
    manifest = {
        "format_version": FORMAT_VERSION,
        "block_size": config.block_size,
        "dtype": job.encoder.dtype,
        "vocab_size": vocab_size,
        "eos_token_id": job.encoder.eos_token_id,
        "packing": config.packing,
        "seed": config.shuffle_seed,
        "validation_rule": str(job.rule),
        "tokenizer": {
            "name": config.tokenizer_name and Path(config.tokenizer_name).name,
            "sha256": sha256_of(job.encoder.tokenizer_json),
            "files": {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in tokenizer_files},
        },
        "source": {
            "name": config.dataset_name or names,
            "fingerprint": f"{sum(receipt['fingerprint'] for receipt in receipts) % 2**64:016x}",
            "documents": sum(receipt["read_documents"] for receipt in receipts),
            "empty_documents": sum(receipt["empty_documents"] for receipt in receipts) + validation["empty_documents"],
        },
        "settings": settings,
        "splits": splits,
    }
    return manifest | {"checksum": checksum_of(manifest)}


def publish(config: PrepareConfig, output_dir: Path, manifest: dict | None) -> None:
    if config.push_to_hub and manifest is not None:
        from gpt2modern.data.publishing import push_to_hub

        push_to_hub(output_dir, manifest, config.hub_dataset_id, private=config.hub_private_repo)


def _quieten_libraries() -> None:
    """A user's mistake is one line of ours; the libraries' own warnings would stand before it."""
    import datasets
    import transformers

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
