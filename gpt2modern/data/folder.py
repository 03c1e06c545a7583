"""Manage the output folder during preparation: lock it, resume it with equal settings only, clean it after errors."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
from xxhash import xxh3_64, xxh3_128

from gpt2modern.data.config import ALWAYS, FILES, HUB, PrepareConfig
from gpt2modern.data.formats.reading import stats_of
from gpt2modern.data.manifest import TOKENIZER_FILES, find_problems, read_manifest
from gpt2modern.data.sources import AnyDataset, expand
from gpt2modern.data.tokenizing import read_template
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import locked, public_name, write_file, write_json

WORKSPACE = ".preparing"  # folder in the output folder, until that is finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PART_BYTES, READ_BYTES = 64 << 20, 1 << 20  # of a file: hashed in one thread, read at once
SECONDS_TO_DIE = 5  # most seconds that the workers of a killed process take to end


def settings_of(config: PrepareConfig, dataset: AnyDataset | None = None) -> dict:
    """Return the settings and fingerprints that decide the output bytes; --output_dir and --num_proc do not."""
    kinds = {ALWAYS}
    if config.dataset_name not in (None, "stdlib") or isinstance(dataset, dict):
        kinds.add(HUB)
    if config.dataset_name != "stdlib" or config.validation_file:
        kinds.add(FILES)
    fields = [field for field in dataclasses.fields(config) if field.metadata.get("identity") in kinds]
    settings = {field.name: getattr(config, field.name) for field in fields}
    if HUB in kinds and config.dataset_name and Path(config.dataset_name).exists():  # manifests get published
        digest = hashlib.sha256(os.path.abspath(config.dataset_name).encode()).hexdigest()
        settings["dataset_name"] = f"{public_name(config.dataset_name)} (sha256 of its path: {digest[:16]})"
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
        # A folder is identified by its content, which includes EOS and chat template, not by its place.
        folder = Path(config.tokenizer_name)
        settings["tokenizer_name"] = folder.name if folder.is_dir() else config.tokenizer_name
        contents = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
        if contents:
            digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in contents))
            settings["tokenizer_sha256"] = digest.hexdigest()
    return {name: value for name, value in settings.items() if value is not None}


@contextlib.contextmanager
def folder_in_preparation(output_dir: Path, settings: dict, *, shared: bool) -> Iterator[dict | None]:
    """Lock `output_dir` for a `with` block; yield its manifest if it is finished, or None if it must be written.

    shared: other machines write shards of it at the same time. Raises GPT2ModernError if the folder has other
    settings, another process prepares it, or it cannot be written. If the block raises GPT2ModernError, the files of
    a preparation that this call started are removed.
    """
    existed, workspace = output_dir.exists(), output_dir / WORKSPACE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with locked(output_dir, shared=shared, seconds=SECONDS_TO_DIE):
            manifest = _finished_manifest(output_dir, settings)
            starts = manifest is None and not (workspace / "settings.json").exists()
            try:
                if manifest is None:
                    workspace.mkdir(exist_ok=True)
                    write_json(workspace / "settings.json", settings)
                else:
                    shutil.rmtree(workspace, ignore_errors=True)  # of a run killed while it cleaned up
                yield manifest
            except GPT2ModernError:
                if starts and not (output_dir / "manifest.json").exists():
                    _remove_what_was_begun(output_dir, shared)
                raise
    except BlockingIOError:
        raise GPT2ModernError(
            f"--output_dir {output_dir} is being prepared by another process; wait until that one ends, or stop it"
        ) from None
    except GPT2ModernError:
        if not existed and not os.listdir(output_dir):
            output_dir.rmdir()
        raise
    except OSError as error:
        advice = "free disk space and run" if error.errno in FULL else "run"
        cause = os.strerror(error.errno) if error.errno else error
        raise GPT2ModernError(
            f"--output_dir {output_dir}: {cause}; finished shards are kept: {advice} the same command again to resume"
        ) from error


def write_dataset_files(output_dir: Path, schema: pa.Schema, splits: dict[str, list[dict]]) -> None:
    """Write the JSON files with which `datasets.load_from_disk` opens the folder or one of its splits.

    schema: of the Arrow files. splits: for each split, the receipts of its shards.
    """
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
    for split, receipts in splits.items():
        info.write_to_directory(output_dir / split)
        state = dict.fromkeys(("_format_columns", "_format_type")) | {
            "_format_kwargs": {},
            "_output_all_columns": False,
        }
        state["_data_files"] = [{"filename": Path(receipt["shard"]["path"]).name} for receipt in receipts]
        checksums = "".join(receipt["file"]["sha256"] for receipt in receipts)
        state["_fingerprint"] = xxh3_64(checksums.encode()).hexdigest()
        write_json(output_dir / split / "state.json", state | {"_split": split}, output_dir / WORKSPACE)
    write_json(output_dir / "dataset_dict.json", {"splits": list(splits)}, output_dir / WORKSPACE)


def finish(output_dir: Path, manifest: dict, report: str, card: str) -> None:
    """Write the report, the dataset card and then the manifest, which marks the folder as finished; then remove the
    workspace."""
    # Built in the workspace, so that a killed process leaves no temporary file in the folder.
    write_file(output_dir / "report.html", report, output_dir / WORKSPACE)
    write_file(output_dir / "README.md", card, output_dir / WORKSPACE)
    write_json(output_dir / "manifest.json", manifest, output_dir / WORKSPACE)
    shutil.rmtree(output_dir / WORKSPACE)


def _finished_manifest(output_dir: Path, settings: dict) -> dict | None:
    """Return the manifest of a folder finished with these settings, or None if the folder is empty or unfinished.
    Raises GPT2ModernError if it has other settings, is damaged, or was not written by prepare_data.py."""
    manifest, started = None, output_dir / WORKSPACE / "settings.json"
    again = f"remove {output_dir} and run the same command"
    if (output_dir / "manifest.json").is_file():
        try:
            manifest = read_manifest(output_dir)
        except GPT2ModernError as error:
            raise GPT2ModernError(f"{error}: {again}") from None
        found = manifest.get("settings", {})
    elif started.is_file():
        try:
            found = dict(json.loads(started.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise GPT2ModernError(f"{started} is damaged ({error}); {again}") from None
    elif set(os.listdir(output_dir)) <= {WORKSPACE}:
        return None
    else:
        raise GPT2ModernError(f"--output_dir {output_dir} exists and is not a prepared dataset; choose another folder")
    if names := [name for name in {**settings, **found} if settings.get(name) != found.get(name)]:
        differences = ", ".join(f"{name} was {found.get(name)}, now {settings.get(name)}" for name in names)
        raise GPT2ModernError(
            f"--output_dir {output_dir} was prepared with other settings or files ({differences}); choose another "
            "folder, or remove this one"
        )
    if manifest is not None and (problems := find_problems(output_dir)):
        raise GPT2ModernError(f"{problems[0]}: {again}")
    return manifest


def _remove_what_was_begun(output_dir: Path, shared: bool) -> None:
    if not shared:
        for name in ("train", "validation", "tokenizer", WORKSPACE):
            shutil.rmtree(output_dir / name, ignore_errors=True)
    elif not (output_dir / "tokenizer").exists():  # nothing is written: a corrected call may have other settings
        (output_dir / WORKSPACE / "settings.json").unlink(missing_ok=True)


def _described(dataset: AnyDataset) -> object:
    """Return the fingerprints of a dataset given from Python, or the class name of a stream, which has none."""
    if isinstance(dataset, dict):
        return {split: _described(each) for split, each in dataset.items()}
    return dataset._fingerprint if isinstance(dataset, datasets.Dataset) else type(dataset).__name__


def _described_files(names: list[str] | None) -> list[dict] | None:
    """Return name, size and xxh3 hash of all bytes of each file that `names` match, or None without names.

    Parts are hashed in threads, which takes 0.14 s of CPU time per GB, 1 % of a preparation.
    """
    if names is None:
        return None
    sizes = {file: size for path in expand(names) for file, (size, _) in stats_of(path).items()}
    parts = [(path, start) for path, size in sizes.items() for start in range(0, size, PART_BYTES)]
    digests = {path: xxh3_128() for path in sizes}
    try:
        with ThreadPoolExecutor() as pool:
            for (path, _), digest in zip(parts, pool.map(_hash_part, parts), strict=True):
                digests[path].update(digest)
    except OSError as error:
        raise GPT2ModernError(f"{error.filename} cannot be read ({error.strerror}); check its permissions") from None
    return [{"name": path.name, "size": size, "xxh3": digests[path].hexdigest()} for path, size in sizes.items()]


def _hash_part(part: tuple[Path, int]) -> bytes:
    """Return the xxh3 hash of PART_BYTES bytes of a file. part: its path, and the first byte."""
    path, start = part
    digest = xxh3_128()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(0, PART_BYTES, READ_BYTES):
            digest.update(file.read(READ_BYTES))
    return digest.digest()
