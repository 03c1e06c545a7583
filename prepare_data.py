"""Text to packed blocks: read documents, hold out a validation split, get a tokenizer, encode, pack, write.

    python prepare_data.py --dataset_name stdlib --train_tokenizer 8192 --block_size 256 --output_dir data/stdlib
    python prepare_data.py --train_file a.txt b.jsonl c.parquet --tokenizer_name data/stdlib/tokenizer \\
        --block_size 1024 --output_dir data/mine
    python prepare_data.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \\
        --tokenizer_name openai-community/gpt2 --num_shards 100 --num_proc 16 --output_dir data/fineweb-edu

What is written, and what training reads (`training.blocks.PackedBlocks`):

    manifest.json                          settings, counts, sha256 of every file
    tokenizer/                             a transformers tokenizer
    train/shard-00000-of-00001/            `datasets` folder; columns input_ids (block_size + 1 tokens) and num_tokens
    validation/shard-00000-of-00001/

Documents and splits. Empty documents are counted and left out. Validation is held out by document: a document belongs
to it when the 64-bit hash of its text falls below the asked percentage, so the choice does not depend on the other
documents, on their order or on the seed, and equal texts never stand on both sides. Where this would hold out fewer
than 10 documents on average, the last part of each document is held out instead, cut at a line break
(manifest: `validation_rule`). Training documents are shuffled with `--shuffle_seed`; validation documents stand in the
order of their hashes, or of the files where they were given or are tails.

Tokens. The ids are those of `tokenizers` with `add_special_tokens=False`, which is what the saved tokenizer gives at
inference: text that spells a special token becomes that token, with either engine. Each document ends with EOS, and
each shard begins with one more, as if a document came before. The stream is cut into rows of block_size + 1 tokens
whose last token is the next row's first: every token of every document is a target exactly once, and a stream can be
cut again to any other block size. The last row of a shard is filled up with EOS; `num_tokens` says how many of a row's
block_size targets are real.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from command_line import UserError, exit_code_2_on_user_error, parse_arguments
from preparation.manifest import FORMAT_VERSION

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Below this many expected validation documents their number, and with it the split, is mostly chance.
MIN_HELD_OUT_DOCUMENTS = 10
CHECKED_DOCUMENTS = 32
CHECKED_CHARACTERS = 20_000  # of each: `tokenizers` encodes about 1.5 MB/s per core
DOCUMENTS_PER_BATCH = 1000
TOKENS_PER_WRITE = 1 << 22


@dataclass
class PrepareConfig:
    """What to prepare, with which tokenizer, and where to; raises ValueError for combinations that mean nothing."""

    output_dir: str = field(metadata={"help": "Folder to create."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "'stdlib' (the source of Python's standard library) or a dataset of the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub dataset that is read."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text files instead of a dataset: txt, json, jsonl, parquet; several, mixed."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files of the validation split; without them it is held out of the rest."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of json, parquet and Hub data with the text."})
    sample_by: Literal["document", "line", "paragraph"] = field(
        default="document", metadata={"help": "What one document is in a txt file: all of it, a line, a paragraph."}
    )
    max_documents: int | None = field(default=None, metadata={"help": "Use only the first so many documents."})
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE of this many entries on the training split."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Or use this tokenizer: folder or Hub name."})
    tokenizer_engine: Literal["auto", "gigatoken", "tokenizers"] = field(
        default="auto", metadata={"help": "What encodes; auto is gigatoken where it serves. The ids are the same."}
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens per block; rows carry one more."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Percentage of the documents that is held out without --validation_file."}
    )
    shuffle_seed: int = field(default=0, metadata={"help": "Seed of the order of the training documents."})
    num_shards: int = field(default=1, metadata={"help": "Folders the training split is written to."})
    num_proc: int | None = field(
        default=None, metadata={"help": "Encoding processes; without it one process whose engine uses every core."}
    )

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("give exactly one of --dataset_name (such as stdlib) and --train_file")
        if (self.train_tokenizer is None) == (self.tokenizer_name is None):
            raise ValueError("give exactly one of --train_tokenizer (such as 8192) and --tokenizer_name")
        if self.train_tokenizer is not None and self.train_tokenizer < 257:
            raise ValueError(
                f"--train_tokenizer {self.train_tokenizer}: a byte-level BPE has at least 257 entries, "
                f"256 bytes and {END_OF_TEXT}"
            )
        for name in ("block_size", "num_shards", "num_proc", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage}: must be in (0, 100)")
        if self.shuffle_seed < 0:
            raise ValueError(f"--shuffle_seed {self.shuffle_seed}: must not be negative")
        for name in [*(self.train_file or []), *(self.validation_file or [])]:
            if Path(name).suffix.lower() not in LOADERS:
                raise ValueError(f"{name}: unknown extension; known are {', '.join(LOADERS)}")
            if not Path(name).is_file():
                raise ValueError(f"{name}: no such file")


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(PrepareConfig, argv, description="\n\n".join(__doc__.split("\n\n")[:2]))
    prepare(config)


def prepare(config: PrepareConfig) -> dict:
    """Write `config.output_dir` and return its manifest.

    All is written to a folder beside it, which gets its name at the end. A finished folder with the same settings is
    left alone. Raises UserError for whatever its user can mend; then nothing is left.
    """
    started = time.perf_counter()
    output_dir = Path(config.output_dir)
    settings = settings_of(config)
    manifest = finished_manifest(output_dir, settings)
    if manifest is not None:
        print(f"{output_dir} is already prepared with these settings; nothing to do")
        return manifest

    _quieten_libraries()
    seconds: dict[str, float] = {}
    build = output_dir.absolute().with_name(f".{output_dir.absolute().name}.partial")
    shutil.rmtree(build, ignore_errors=True)  # of a run that was killed
    try:
        build.mkdir(parents=True)
        manifest = _build(config, settings, build, seconds)
        shutil.rmtree(build / "cache")
        build.rename(output_dir)  # over an empty folder, if there is one
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error}") from error
    finally:
        shutil.rmtree(build, ignore_errors=True)
    print_summary(output_dir, manifest, seconds, time.perf_counter() - started)
    return manifest


def _build(config: PrepareConfig, settings: dict, build: Path, seconds: dict[str, float]) -> dict:
    cache = build / "cache"
    cache.mkdir()
    with _timed(seconds, "read"):
        documents = read_documents(config, cache)
        held_out = read_files(config.validation_file, config, cache) if config.validation_file else None
    with _timed(seconds, "split"):
        splits, source, rule = split_documents(documents, held_out, config, cache)
    with _timed(seconds, "tokenizer"):
        if config.train_tokenizer:
            tokenizer = train_tokenizer(splits["train"], config.train_tokenizer, config.block_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer_name)
        tokenizer.save_pretrained(build / "tokenizer")
        vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        encoder = Encoder(
            tokenizer_json=build / "tokenizer" / "tokenizer.json",
            engine=config.tokenizer_engine,
            dtype="uint16" if vocab_size < 1 << 16 else "uint32",
            eos_token_id=tokenizer.eos_token_id,
        ).with_engine_chosen()
    with _timed(seconds, "check"):
        for split, documents in splits.items():
            check_engine(encoder, documents, split, config.shuffle_seed)

    written = {}
    for split, documents in splits.items():
        num_shards = config.num_shards if split == "train" else 1
        if num_shards > len(documents):
            raise UserError(f"--num_shards {num_shards}: the training split has only {len(documents)} documents")
        counts = {"documents": len(documents)}
        counts |= dict.fromkeys(("bytes", "tokens", "rows", "padding", "cut_documents"), 0) | {"shards": []}
        for index in range(num_shards):
            path = build / split / f"shard-{index:05d}-of-{num_shards:05d}"
            label = split if num_shards == 1 else f"{split} shard {index}"
            with _timed(seconds, "encode"):
                shard = documents.shard(num_shards, index, contiguous=True)
                encoded = encode(shard, encoder, config.num_proc, cache, label)
            with _timed(seconds, "write"):
                shard_counts = write_shard(encoded, path, config.block_size, encoder, cache, label)
                entry = {"path": path.relative_to(build).as_posix()}
                entry |= {name: shard_counts[name] for name in ("rows", "tokens")} | {"files": _files(path)}
                counts["shards"].append(entry)
            for name, value in shard_counts.items():
                counts[name] += value
        written[split] = counts

    manifest = {
        "format_version": FORMAT_VERSION,
        "block_size": config.block_size,
        "dtype": encoder.dtype,
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "packing": "concat",
        "seed": config.shuffle_seed,
        "validation_rule": rule,
        "tokenizer": {
            "name": config.tokenizer_name and Path(config.tokenizer_name).name,
            "sha256": _sha256(encoder.tokenizer_json),
        },
        "source": source,
        "settings": settings,
        "splits": written,
    }
    (build / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


# Settings and what is there already


def settings_of(config: PrepareConfig) -> dict:
    """What decides the bytes of the result: not where it goes, nor how many processes or which engine make it."""
    settings = {
        "block_size": config.block_size,
        "dataset_name": config.dataset_name,
        "shuffle_seed": config.shuffle_seed,
        "num_shards": config.num_shards,
        "max_documents": config.max_documents,
        "train_file": _described(config.train_file),
        "validation_file": _described(config.validation_file),
        "validation_split_percentage": None if config.validation_file else config.validation_split_percentage,
        "train_tokenizer": config.train_tokenizer,
    }
    if config.dataset_name == "stdlib":
        settings["python"] = platform.python_version()
    elif config.dataset_name:
        settings |= {"dataset_config_name": config.dataset_config_name, "dataset_split": config.dataset_split}
    if config.dataset_name != "stdlib" or config.validation_file:
        settings |= {"text_column": config.text_column, "sample_by": config.sample_by}
    if config.tokenizer_name:
        settings["tokenizer_name"] = Path(config.tokenizer_name).name
        tokenizer_json = Path(config.tokenizer_name) / "tokenizer.json"
        settings["tokenizer_sha256"] = _sha256(tokenizer_json) if tokenizer_json.is_file() else None
    return {name: value for name, value in settings.items() if value is not None}


def finished_manifest(output_dir: Path, settings: dict) -> dict | None:
    """The manifest that is there if it was made with the same settings, None if nothing is there; else UserError."""
    path = output_dir / "manifest.json"
    if not path.is_file():
        if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
            raise UserError(f"--output_dir {output_dir}: exists and is not a prepared dataset; choose another folder")
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a manifest of a prepared dataset; choose another --output_dir") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {manifest.get('format_version')!r}, this code writes {FORMAT_VERSION}; remove "
            f"{output_dir} and prepare the data again"
        )
    names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
    if names:
        differences = ", ".join(f"{name} is {found.get(name)} there, {settings.get(name)} here" for name in names)
        raise UserError(
            f"--output_dir {output_dir}: holds other data ({differences}); choose another folder or remove it"
        )
    return manifest


def _described(names: list[str] | None) -> list[dict] | None:
    return names and [
        {"name": Path(name).name, "size": Path(name).stat().st_size, "sha256": _sha256(Path(name))} for name in names
    ]


def _files(folder: Path) -> dict[str, dict]:
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading


def read_documents(config: PrepareConfig, cache: Path) -> "Dataset":
    """The documents of --dataset_name or --train_file in their own order: a dataset with the one column `text`."""
    if config.dataset_name is None:
        documents = read_files(config.train_file, config, cache)
    elif config.dataset_name == "stdlib":
        documents = read_standard_library()
    else:
        documents = read_hub_dataset(config)
    if config.max_documents is not None:
        documents = documents.select(range(min(config.max_documents, len(documents))))
    return documents


def standard_library_files() -> list[Path]:
    """The .py files of the running Python's standard library, sorted by relative path, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_standard_library() -> "Dataset":
    """About 1,700 documents, 31 MB; test files that are not UTF-8 on purpose are left out."""
    from datasets import Dataset, Features, Value
    from tqdm import tqdm

    texts = []
    for path in tqdm(standard_library_files(), desc="Reading the standard library", unit=" files"):
        with contextlib.suppress(UnicodeDecodeError):
            texts.append(path.read_bytes().decode("utf-8"))
    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("large_string")}))


def read_hub_dataset(config: PrepareConfig) -> "Dataset":
    """One split of a dataset of the Hub; raises UserError when it cannot be had."""
    from datasets import load_dataset

    try:
        documents = load_dataset(config.dataset_name, config.dataset_config_name, split=config.dataset_split)
    except Exception as error:  # the network, the Hub, the dataset's own files: none of it is a defect of ours
        raise UserError(
            f"--dataset_name {config.dataset_name}: cannot be loaded ({_cause(error)}); "
            "check the name and the network, or use --dataset_name stdlib or --train_file"
        ) from error
    return _text_only(documents, config.text_column, f"--dataset_name {config.dataset_name}")


def read_files(names: list[str], config: PrepareConfig, cache: Path) -> "Dataset":
    """The documents of text files, in the order given; neighbours of one kind are read by one `datasets` loader."""
    from itertools import groupby

    from datasets import Features, Value, concatenate_datasets

    parts = []
    for loader, group in groupby(names, key=lambda name: LOADERS[Path(name).suffix.lower()]):
        parts.append(_read_files_of_one_kind(loader, list(group), config, cache))
    if any(part.features != parts[0].features for part in parts):
        parts = [part.cast(Features({"text": Value("large_string")})) for part in parts]
    return concatenate_datasets(parts)


def _read_files_of_one_kind(loader: str, names: list[str], config: PrepareConfig, cache: Path) -> "Dataset":
    from datasets import load_dataset

    column, options = config.text_column, {}
    if loader == "text":
        column, options = "text", {"sample_by": config.sample_by}
    elif loader == "json":
        options = {"parse_agent_traces": False}
        for name in names:
            if not Path(name).stat().st_size:
                raise UserError(f"{name}: is empty; leave it out")
            _refuse_undecodable(name)  # Arrow's parser does not look
    elif loader == "parquet":
        for name in names:
            _require_column(_parquet_columns(name), column, name)
        options = {"columns": [column]}
    try:
        documents = load_dataset(loader, data_files=names, split="train", cache_dir=str(cache), **options)
    except Exception as error:  # each loader raises its own
        for name in names if len(names) > 1 else []:
            _read_files_of_one_kind(loader, [name], config, cache)  # raises for the one at fault
        if loader == "text":
            _refuse_undecodable(names[0])
        raise UserError(f"{names[0]}: cannot be read as {loader} ({_cause(error)})") from error
    return _text_only(documents, column, names[0] if len(names) == 1 else f"{names[0]} and the files after it")


def _parquet_columns(name: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(name).names
    except pa.ArrowException as error:
        raise UserError(f"{name}: cannot be read as parquet ({_cause(error)})") from error


def _require_column(columns: list[str], column: str, origin: str) -> None:
    if column not in columns:
        raise UserError(f"{origin}: no column {column!r}; --text_column can be one of {', '.join(columns)}")


def _text_only(documents: "Dataset", column: str, origin: str) -> "Dataset":
    _require_column(documents.column_names, column, origin)
    dtype = getattr(documents.features[column], "dtype", documents.features[column])
    if dtype not in ("string", "large_string", "null"):
        raise UserError(f"{origin}: column {column!r} holds {dtype}, not text; name another with --text_column")
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def _refuse_undecodable(name: str) -> None:
    """Raise UserError with the offset of the first byte that is not UTF-8; return if there is none."""
    import codecs

    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(name, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}: byte {offset - pending + error.start} is not UTF-8 ({error.reason}); convert the file"
                ) from None
            offset += len(chunk)
            if not chunk:
                return


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


# Splitting


def split_documents(
    documents: "Dataset", held_out: "Dataset | None", config: PrepareConfig, cache: Path
) -> tuple[dict[str, "Dataset"], dict, str]:
    """`train` and `validation` in the order in which they are packed, the manifest's `source`, and the rule applied."""
    import numpy as np

    hashes, not_empty = _hash_documents(documents)
    source = {
        "name": config.dataset_name or [Path(name).name for name in config.train_file],
        "fingerprint": hashlib.sha256(hashes.tobytes()).hexdigest(),
        "documents": len(documents),
        "empty_documents": int(len(documents) - not_empty.sum()),
    }
    if not not_empty.any():
        raise UserError(f"the corpus is empty: {len(documents)} documents, none with any text; check the source")
    fraction = config.validation_split_percentage / 100
    if held_out is not None:
        rule = "the documents of --validation_file"
        validation_not_empty = _hash_documents(held_out)[1]
        train, validation = np.flatnonzero(not_empty), held_out.select(np.flatnonzero(validation_not_empty))
    elif not_empty.sum() * fraction < MIN_HELD_OUT_DOCUMENTS:
        rule = f"the last {fraction:.4g} of each document, from a line break on"
        documents, validation = _cut_tails(documents.select(np.flatnonzero(not_empty)), fraction, cache)
        train = np.arange(len(documents))
    else:
        rule = f"documents whose hash is below {fraction:.4g} of its range"
        below = hashes < np.uint64(fraction * 2**64)
        train = np.flatnonzero(not_empty & ~below)
        chosen = np.flatnonzero(not_empty & below)
        validation = documents.select(chosen[np.argsort(hashes[chosen], kind="stable")])
    if not len(train) or not len(validation):
        raise UserError(
            f"{not_empty.sum()} documents leave {len(train)} for training and {len(validation)} for validation; "
            "give --validation_file or another --validation_split_percentage"
        )
    train = np.random.default_rng(config.shuffle_seed).permutation(train)
    return {"train": documents.select(train), "validation": validation}, source, rule


def _hash_documents(documents: "Dataset") -> tuple["np.ndarray", "np.ndarray"]:
    """(blake2b-64 of the text: uint64, text is not empty: bool), one of each per document."""
    import numpy as np
    import pyarrow as pa
    from tqdm import tqdm

    hashes = np.zeros(len(documents), dtype=np.uint64)
    not_empty = np.zeros(len(documents), dtype=bool)
    index = 0
    with tqdm(total=len(documents), desc="Hashing", unit=" documents") as bar:
        for table in documents.with_format("arrow").iter(DOCUMENTS_PER_BATCH):
            try:
                table["text"].validate(full=True)
            except pa.ArrowInvalid as error:
                raise UserError(f"documents {index} to {index + len(table) - 1}: not UTF-8 text ({error})") from error
            for text in table["text"].cast(pa.large_binary()).to_pylist():
                if text:
                    hashes[index] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
                    not_empty[index] = True
                index += 1
            bar.update(len(table))
    return hashes, not_empty


def _cut_tails(documents: "Dataset", fraction: float, cache: Path) -> tuple["Dataset", "Dataset"]:
    """Heads and tails of each document; a document without a line break to cut at is all head."""

    def cut(batch: dict[str, list[str]], part: str) -> dict[str, list[str]]:
        pieces = []
        for text in batch["text"]:
            target = int(len(text) * (1 - fraction))
            position = text.rfind("\n", 0, target) + 1 or text.find("\n", target) + 1 or len(text)
            pieces.append(text[:position] if part == "head" else text[position:])
        return {"text": [piece for piece in pieces if piece]}

    heads, tails = (
        documents.map(
            cut,
            batched=True,
            batch_size=1,  # the documents are few, and may be large
            fn_kwargs={"part": part},
            load_from_cache_file=False,
            cache_file_name=str(cache / f"{part}.arrow"),
            new_fingerprint=part,
            desc=f"Cutting {part}s",
        )
        for part in ("head", "tail")
    )
    return heads, tails


# Tokenizers


def train_tokenizer(documents: "Dataset", vocab_size: int, model_max_length: int) -> "PreTrainedTokenizerFast":
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
    batches = (table["text"].to_pylist() for table in documents.with_format("arrow").iter(DOCUMENTS_PER_BATCH))
    bpe.train_from_iterator(batches, trainer, length=len(documents))
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
    """A fast tokenizer with an EOS token from a folder or the Hub; raises UserError for anything else."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, ... by what is missing
        way_out = (
            "the folder needs tokenizer.json and tokenizer_config.json"
            if Path(name).exists()
            else "no such folder, and the Hub does not give it: check the name and the network"
        )
        raise UserError(f"--tokenizer_name {name}: not a tokenizer ({_cause(error)}); {way_out}") from error
    for name_of_this_call in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name_of_this_call, None)  # or they are saved
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer_name {name}: has no fast version (tokenizer.json); choose another tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_name {name}: has no EOS token; set eos_token in its tokenizer_config.json")
    return tokenizer


# Encoding


@dataclass
class Encoder:
    """Texts to ids; the engine is loaded once in each process, and pickling leaves it behind."""

    tokenizer_json: Path
    engine: Literal["auto", "gigatoken", "tokenizers"]
    dtype: Literal["uint16", "uint32"]
    eos_token_id: int
    _loaded: object = field(default=None, init=False, repr=False, compare=False)

    def with_engine_chosen(self) -> "Encoder":
        """`auto` becomes gigatoken, or `tokenizers`, with a note, where gigatoken cannot serve; UserError where
        gigatoken was asked for and cannot."""
        if self.engine == "tokenizers":
            return self
        try:
            chosen = replace(self, engine="gigatoken")
            chosen.load()
            return chosen
        except Exception as error:  # not installed, or a kind of tokenizer that it does not know
            if self.engine == "gigatoken":
                raise UserError(
                    f"--tokenizer_engine gigatoken: cannot serve this tokenizer ({_cause(error)}); "
                    "use auto or tokenizers"
                ) from error
            print(f"note: encoding with tokenizers; gigatoken cannot serve this tokenizer ({_cause(error)})")
            return replace(self, engine="tokenizers")

    def load(self):
        """The engine's own tokenizer: `gigatoken.Tokenizer` or `tokenizers.Tokenizer`."""
        if self._loaded is None and self.engine == "gigatoken":
            import gigatoken

            self._loaded = gigatoken.Tokenizer.from_json(self.tokenizer_json.read_text(encoding="utf-8"))
        elif self._loaded is None:
            from tokenizers import Tokenizer

            self._loaded = Tokenizer.from_file(str(self.tokenizer_json))
            self._loaded.no_truncation()
            self._loaded.no_padding()
        return self._loaded

    def __getstate__(self) -> dict:
        return vars(self) | {"_loaded": None}

    def ids_and_lengths(self, texts: "pa.Array") -> tuple["np.ndarray", "np.ndarray"]:
        """Encode a `large_string` array: all ids one after the other (uint32), and how many each text has (int64)."""
        import numpy as np

        if self.engine == "gigatoken":
            import awkward

            ids = self.load().encode_batch(awkward.from_arrow(texts))
            return awkward.to_numpy(awkward.flatten(ids)), awkward.to_numpy(awkward.num(ids))
        encodings = self.load().encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)

    def encode_table(self, table: "pa.Table") -> "pa.Table":
        """Column `text` -> `ids` (of the text and EOS, in `dtype`) and `bytes` (of its UTF-8)."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        texts = pa.chunked_array(table["text"]).cast(pa.large_string()).combine_chunks()
        ids, lengths = self.ids_and_lengths(texts)
        ends = np.cumsum(lengths)
        ids = np.insert(ids.astype(self.dtype), ends, self.eos_token_id)
        offsets = np.concatenate([[0], ends + np.arange(1, len(ends) + 1)])
        columns = {
            "ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            "bytes": pc.binary_length(texts).cast(pa.int64()),
        }
        return pa.table(columns)


def check_engine(encoder: Encoder, documents: "Dataset", split: str, seed: int) -> None:
    """Encode a sample of the documents with `tokenizers` too; raises UserError naming the first that differs."""
    import numpy as np
    import pyarrow as pa

    reference = replace(encoder, engine="tokenizers")
    count = min(CHECKED_DOCUMENTS, len(documents)) if encoder.engine != "tokenizers" else 0
    for index in sorted(np.random.default_rng(seed).choice(len(documents), count, replace=False).tolist()):
        text = documents[index]["text"][:CHECKED_CHARACTERS]
        texts = pa.array([text], pa.large_string())
        if not np.array_equal(encoder.ids_and_lengths(texts)[0], reference.ids_and_lengths(texts)[0]):
            raise UserError(
                f"{encoder.engine} and tokenizers encode document {index} of the {split} split differently "
                f"(it begins {text[:60]!r}); use --tokenizer_engine tokenizers"
            )


def encode(documents: "Dataset", encoder: Encoder, num_proc: int | None, cache: Path, label: str) -> "Dataset":
    """`Encoder.encode_table` of all documents, in their order, in `num_proc` processes."""
    from datasets import Features, LargeList, Value

    if num_proc is not None and num_proc > 1:
        # Workers are forked after `tokenizers` has used threads here: without this each warns of it, at length.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return documents.with_format("arrow").map(
        encoder.encode_table,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=["text"],
        features=Features({"ids": LargeList(Value(encoder.dtype)), "bytes": Value("int64")}),
        num_proc=num_proc and min(num_proc, len(documents)),
        load_from_cache_file=False,
        cache_file_name=str(cache / "encoded.arrow"),
        new_fingerprint="encoded",
        desc=f"Encoding {label}",
    )


# Packing and writing


def packed_rows(
    streams: Iterator["np.ndarray"], block_size: int, eos_token_id: int
) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Cut a stream that arrives in pieces into (rows, block_size + 1) arrays, each with the (rows,) number of its
    real targets; a row begins with its predecessor's last token, the first one with EOS, and EOS fills up the last."""
    import numpy as np

    rest = None
    for tokens in streams:
        if rest is None:
            rest = np.array([eos_token_id], dtype=tokens.dtype)
        tokens = np.concatenate([rest, tokens])
        rows = (len(tokens) - 1) // block_size
        rest = tokens[rows * block_size :]
        if rows:
            full = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size][:rows]
            yield full, np.full(rows, block_size, dtype=np.int32)
    if rest is not None and len(rest) > 1:
        last = np.full((1, block_size + 1), eos_token_id, dtype=rest.dtype)
        last[0, : len(rest)] = rest
        yield last, np.array([len(rest) - 1], dtype=np.int32)


def write_shard(
    encoded: "Dataset", path: Path, block_size: int, encoder: Encoder, cache: Path, label: str
) -> dict[str, int]:
    """Pack `encoded` into the `datasets` folder `path`; returns bytes, tokens (targets), rows, padding and
    cut_documents (which, with their EOS, lie in more than one row)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, DatasetInfo, Features, List, Value
    from datasets.arrow_writer import ArrowWriter
    from datasets.table import MemoryMappedTable
    from tqdm import tqdm

    ids = encoded.data.column("ids")
    total_tokens = sum(len(chunk.flatten()) for chunk in ids.chunks)
    ends = np.cumsum(pc.list_value_length(ids).to_numpy())
    starts = np.concatenate([[0], ends[:-1]])
    features = Features({"input_ids": List(Value(encoder.dtype), length=block_size + 1), "num_tokens": Value("int32")})
    unsaved = cache / "packed.arrow"
    rows, digest = 0, hashlib.sha256()
    with tqdm(total=total_tokens, desc=f"Packing {label}", unit=" tokens", unit_scale=True) as bar:
        pieces = (
            chunk.flatten()[start : start + TOKENS_PER_WRITE].to_numpy(zero_copy_only=True)
            for chunk in ids.chunks
            for start in range(0, len(chunk.flatten()), TOKENS_PER_WRITE)
        )
        with ArrowWriter(features=features, path=str(unsaved)) as writer:
            for block_rows, num_tokens in packed_rows(pieces, block_size, encoder.eos_token_id):
                values = block_rows.ravel()
                digest.update(values)
                column = pa.FixedSizeListArray.from_arrays(pa.array(values), block_size + 1)
                writer.write_table(pa.table({"input_ids": column, "num_tokens": num_tokens}))
                rows += len(block_rows)
                bar.update(int(num_tokens.sum()))
            writer.finalize()
    digest.update(str(total_tokens).encode())  # padding looks like EOS
    # The fingerprint is given so that equal data is written as equal bytes: the default holds the time.
    packed = Dataset(
        MemoryMappedTable.from_file(str(unsaved)),
        info=DatasetInfo(features=features),
        fingerprint=digest.hexdigest()[:16],
    )
    packed.save_to_disk(path, num_shards=1)
    del packed
    unsaved.unlink()
    return {
        "bytes": pc.sum(encoded.data.column("bytes")).as_py(),
        "tokens": total_tokens,
        "rows": rows,
        "padding": rows * block_size - total_tokens,
        "cut_documents": int((starts // block_size != (ends - 1) // block_size).sum()),
    }


# Reporting


def print_summary(output_dir: Path, manifest: dict, seconds: dict[str, float], total: float) -> None:
    """What was made, how long it took, and what to type next."""
    print(f"\n{output_dir}: blocks of {manifest['block_size']} tokens, {manifest['vocab_size']:,} vocabulary entries")
    print(f"{'':12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}{'blocks':>11}{'padding':>9}")
    for split, counts in manifest["splits"].items():
        bytes_per_token = counts["bytes"] / counts["tokens"]
        print(
            f"{split:12}{counts['documents']:>12,}{counts['bytes']:>16,}{counts['tokens']:>16,}"
            f"{bytes_per_token:>13.3f}{counts['rows']:>11,}{counts['padding']:>9,}"
        )
    print(f"validation: {manifest['validation_rule']}")
    print(f"{total:.1f} s: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    print(f"next: python train_accelerate.py --config recipes/NAME.yaml --data_dir {output_dir} --output_dir out/NAME")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


def _quieten_libraries() -> None:
    """A user's mistake is one line of ours; the libraries' own warnings would stand before it."""
    import datasets
    import transformers

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
