"""What the documentation shows exists: commands, flags, files, recipes; and imports point one way."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.loss import LossBenchmarkConfig
from benchmarks.precision import PrecisionCheckConfig
from benchmarks.throughput import ThroughputConfig
from eval.generate import GenerateConfig
from eval.perplexity import PerplexityConfig
from gpt2modern.cli import parse_arguments
from gpt2modern.conversion.convert import ConversionConfig
from prepare_data import PrepareConfig
from train_accelerate import TrainConfig

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
ARGUMENTS = {
    "prepare_data.py": PrepareConfig,
    "train_accelerate.py": TrainConfig,
    "eval.generate": GenerateConfig,
    "eval.perplexity": PerplexityConfig,
    "benchmarks.loss": LossBenchmarkConfig,
    "benchmarks.precision": PrecisionCheckConfig,
    "benchmarks.throughput": ThroughputConfig,
    "gpt2modern.conversion": ConversionConfig,
}
# A file may import what stands above it in this list, and nothing of the project that stands below.
LAYERS = ["command_line", "preparation", "modeling_gpt2modern", "training", "eval", "train_accelerate"]


def shell_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if " verify " not in line]  # which takes folders, no flags
    return [line for line in commands if ARGUMENTS.keys() & set(shlex.split(line, comments=True))]


def test_the_readme_shows_every_command():
    shown = " ".join(shell_commands())
    assert all(program in shown for program in ARGUMENTS)


@pytest.mark.parametrize("line", shell_commands())
def test_the_readmes_commands_have_flags_that_exist(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)
    position = next(index for index, word in enumerate(words) if word in ARGUMENTS)
    for name in re.findall(r"--train_file (\S+)", line):  # stands for the reader's own file
        (tmp_path / name).write_text("text")
    for name in re.findall(r"--model (\S+)", line):  # a folder that an earlier command has made
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    configurations = [word for word in words if word.startswith(("recipes/", "accelerate_configs/"))]
    for path in configurations:
        assert (REPOSITORY / path).is_file()
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((REPOSITORY / path).read_text())
    monkeypatch.chdir(tmp_path)
    parse_arguments(ARGUMENTS[words[position]], words[position + 1 :])


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse_and_name_models_that_exist(recipe):
    from gpt2modern.training.models import parse_config_overrides
    from modeling_gpt2modern import GPT2ModernConfig

    parsed = parse_arguments(TrainConfig, ["--config", str(recipe), "--data_dir", "data", "--output_dir", "out"])
    GPT2ModernConfig.from_preset(parsed.model_preset, **parse_config_overrides(parsed.config_overrides))


def test_the_readme_names_every_module():
    modules = [*REPOSITORY.glob("*.py")]
    for package in ("preparation", "modeling_gpt2modern", "training", "eval"):
        modules += REPOSITORY.glob(f"{package}/*.py")
    missing = [path.stem for path in modules if path.stem != "__init__" and path.stem not in README]
    assert not missing


def test_the_readmes_files_and_numbers_of_lines_hold():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (REPOSITORY / path).exists(), path
    assert len(README.splitlines()) <= 200


def project_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", [*LAYERS, "prepare_data"])
def test_imports_point_one_way(layer):
    allowed = {"command_line", "preparation"} if layer == "prepare_data" else set(LAYERS[: LAYERS.index(layer) + 1])
    project = {*LAYERS, "prepare_data"}
    files = [REPOSITORY / f"{layer}.py"] if (REPOSITORY / f"{layer}.py").exists() else (REPOSITORY / layer).glob("*.py")
    for path in files:
        upward = set(project_imports(path)) & (project - allowed)
        assert not upward, f"{path.name} imports {upward}"


@pytest.mark.parametrize(
    "script",
    [
        "prepare_data.py", "train_accelerate.py", "eval/perplexity.py", "eval/generate.py", "eval/throughput.py",
        "eval/precision_check.py", "eval/measuring.py", "eval/data_benchmark.py", "eval/data_corpora.py",
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported_before_it_is_needed(script):
    """`--help` has to answer at once: torch alone takes a second."""
    heavy = {"torch", "datasets", "accelerate", "numpy", "pyarrow", "gigatoken", "tokenizers", "matplotlib"}
    heavy |= {"modeling_gpt2modern", "training"}
    tree = ast.parse((REPOSITORY / script).read_text())
    at_import = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not at_import & heavy
