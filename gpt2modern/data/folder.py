"""The folder that is being prepared: what decides its bytes, and its resumption with the same settings only.

It is held against other processes and left clean.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
from xxhash import xxh3_128

from gpt2modern.data.config import ALWAYS, FILES, HUB, PrepareConfig
from gpt2modern.data.manifest import TOKENIZER_FILES, find_problems, read_manifest
from gpt2modern.data.sources import AnyDataset, expand
from gpt2modern.data.tokenizing import read_template
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import flush_to_disk, locked, write_file, write_json

WORKSPACE = ".preparing"  # in the folder, while it is not finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SECONDS_TO_DIE = 5  # that the workers of a killed process take at most


def settings_of(config: PrepareConfig, dataset: AnyDataset | None = None) -> dict:
    """Return the settings and fingerprints that decide the result; where it goes and who makes it do not."""
    kinds = {ALWAYS}
    if config.dataset_name not in (None, "stdlib") or isinstance(dataset, dict):
        kinds.add(HUB)
    if config.dataset_name != "stdlib" or config.validation_file:
        kinds.add(FILES)
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("identity") in kinds]
    settings = {field.name: getattr(config, field.name) for field in fields}
    settings |= {"train_file": _described_files(config.train_file)}
    settings |= {"validation_file": _described_files(config.validation_file)}
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
        contents = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
        if contents:
            digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in contents))
            settings["tokenizer_sha256"] = digest.hexdigest()
    return {name: value for name, value in settings.items() if value is not None}


@contextlib.contextmanager
def folder_in_preparation(output_dir: Path, settings: dict, *, shared: bool) -> Iterator[dict | None]:
    """Hold a folder, and give its manifest if it is finished with these settings, None if it is to be written.

    shared: others write shards of it at the same time. Raises GPT2ModernError for a folder of other settings or of
    another process, and for whatever the disk refuses. After a GPT2ModernError what this call began is removed.
    """
    existed, workspace = output_dir.exists(), output_dir / WORKSPACE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with locked(output_dir, shared=shared, seconds=SECONDS_TO_DIE):
            manifest = _finished_manifest(output_dir, settings)
            begins = manifest is None and not (workspace / "settings.json").exists()
            try:
                if manifest is None:
                    workspace.mkdir(exist_ok=True)
                    write_json(workspace / "settings.json", settings)
                else:
                    shutil.rmtree(workspace, ignore_errors=True)  # of a run killed while it tidied up
                yield manifest
            except GPT2ModernError:
                if begins and not (output_dir / "manifest.json").exists():
                    _remove_what_was_begun(output_dir, shared)
                raise
    except BlockingIOError:
        raise GPT2ModernError(
            f"--output_dir {output_dir}: another process is preparing it; wait for that one, or end it"
        ) from None
    except GPT2ModernError:
        if not existed and not os.listdir(output_dir):
            output_dir.rmdir()
        raise
    except OSError as error:
        way_out = "make room and run" if error.errno in FULL else "run"
        cause = os.strerror(error.errno) if error.errno else error
        raise GPT2ModernError(
            f"--output_dir {output_dir}: {cause}; what is finished is kept: {way_out} the same command again"
        ) from error


def finish(output_dir: Path, manifest: dict, report: str) -> None:
    """Write the report, then the manifest, which says that all is there; then remove the workspace."""
    write_file(output_dir / "report.html", report)
    # Made in the workspace: a process that is killed leaves nothing of it in the folder.
    write_json(output_dir / WORKSPACE / "manifest.json", manifest)
    (output_dir / WORKSPACE / "manifest.json").rename(output_dir / "manifest.json")
    flush_to_disk(output_dir)
    shutil.rmtree(output_dir / WORKSPACE)


def _finished_manifest(output_dir: Path, settings: dict) -> dict | None:
    """Return the manifest that is there if it was made with the same settings, None if the folder is empty or
    unfinished; else raise GPT2ModernError."""
    manifest, begun, again = None, output_dir / WORKSPACE / "settings.json", f"remove {output_dir} and run it again"
    if (output_dir / "manifest.json").is_file():
        try:
            manifest = read_manifest(output_dir)
        except GPT2ModernError as error:
            raise GPT2ModernError(f"{error}; {again}") from None
        found = manifest.get("settings", {})
    elif begun.is_file():
        found = json.loads(begun.read_text(encoding="utf-8"))
    elif set(os.listdir(output_dir)) <= {WORKSPACE}:
        return None
    else:
        raise GPT2ModernError(f"--output_dir {output_dir}: exists and is not a prepared dataset; choose another folder")
    if names := [name for name in {**settings, **found} if settings.get(name) != found.get(name)]:
        differences = ", ".join(f"{name} is {found.get(name)} there, {settings.get(name)} here" for name in names)
        raise GPT2ModernError(
            f"--output_dir {output_dir}: holds other data ({differences}); choose another folder or remove it"
        )
    if manifest is not None and (problems := find_problems(output_dir)):
        raise GPT2ModernError(f"{problems[0]}; {again}")
    return manifest


def _remove_what_was_begun(output_dir: Path, shared: bool) -> None:
    if not shared:
        for name in ("train", "validation", "tokenizer", WORKSPACE):
            shutil.rmtree(output_dir / name, ignore_errors=True)
    elif not (output_dir / "tokenizer").exists():  # nothing is written: a corrected call may have other settings
        (output_dir / WORKSPACE / "settings.json").unlink(missing_ok=True)


def _described(dataset: AnyDataset) -> object:
    """Return the fingerprints of a dataset given from Python; a stream has none, so streams are taken for equal."""
    if isinstance(dataset, dict):
        return {split: _described(each) for split, each in dataset.items()}
    return dataset._fingerprint if isinstance(dataset, datasets.Dataset) else type(dataset).__name__


def _described_files(names: list[str] | None) -> list[dict] | None:
    """Return name, size and fingerprint of each file."""
    if names is None:
        return None
    given = [path for path in expand(names) for path in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    try:
        return [
            {"name": path.name, "size": path.stat().st_size, "xxh3": _fingerprint(path)}
            for path in given
            if path.is_file()
        ]
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
