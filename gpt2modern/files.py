"""Write files and folders so that they are complete or absent, compute checksums, lock, and check output paths."""

import contextlib
import fcntl
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


def is_hub_name(name: str | Path | None) -> bool:
    """Return whether `name` has the form owner/name of a Hub repository and is not a local folder or file."""
    return bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None and not Path(name).exists()


def public_name(name: str | Path) -> str:
    """Return a Hub name as it is, and of a path only its last part: the folders before it tell who the user is."""
    return str(name) if is_hub_name(name) else os.path.basename(os.path.abspath(name))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as a hexadecimal string. Raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file: {"size": ..., "sha256": ...}."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk (fsync). Raises OSError if that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes, build_in: Path | None = None) -> None:
    """Write `content` to `path` so that readers see the complete old or the complete new file, even after a crash.

    A string is encoded as UTF-8. build_in: see `atomic_file`. Raises OSError if the file cannot be written; `path` is
    then unchanged.
    """
    with atomic_file(path, build_in) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Any, build_in: Path | None = None) -> None:
    """Write `values` to `path` as indented JSON, complete or not at all. Raises OSError if it cannot be written."""
    write_file(path, json.dumps(values, indent=2) + "\n", build_in)


@contextlib.contextmanager
def atomic_file(path: Path, build_in: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` when the `with` block ends without an exception. After
    an exception the temporary file is deleted and `path` is unchanged.

    build_in: folder of the temporary file, on the same file system; default: the folder of `path`. A killed process
    leaves the temporary file there.
    """
    # A random name, since machines that share the folder may have processes with the same id.
    temporary = (build_in or path.parent) / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder that is flushed to disk and renamed to `path` when the `with` block ends.

    A temporary folder left by a killed process is deleted first. After an exception the temporary folder is deleted.
    """
    temporary = path.parent / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the hidden `.tmp` files and folders that a killed process has left in a folder, as far as permitted."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def move_folder(source: Path, target: Path) -> None:
    """Flush a folder with all its files to disk, then rename it to `target` on the same file system."""
    for path in [*source.rglob("*"), source]:
        flush_to_disk(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    flush_to_disk(target.parent)


def apply_umask(folder: Path) -> None:
    """Set the permissions of a folder and everything in it to the default of the user's umask, because safetensors
    creates files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, seconds: float = math.inf) -> Iterator[None]:
    """Lock `path` against other processes that call this function, until the `with` block ends (flock).

    path: a folder, or a file that is created if it is missing and may be deleted by the process that has locked it; NFS
    locks only files. shared: several processes may hold a shared lock. Raises BlockingIOError after waiting for
    `seconds`. Locks nothing where locks are unsupported (some file systems).
    """
    waited = 0.0
    while True:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if waited >= seconds:
                    raise
                time.sleep(0.1)
                waited += 0.1
                continue
            except OSError:  # a file system without locks
                pass
            if _is_open_at(descriptor, path):  # otherwise its last user has deleted it meanwhile
                yield
                return
        finally:
            os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file `descriptor` is the file that `path` names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def check_writable_folder(flag: str, path: str | None) -> None:
    """Raise ValueError unless `path` is None, a writable folder, or a folder that can be created. Creates nothing."""
    if path is not None:
        _check_writable(f"{flag} {path}", Path(os.path.abspath(path)))


def check_writable_file(flag: str, path: str | None) -> None:
    """Raise ValueError unless `path` is None or a file that can be written. Creates nothing."""
    if path is None:
        return
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a folder; give the path of a file")
    _check_writable(f"{flag} {path}", Path(os.path.abspath(path)).parent)


def _check_writable(given: str, place: Path) -> None:
    try:
        while not _exists(place):
            place = place.parent
        if not stat.S_ISDIR(place.stat().st_mode):
            raise ValueError(f"{given}: {place} is a file, not a folder; choose another path")
    except OSError as error:
        raise ValueError(f"{given} cannot be used ({error.strerror}); choose another path") from None
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: you have no permission to write to {place}; choose another path")


def _exists(path: Path) -> bool:
    # os.path.lexists would also say no to a name that is too long.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()
        return True
    return False
