"""eval.evidence and eval/reports: README says what the JSON files say, and no report is older than what it measures."""

import json
import subprocess

import pytest
import torch

from eval import evidence, record
from eval.evidence import REPORTS, REPOSITORY, Report, differences
from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.evaluation.loss import evaluate_loss
from gpt2modern.loading import load_model
from tests.support.reports import changed_since, problems
from tests.support.trainer import train

TEMPLATE = """
{% if "speed_cpu" in reports %}
<!-- report: answer -->takes {{ "%.1f"|format(reports.speed_cpu.results.seconds) }} s<!-- end -->
<!-- report: table -->
{% for row in reports.speed_cpu.table %}
| {{ row|join(" | ") }} |
{% endfor %}
<!-- end -->
{% endif %}
"""
PAGE = "It <!-- report: answer -->?<!-- end -->, as below.\n\n<!-- report: table -->\n<!-- end -->\n"
CODE = '''"""A module."""

CONSTANT = 1


def measured():
    """Words."""
    return 1  # a comment


def other():
    return 2
'''


BARS = {"kind": "bars", "numbers": {"unit": "s", "names": ["a", "b"], "values": [[1, 2], [3, 4]], "notes": ["x", "y"]}}


def git(root, *words):
    identity = ["-c", "user.name=Name", "-c", "user.email=name@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True, text=True).stdout


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a change")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with code and a page, in which `Report` and the command work."""
    root = tmp_path / "checkout"
    for folder in ("docs", "eval/reports", "package"):
        (root / folder).mkdir(parents=True)
    (root / "README.md").write_text(PAGE)
    (root / "docs/more.md").write_text("no block\n")
    (root / "eval/blocks.md.jinja").write_text(TEMPLATE)
    (root / "package/code.py").write_text(CODE)
    (root / "package/table.txt").write_text("1\n")
    git(root, "init", "-q")
    commit(root)
    monkeypatch.setattr(evidence, "REPOSITORY", root)
    return root


def report(
    root, seconds=1.25, measures=("package/code.py:measured",), at="2026-01-01_000000", changes=None, drawing=None
):
    """Write a report as a benchmark does, at another time, and return the path of its JSON file."""
    flags = ["--steps", "3", "--out=/home/name/runs", "--flags", "--data_dir /home/name/text --steps=3"]
    made = Report("speed", str(root / REPORTS), torch.device("cpu"), flags, measures=measures)
    made.path = made.path.with_name(f"{at}_speed_cpu.md")
    rows = [["program", "seconds"], ["ours", f"{seconds:.2f}"]]
    made.write("Speed", "how fast?", "n = 1.", rows, "Limits: none.", {"seconds": seconds}, drawing)
    path = made.path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
    return path


def test_the_pages_say_what_the_reports_say():
    assert list(differences(REPOSITORY)) == []


def test_no_report_is_incomplete_or_older_than_what_it_measures():
    if evidence.git(REPOSITORY, "rev-parse", "--is-shallow-repository") != "false\n":
        pytest.skip("needs a git checkout with its history")
    assert list(problems(REPOSITORY)) == []


def test_make_report_fills_blocks_from_the_newest_report(root, capsys):
    with pytest.raises(SystemExit) as caught:
        report(root, 9.0)
        evidence.main(["--check"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert caught.value.code == 1 and [line.split(" is not")[0] for line in lines] == [
        "README.md: the block answer", "README.md: the block table",
    ]  # fmt: skip
    report(root, 1.25, at="2026-01-02_000000")
    evidence.main([])
    filled = (root / "README.md").read_text()
    assert "It <!-- report: answer -->takes 1.2 s<!-- end -->, as below." in filled and "| ours | 1.25 |" in filled
    evidence.main(["--check"])
    evidence.main([])
    assert (root / "README.md").read_text() == filled and (root / "docs/more.md").read_text() == "no block\n"


def test_a_number_typed_by_hand_is_found(root):
    path = report(root)
    evidence.main([])
    for page in (root / "README.md", path.with_suffix(".md")):
        text = page.read_text()
        page.write_text(text.replace("1.25", "0.25"))
        (line,) = differences(root)
        assert page.name in line and "is not what the reports say" in line
        page.write_text(text)


@pytest.mark.parametrize("wrong", ["reports.speed_cpu.results.missing", "reports.unknown.results", "1 / 'a'"])
def test_a_template_without_its_number_is_an_error_in_one_line(root, capsys, wrong):
    report(root)
    (root / "eval/blocks.md.jinja").write_text(TEMPLATE.replace("reports.speed_cpu.results.seconds", wrong))
    with pytest.raises(SystemExit) as caught:
        evidence.main([])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: eval/blocks.md.jinja")
    assert (root / "README.md").read_text() == PAGE


def test_a_block_without_a_template_is_an_error(root, capsys):
    with pytest.raises(SystemExit) as caught:
        evidence.main(["--check"])
    assert caught.value.code == 2 and "'answer'" in capsys.readouterr().err


def test_a_block_without_its_end_is_an_error_and_nothing_is_lost(root, capsys):
    report(root)
    (root / "README.md").write_text(PAGE.replace("<!-- end -->", "", 1))
    with pytest.raises(SystemExit) as caught:
        evidence.main([])
    assert caught.value.code == 2 and "a block of README.md has no end" in capsys.readouterr().err
    assert (root / "README.md").read_text() == PAGE.replace("<!-- end -->", "", 1)


def test_make_report_draws_pictures_anew(root, capsys):
    path = report(root, drawing=BARS)
    evidence.main([])
    assert list(differences(root)) == []
    picture, other = path.with_suffix(".png"), BARS | {"numbers": BARS["numbers"] | {"values": [[1, 2], [3, 5]]}}
    before = picture.read_bytes()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drawing": other}))
    (line,) = differences(root)
    assert line == f"{picture.relative_to(root)} does not show the numbers of its report; run make report"
    evidence.main([])
    assert list(differences(root)) == [] and picture.read_bytes() != before
    picture.unlink()
    with pytest.raises(SystemExit):
        evidence.main(["--check"])
    evidence.main([])
    assert picture.exists() and "1 parts changed" in capsys.readouterr().out


def test_a_report_that_is_no_json_is_named(root, capsys):
    report(root).write_text("{")
    with pytest.raises(SystemExit) as caught:
        evidence.main(["--check"])
    assert caught.value.code == 2 and "speed_cpu.json is no report" in capsys.readouterr().err


def test_a_report_is_complete(root):
    path = report(root, drawing=BARS)
    content = json.loads(path.read_text())
    words = "--steps 3 --out=runs --flags '--data_dir text --steps=3'"  # without folders of this machine
    assert content["command"] == f"python -m benchmarks.speed {words}" and content["versions"].startswith("torch ")
    assert content["commit"] == git(root, "rev-parse", "--short=10", "HEAD").strip()
    page = evidence.page_of(content)
    assert "at commit " + content["commit"] in page and "](2026-01-01_000000_speed_cpu.png)" in page
    assert list(problems(root)) == []


@pytest.mark.parametrize("key", ["command", "commit", "versions", "measures", "results", "drawing"])
def test_a_report_without_its_origin_is_found(root, key):
    report(root, drawing=BARS, changes={key: None})
    assert list(problems(root)) == [f"2026-01-01_000000_speed_cpu.json has no {key}"]


def test_a_file_without_json_beside_it_is_found(root):
    for name in ("2026-01-01_typed_by_hand.md", "2026-01-01_000000_speed_cpu.md", "2026-01-01_curves.png"):
        (root / REPORTS / name).write_text("text")
    assert [line.split()[0] for line in problems(root)] == sorted(path.name for path in (root / REPORTS).iterdir())


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("package/code.py", "return 1 ", "return 3 ", True),
        ("package/code.py", "def measured()", "def renamed()", True),
        ("package/code.py", CODE, "", True),
        ("package/code.py", "return 2", "return 4", False),  # of another function
        ("package/code.py", "a comment", "another one", False),
        ("package/code.py", '"""Words."""', '"""Other words."""', False),
        ("package/code.py", '    """Words."""\n', "", False),
        ("package/table.txt", "1", "2", True),
        ("README.md", "It", "That", False),
    ],
)
def test_a_change_of_what_is_measured_makes_a_report_old(root, file, old, new, stale):
    path = report(root, measures=["package/code.py:measured", "package/table.txt"])
    (root / file).write_text((root / file).read_text().replace(old, new))
    expected = [file] if stale else []
    assert changed_since(root, "HEAD", ["package/code.py:measured", "package/table.txt"]) == expected
    commit(root)
    lines = list(problems(root))
    assert len(lines) == stale and all(f"{path.name} is older than {file};" in line for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "stale"), [("CONSTANT = 1", "CONSTANT = 2", True), ("return 1 ", "return 3 ", False)]
)
def test_a_constant_is_measured_by_its_name(root, old, new, stale):
    report(root, measures=["package/code.py:CONSTANT"])
    (root / "package/code.py").write_text(CODE.replace(old, new))
    assert len(list(problems(root))) == stale


def test_a_folder_is_measured_with_all_its_files(root):
    report(root, measures=["package"])
    (root / "package/code.py").write_text(CODE.replace("return 2", "return 4"))
    assert "older than package/code.py" in next(problems(root))
    (root / "package/code.py").unlink()
    assert "older than package/code.py" in next(problems(root))


def test_a_path_that_does_not_exist_is_found(root):
    report(root, measures=["package/cod.py"])
    assert "older than package/cod.py" in next(problems(root))


def test_a_report_can_be_revalidated_with_a_reason(root):
    path = report(root)
    (root / "package/code.py").write_text(CODE.replace("return 1 ", "return int(1) "))
    commit(root)
    head = git(root, "rev-parse", "HEAD").strip()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"revalidated": {"commit": head}}))
    assert list(problems(root)) == [f"{path.name} has no reason"]
    path.write_text(json.dumps(content | {"revalidated": {"commit": head, "reason": "the same number"}}))
    assert list(problems(root)) == []
    (root / "package/code.py").write_text(CODE.replace("return 1 ", "return 2 "))
    assert "is older than package/code.py" in next(problems(root))


def test_only_changes_of_what_is_measured_make_a_report_dirty(root):
    report(root)
    (root / "README.md").write_text("changed")
    assert "dirty" not in json.loads(report(root, at="2026-01-02_000000").read_text())["commit"]
    (root / "package/code.py").write_text(CODE + "\n# unfinished\n")
    assert json.loads(report(root, at="2026-01-03_000000").read_text())["commit"].endswith("-dirty")
    assert [line for line in problems(root) if "uncommitted changes" in line] == list(problems(root))


def test_an_unknown_commit_is_found(root):
    report(root, changes={"commit": "0123456789"})
    assert "0123456789, which is unknown here" in next(problems(root))


def test_a_run_is_recorded_with_its_loss_on_the_whole_validation_split(data_dir, tmp_path, capsys):
    run = train(
        data_dir, tmp_path / "demo", ["--sample_prompts", "def ", "class "], eval_blocks=2, sample_max_new_tokens=4
    )
    (run / "commits.txt").write_text("1234567890\n1234567890\n")  # as eval.ablation does
    record.main(
        ["--run", str(run), "--data", str(data_dir), "--output", str(tmp_path / "reports"), "--length_factors", "2"]
    )
    (page,) = (tmp_path / "reports").glob("*_record_demo_cpu.md")
    content = json.loads(page.with_suffix(".json").read_text())
    results, summary = content["results"], json.loads((run / "summary.json").read_text())
    blocks = PackedBlocks(data_dir, "validation")
    assert results["eval_loss"] == pytest.approx(evaluate_loss(load_model(str(run)), blocks, batch_size=1), abs=1e-6)
    assert results["eval_loss"] != summary["eval_loss"] and results["tokens_seen"] == summary["tokens_seen"]
    longer = PackedBlocks(data_dir, "validation", 2 * blocks.block_size)
    expected = evaluate_loss(load_model(str(run)), longer, batch_size=1)
    assert results["lengths"][0]["loss"] == pytest.approx(expected, abs=1e-6) != results["eval_loss"]
    assert [each["prompt"] for each in results["samples"]] == ["def ", "class "] and len(results["rates"]) == 8
    assert content["commit"].split(", ")[0] == "1234567890" and content["commit"].count("1234567890") == 1
    assert results["settings"]["eval_blocks"] == 2 and "`" in page.read_text().split("Settings of the training: ")[1]
    assert "recipes/demo.yaml" in content["measures"] and content["command"].startswith("python -m eval.record --run")
    assert f"| eval_loss | {results['eval_loss']:.3f} |" in page.read_text() and content["picture"] in page.read_text()
    assert str(tmp_path) not in page.with_suffix(".json").read_text() + page.read_text()


def test_a_run_that_is_not_finished_is_not_recorded(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        record.main(["--run", str(tmp_path), "--data", str(data_dir), "--output", str(tmp_path / "reports")])
    assert caught.value.code == 2 and "has no summary.json; finish the run" in capsys.readouterr().err
