"""The cost model counts the bytes that are really sent; compiled processes train like one; dry runs predict."""

import math
import re
import subprocess
from dataclasses import replace

import pytest
import yaml
from accelerate.state import AcceleratorState

import train_accelerate
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.batches import BatchPlan, plan_batches
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.dry_run import Device, predict_step
from gpt2modern.training.memory import estimate_memory
from gpt2modern.training.models import build_model
from gpt2modern.training.speed import model_flops_per_token
from tests.support.models import tiny_model
from tests.support.scaling import PAGE, table
from tests.support.trainer import REPOSITORY, TINY, TORCHRUN, command, config_of, environment, losses, train

SETTINGS = {"per_device_train_batch_size": 2, "max_steps": 2, "eval_steps": 0, "eval_blocks": 2, "save_steps": 0}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def in_two_processes(data_dir, output_dir, *module, variables=(), **changes):
    """Train in two launched processes, in a program of the tests instead of train_accelerate.py if one is named."""
    arguments = command(data_dir, output_dir, *TORCHRUN, "2", *module, **(SETTINGS | changes))
    if module:
        arguments.remove(str(REPOSITORY / "train_accelerate.py"))
    result = subprocess.run(
        arguments, env=environment(**dict(variables)), capture_output=True, text=True, timeout=500, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.parametrize(
    ("variables", "precision"), [({}, "bf16"), (FSDP2, "no"), (FSDP2, "bf16")], ids=["DDP", "FSDP2", "FSDP2 bf16"]
)
def test_the_predicted_bytes_are_those_that_two_processes_send(data_dir, tmp_path, variables, precision):
    """Norms, losses and the like are not predicted: a few numbers per step."""
    module = ("-m", "tests.support.scaling")
    result = in_two_processes(data_dir, tmp_path, *module, variables=variables, mixed_precision=precision)
    sent = int(re.search(r"sent (\d+) bytes", result.stdout)[1])
    config = config_of(data_dir, tmp_path, total_batch_size=256)
    plan = plan_batches(config, block_size=32, num_processes=2)
    assert plan.grad_accum_steps(0) == 2
    model = build_model(config, PackedBlocks(data_dir, "train"))
    _, predicted = predict_step(model, plan, Device(*[1.0] * 4), 2, fsdp2=bool(variables), autocast=precision == "bf16")
    assert sent == pytest.approx(predicted, rel=0.002)


def test_a_run_that_is_compiled_and_divided_trains_like_one_process(data_dir, tmp_path):
    """The gradient fills two of DDP's buckets, between which Dynamo cuts the graph. It is compiled once."""
    shape = {"config_overrides": "hidden_size=128,num_hidden_layers=2,num_attention_heads=2"}
    one = train(data_dir, tmp_path / "one", **(SETTINGS | shape))
    module, variables = ("-m", "tests.support.scaling"), {"TORCH_LOGS": "recompiles"}
    result = in_two_processes(data_dir, tmp_path / "two", *module, torch_compile=True, variables=variables, **shape)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert "Recompiling" not in result.stderr


@pytest.mark.parametrize(
    ("count", "passes", "fsdp2", "changes", "seconds", "sent"),
    [  # r: bytes outside the layers over those inside
        (1, 4, False, {}, lambda r: 12, lambda r: 0),
        (2, 1, False, {}, lambda r: 1 + 4 + 4 * r, lambda r: 4 + 4 * r),  # the layers' sum outlasts the backward pass
        (2, 4, False, {}, lambda r: 9 + 1 + 4 + 4 * r, lambda r: 4 + 4 * r),
        (2, 4, False, {"overlaps": False}, lambda r: 12 + 4 + 4 * r, lambda r: 4 + 4 * r),
        (2, 4, False, {"within_node": math.inf}, lambda r: 12, lambda r: 4 + 4 * r),
        (16, 1, False, {"flops": math.inf}, lambda r: 2 * 7.5 * (1 + r), lambda r: 7.5 * (1 + r)),  # between two nodes
        (2, 1, True, {}, lambda r: 1 + 3 + 3 * r, lambda r: 2 + r + 2 + 2 * r),
        (2, 2, True, {"overlaps": False}, lambda r: 6 + 2 + r + 4 + 3 * r, lambda r: 2 * (2 + r) + 2 + 2 * r),
    ],
)
def test_the_cost_model_by_hand(count, passes, fsdp2, changes, seconds, sent):
    """A pass is 1 s forward and 2 s backward; the weights of the layers take 1 s to send per byte of each."""
    model, plan = tiny_model("gpt2"), BatchPlan(passes * count, 1, count, block_size=16)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    rest = model.num_parameters() / layers - 1
    device = Device(model_flops_per_token(model, 16) * 16 / 3, math.inf, within_node=layers, between_nodes=layers / 2)
    found = predict_step(model, plan, replace(device, **changes), passes, fsdp2=fsdp2)
    assert found == pytest.approx((seconds(rest), sent(rest) * layers))


@pytest.mark.parametrize(("passes", "whole"), [(1, False), (4, True)])
def test_shards_accumulate_whole_gradients(passes, whole):
    """Between the passes of a step FSDP2 keeps them, and sums and divides them in the last."""
    model, plan = tiny_model("gpt2"), BatchPlan(passes * 2, 1, 2, block_size=16)
    memory = estimate_memory(TrainConfig(dry_run=True), model, plan, autocast=False, fsdp2=True)
    assert memory["gradients"] == 4 * model.num_parameters() // (1 if whole else 2)
    assert memory["optimizer states"] == 8 * model.num_parameters() // 2


def dry_run(capsys, *flags):
    """Return the facts that a dry run prints, by name, and its settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_accelerate.main([*flags])
    output = capsys.readouterr().out
    lines = [line[2:] for line in output.splitlines() if line.startswith("# ")]
    return {line[:20].strip(): line[21:] for line in lines}, yaml.safe_load(output)


SMALL = ("--model_preset", "gpt2", "--block_size", "64", "--config_overrides", TINY)


def test_a_dry_run_predicts_the_speed_on_named_devices(capsys):
    flags = (*SMALL, "--total_batch_size", "16384", "--max_steps", "1000")
    facts, settings = dry_run(capsys, *flags, "--dry_run", "16 x NVIDIA H100 80GB HBM3")
    plain, same = dry_run(capsys, *flags, "--dry_run")
    assert settings == same and "prediction" not in plain
    assert plain["processes"] == "1 x cpu, no" and facts["processes"] == "16 x NVIDIA H100 80GB HBM3, bf16"
    assert facts["prediction"].startswith("2 node(s)") and facts["prediction"].endswith("not measured")
    milliseconds, hours = (float(re.search(rf"[\d.]+(?= {unit})", facts["DDP"])[0]) for unit in ("ms", "hours"))
    assert milliseconds / 1000 > float(facts["FLOPs"]) / 1000 / (16 * 0.4 * 989e12)
    assert hours == pytest.approx(milliseconds * 1000 / 3.6e6, abs=0.01)
    assert "DDP" in facts["memory per process"] and "GB sent per step" in facts["FSDP2"]


@pytest.mark.parametrize("text", ["8 x H1000", "x H100", "0 x H100", "H100", "8 x", "flase"])
def test_other_devices_are_refused_in_one_line(capsys, text):
    with pytest.raises(SystemExit) as caught:
        dry_run(capsys, *SMALL, "--dry_run", text)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1
    assert f"--dry_run {text} is neither true, false nor a number and kind of devices such as '8 x H100'" in message


def test_the_table_of_predictions_is_what_the_code_predicts():
    assert table() in PAGE.read_text(encoding="utf-8"), "python -m tests.support.scaling writes it anew"
