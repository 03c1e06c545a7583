"""Text for measurements out of files that every installation has, as JSON lines and parquet.

Files of UTF-8 (.py, .md, .rst, .txt): those of the folders that were named, of the installed packages and of the
standard library. No two documents are equal; their choice and order follow from a seed and from what is installed.
"""

import contextlib
import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2modern.errors import GPT2ModernError

MEGABYTE = 10**6
SUFFIXES = {".py", ".md", ".rst", ".txt"}
DOCUMENTS_PER_ROW_GROUP = 1000
# Below this, 5% held out by document are few, and prepare_data.py cuts documents instead: another number of tokens.
MIN_DOCUMENTS = 300


@dataclass(frozen=True)
class Corpus:
    """One text on disk in each format; `passes`: how often each of the different documents stands in it on average."""

    name: str
    files: dict[str, list[Path]]
    text_bytes: int
    documents: int
    passes: float


def read_documents(
    folders: Sequence[Path], text_bytes: int, left_out: Sequence[str], most_bytes: int | None, seed: int
) -> tuple[list[str], dict[str, int]]:
    """Different documents of `text_bytes` together, or all there are; and the bytes of each origin.

    `folders` are read first. Documents with one of the strings `left_out` are left out (encoders are asked for
    different ids where a text spells a special token), and those above `most_bytes`.
    """
    documents: list[str] = []
    seen: set[bytes] = set()
    origins: dict[str, int] = {}
    for origin, path in _text_files(folders, seed):
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.blake2b(content, digest_size=16).digest()
        unwanted = not text or any(word in text for word in left_out) or (most_bytes and len(content) > most_bytes)
        if unwanted or digest in seen:
            continue
        seen.add(digest)
        documents.append(text)
        origins[origin] = origins.get(origin, 0) + len(content)
        if sum(origins.values()) >= text_bytes:
            break
    random.Random(seed).shuffle(documents)
    return documents, origins


def _text_files(folders: Sequence[Path], seed: int) -> Iterator[tuple[str, Path]]:
    """(origin, path): those of `folders`, then all others in a seeded order."""
    for folder in folders:
        yield from ((f"--text_dir {folder.name}", path) for path in _files_below(folder))
    paths = {path for name in ("purelib", "platlib", "stdlib") for path in _files_below(Path(sysconfig.get_path(name)))}
    package_folders = {"site-packages", "dist-packages"}  # one may lie below the standard library
    found = [
        ("installed packages" if package_folders.intersection(path.parts) else "standard library", path)
        for path in sorted(paths)
    ]
    random.Random(seed).shuffle(found)
    yield from found


def _files_below(root: Path) -> list[Path]:
    """os.walk asks nothing of a file, and takes half as long as Path.rglob."""
    return sorted(
        Path(folder, name) for folder, _, names in os.walk(root) for name in names if Path(name).suffix in SUFFIXES
    )


def write_corpora(
    wanted: dict[str, tuple[float | None, list[str]]], documents: list[str], folder: Path, num_files: int, seed: int
) -> dict[str, Corpus]:
    """A corpus for each name -> (megabytes, formats); None: every document once; 0: no such corpus.

    Raises GPT2ModernError for one with too few documents to hold some of them out.
    """
    corpora = {}
    for name, (megabytes, formats) in wanted.items():
        if megabytes == 0:
            continue
        texts = iter(documents) if megabytes is None else _first_bytes(documents, megabytes * MEGABYTE, seed)
        files = {
            file_format: [folder / f"{name}-{index:02d}.{file_format}" for index in range(num_files)]
            for file_format in formats
        }
        count, text_bytes = _write(texts, files)
        if count < MIN_DOCUMENTS:
            raise GPT2ModernError(
                f"the {name} text has {count} documents, at least {MIN_DOCUMENTS} are needed; "
                "ask for more megabytes, or name folders of smaller files with --text_dir"
            )
        corpora[name] = Corpus(name, files, text_bytes, count, count / len(documents))
    return corpora


def _first_bytes(documents: list[str], text_bytes: float, seed: int) -> Iterator[str]:
    """Documents in their order up to `text_bytes`; if they do not reach, again, each time in another order."""
    generator, order, written = random.Random(seed), list(range(len(documents))), 0
    while documents:
        for index in order:
            if written >= text_bytes:
                return
            yield documents[index]
            written += len(documents[index].encode())
        generator.shuffle(order)


def _write(texts: Iterator[str], files: dict[str, list[Path]]) -> tuple[int, int]:
    """One document to each file in turn; returns how many there were and their bytes."""
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema({"text": pa.string()})
    count = text_bytes = 0
    with contextlib.ExitStack() as stack:
        json_files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in files.get("jsonl", [])]
        parquet_files = [
            stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema)) for path in files.get("parquet", [])
        ]
        pending: list[list[str]] = [[] for _ in parquet_files]
        num_files = len(next(iter(files.values())))
        for text in texts:
            index = count % num_files
            if json_files:
                json_files[index].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if parquet_files:
                pending[index].append(text)
                if len(pending[index]) == DOCUMENTS_PER_ROW_GROUP:
                    parquet_files[index].write_table(pa.table({"text": pending[index]}, schema))
                    pending[index] = []
            count += 1
            text_bytes += len(text.encode())
        for file, rest in zip(parquet_files, pending, strict=True):
            if rest:
                file.write_table(pa.table({"text": rest}, schema))
    return count, text_bytes
