"""Flags and YAML are typed alike, shipped recipes are found by name, and every mistake is one line, exit code 2."""

import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from gpt2modern.cli import find_recipe, one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError


@dataclass
class Example:
    config: str | None = None
    steps: int = field(default=10, metadata={"help": "steps"})
    learning_rate: float = 0.1
    schedule: Literal["cosine", "linear"] = "cosine"
    precision: Literal["no", "bf16"] = "bf16"
    files: list[str] = field(default_factory=list)
    compile: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be at least 1")


def parse(tmp_path, yaml_text, *flags):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml_text)
    return parse_arguments(Example, ["--config", str(path), *flags])


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    parsed = parse(tmp_path, "steps: 20\nlearning_rate: 3e-4\n", "--steps", "30")
    assert (parsed.steps, parsed.learning_rate, parsed.schedule) == (30, 3e-4, "cosine")


def test_yaml_lists_and_booleans_arrive_typed(tmp_path):
    parsed = parse(tmp_path, "files: [a.txt, b.txt]\ncompile: true\n")
    assert parsed.files == ["a.txt", "b.txt"] and parsed.compile is True


def test_a_bare_no_is_the_choice_and_not_false(tmp_path):
    assert parse(tmp_path, "precision: no\n").precision == "no"


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
@pytest.mark.parametrize(
    ("yaml_text", "expected"),
    [
        ("stepps: 3", "unknown key 'stepps' (did you mean 'steps'?)"),
        ("steps: many", "invalid int value: 'many'"),
        ("steps: 2.5", "invalid int value: '2.5'"),
        ("steps: true", "invalid int value: 'true'"),
        ("schedule: wsd", "invalid choice: 'wsd'"),
        ("steps: [1, 2]", "the key 'steps' is ['1', '2']; give "),
        ("steps: [1]", "the key 'steps' is ['1']; give "),
        ("files: []", "the key 'files' is []; give "),
        ("steps: 1\nsteps: 2", "'steps' is given twice"),
        ("steps:", "the key 'steps' is None; give "),
        ("- 1", "must have 'flag: value' lines, but its content is of type list"),
        ("a: [", "not valid YAML"),
        ("steps: 0", "--steps 0 must be at least 1"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(tmp_path, yaml_text, expected):
    with pytest.raises(GPT2ModernError) as caught:
        parse(tmp_path, yaml_text)
    assert expected in str(caught.value)


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--step", "3"], "unknown argument '--step' (did you mean '--steps'?)"),
        (["--learning_rte=3"], "(did you mean '--learning_rate'?)"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_nearest_one(flags, expected):
    with pytest.raises(GPT2ModernError) as caught:
        parse_arguments(Example, flags)
    assert expected in str(caught.value)


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    assert find_recipe("demo").read_text() == shipped.read_text()


def test_a_file_wins_over_a_shipped_recipe_and_a_path_is_never_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("demo.yaml", "recipes/demo", "nowhere/at/all.yaml"):
        assert find_recipe(path) == Path(path)
    Path("demo").write_text("steps: 3\n")
    assert parse_arguments(Example, ["--config", "demo"]).steps == 3


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
def test_a_folder_of_the_same_name_does_not_hide_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo").name == "demo.yaml"


def test_an_unknown_recipe_is_refused_with_the_shipped_ones():
    with pytest.raises(GPT2ModernError, match=r"--config dmeo: no such file or recipe; .*\bdemo\b"):
        parse_arguments(Example, ["--config", "dmeo"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (GPT2ModernError("first\n  second"), 2, "error: first second\n"),
        (KeyboardInterrupt(), 130, "error: interrupted by the user (Ctrl-C)\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x cannot be used (Permission denied)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", 300 * "x"), 2, f"error: {200 * 'x'} cannot be used (File"),
    ],
)
def test_errors_and_interruptions_are_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == code
    found = capsys.readouterr().err
    assert found.startswith(line) and found.index("\n") == len(found) - 1


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(errno.EBADF, "Bad file descriptor")])
def test_defects_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error
