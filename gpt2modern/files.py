"""Files and folders that are either complete or not there, their checksums and names, checks of where one may write."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def is_hub_name(name: str | Path | None) -> bool:
    """Whether `name` reads owner/name, as repositories of the Hub are called, and is not a folder or file here."""
    return bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None and not Path(name).exists()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal; raises OSError where the file cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk (fsync); raises OSError where the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: readers see the old content or all of the new, also after a crash.

    Text is written as UTF-8. Raises OSError for what the disk answers; nothing is left behind then.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as indented JSON, as `write_file` does."""
    write_file(path, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`, which replaces `path` when the block ends without an error."""
    # Machines that share the folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, build_in: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder that becomes `path`, flushed to disk, when the block ends without an error.

    build_in: where the temporary folder is made, on the same file system; default: beside `path`. One that a killed
    process has left is replaced. After an error nothing is left of it.
    """
    temporary = (build_in or path.parent) / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def move_folder(source: Path, target: Path) -> None:
    """Flush a folder with all its files to disk, then rename it to `target` on the same file system."""
    for path in [*source.rglob("*"), source]:
        flush_to_disk(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    flush_to_disk(target.parent)


def apply_umask(folder: Path) -> None:
    """Give a folder and all in it the modes that the user's umask asks for: safetensors makes files that only their
    owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, seconds: float = math.inf) -> Iterator[None]:
    """Hold a folder, or a file that is made if it is missing, against other processes that lock it.

    shared: others may hold it so too. seconds: how long to wait for it before BlockingIOError. A killed process holds
    no lock; on a file system or system without locks nothing is held.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        waited = 0.0
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited >= seconds:
                    raise
                time.sleep(0.1)
                waited += 0.1
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def check_writable_folder(flag: str, path: str | None) -> None:
    """Raise ValueError unless `path` is None, a folder that one may write to, or can become one. Makes nothing."""
    if path is not None:
        _check_writable(f"{flag} {path}", Path(os.path.abspath(path)))


def check_writable_file(flag: str, path: str | None) -> None:
    """Raise ValueError unless `path` is None or a file can be written there. Makes nothing."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path}: is a folder; name a file in it")
    _check_writable(f"{flag} {path}", Path(os.path.abspath(path)).parent)


def _check_writable(given: str, place: Path) -> None:
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not stat.S_ISDIR(place.stat().st_mode):
            raise ValueError(f"{given}: {place} is a file, not a folder; name another place")
    except OSError as error:
        raise ValueError(f"{given}: {error.strerror}; name another place") from None
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {place} is not a folder that you may write to; name another place")
