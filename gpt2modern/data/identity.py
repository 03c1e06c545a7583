"""Describe what decides the bytes of a prepared folder, to tell whether one that is there holds the same data."""

import dataclasses
import hashlib
import platform
from pathlib import Path

import datasets
from xxhash import xxh3_128

from gpt2modern.data.config import ALWAYS, FILES, HUB, PrepareConfig
from gpt2modern.data.manifest import TOKENIZER_FILES
from gpt2modern.data.sources import AnyDataset, expand
from gpt2modern.data.tokenizing import read_template
from gpt2modern.errors import GPT2ModernError


def settings_of(config: PrepareConfig, dataset: AnyDataset | None = None) -> dict:
    """Return the settings and fingerprints that decide the result; where it goes and who makes it do not."""
    kinds = {ALWAYS}
    if config.dataset_name not in (None, "stdlib") or isinstance(dataset, dict):
        kinds.add(HUB)
    if config.dataset_name != "stdlib" or config.validation_file:
        kinds.add(FILES)
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("identity") in kinds]
    settings = {field.name: getattr(config, field.name) for field in fields}
    settings |= {"train_file": _files_of(config.train_file), "validation_file": _files_of(config.validation_file)}
    if config.validation_file is None:
        settings["validation_split_percentage"] = config.validation_split_percentage
    if config.dataset_name == "stdlib":
        settings["python"] = platform.python_version()
    if dataset is not None:
        settings["dataset"] = _described(dataset)
    if config.chat_template:
        settings["chat_template"] = read_template(config.chat_template)
    if config.tokenizer_name:
        # Of a folder what is in it counts, EOS and chat template included, not where it lies.
        folder = Path(config.tokenizer_name)
        settings["tokenizer_name"] = folder.name if folder.is_dir() else config.tokenizer_name
        contents = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        if contents:
            digest = hashlib.sha256(b"".join(name.encode() + path.read_bytes() for name, path in contents.items()))
            settings["tokenizer_sha256"] = digest.hexdigest()
    return {name: value for name, value in settings.items() if value is not None}


def _described(dataset: AnyDataset) -> object:
    """Return the fingerprints of a dataset given from Python; a stream has none, so streams are taken for equal."""
    if isinstance(dataset, dict):
        return {split: _described(each) for split, each in dataset.items()}
    return dataset._fingerprint if isinstance(dataset, datasets.Dataset) else type(dataset).__name__


def _files_of(names: list[str] | None) -> list[dict] | None:
    """Return name, size and fingerprint of each file."""
    if names is None:
        return None
    files = (
        path
        for given in expand(names)
        for path in ([given] if given.is_file() else sorted(p for p in given.rglob("*") if p.is_file()))
    )
    try:
        return [{"name": path.name, "size": path.stat().st_size, "xxh3": _fingerprint(path)} for path in files]
    except OSError as error:
        raise GPT2ModernError(f"{error.filename}: {error.strerror}") from None


def _fingerprint(path: Path) -> str:
    """Hash 64 evenly spaced pieces of 64 KB, and the end, by xxh3: a file up to 4 MB whole, a larger one by sample, so
    that a machine that writes one shard of a hundred need not read all the text. What is inserted or removed moves all
    that follows it and is seen; a few bytes overwritten in place in a large file are not."""
    size, piece = path.stat().st_size, 1 << 16
    digest = xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(piece, size // 64)):
            file.seek(start)
            digest.update(file.read(piece))
        file.seek(max(0, size - piece))
        digest.update(file.read())
    return digest.hexdigest()
