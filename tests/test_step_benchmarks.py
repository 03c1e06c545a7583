"""benchmarks.throughput and benchmarks.precision: rows, figures and reports; what is measured is the trainer's step."""

import math

import pytest
import torch

from benchmarks import precision, throughput
from benchmarks.measuring import median_and_spread
from benchmarks.throughput import Row, ThroughputConfig, build_model, peer_loss, rows_of, table, training_step
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.speed import flops_per_token
from train_accelerate import StepResult

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=256"
CONFIG = ThroughputConfig(
    config_overrides=TINY, block_size=16, per_device_train_batch_size=2, steps=2, device="cpu"
)  # 64 tokens in a repetition


def test_percentiles_lie_between_neighbours():
    assert median_and_spread([4.0, 1.0, 2.0], ".2f") == "2.00 (1.40 to 3.20)"
    assert median_and_spread([1.0, 2.0], ".2f", low=0.25, high=1) == "1.50 (1.25 to 2.00)"
    assert median_and_spread([3.0], ".0f") == "3 (3 to 3)"
    assert median_and_spread([10.0, 20.0, 30.0], ".0f") == "20 (14 to 26)"


def test_rows_hold_every_precision_compiled_once_and_the_peer_beside_gpt2_with_adamw():
    rows = rows_of(ThroughputConfig(model_preset=["gpt2", "modern"], optimizer=["adamw", "muon"]), peer=True)
    assert len(rows) == len(set(rows)) == 15
    other_shape = ThroughputConfig(model_preset=["gpt2"], config_overrides="num_key_value_heads=2")
    assert not any(row.is_peer for row in rows_of(other_shape, peer=True))
    assert {(row.precision, row.compiled) for row in rows} == {("fp32", False), ("bf16", False), ("bf16", True)}
    assert [(row.model_preset, row.optimizer) for row in rows if row.is_peer] == [("gpt2", "adamw")] * 3


def test_the_table_has_speed_mfu_memory_and_the_ratio_to_the_peer_in_the_same_precision():
    rows = [Row("modern"), Row("gpt2", is_peer=True), Row("gpt2", precision="bf16", is_peer=True), Row("speedrun")]
    answers = [
        [(64 / speed, memory) for speed, memory in ((300.0, 1.5), (200.0, 1.0), (100.0, 1.5))],
        [(64 / 100.0, 2.0)] * 3,
        [(64 / 50.0, 2.0)] * 3,
        "out of memory",
    ]
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 256 * 32 + 5 * 32  # with the norms' gains, as everywhere in training
    peak = 1000.0 * flops_per_token(matrices, 2, 32, 16)
    lines = table(dict(zip(rows, answers, strict=True)), CONFIG, peak)
    assert lines[0] == ["modern", "adamw", "fp32", "200 (140 to 260)", "2.00", "20.0%", "160.0", "1.50"]
    assert lines[1][4] == lines[2][4] == "1.00"
    assert lines[3][3:5] == ["out of memory", "-"]


@pytest.mark.parametrize("row", [Row("modern"), Row("speedrun", "muon"), Row("gpt2", is_peer=True)], ids=str)
def test_a_measured_step_learns(row):
    with training_step(row, CONFIG) as step:
        torch.manual_seed(0)
        batch = torch.randint(256, (2, 17))
        losses = [step(batch).loss.item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05


def test_the_measured_step_begins_where_the_seed_does():
    batch = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    with training_step(Row("modern"), CONFIG) as step:
        result = step(batch)
    torch.manual_seed(TrainConfig(dry_run=True).seed)
    model = build_model(Row("modern"), CONFIG).train()
    assert isinstance(result, StepResult) and result.finite
    assert result.loss.item() == batch_loss(model, batch, num_items=torch.tensor(32.0))[1].item()


@pytest.mark.parametrize(("is_peer", "objective"), [(False, batch_loss), (True, peer_loss)])
def test_both_objectives_are_mean_losses(is_peer, objective):
    """Weights of zero give every token the same probability."""
    model = build_model(Row("gpt2", is_peer=is_peer), CONFIG)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    minimised, loss = objective(model, torch.randint(256, (2, 17)), num_items=torch.tensor(32.0))
    assert minimised.item() == loss.item() == pytest.approx(math.log(256))
    assert minimised.requires_grad and not loss.requires_grad


def test_a_report_is_written_with_a_row_for_each_process(tmp_path, capfd):
    flags = f"--model_preset gpt2 --config_overrides {TINY} --block_size 16 --per_device_train_batch_size 2 --steps 2"
    throughput.main([*flags.split(), "--precision", "fp32", "--torch_compile", "false", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert path.name.endswith("_throughput_cpu.md") and text in capfd.readouterr().out
    assert "| gpt2 | adamw | fp32 |" in text and "| transformers GPT2LMHeadModel (gpt2) | adamw | fp32 |" in text
    assert (
        "Command: `python -m benchmarks.throughput --model_preset gpt2" in text
        and "n = 3 repetitions of 2 steps" in text
    )


def test_a_row_that_fails_does_not_end_the_others():
    rows = [Row("modern"), Row("modern", optimizer="unknown")]
    good, bad = throughput.measure(rows, CONFIG).values()
    assert len(good) == 3 and "unknown" in bad


def check(data, output, *flags):
    shape = TINY.removesuffix(",vocab_size=256")  # the vocabulary is that of the data
    precision.main(
        f"--data {data} --model_preset modern --config_overrides {shape} --block_size 16 --steps 12 "
        f"--per_device_train_batch_size 2 --output {output}".split()
        + list(flags)
    )
    return next(output.glob("*_precision_cpu.md")).read_text()


def test_bf16_ends_where_fp32_ends_and_a_tolerance_of_nothing_fails(data_dir, tmp_path):
    text = check(data_dir, tmp_path)
    assert "every row ends where fp32 ends" in text
    assert "| modern | adamw | fp32 | cpu |" in text and "| modern | adamw | bf16 | cpu |" in text
    with pytest.raises(SystemExit) as caught:
        check(data_dir, tmp_path, "--tolerance", "0")
    assert caught.value.code == 1


def test_fp32_repeats_itself(data_dir, tmp_path):
    text = check(data_dir, tmp_path, "--precision", "fp32", "--tolerance", "0")
    assert text.count("| +0.0000 | 0.0000 |") == 2
