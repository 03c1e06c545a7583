"""Publishing a run's model on the Hub in the background. Nothing that fails there stops training.

What is uploaded is the model folder, its card, its curves and its records; never optimizer or trainer state.
"""

import os
import shlex
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from gpt2modern.errors import warn

WAIT_S = 600.0  # how long the end of a run waits for its last upload


class HubUploader:
    """Uploads of one run, one at a time, each in a thread; on the main process.

    The token is the one that `hf auth login` or HF_TOKEN has set; it is neither written nor shown.
    """

    def __init__(self, hub_model_id: str, *, private: bool | None, revision: str | None):
        """Make the repository, in the background too: what will not work is known at the start of a run."""
        self.repo_id = hub_model_id  # with its owner as soon as the Hub has told
        self.private = private
        self.revision = revision
        self.url: str | None = None  # of the newest upload that worked
        self.problem: str | None = None  # of the newest one, if it did not
        self.warns = True
        disable_progress_bars()
        # HfApi's own pool has threads that are waited for at exit: an upload that hangs would keep the process.
        self._thread = self._start(None, None, "")

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def upload(self, folder: Path, *, commit_message: str, path_in_repo: str | None = None) -> None:
        """Start to upload `folder`, which is removed in the end; not to be called while `is_busy`."""
        assert not self.is_busy
        self._thread = self._start(folder, path_in_repo, commit_message)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)

    def command_by_hand(self, folder: Path) -> str:
        """What a user types to upload the finished run in `folder`."""
        options = ["--revision", self.revision] if self.revision else []
        options += {True: ["--private"], False: ["--no-private"], None: []}[self.private]
        excluded = ["--exclude", "checkpoints/*", "--exclude", "tensorboard/*"]
        return shlex.join(["hf", "upload", self.repo_id, str(folder), ".", *excluded, *options])

    def _start(self, folder: Path | None, path_in_repo: str | None, commit_message: str) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(folder, path_in_repo, commit_message), daemon=True)
        thread.start()
        return thread

    def _work(self, folder: Path | None, path_in_repo: str | None, commit_message: str) -> None:
        try:
            api = HfApi()
            self.repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision:
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            if folder is not None:
                commit = api.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    path_in_repo=path_in_repo,
                    revision=self.revision,
                    commit_message=commit_message,
                )
                self.url = str(commit.repo_url)
            self.problem = None
        except Exception as error:
            problem = without_token(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            if self.warns and problem != self.problem:  # the same one again says nothing new
                warn(f"--push_to_hub {self.repo_id}: {problem}; training goes on, the next save tries again")
            self.problem = problem
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "hf_...") if token else text


def stage_files(files: Iterable[Path], folder: Path) -> None:
    """Make `folder` hold `files` as they are now: training goes on writing its records and deletes old checkpoints.

    Weights are linked where the file system can: they are replaced and removed, never written into.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in files:
        if path.suffix == ".safetensors":
            try:
                os.link(path, folder / path.name)
                continue
            except OSError:
                pass
        shutil.copy2(path, folder / path.name)


def upload_last(uploader: HubUploader, folder: Path, *, commit_message: str, files: Iterable[Path]) -> str:
    """Upload a finished run and wait for it, `WAIT_S` at most; say where it is, or what failed and the way out.

    files: what is uploaded; folder: where the run lies.
    """
    deadline = time.monotonic() + WAIT_S
    uploader.wait(WAIT_S)
    uploader.warns = False  # what it returns says it
    if not uploader.is_busy:
        staged = folder / ".hub_upload"
        try:
            stage_files(files, staged)
        except OSError as error:
            uploader.problem = f"{staged}: {error.strerror}"
        else:
            uploader.upload(staged, commit_message=commit_message)
            uploader.wait(max(0.0, deadline - time.monotonic()))
    if uploader.is_busy:
        uploader.problem = f"not done after {WAIT_S:.0f} s"
    if uploader.problem is None:
        return f"uploaded to {uploader.url}"
    return f"not on the Hub ({uploader.problem}); by hand: {uploader.command_by_hand(folder)}"
