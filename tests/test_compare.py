"""Runs next to each other on one page: losses, speed, samples, the settings that differ."""

import html
import json
import shutil
import struct
from pathlib import Path

import pytest

from eval import compare
from gpt2modern.evaluation.curves import plot_runs
from tests.support.trainer import metrics, train

PROMPTS = ("--sample_prompts", "def <f>", "class")


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    prompts = {"sample_max_new_tokens": 8, "save_steps": 0, "logging_steps": 2}
    wider = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
    return [
        train(data_dir, folder / "one", PROMPTS, **prompts),
        train(data_dir, folder / "other", PROMPTS, **prompts, learning_rate=3e-3, config_overrides=wider),
    ]


def compared(tmp_path, *folders) -> str:
    compare.main([*map(str, folders), "--output", str(tmp_path / "page.html")])
    return (tmp_path / "page.html").read_text()


def test_the_page_has_results_differing_settings_curves_and_samples(runs, tmp_path, capsys):
    page = compared(tmp_path, *runs)
    printed = capsys.readouterr().out
    for folder in runs:
        last = metrics(folder)[-1]
        for number in (f"{last['eval_loss']:.4f}", f"{last['bits_per_byte']:.4f}", f"{last['tokens_seen']:,}"):
            assert f"<td>{number}</td>" in page and number in printed
        texts = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        shown = [each for each in texts if each["step"] == last["step"]]
        assert len(shown) == 2 < len(texts)
        assert all(f"<b>{each['prompt']}</b>{each['text']}</td>" in html.unescape(page) for each in shown)
    assert "<b>def &lt;f&gt;</b>" in page
    differing = page.split("Settings that differ")[1].split("</table>")[0]
    for name, first, second in (("learning_rate", "0.01", "0.003"), ("hidden_size", "32", "64")):
        values = f'<td class="text" title="one">{first}</td><td class="text" title="other">{second}</td>'
        assert f"<td>{name}</td>{values}" in differing
    assert differing.count("<tr>") == 3
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG") and 'src="data:image/png;base64,' in page


def test_runs_of_the_same_name_are_told_apart_and_one_alone_is_shown(runs, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(runs[0], tmp_path / parent / "run")
    page = compared(tmp_path, tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert "<td>a/run</td>" in page and "<td>b/run</td>" in page
    for each in (page, compared(tmp_path, runs[0]), compared(tmp_path, runs[0], runs[0])):
        assert "<h2>Results</h2>" in each and "Settings that differ" not in each


def test_a_run_is_shown_before_its_first_evaluation_and_without_samples(runs, tmp_path):
    young = Path(shutil.copytree(runs[0], tmp_path / "young"))
    (young / "samples.jsonl").unlink()
    first = (young / "metrics.jsonl").read_text().splitlines()[0]
    (young / "metrics.jsonl").write_text(first + '\n{"step": 2, "tok')
    page = compared(tmp_path, young)
    assert "not measured" in page and "Samples" not in page


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.jsonl", "3"), ("metrics.jsonl", '{"step": 1}'), ("metrics.jsonl", ""), ("samples.jsonl", "[1]"),
        ("resolved_config.yaml", "- 1"), ("resolved_config.yaml", "a: ["),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_line(runs, tmp_path, capsys, name, content):
    damaged = Path(shutil.copytree(runs[0], tmp_path / "damaged"))
    (damaged / name).write_text(content)
    with pytest.raises(SystemExit) as caught:
        compared(tmp_path, runs[1], damaged)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert f"error: {damaged} is not the output folder of a training run" in error
    assert not list(tmp_path.glob("page.*"))


def test_curves_of_several_runs_have_panels_for_speed_and_tasks(tmp_path):
    rows = [{"tokens_seen": n, "loss": 3.0, "eval_loss": 3.0, "tokens_per_second": 5.0} for n in (1, 2)]
    heights = []
    for more in ({}, {"hellaswag_acc_norm": 0.3, "lambada_acc": 0.2}):
        plot_runs({"a": rows, "b": [rows[0] | more]}, tmp_path / "curves.png")
        heights.append(struct.unpack(">I", (tmp_path / "curves.png").read_bytes()[20:24])[0])
    assert heights == [900, 1260]
