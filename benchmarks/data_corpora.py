"""Text for measurements out of files that every installation has, as JSON lines and parquet.

Files of UTF-8 (.py, .md, .rst, .txt): those of the folders that were named, then those of the installed packages and of
the standard library. No two documents are equal; choice and order follow from a seed and from what is installed.
"""

import json
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2modern.errors import GPT2ModernError

MEGABYTE = 10**6
SUFFIXES = {".py", ".md", ".rst", ".txt"}
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
    folders: Sequence[Path], text_bytes: int, left_out: Sequence[str], seed: int
) -> tuple[list[str], dict[str, int]]:
    """Read different documents of `text_bytes` together, or all there are; return them and the bytes of each origin.

    `folders` are read first. Documents with one of the strings `left_out` are left out: encoders are asked for
    different ids where a text spells a special token.
    """
    documents: dict[str, None] = {}
    origins: dict[str, int] = {}
    for origin, path in text_files(folders, seed):
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text and text not in documents and not any(word in text for word in left_out):
            documents[text] = None
            origins[origin] = origins.get(origin, 0) + len(text.encode())
            if sum(origins.values()) >= text_bytes:
                break
    return random.Random(seed).sample(list(documents), len(documents)), origins


def text_files(folders: Sequence[Path], seed: int) -> Iterator[tuple[str, Path]]:
    """Yield (origin, path): those of `folders`, then all others in a seeded order."""
    for folder in folders:
        yield from ((f"--text_dir {folder.name}", path) for path in files_below(folder))
    paths = {path for name in ("purelib", "platlib", "stdlib") for path in files_below(Path(sysconfig.get_path(name)))}
    for path in random.Random(seed).sample(sorted(paths), len(paths)):
        is_package = {"site-packages", "dist-packages"} & set(path.parts)  # may lie below the standard library
        yield "installed packages" if is_package else "standard library", path


def files_below(root: Path) -> list[Path]:
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in files if path.suffix in SUFFIXES)


def write_corpus(
    name: str, megabytes: float | None, documents: list[str], formats: Sequence[str], folder: Path, num_files: int
) -> Corpus:
    """Write `megabytes` of the documents, again and again in other orders if they do not reach; None: each one once.

    Raises GPT2ModernError for too few documents to hold some of them out.
    """
    sizes = [len(text.encode()) for text in documents]
    limit = sum(sizes) if megabytes is None else megabytes * MEGABYTE
    generator, order, chosen, text_bytes = random.Random(0), list(range(len(documents))), [], 0
    while documents and text_bytes < limit:
        for index in order:
            if text_bytes < limit:
                chosen.append(index)
                text_bytes += sizes[index]
        generator.shuffle(order)
    if len(chosen) < MIN_DOCUMENTS:
        raise GPT2ModernError(
            f"the {name} text has {len(chosen)} documents, at least {MIN_DOCUMENTS} are needed; "
            "ask for more megabytes, or name folders of smaller files with --text_dir"
        )
    files = {each: [folder / f"{name}-{index:02d}.{each}" for index in range(num_files)] for each in formats}
    for paths in files.values():
        for first, path in enumerate(paths):
            texts = [documents[index] for index in chosen[first::num_files]]
            if path.suffix == ".parquet":
                pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
            else:
                lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
                path.write_text("".join(lines), encoding="utf-8")
    return Corpus(name, files, text_bytes, len(chosen), len(chosen) / len(documents))
