"""Upload the model of a run to the Hub in the background. A failed upload is a warning and does not stop training.

The model folder, card, curves and records are uploaded; the state to resume from only by --hub_strategy checkpoint.
"""

import contextlib
import os
import shlex
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import write_file, write_json
from gpt2modern.hub import hub_problem, retried
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.card import EVALUATION_FILE, model_card, public_settings, summarize
from gpt2modern.training.checkpoints import HUB_FOLDER, TRAINING_STATE_FILES
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.export import STOCK_FOLDER, export_model, export_stock
from gpt2modern.training.models import ADAPTER_FOLDER, has_adapters
from gpt2modern.training.records import CURVES_FILE, SETTINGS_FILE, Records, settings_text, show_evaluation
from gpt2modern.training.state import TrainState
from modeling_gpt2modern import GPT2ModernForCausalLM

WAIT_S = 600.0  # how long a finished run waits at most for its last upload
# Files that are uploaded in addition to the model and its card, if the run has them.
RECORDS = ("summary.json", "metrics.jsonl", "samples.jsonl", EVALUATION_FILE, CURVES_FILE)


@dataclass
class Publisher:
    """Export the model of a run with its card, and upload it from the main process. Without --push_to_hub, and on other
    processes, the upload methods do nothing."""

    config: TrainConfig
    records: Records
    model: GPT2ModernForCausalLM
    plan: BatchPlan
    eval_blocks: PackedBlocks

    def __post_init__(self):
        self.output_dir = Path(self.config.output_dir)
        self.model_files: list[str] = []  # names in output_dir, of the exported model
        self.uploader = None
        if self.config.push_to_hub and self.records.is_main:
            self.uploader = HubUploader(self.config, self.output_dir)

    def summary(self, state: TrainState) -> dict[str, Any]:
        """Return the contents of summary.json for a run that has reached `state`."""
        rows = self.records.metrics.rows
        return summarize(self.config, state, rows, model=self.model, plan=self.plan, eval_blocks=self.eval_blocks)

    def card(self, summary: dict[str, Any]) -> str:
        """Return the Markdown text of the model card. summary: the contents of summary.json."""
        return model_card(
            self.config,
            summary,
            name=self.uploader.repo_id if self.uploader else self.output_dir.resolve().name,
            base_model=self.model.config.name_or_path or None,
            samples=self.records.samples.rows,
            manifest=self.eval_blocks.manifest,
            num_eval_blocks=len(self.eval_blocks),
        )

    def upload_checkpoint(self, state: TrainState, checkpoint: Path, *, waits: bool = False) -> None:
        """Start to upload the model folder of a checkpoint, under --hub_strategy checkpoint with the state to resume
        from. waits: first for the upload that is running, then for this one, each at most `WAIT_S` seconds.

        Does nothing without --push_to_hub, under --hub_strategy end, if another upload is running, and at the last
        step, where the finished model is uploaded instead.
        """
        strategy = self.config.hub_strategy
        if self.uploader is None or strategy == "end" or state.step == self.config.max_steps:
            return
        if waits:
            print(f"uploading the checkpoint of step {state.step} to {self.uploader.repo_id}", flush=True)
            self.uploader.thread.join(WAIT_S)
        if self.uploader.is_busy or not checkpoint.is_dir():
            return
        self.records.draw_curves()
        left_out = set() if strategy == "checkpoint" else TRAINING_STATE_FILES
        paths = (path for path in checkpoint.rglob("*") if path.name not in left_out)
        self.uploader.upload(
            {path.relative_to(checkpoint).as_posix(): path for path in paths}
            | {name: self.output_dir / name for name in RECORDS if name != "summary.json"},
            self.texts(self.summary(state)),
            message=f"Checkpoint of step {state.step}",
            path_in_repo=HUB_FOLDER if strategy == "checkpoint" else None,
        )
        if waits:
            self.uploader.thread.join(WAIT_S)

    def texts(self, summary: dict[str, Any]) -> dict[str, str]:
        """Return the text files, by name, that are made for the Hub: the card, and the settings without local paths."""
        settings = settings_text(public_settings(self.config), self.plan.num_processes)
        return {"README.md": self.card(summary), SETTINGS_FILE: settings}

    def export(self, summary: dict[str, Any], model: GPT2ModernForCausalLM, blocks: PackedBlocks) -> None:
        """Write the finished model with its code, tokenizer, card and summary to --output_dir, and print where it is.

        model: unsharded, with its LoRA adapters if it has any. Raises GPT2ModernError if a file cannot be written.
        """
        try:
            self.model_files = export_model(model, self.output_dir, blocks)
            summary["stock_class"], stock_files = export_stock(self.config, model.config)
            self.model_files += stock_files
            self.records.draw_curves()
            write_file(self.output_dir / "README.md", self.card(summary))
            write_json(self.output_dir / "summary.json", summary)
            show_evaluation(self.output_dir)
        except (OSError, SafetensorError) as error:
            raise GPT2ModernError(
                f"the finished model cannot be written to {self.output_dir}: {error}; its checkpoints are unchanged; "
                "fix the cause and run the same command again to export it"
            ) from None
        where = f"model in {self.output_dir}"
        if has_adapters(model):
            where = f"merged {where}, separate LoRA adapters in {self.output_dir / ADAPTER_FOLDER}"
        if summary["stock_class"]:
            where += f", the same as a {summary['stock_class']} in {self.output_dir / STOCK_FOLDER}"
        print(f"training finished: validation loss {summary['eval_loss']:.4f} nats/token, {where}")

    def upload_final(self, summary: dict[str, Any]) -> None:
        """Upload the exported model, wait at most `WAIT_S` seconds, and print its URL or how to upload it by hand.
        Does nothing without --push_to_hub."""
        if self.uploader is not None:
            files = {name: self.output_dir / name for name in (*self.model_files, *RECORDS)}
            texts = self.texts(summary) | {"README.md": (self.output_dir / "README.md").read_text(encoding="utf-8")}
            print(self.uploader.finish(files, texts, message=f"Model after {summary['steps']} steps"))


class HubUploader:
    """Upload folders of one run to its Hub repository in a background thread, one upload at a time.

    It uses the token set by `hf auth login` or HF_TOKEN, which is never printed or saved.
    """

    def __init__(self, config: TrainConfig, output_dir: Path):
        """Start to create the repository in the background, so that a wrong name or token is reported early."""
        self.folder = output_dir / ".hub_upload.tmp"
        self.repo_id = config.hub_model_id or output_dir.resolve().name  # with its owner once the Hub has answered
        self.private = config.hub_private_repo
        self.revision = config.hub_revision
        self.url: str | None = None  # of the last successful upload
        self.problem: str | None = None  # the error of the last upload, None if it succeeded
        self.warns = True
        disable_progress_bars()
        # Python waits at exit for the threads of HfApi's own pool: an upload that hangs would keep the process alive.
        self.thread = self._start(None, None, "")

    @property
    def is_busy(self) -> bool:
        return self.thread.is_alive()

    def upload(self, files: dict[str, Path], texts: dict[str, str], *, message: str, path_in_repo: str | None = None):
        """Copy `files` and `texts`, by their names in the repository, to a folder and start to upload it in the
        background. Must not be called while `is_busy`. Warns, and uploads nothing, if the folder cannot be written."""
        assert not self.is_busy
        if self._stage(files, texts):
            self.thread = self._start(self.folder, path_in_repo, message)

    def finish(self, files: dict[str, Path], texts: dict[str, str], *, message: str) -> str:
        """Upload the finished run and wait at most `WAIT_S` seconds in total. Returns a message with the URL or, if the
        upload failed, with the cause and the command that uploads it by hand from the folder that is then kept."""
        deadline = time.monotonic() + WAIT_S
        self.thread.join(WAIT_S)
        self.warns = False  # the returned message reports a failure
        self.folder = self.folder.with_name(".hub_upload_final")  # the other one may still be in use
        if self._stage(files, texts) and not self.is_busy:
            self.thread = self._start(self.folder, None, message)
            self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.is_busy:
            self.problem = f"the upload was not finished after {WAIT_S:.0f} s"
        if self.problem is None:
            return f"model uploaded to {self.url}"
        return f"the model was not uploaded to the Hub ({self.problem}); upload it with: {self._command_by_hand()}"

    def _stage(self, files: dict[str, Path], texts: dict[str, str]) -> bool:
        try:
            stage_files(files, texts, self.folder)
        except OSError as error:
            self._report(f"{self.folder} cannot be written ({error.strerror})")
            return False
        return True

    def _command_by_hand(self) -> str:
        options = ["--revision", self.revision] if self.revision else []
        options += {True: ["--private"], False: ["--no-private"], None: []}[self.private]
        return shlex.join(["hf", "upload", self.repo_id, str(self.folder), ".", *options])

    def _start(self, folder: Path | None, path_in_repo: str | None, message: str) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(folder, path_in_repo, message), daemon=True)
        thread.start()
        return thread

    def _work(self, folder: Path | None, path_in_repo: str | None, message: str) -> None:
        try:
            api = HfApi()
            self.repo_id = retried(api.create_repo, self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision:
                retried(api.create_branch, self.repo_id, branch=self.revision, exist_ok=True)
            if folder is not None:
                place = {"repo_id": self.repo_id, "revision": self.revision, "path_in_repo": path_in_repo}
                earlier = [f"{STOCK_FOLDER}/*", f"{ADAPTER_FOLDER}/*"]  # of earlier weights
                message = {"commit_message": message, "delete_patterns": earlier}
                commit = retried(api.upload_folder, **place, folder_path=folder, **message)
                self.url = str(commit.repo_url)
            self.problem = None
        except Exception as error:
            self._report(hub_problem(error))
        finally:
            if folder is not None and (self.problem is None or self.warns):
                shutil.rmtree(folder, ignore_errors=True)

    def _report(self, problem: str) -> None:
        if self.warns and problem != self.problem:  # a repeated problem is reported once
            warn(f"--push_to_hub {self.repo_id}: {problem}; training continues, and the next upload retries")
        self.problem = problem


def stage_files(files: dict[str, Path], texts: dict[str, str], folder: Path) -> None:
    """Replace `folder` by a new one with copies of those `files` that exist, by their name in it, because training may
    later change or delete them; write `texts` too, which replace files.

    Weight files (.safetensors) are hard-linked where the file system allows it: training never changes their content.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, path in files.items():
        if not path.is_file():
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            with contextlib.suppress(OSError):
                os.link(path, folder / name)
                continue
        shutil.copy2(path, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
