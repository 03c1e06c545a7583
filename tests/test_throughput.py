"""benchmarks.throughput and benchmarks.precision: rows, figures and reports; what is measured is a step as the trainer's."""

import pytest
import torch

from benchmarks import precision, throughput
from benchmarks.measuring import median_and_spread, percentile
from benchmarks.throughput import Measurement, Row, Shape, make_training_step, rows_of, table
from gpt2modern.training.metrics import flops_per_token

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=256"
SHAPE = Shape(
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 256},
    block_size=16,
    batch_size=2,
    attn_implementation="sdpa",
    device="cpu",
)


def test_percentiles_lie_between_neighbours():
    assert percentile([4.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.25) == 1.25
    assert percentile([3.0], 0.8) == 3.0
    assert median_and_spread([10.0, 20.0, 30.0], ".0f") == "20 (14 to 26)"


def test_rows_hold_every_precision_compiled_once_and_the_peer_beside_gpt2_with_adamw():
    config = throughput.ThroughputConfig(model_preset=["gpt2", "modern"], optimizer=["adamw", "muon"])
    rows = rows_of(config)
    assert len(rows) == len(set(rows)) == 15
    assert {(row.precision, row.compiled) for row in rows} == {("fp32", False), ("bf16", False), ("bf16", True)}
    assert [(row.model_preset, row.optimizer) for row in rows if row.is_peer] == [("gpt2", "adamw")] * 3


def test_the_table_has_speed_mfu_memory_and_the_ratio_to_the_peer_in_the_same_precision():
    rows = [Row("modern"), Row("gpt2", is_peer=True), Row("gpt2", precision="bf16", is_peer=True), Row("speedrun")]
    results = [
        Measurement([300.0, 200.0, 100.0], 1.5, flops_per_token=10),
        Measurement([100.0] * 3, 2.0, flops_per_token=10),
        Measurement([50.0] * 3, 2.0, flops_per_token=10),
        "out of memory",
    ]
    lines = [line.strip("| ").split(" | ") for line in table(rows, results, SHAPE, 10_000.0).splitlines()[2:]]
    assert lines[0] == ["modern", "adamw", "fp32", "200 (140 to 260)", "2.00", "20.0%", "160.0", "1.50"]
    assert lines[1][4] == lines[2][4] == "1.00"
    assert lines[3][3:5] == ["out of memory", "-"]


def test_flops_are_those_of_the_matrices_and_of_attention():
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 256 * 32 + 5 * 32  # with the norms' gains, as everywhere in training
    assert throughput.flops_per_token(Row("modern"), SHAPE) == flops_per_token(matrices, 2, 32, 16)


@pytest.mark.parametrize("row", [Row("modern"), Row("speedrun", "muon"), Row("gpt2", is_peer=True)], ids=str)
def test_a_measured_step_learns(row):
    torch.manual_seed(0)
    step = make_training_step(row, SHAPE)
    batch = torch.randint(256, (2, 17))
    losses = [step(batch, 1.0).item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05


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


def check(data, output, *flags):
    precision.main(
        f"--data {data} --model_preset modern --config_overrides {TINY} --block_size 16 --steps 12 "
        f"--per_device_train_batch_size 2 --output {output}".split()
        + list(flags)
    )
    return next(output.glob("*_precision_cpu.md")).read_text()


def test_bf16_ends_where_fp32_ends_and_a_tolerance_of_nothing_fails(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 3)
    text = check(tmp_path / "text.txt", tmp_path)
    assert "every row ends where fp32 ends" in text
    assert "| modern | adamw | fp32 | cpu |" in text and "| modern | adamw | bf16 | cpu |" in text
    with pytest.raises(SystemExit) as caught:
        check(tmp_path / "text.txt", tmp_path, "--tolerance", "0")
    assert caught.value.code == 1


def test_prepared_data_is_read_and_fp32_repeats_itself(data_dir, tmp_path):
    config = TINY.replace("vocab_size=256", "vocab_size=320")
    text = check(data_dir, tmp_path, "--config_overrides", config, "--precision", "fp32", "--tolerance", "0")
    assert text.count("| +0.0000 | 0.0000 |") == 2
