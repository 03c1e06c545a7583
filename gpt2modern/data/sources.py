"""Open the source of documents: files, the standard library, a dataset of the Hub, or one given from Python.

A source is a list of pieces: ranges of bytes or rows of a file or table, about 1 MB each if the format can be divided,
so that each machine reads only its share. A stream that is limited by --max_tokens or --max_documents is written to a
table on disk first, because its documents are read several times.
"""

import contextlib
import functools
import glob
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from gpt2modern.data.config import PrepareConfig
from gpt2modern.data.documents import COLUMN, Documents, array_of, first_documents, first_tokens
from gpt2modern.data.formats import FORMATS, Piece, ReadOptions, arrow
from gpt2modern.data.formats.reading import require_column, stats_of, text_of_column
from gpt2modern.data.formats.registry import extensions, format_of, suffix
from gpt2modern.data.formats.tokens import HEADER_BYTES
from gpt2modern.data.splits import is_not_empty
from gpt2modern.data.tokenizing import Encoder
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import is_hub_name, locked, sha256_of
from gpt2modern.hub import files_on_hub, hub_errors, retried

SHARD_BYTES = 128 << 20  # of the source, per shard, if --num_shards is not given
PIECE_BYTES = 1 << 20
MAX_PIECES = 100_000  # as their list is held in memory
BATCH_BYTES = 4 << 20  # of text in a batch of documents, estimated from a sample
BATCH_ROWS = (16, 4096)  # least and most
STREAM_ROWS = 256  # documents of a stream that are processed together

AnyDataset = datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict


@dataclass
class Source:
    """Represent a source of documents: pieces of files and tables, or a stream of `datasets`, which has no pieces.

    size: bytes on disk, 0 if unknown. name: for error messages. cache_dir: folder for the locks of `datasets`.
    """

    options: ReadOptions
    name: str = "the source"
    pieces: list[Piece] = field(default_factory=list)
    stream: datasets.IterableDataset | None = None
    size: int = 0
    cache_dir: str | None = None

    def documents(self, shuffle_seed: int | None = None) -> datasets.IterableDataset:
        """Return a dataset of the documents with one shard per piece, shuffled if `shuffle_seed` is given."""
        if self.stream is not None:
            shuffled = shuffle_seed is not None and self.stream.num_shards > 1
            return self.stream.shuffle(seed=shuffle_seed, buffer_size=1) if shuffled else self.stream
        pieces = self.pieces
        if shuffle_seed is not None:
            pieces = [pieces[i] for i in np.random.default_rng(shuffle_seed).permutation(len(pieces))]
        return Documents(pieces, self.options, self.cache_dir).as_streaming_dataset("train")

    @functools.cached_property
    def batch_rows(self) -> int:
        """Return the number of documents in about 4 MB, estimated from the mean size in up to eight pieces.

        Small batches cost time: each call of gigatoken takes 2 ms in addition to the time for its text."""
        documents, sizes = self.documents(), [1.0]
        for index in np.unique(np.linspace(0, documents.num_shards - 1, 8, dtype=int)):
            shard = documents.shard(documents.num_shards, index)
            table = next(iter(shard.with_format("arrow").iter(64)), None)
            if table is not None and len(table):
                sizes.append(table.nbytes / len(table))
        return int(np.clip(BATCH_BYTES // np.median(sizes), *BATCH_ROWS))

    @property
    def default_num_shards(self) -> int:
        """Return the default of --num_shards: one per 128 MB, rounded up to a power of two, at most one per piece."""
        wanted = 2 ** math.ceil(math.log2(max(1.0, self.size / SHARD_BYTES)))
        return max(1, min(wanted, self.documents().num_shards))

    def arrays(self) -> Iterator[pa.Array]:
        """Yield all documents in order, as arrays of `batch_rows` documents."""
        for table in self.documents().with_format("arrow").iter(self.batch_rows):
            yield array_of(table, COLUMN)


def with_token_files(config: PrepareConfig) -> PrepareConfig:
    """Download a Hub dataset of token files, such as kjj0/fineweb10B-gpt2, and return `config` with them as files: of
    the .bin files with "train" in their names the first that --max_tokens needs, and those with "val" as validation
    split. Returns `config` as it is for any other source. Files of an earlier call are kept or continued.

    Raises GPT2ModernError if a download fails or a file has another sha256 than on the Hub."""
    name, files = config.dataset_name, {}
    with contextlib.suppress(Exception):  # `datasets` has a copy, or says what is wrong
        if is_hub_name(name):
            commit, files = files_on_hub(name, repo_type="dataset", revision=config.dataset_revision)
    names = [path for path in sorted(files) if path.endswith(".bin")]
    train = [path for path in names if "train" in Path(path).name]
    if not train:
        return config
    if config.max_tokens is not None:
        counts = [(files[path].size - HEADER_BYTES) // (4 if config.token_dtype == "uint32" else 2) for path in train]
        train = train[: 1 + int(np.searchsorted(np.cumsum(counts), config.max_tokens))]
    held_out = [path for path in names if "val" in Path(path).name and not config.validation_file]
    with hub_errors(f"--dataset_name {name} cannot be downloaded", "run the same command again to continue"):
        folder = retried(snapshot_download, name, repo_type="dataset", revision=commit, allow_patterns=train + held_out)
    for path in train + held_out:
        if files[path].lfs is not None and sha256_of(Path(folder, path)) != files[path].lfs.sha256:
            problem = "has another sha256 than on the Hub; delete it and run the same command again"
            raise GPT2ModernError(f"--dataset_name {name}: {Path(folder, path).resolve()} {problem}")
    train, held_out = ([str(Path(folder, path)) for path in paths] for paths in (train, held_out))
    return replace(config, train_file=train, validation_file=held_out or config.validation_file)


def open_source(
    config: PrepareConfig,
    dataset: AnyDataset | None,
    options: ReadOptions,
    tokenizer: PreTrainedTokenizerFast | None,
    workspace: Path,
) -> Source:
    """Open the source that the flags name, or `dataset`, limited to --max_documents and --max_tokens.

    tokenizer: counts the tokens for --max_tokens. Raises GPT2ModernError if the source has no text.
    """
    dataset = None if dataset is None else _split_of(dataset, config.dataset_split)
    is_stream = config.streaming or isinstance(dataset, datasets.IterableDataset)
    if config.max_tokens is not None and not is_stream:
        formats = {format_of(path, options.file_format) for path in expand(config.train_file or [])}
        if not formats or not all(FORMATS[name].holds_tokens for name in formats):
            able = "--streaming or files of tokens; use --max_documents instead"
            raise GPT2ModernError(f"--max_tokens {config.max_tokens} works only with {able}")
    if config.train_file is not None:
        source = open_files(config.train_file, options, config.num_shards)
        if config.max_tokens is not None:
            source.pieces = first_tokens(source.pieces, config.max_tokens)
    elif dataset is not None:
        source = open_dataset("dataset", dataset, options, config.num_shards)
    elif config.dataset_name == "stdlib":
        source = open_standard_library(replace(options, chat_column=None))
    else:
        name = f"--dataset_name {config.dataset_name}"
        source = open_dataset(name, _load_hub_dataset(config), options, config.num_shards)
    if source.stream is not None and (config.max_documents is not None or config.max_tokens is not None):
        table = spool(source.stream, source.name, config, tokenizer, workspace)
        source = open_dataset(source.name, table, source.options, config.num_shards)
    source.cache_dir = str(workspace / "datasets")
    if config.max_documents is not None and source.stream is None:
        source.pieces = first_documents(source.pieces, source.options, config.max_documents)
    if not any(is_not_empty(array).any() for array in source.arrays()):
        raise GPT2ModernError(f"{source.name} is empty: no document has any text; check the source and the column")
    return source


def open_validation(
    config: PrepareConfig, settings: dict, dataset: AnyDataset | None, options: ReadOptions, workspace: Path
) -> Source | None:
    """Open --validation_file, or the split `validation` of a dataset given from Python. Returns None without either.

    settings: with the fingerprint of each file, by which copies of a training file are found.
    """
    if config.validation_file is not None:
        trained_on = {file["xxh3"]: file["name"] for file in settings.get("train_file", [])}
        for file in settings.get("validation_file", []):  # none, if they were downloaded
            if same := trained_on.get(file["xxh3"]):
                problem = f"has the content of {same} in --train_file, so its loss does not measure other text"
                warn(f"--validation_file {file['name']} {problem}")
        source = open_files(config.validation_file, options, None)
    elif isinstance(dataset, dict) and "validation" in dataset:
        source = open_dataset("validation", dataset["validation"], options, None)
    else:
        return None
    source.name, source.cache_dir = "the validation split", str(workspace / "datasets")
    return source


def open_files(names: Sequence[str], options: ReadOptions, num_shards: int | None) -> Source:
    """Open files, globs, and folders of files or saved by `save_to_disk`, in the given order.

    Raises GPT2ModernError if a file is missing, empty, or has no column of documents.
    """
    paths = expand(names, warn)
    formats = [format_of(path, options.file_format) for path in paths]
    if len({FORMATS[name].holds_tokens for name in formats}) > 1:
        first = next(path for path, name in zip(paths, formats, strict=True) if FORMATS[name].holds_tokens)
        raise GPT2ModernError(f"{first} holds tokens, which cannot be mixed with text files; prepare them separately")
    stats = [stats_of(path) for path in paths]
    source = Source(options, size=sum(size for files in stats for size, _ in files.values()))
    for path, name, files in zip(paths, formats, stats, strict=True):
        if path.is_file() and not path.stat().st_size:
            raise GPT2ModernError(f"{path} is an empty file; omit it")
        if options.chat_column and not FORMATS[name].holds_chats:
            able = ", ".join(name for name, format in FORMATS.items() if format.holds_chats)
            raise GPT2ModernError(f"{path}: {name} files cannot hold conversations; --chat_column works with {able}")
        source.pieces += _pieces_of(str(path), FORMATS[name].open(path, options), name, source, num_shards, files)
    if len(paths) == 1:
        source.name = str(paths[0])
    return source


def _pieces_of(
    name: str, origin: object, format: str, source: Source, num_shards: int | None, stats: dict
) -> list[Piece]:
    ranges = FORMATS[format].pieces(origin, source.options, piece_bytes_of(source.size, num_shards))
    return [Piece(format, origin, name, start, stop, stats=stats) for start, stop in ranges]


def piece_bytes_of(total: int, num_shards: int | None) -> int:
    """Return the most bytes of a piece: about an eighth of a shard, at most 1 MB unless there were too many pieces."""
    return max(min(PIECE_BYTES, total // (8 * (num_shards or 1)) + 1), total // MAX_PIECES, 4096)


def expand(names: Sequence[str], warn: Callable[[str], None] = lambda message: None) -> list[Path]:
    """Replace globs by their sorted matches and folders by their known files, without .bin files beside others.

    warn: called with a message for each folder of which files are omitted. Raises GPT2ModernError if a name matches
    nothing, or something that is not a file.
    """
    paths: list[Path] = []
    for name in names:
        found, problem = [Path(name)], "no such file; check the path"
        if glob.has_magic(name) and not Path(name).exists():
            found, problem = (
                [Path(match) for match in sorted(glob.glob(name, recursive=True))],
                "no file matches this pattern",
            )
            found = [path for path in found if path.is_file()]
        elif Path(name).is_dir() and not arrow.is_saved_dataset(Path(name)):
            known = extensions()
            found = sorted(path for path in Path(name).rglob("*") if path.is_file() and suffix(path) in known)
            texts = [path for path in found if not FORMATS[format_of(path)].holds_tokens]
            if texts and len(texts) < len(found):
                omitted = min(set(found) - set(texts))
                warn(f"{name}: {omitted.name} and other files of tokens are omitted, as the folder has text files, too")
                found = texts
            problem = f"the folder has no file with a known extension ({', '.join(known)})"
        if not found or not found[0].exists():
            raise GPT2ModernError(f"{name}: {problem}")
        if not (found[0].is_file() or found[0].is_dir()):
            raise GPT2ModernError(f"{name} is a pipe or a device, which can be read only once; save it as a file first")
        paths += found
    return paths


def stats_of_files(config: PrepareConfig) -> dict[Path, tuple[int, int]]:
    """Return size and modification time of each file of --train_file and --validation_file; see `stats_of`."""
    paths = expand([*(config.train_file or []), *(config.validation_file or [])])
    return {file: stat for path in paths for file, stat in stats_of(path).items()}


def standard_library_files() -> list[Path]:
    """Return the .py files of Python's standard library, sorted by relative path, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def open_standard_library(options: ReadOptions) -> Source:
    """Open the files of Python's standard library: about 1,700 documents, 31 MB. Skips files that are not UTF-8."""
    source = Source(replace(options, sample_by="document", separator=None))
    for path in standard_library_files():
        data = path.read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            if data.decode("utf-8"):
                source.pieces.append(Piece("text", path, str(path), 0, len(data), stats=stats_of(path)))
                source.size += len(data)
    return source


def open_dataset(
    name: str, dataset: datasets.Dataset | datasets.IterableDataset, options: ReadOptions, num_shards: int | None
) -> Source:
    """Open a `datasets` table or stream. name: for error messages. num_shards: of the run, which sizes the pieces."""

    def take_text(table: pa.Table, indices: list[int]) -> pa.Table:
        require_column(table.schema, options, name)
        return pa.table({COLUMN: text_of_column(table.column(options.column), options, name, indices[0])})

    if isinstance(dataset, datasets.IterableDataset):
        stream = dataset.with_format("arrow")
        stream = stream.map(take_text, batched=True, batch_size=STREAM_ROWS, with_indices=True)
        return Source(replace(options, text_column=COLUMN, chat_column=None), name, stream=stream)
    table = arrow.text_column_of(dataset, options, name)
    source = Source(options, name, size=table.data.nbytes * len(table) // max(1, len(table.data)))
    source.pieces = _pieces_of(name, table, "arrow", source, num_shards, {})
    return source


def _split_of(dataset: AnyDataset, split: str) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset
    if not isinstance(dataset, dict):
        raise GPT2ModernError(
            f"dataset has the type {type(dataset).__name__}; give a Dataset, IterableDataset or DatasetDict"
        )
    if split not in dataset:
        raise GPT2ModernError(f"dataset has no split {split!r}; choose dataset_split from {', '.join(dataset)}")
    return dataset[split]


def _load_hub_dataset(config: PrepareConfig) -> datasets.Dataset | datasets.IterableDataset:
    options = {"split": config.dataset_split, "revision": config.dataset_revision, "streaming": config.streaming}
    advice = "check the name and the network, or use --dataset_name stdlib or --train_file"
    with hub_errors(f"--dataset_name {config.dataset_name} cannot be loaded", advice):
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name, **options)


def spool(
    documents: datasets.IterableDataset,
    name: str,
    config: PrepareConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    workspace: Path,
) -> datasets.Dataset:
    """Write the first documents of a stream to a table on disk and open it. A finished table is opened again.

    The last document is the one that reaches --max_tokens, or number --max_documents. Machines that share the folder
    share the table. Raises GPT2ModernError if reading the stream fails or the stream has no documents.
    """
    max_documents, max_tokens = config.max_documents, config.max_tokens
    finished, unfinished = workspace / "stream.arrow", workspace / "stream.unfinished"
    with locked(workspace / "stream.lock"):
        if finished.is_file():
            return datasets.Dataset.from_file(str(finished))
        if max_tokens is not None:
            tokenizer.save_pretrained(workspace / "counting")
            counter = Encoder.of(tokenizer, workspace / "counting", config)
        seen = tokens = 0
        advice = "check the network and run the same command again"
        with (
            hub_errors(f"{name}: reading the stream failed", advice),
            tqdm(total=max_tokens or max_documents, desc="Streaming", unit_scale=True) as bar,
            pa.ipc.new_stream(str(unfinished), pa.schema({COLUMN: pa.large_string()})) as writer,
        ):
            for table in documents.with_format("arrow").iter(STREAM_ROWS):
                if max_documents is not None:
                    table = table.slice(0, max_documents - seen)
                if max_tokens is not None:
                    totals = tokens + np.cumsum(counter.ids_and_lengths(array_of(table, COLUMN))[1] + 1)
                    table = table.slice(0, int(np.searchsorted(totals, max_tokens)) + 1)
                    tokens = int(totals[len(table) - 1])
                writer.write_table(table)
                seen += len(table)
                bar.update((tokens if max_tokens else seen) - bar.n)
                if seen == max_documents or (max_tokens is not None and tokens >= max_tokens):
                    break
        if not seen:
            raise GPT2ModernError(f"{name}: the stream has no documents; check its name and split")
        unfinished.rename(finished)
    return datasets.Dataset.from_file(str(finished))
