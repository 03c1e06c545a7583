"""What a prepared folder was made with, and whether a folder that is there may be taken for, or gone on with."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from gpt2modern.errors import GPT2ModernError
from gpt2modern.data.manifest import TOKENIZER_FILES

WORKSPACE = ".preparing"  # in the folder, while it is not finished


def settings_of(config: Any) -> dict:
    """What decides the bytes of the result: not where it goes, nor how many processes or which engine make it."""
    settings = {
        name: getattr(config, name)
        for name in (
            "block_size", "packing", "shuffle_seed", "num_shards", "max_documents", "max_tokens", "dataset_name",
            "train_tokenizer", "encoding_errors",
        )
    }  # fmt: skip
    settings |= {
        "train_file": _described(config.train_file),
        "validation_file": _described(config.validation_file),
        "validation_split_percentage": None if config.validation_file else config.validation_split_percentage,
    }
    if config.dataset_name == "stdlib":
        settings["python"] = platform.python_version()
    elif config.dataset_name:
        names = ("dataset_config_name", "dataset_split", "dataset_revision", "streaming")
        settings |= {name: getattr(config, name) for name in names}
    if config.dataset_name != "stdlib" or config.validation_file:
        names = ("text_column", "chat_column", "sample_by", "separator", "file_format")
        settings |= {name: getattr(config, name) for name in names}
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


def finished_manifest(output_dir: Path, settings: dict) -> dict | None:
    """The manifest that is there if it was made with the same settings, None if the folder is empty, missing or
    unfinished; else GPT2ModernError."""
    from gpt2modern.data.manifest import FORMAT_VERSION, find_problems

    manifest_path, begun_path = output_dir / "manifest.json", output_dir / WORKSPACE / "settings.json"
    if not manifest_path.is_file() and not begun_path.is_file():
        if output_dir.exists() and not (output_dir.is_dir() and set(os.listdir(output_dir)) <= {WORKSPACE}):
            raise GPT2ModernError(f"--output_dir {output_dir}: exists and is not a prepared dataset; choose another folder")
        return None
    path = manifest_path if manifest_path.is_file() else begun_path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"] if path == manifest_path else FORMAT_VERSION
        found = content["settings"] if path == manifest_path else content
        names = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
    except (ValueError, KeyError, TypeError):
        raise GPT2ModernError(f"{path}: not a record of a prepared dataset; choose another --output_dir") from None
    if version != FORMAT_VERSION:
        raise GPT2ModernError(
            f"{path}: format_version {version}, this code writes {FORMAT_VERSION}; remove {output_dir} and prepare the "
            "data again"
        )
    if names:
        differences = ", ".join(f"{name} is {found.get(name)} there, {settings.get(name)} here" for name in names)
        raise GPT2ModernError(
            f"--output_dir {output_dir}: holds other data ({differences}); choose another folder or remove it"
        )
    if path == begun_path:
        return None
    if problems := find_problems(output_dir):
        raise GPT2ModernError(f"{problems[0]}; remove {output_dir} and run the same command again")
    return content


def _described(names: list[str] | None) -> list[dict] | None:
    """Name, size and fingerprint of each file."""
    if names is None:
        return None
    from gpt2modern.data.sources import expand

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
    """xxh3 of 64 evenly spaced pieces of 64 KB, and of the end: all of a file up to 4 MB, a sample of a larger one, so
    that a machine that writes one shard of a hundred need not read all the text. What is inserted or removed moves all
    that follows it and is seen; a few bytes overwritten in place in a large file are not."""
    from xxhash import xxh3_128

    size, piece = path.stat().st_size, 1 << 16
    digest = xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(piece, size // 64)):
            file.seek(start)
            digest.update(file.read(piece))
        file.seek(max(0, size - piece))
        digest.update(file.read())
    return digest.hexdigest()


def read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GPT2ModernError(f"--chat_template {path}: cannot be read ({error})") from None
