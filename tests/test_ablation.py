"""eval.ablation: variants as planned, sets that survive a kill, verdicts as computed by hand. eval.breakdown: sums."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from statistics import median
from types import SimpleNamespace

import pytest

from eval import ablation, breakdown
from eval.ablation import Ablation, AblationConfig, pooled_sd, tokens_to_reach, verdict
from eval.evidence import current_commit
from gpt2modern.errors import GPT2ModernError
from gpt2modern.training.records import read_rows
from tests.support.trainer import ENVIRONMENT, REPOSITORY

RECIPE = """\
model_preset: gpt2
config_overrides: hidden_size=32,num_hidden_layers=2,num_attention_heads=2
per_device_train_batch_size: 4
total_batch_size: 256
max_steps: 6
learning_rate: 1.0e-2
eval_steps: 3
eval_blocks: 8
logging_steps: 1
save_steps: 1
"""


@pytest.fixture
def flags(data_dir, tmp_path):
    """Return a function that makes the command line of a small ablation."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    places = {"data_dir": data_dir, "output_dir": tmp_path / "runs", "recipe": tmp_path / "recipe.yaml"}
    places |= {"output": tmp_path / "reports", "jobs": 1, "speed_steps": 0}

    def make(variants, *more, **settings):
        settings = places | {"variants": variants} | settings
        return [*(f"--{name}={value}" for name, value in settings.items()), *more]

    return make


def planned(flags, variants, **settings):
    return Ablation(ablation.parse_arguments(AblationConfig, flags(variants, **settings)))


def commits_of_report(tmp_path):
    return json.loads(max(tmp_path.glob("reports/*_ablation_*.json")).read_text())["commit"].split(", ")


def results_of_report(tmp_path):
    """Return the newest report's results, and check that text and picture are beside it."""
    path = max(tmp_path.glob("reports/*_ablation_*.json"))
    content = json.loads(path.read_text())
    assert path.with_name(content["picture"]).stat().st_size > 1000
    assert path.with_suffix(".md").read_text().count(f"]({content['picture']})") == 1
    return content["results"]


def summaries(tmp_path):
    return {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/summary.json")}


def speeds_of_short_runs(tmp_path, name):
    """Return the median of the tokens/s that each run of ten steps has logged after its first row."""
    runs = [path.parent for path in tmp_path.glob(f"runs/{name}-seed*/summary.json")]
    rows = [read_rows(run / "metrics.jsonl") for run in runs]
    rates = [[row["tokens_per_second"] for row in each if "tokens_per_second" in row] for each in rows]
    return [median(each[1:]) for each, logged in zip(rates, rows, strict=True) if logged[-1]["step"] == 10]


def test_a_set_is_trained_once_and_reported(flags, tmp_path, capfd, monkeypatch):
    ablation.main(flags("vanilla,+rope", seeds=2))
    found, trained = results_of_report(tmp_path)["variants"], summaries(tmp_path)
    assert len(trained) == 4
    for name, each in found.items():
        losses = [
            json.loads((path / "summary.json").read_text())["eval_loss"]
            for path in sorted(tmp_path.glob(f"runs/{name.lstrip('+')}-seed*"))
        ]
        assert list(each["losses"].values()) == losses and losses[0] != losses[1]
        assert each["mean_loss"] == pytest.approx(sum(losses) / 2)
        assert each["sd_loss"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert each["tokens"] == 6 * 256 and each["peak_memory_gib"] > 0
        assert [point[0] for point in each["curve"]] == [3 * 256, 6 * 256]
        assert each["curve"][-1][1:] == pytest.approx([each["mean_loss"], min(losses), max(losses)])
    assert found["vanilla"]["parameters"] - found["+rope"]["parameters"] == 32 * 32  # the learned positions
    assert found["vanilla"]["tokens_to_base_loss"] == 1.0 and found["vanilla"]["verdict"] == "base"
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert not list(tmp_path.glob("runs/*/stock"))
    monkeypatch.setattr(ablation, "tqdm", partial(ablation.tqdm, disable=True))  # TQDM_DISABLE=1, read at import
    for path in tmp_path.glob("runs/rope-seed*/commits.txt"):
        path.write_text("1234567890\n1234567890\nabcdef0123-dirty\n")  # as if an older version had trained them
    ablation.main(flags("vanilla,+rope", seeds=2))
    assert summaries(tmp_path) == trained  # nothing was trained again
    assert commits_of_report(tmp_path) == [current_commit(ablation.MEASURES), "1234567890", "abcdef0123-dirty"]
    assert results_of_report(tmp_path)["variants"] == found
    ablation.main(flags("vanilla,+rope", "--report_only", seeds=3))
    partly = results_of_report(tmp_path)
    assert len(partly["not_finished"]) == 2 and partly["variants"]["+rope"]["losses"] == found["+rope"]["losses"]
    assert "| `+rope` |" in capfd.readouterr().out


def test_time_is_matched_by_speeds_measured_in_turn(flags, tmp_path):
    ablation.main(flags("vanilla,+rope", matched="time", seeds=1, speed_steps=10))
    found, (base,) = results_of_report(tmp_path)["variants"], speeds_of_short_runs(tmp_path, "vanilla")
    assert found["vanilla"]["each_tokens_per_second"] == [base] and found["vanilla"]["tokens"] == 6 * 256
    (speed,) = speeds_of_short_runs(tmp_path, "rope")
    assert found["+rope"]["tokens"] == 256 * max(1, round(6 * speed / base))
    with pytest.raises(SystemExit):
        ablation.main(flags("vanilla,+rope", matched="time", seeds=1, output_dir=tmp_path / "new"))


def test_a_killed_set_continues(flags, tmp_path):
    """The command is killed after its first run; the same command finishes the others and keeps that one."""
    command = [sys.executable, "-m", "eval.ablation", *flags("vanilla,+relu2", seeds=2)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not summaries(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    before = summaries(tmp_path)
    assert 1 <= len(before) < 4
    ablation.main(flags("vanilla,+relu2", seeds=2))
    after = summaries(tmp_path)
    assert len(after) == 4 and before.items() <= after.items()
    assert results_of_report(tmp_path)["not_finished"] == []


def test_tuning_takes_the_minimum_and_gives_it_to_the_variants(flags, tmp_path, capfd):
    tune = "--tune=learning_rate=0,0.01,30"
    ablation.main(flags("vanilla,+rope,+learning_rate=0.002", tune, seeds=1))
    (tuned,) = results_of_report(tmp_path)["tuning"]
    assert tuned["best"] == "0.01" == min(tuned["losses"], key=tuned["losses"].get) and not tuned["at_edge"]
    rates = {
        path.parent.name.split("-seed")[0]: path.read_text().split("\nlearning_rate: ")[1].split("\n")[0]
        for path in tmp_path.glob("runs/*/resolved_config.yaml")
        if "learning_rate: 0.0\n" not in path.read_text() and "learning_rate: 30" not in path.read_text()
    }
    assert rates == {"vanilla": "0.01", "rope": "0.01", "learning_rate=0.002": "0.002"}
    assert len(summaries(tmp_path)) == 5  # the tuned run is the base's run with seed 1
    ablation.main(flags("vanilla", "--tune=learning_rate=0.001,0.01", seeds=1))
    assert results_of_report(tmp_path)["tuning"][0]["at_edge"] and "at the edge" in capfd.readouterr().err


def test_variants_have_the_settings_that_their_names_say(flags):
    plan = planned(flags, "vanilla,+swiglu,modern+relu2,+rope+qk_norm,speedrun,+batch_size_ramp=1 2+weight_decay=0")
    configs = {name: plan.train_config(settings) for name, settings in plan.variants.items()}
    models = {name: plan.model(settings).config for name, settings in plan.variants.items()}
    assert models["vanilla"].mlp_type == "gelu_new" and models["vanilla"].hidden_dropout == 0
    assert models["+swiglu"].mlp_type == "swiglu" and models["+swiglu"].intermediate_size == 88  # 2/3 of 128, 11 x 8
    assert models["modern+relu2"].mlp_type == "relu2" and models["modern+relu2"].position_embedding_type == "rope"
    assert models["+rope+qk_norm"].use_qk_norm and models["+rope+qk_norm"].norm_type == "layernorm"
    assert [configs[name].optimizer for name in ("vanilla", "speedrun")] == ["adamw", "muon"]
    assert configs["+batch_size_ramp=1 2+weight_decay=0"].batch_size_ramp == [1.0, 2.0]
    assert configs["speedrun"].learning_rate == 0.008 and configs["modern+relu2"].learning_rate == 0.01


def test_the_optimizer_of_the_recipe_is_tuned(flags, tmp_path):
    """modern names no optimizer; the recipe does."""
    (tmp_path / "recipe.yaml").write_text(RECIPE + "optimizer: muon\n")
    ablation.main(flags("modern", "--tune=muon_learning_rate=0.01,0.02", seeds=1))
    assert results_of_report(tmp_path)["tuning"][0]["variant"] == "modern"


def test_parameters_are_matched_by_the_mlp_width(flags):
    plan = planned(flags, "vanilla,+swiglu,+no_bias,+num_key_value_heads=1", matched="params")
    wanted, step = plan.parameters(plan.variants["vanilla"]), 2 * 3 * 32 * 8  # of 8 more columns, at most
    for name, settings in plan.variants.items():
        assert abs(plan.parameters(settings) - wanted) <= step / 2, name
    tables = planned(flags, "vanilla,+bigram_vocab_size=4096+value_embedding_layers=alternating", matched="params")
    assert [each.get("intermediate_size") for each in tables.variants.values()][1] == "128"  # tables are not matched
    with pytest.raises(GPT2ModernError, match=r"no MLP is narrow enough for .*; use --matched tokens"):
        planned(flags, "vanilla,+head_dim=256", matched="params")


def test_tokens_decide_the_steps_and_the_evaluations(flags):
    plan = planned(flags, "vanilla", tokens="0.003072M", train_flags="--warmup_ratio 0.5")
    assert (plan.recipe.max_steps, plan.recipe.eval_steps, plan.recipe.schedule.warmup_steps) == (12, 6, 6)
    changes = "vanilla+total_batch_size=512,vanilla+total_batch_size=512+max_steps=7"
    plan = planned(flags, changes, tokens="0.003072M", train_flags="--warmup_ratio 0.5")
    run, shorter = (plan.run(name, 1).config for name in plan.variants)
    assert (run.max_steps, run.eval_steps, run.schedule.warmup_steps, shorter.max_steps) == (6, 3, 3, 7)


@pytest.mark.parametrize(
    "variants, settings, message",
    [
        ("vanilla,+ropes", {}, "'ropes' is no change; choose from rope,"),
        ("llama", {}, "'llama' is no base; choose vanilla, modern, modern-muon, speedrun, frontier"),
        ("vanilla,+rope,+rope", {}, r"--variants has \+rope twice"),
        ("vanilla,+hidden_size=33", {}, "hidden_size"),
        ("vanilla", {"tokens": "many"}, "--tokens many must be a number"),
        ("+rope,vanilla", {}, "the first variant has no base that a change could change; choose vanilla"),
        ("vanilla,+seed=7", {}, "'seed=7' is no change"),
        ("vanilla", {"tune": "learning_rate=1..2,e"}, "--tune learning_rate=1..2,e must be a setting"),
        ("vanilla", {"tune": "speed=1,2"}, "--tune speed=1,2 must be a setting of train_accelerate.py"),
        ("vanilla", {"recipe": "none"}, "no such file or recipe; the recipes are ablation,"),
    ],
)
def test_a_wrong_plan_is_an_error(flags, variants, settings, message):
    with pytest.raises(GPT2ModernError, match=message):
        planned(flags, variants, **settings)


def test_verdicts_and_spread_as_computed_by_hand():
    assert pooled_sd([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert pooled_sd([1.0, 3.0], [5.0, 6.0, 7.0]) == pytest.approx(math.sqrt((2 + 2) / 3))
    assert pooled_sd([1.0], [2.0]) is None
    base = [4.0, 4.1, 4.2]  # sd 0.1
    assert [verdict([loss - 0.1, loss, loss + 0.1], base) for loss in (3.8, 3.91, 4.29, 4.4)] == [
        "adopt",
        "inconclusive",
        "inconclusive",
        "reject",
    ]
    assert verdict([1.0], [4.0]) == "one seed"


def test_uneven_speeds_are_not_reported():
    """Other programs have slowed one of the measurements: neither the variant's speed nor its time is known."""

    def run(loss):
        summary = {"eval_loss": loss, "tokens_seen": 100, "params": 1, "peak_memory_gib": 1}
        curve = [(50, loss + 0.1), (100, loss)]
        return SimpleNamespace(summary=summary, rows_with=lambda name: curve, config=SimpleNamespace(seed=loss))

    base, better = [run(3.0), run(3.1)], [run(2.9), run(2.8)]
    steady = ablation.results_of(better, base, [50, 55], [100, 110])
    assert steady["tokens_per_second"] == 52.5 and (steady["tokens_to_base_loss"], steady["time_to_base_loss"]) == (
        0.5,
        1,
    )
    for speeds, of_base, unknown in ([50, 100], [100, 110], "uneven"), ([50, 55], [50, 100], "uneven"), ([], [], "-"):
        result = ablation.results_of(better, base, speeds, of_base)
        assert result["time_to_base_loss"] is None and result["tokens_to_base_loss"] == 0.5
        (row,) = ablation.table_of({"+rope": result}, jobs=1)[1:]
        assert row[4:7] == ["50.0%", unknown, "52" if unknown == "uneven" and speeds[1] == 55 else unknown]


def test_tokens_to_a_loss_are_interpolated():
    curve = [(100, 5.0), (200, 4.0), (300, 3.5)]
    assert [tokens_to_reach(curve, loss) for loss in (6.0, 4.25, 4.0, 3.6, 3.0)] == [100, 175, 200, 280, None]


@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_the_parts_of_a_model_sum_to_the_whole(preset, capsys):
    config = SimpleNamespace(model=None, config_overrides=None, block_size=64)
    model, seq_len = breakdown.build(config, preset)
    parts = breakdown.breakdown(model, seq_len)
    assert seq_len == 64 and sum(count for count, _ in parts.values()) == model.num_parameters()
    assert parts["attention scores"] == (0, 4 * 12 * 64 * 768)  # 2 for scores, 2 for values; each token sees all 64
    assert parts["MLP"][1] == 2 * parts["MLP"][0] and parts["head"][1] == 2 * 768 * model.config.vocab_size
    breakdown.main(["--model_preset", preset, "--block_size", "64"])
    assert f"| total | {model.num_parameters():,} | 100.0% |" in capsys.readouterr().out
