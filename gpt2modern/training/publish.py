"""Upload a run's model to the Hub in the background. Nothing that fails there stops training.

What is uploaded is the model folder, its card, its curves and its records; never optimizer or trainer state.
"""

import os
import shlex
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import write_file, write_json
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.card import model_card, summarize
from gpt2modern.training.checkpoints import TRAINING_STATE_FILES
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.export import export_model
from gpt2modern.training.models import ADAPTER_FOLDER, has_adapters
from gpt2modern.training.records import CURVES_FILE, SETTINGS_FILE, Records
from gpt2modern.training.state import TrainState
from modeling_gpt2modern import GPT2ModernForCausalLM

WAIT_S = 600.0  # how long the end of a run waits for its last upload
# What is uploaded beside the model and its card, where a run has it.
RECORDS = ("summary.json", "metrics.jsonl", "samples.jsonl", CURVES_FILE, SETTINGS_FILE)


@dataclass
class Publisher:
    """Exports a run's model with its card, and uploads it where --push_to_hub asks for it, on the main process."""

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
        """Return the contents of summary.json."""
        rows = self.records.metrics.rows
        return summarize(self.config, state, rows, model=self.model, plan=self.plan, eval_blocks=self.eval_blocks)

    def card(self, summary: dict[str, Any]) -> str:
        """Return the model card."""
        return model_card(
            self.config,
            summary,
            name=self.uploader.repo_id if self.uploader else self.output_dir.resolve().name,
            base_model=self.model.config.name_or_path or None,
            samples=self.records.samples.rows,
            manifest=self.eval_blocks.manifest,
            num_eval_blocks=len(self.eval_blocks),
        )

    def upload_checkpoint(self, state: TrainState, checkpoint: Path) -> None:
        """Start to upload the model folder of a checkpoint, by --hub_strategy; not while another upload is going on,
        nor where the finished model follows at once."""
        strategy = self.config.hub_strategy
        if self.uploader is None or strategy == "end" or self.uploader.is_busy or state.step == self.config.max_steps:
            return
        self.records.draw_curves()
        model_files = [
            path for path in checkpoint.iterdir() if path.is_file() and path.name not in TRAINING_STATE_FILES
        ]
        records = [self.output_dir / name for name in RECORDS if name != "summary.json"]
        self.uploader.upload(
            [*model_files, *(path for path in records if path.exists())],
            self.card(self.summary(state)),
            message=f"Checkpoint of step {state.step}",
            path_in_repo="last-checkpoint" if strategy == "checkpoint" else None,
        )

    def export(self, summary: dict[str, Any], model: GPT2ModernForCausalLM, blocks: PackedBlocks) -> None:
        """Write the Hub-ready folder of the finished run, with its card and summary, and print where it is.

        model: whole, with its adapters if it has any. Raises GPT2ModernError if the disk does not take it.
        """
        try:
            self.model_files = export_model(model, self.output_dir, blocks)
            self.records.draw_curves()
            write_file(self.output_dir / "README.md", self.card(summary))
            write_json(self.output_dir / "summary.json", summary)
        except (OSError, SafetensorError) as error:
            raise GPT2ModernError(
                f"the finished model cannot be written to {self.output_dir}: {error}; its checkpoints are unchanged, "
                "the same command tries again"
            ) from None
        where = f"model in {self.output_dir}"
        if has_adapters(model):
            where = f"merged {where}, adapters alone in {self.output_dir / ADAPTER_FOLDER}"
        print(f"finished: validation loss {summary['eval_loss']:.4f} nats/token, {where}")

    def upload_final(self, summary: dict[str, Any]) -> None:
        """Upload the exported model, wait for it, and print where it is."""
        if self.uploader is not None:
            paths = [self.output_dir / name for name in (*self.model_files, *RECORDS)]
            message = self.uploader.finish(
                [path for path in paths if path.exists()],
                self.card(summary),
                message=f"Model after {summary['steps']} steps",
            )
            print(message)


class HubUploader:
    """Uploads the model folder of one run, one upload at a time, each in a thread; on the main process.

    The token is the one that `hf auth login` or HF_TOKEN has set; it is neither written nor shown.
    """

    def __init__(self, config: TrainConfig, output_dir: Path):
        """Create the repository, in the background too: what will not work is known at the start of a run."""
        self.output_dir = output_dir
        self.repo_id = config.hub_model_id or output_dir.resolve().name  # with its owner as soon as the Hub has told
        self.private = config.hub_private_repo
        self.revision = config.hub_revision
        self.url: str | None = None  # of the newest upload that worked
        self.problem: str | None = None  # of the newest one, if it did not
        self.warns = True
        disable_progress_bars()
        # HfApi's own pool has threads that are waited for at exit: an upload that hangs would keep the process.
        self._thread = self._start(None, None, "")

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def upload(self, files: Iterable[Path], card: str, *, message: str, path_in_repo: str | None = None) -> None:
        """Start to upload `files` as they are now and `card`, gathered in a folder that is removed in the end.

        Not to be called while `is_busy`. A disk that does not take the folder is a warning.
        """
        assert not self.is_busy
        folder = self.output_dir / ".hub_upload"
        try:
            stage_files(files, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
        except OSError as error:
            self._report(f"{folder}: {error.strerror}")
            return
        self._thread = self._start(folder, path_in_repo, message)

    def finish(self, files: Iterable[Path], card: str, *, message: str) -> str:
        """Upload the finished run and wait, `WAIT_S` at most; say where it is, or what failed and the way out."""
        deadline = time.monotonic() + WAIT_S
        self._thread.join(WAIT_S)
        self.warns = False  # what is returned says it
        if not self.is_busy:
            self.upload(files, card, message=message)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self.is_busy:
            self.problem = f"not done after {WAIT_S:.0f} s"
        if self.problem is None:
            return f"uploaded to {self.url}"
        return f"not on the Hub ({self.problem}); by hand: {self._command_by_hand()}"

    def _command_by_hand(self) -> str:
        options = ["--revision", self.revision] if self.revision else []
        options += {True: ["--private"], False: ["--no-private"], None: []}[self.private]
        excluded = ["--exclude", "checkpoints/*", "--exclude", "tensorboard/*"]
        return shlex.join(["hf", "upload", self.repo_id, str(self.output_dir), ".", *excluded, *options])

    def _start(self, folder: Path | None, path_in_repo: str | None, message: str) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(folder, path_in_repo, message), daemon=True)
        thread.start()
        return thread

    def _work(self, folder: Path | None, path_in_repo: str | None, message: str) -> None:
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
                    commit_message=message,
                )
                self.url = str(commit.repo_url)
            self.problem = None
        except Exception as error:
            self._report(without_token(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _report(self, problem: str) -> None:
        if self.warns and problem != self.problem:  # the same one again says nothing new
            warn(f"--push_to_hub {self.repo_id}: {problem}; training continues, the next save tries again")
        self.problem = problem


def without_token(text: str) -> str:
    """Replace the user's token in an error message of the Hub."""
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
