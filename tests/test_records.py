"""Records of a run: no step twice, no half line, curves and a progress bar that show what is known."""

import json
import os
import threading
import time

import pytest
import torch

from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.curves import plot_training_curves, read_rows
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.files import locked
from gpt2modern.training.nonfinite import first_loss_message
from gpt2modern.training.records import (
    RowLog,
    bar_numbers,
    on_one_line,
    reserved_output_dir,
)
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM
from tests.support.trainer import losses, train

NUMBERS = '{"step": 1, "tokens_seen": 2, '


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}', "[1]", "3", '{"step": "1"}', '{"step": 1}', '{"step": true, "tokens_seen": 2}', "[" * 100_000,
        '{"step": 1, "tokens_seen": null}', NUMBERS + '"loss": "x"}', NUMBERS + '"eval_loss": [1]}',
        NUMBERS + '"loss": true}', NUMBERS + '"loss": NaN}', NUMBERS + '"loss": 1e999}',
        NUMBERS + f'"loss": 1{"0" * 400}}}', NUMBERS + f'"loss": {"9" * 5000}}}', NUMBERS + '"peak_memory_gib": "x"}',
    ],
    ids=lambda content: content[:50],
)  # fmt: skip
def test_a_file_that_is_not_a_log_is_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(GPT2ModernError, match="is not a log of a training run"):
        RowLog(tmp_path / "metrics.jsonl", {"tokens_seen": int}, resumed_step=0)


@pytest.mark.parametrize(
    "row", [{"step": 1}, {"step": 1, "prompt": "a", "text": 3}, {"step": 1, "prompt": None, "text": "b"}]
)
def test_a_file_of_other_samples_is_refused(tmp_path, row):
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(GPT2ModernError, match="is not a log of a training run"):
        RowLog(tmp_path / "samples.jsonl", {"prompt": str, "text": str}, resumed_step=0)


def test_a_row_without_a_learning_rate_is_drawn(tmp_path):
    rows = [{"step": step, "tokens_seen": step, "loss": 3.0} for step in (1, 2)]
    plot_training_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_curves_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError, match="curves"):
        plot_training_curves([], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.fault("F20 a log with a step twice or half a line")
def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = RowLog(path, {}, resumed_step=0)
    for step in range(1, 6):
        log.add({"step": step})
    resumed = RowLog(path, {}, resumed_step=3)
    assert resumed.last_step == 5 and [row["step"] for row in read_rows(path)] == [1, 2, 3]
    resumed.add({"step": 4})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


@pytest.mark.fault("F20 a log with a step twice or half a line")
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]


def test_the_curves_are_a_png_also_before_the_first_evaluation(tmp_path):
    rows = [{"step": 1, "tokens_seen": 10, "loss": 3.0, "learning_rate": 0.1}]
    plot_training_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_bar_names_every_number_and_leaves_out_what_is_not_known():
    metrics = {"loss": 3.21, "learning_rate": 6e-4, "tokens_per_second": 12345.6, "peak_memory_gib": 1.25, "mfu": 0.414}
    known = "02:05 left, loss 3.210, lr 6.0e-04, 12,346 tok/s, MFU 41.4%, 1.2 GiB"
    assert bar_numbers(metrics, remaining_s=125) == known
    assert bar_numbers(metrics | {"mfu": None}, remaining_s=125) == known.replace("MFU 41.4%, ", "")


def test_a_sample_is_shown_on_one_line():
    assert on_one_line({"prompt": "a\n", "text": "b"}) == r"'a\nb'"
    assert on_one_line({"prompt": "a", "text": "b" * 200}, width=20) == "'" + "a" + "b" * 15 + "..."


@pytest.mark.fault("F25 two runs in one folder")
def test_one_run_at_a_time_has_the_folder(tmp_path):
    """Also within a process; folders that were made for it are removed if nothing was written."""
    folder = tmp_path / "out" / "run"
    with reserved_output_dir(folder):
        refusal = pytest.raises(GPT2ModernError, match=f"in use by another run \\(process {os.getpid()} on ")
        with refusal, reserved_output_dir(folder):
            raise AssertionError("both have it")
        assert (folder / ".in_use").exists()
    assert not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    (folder / ".in_use").write_text("process 1 on another-host since yesterday")  # left by a kill
    with reserved_output_dir(folder):
        pass
    assert not list(folder.iterdir())


def test_a_lock_whose_file_was_deleted_meanwhile_is_taken_on_a_new_one(tmp_path):
    path, held = tmp_path / "lock", threading.Event()

    def wait_for_it():
        with locked(path, seconds=20):
            held.set()
            release.wait(20)

    waiting, release = threading.Thread(target=wait_for_it), threading.Event()
    with locked(path):
        waiting.start()
        time.sleep(0.3)  # it has opened the file by now
        path.unlink()
    assert held.wait(20)
    with pytest.raises(BlockingIOError), locked(path, seconds=0):
        pass
    release.set()
    waiting.join()


@pytest.mark.parametrize(
    "preset, changes, ending",
    [
        ("gpt2", {}, "= 5.545"),
        ("modern", {}, "= 5.545"),
        ("speedrun", {}, "= 5.545"),
        ("modern", {"hidden_size": 512, "zero_init_projections": True}, "each token first predicts itself"),
        (
            "modern",
            {"hidden_size": 256, "initializer_range": 0.2, "tie_word_embeddings": False},
            "initializer_range 0.2",
        ),
    ],
)
def test_the_first_loss_of_a_new_model_is_compared_with_ln_v(preset, changes, ending):
    """What the configuration explains is no warning: the presets start at ln(V), a tied head may start above it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256} | changes
    model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset(preset, **sizes))
    batch = torch.randint(256, (4, 65))
    loss = batch_loss(model, batch, num_items=4 * 64)[1].item()
    message = first_loss_message(loss, model.config)
    assert message.endswith(ending) and message.startswith(f"the first loss is {loss:.3f}; that of 256 equally likely")


def test_a_first_loss_that_nothing_explains_is_a_warning():
    message = first_loss_message(4.0, GPT2ModernConfig(vocab_size=512, unpadded_vocab_size=256))
    assert message.startswith("warning: the first loss is 4.000; that of 256 equally likely tokens is ln(V) = 5.545")


def test_a_first_loss_that_is_too_low_is_a_warning_whatever_the_initialisation():
    message = first_loss_message(0.3, GPT2ModernConfig(vocab_size=300, zero_init_projections=True))
    assert message.startswith("warning: the first loss is 0.300") and "labels are not in its inputs" in message


def test_only_a_new_model_is_compared_with_ln_v(data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / "new", max_steps=2, save_steps=0)
    assert f"the first loss is {losses(tmp_path / 'new')[0]:.3f}; that of 300 equally" in capsys.readouterr().out
    train(data_dir, tmp_path / "tuned", model_name_or_path=tmp_path / "new", config_overrides="hidden_dropout=0.0")
    assert "first loss" not in capsys.readouterr().out
