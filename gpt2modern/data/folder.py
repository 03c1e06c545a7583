"""The folder that is being prepared: held against other processes, resumed with the same settings only, left clean."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpt2modern.data.manifest import finished_manifest
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import flush_to_disk, locked, write_file, write_json

WORKSPACE = ".preparing"  # in the folder, while it is not finished
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SECONDS_TO_DIE = 5  # that the workers of a killed process take at most


@contextlib.contextmanager
def folder_in_preparation(output_dir: Path, settings: dict, *, shared: bool) -> Iterator[dict | None]:
    """Hold a folder, and give its manifest if it is finished with these settings, None if it is to be written.

    shared: others write shards of it at the same time. Raises GPT2ModernError for a folder of other settings or of
    another process, and for whatever the disk refuses. After a GPT2ModernError what this call began is removed.
    """
    existed, workspace = output_dir.exists(), output_dir / WORKSPACE
    begins = False
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with _only_user_of(output_dir, shared):
            manifest = finished_manifest(output_dir, settings, workspace / "settings.json")
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


@contextlib.contextmanager
def _only_user_of(output_dir: Path, shared: bool) -> Iterator[None]:
    try:
        with locked(output_dir, shared=shared, seconds=SECONDS_TO_DIE):
            yield
    except BlockingIOError:
        raise GPT2ModernError(
            f"--output_dir {output_dir}: another process is preparing it; wait for that one, or end it"
        ) from None


def _remove_what_was_begun(output_dir: Path, shared: bool) -> None:
    if not shared:
        for name in ("train", "validation", "tokenizer", WORKSPACE):
            shutil.rmtree(output_dir / name, ignore_errors=True)
    elif not (output_dir / "tokenizer").exists():  # nothing is written: a corrected call may have other settings
        (output_dir / WORKSPACE / "settings.json").unlink(missing_ok=True)
