"""What the documentation shows exists: commands, flags, files, recipes, settings."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.attention import AttentionConfig
from benchmarks.precision import PrecisionCheckConfig
from benchmarks.scaling import ScalingConfig
from benchmarks.targets import TargetsConfig
from benchmarks.throughput import LadderConfig
from eval.compare import CompareConfig
from eval.generate import GenerateConfig
from eval.perplexity import PerplexityConfig
from eval.playground import PlaygroundConfig
from eval.record import RecordConfig
from eval.run import RunConfig
from gpt2modern.cli import parse_arguments
from gpt2modern.conversion.convert import ConversionConfig
from gpt2modern.conversion.gguf import GGUFConfig
from gpt2modern.data.exporting import ExportConfig
from gpt2modern.data.publishing import ReportConfig
from gpt2modern.training.models import parse_config_overrides
from modeling_gpt2modern import GPT2ModernConfig
from prepare_data import PrepareConfig
from train_accelerate import TrainConfig

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]
}
README = PAGES["README.md"]
ARGUMENTS = {
    "prepare_data.py": PrepareConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "train_accelerate.py": TrainConfig,
    "eval.compare": CompareConfig,
    "eval.generate": GenerateConfig,
    "eval.perplexity": PerplexityConfig,
    "eval.playground": PlaygroundConfig,
    "eval.record": RecordConfig,
    "eval.hellaswag": RunConfig,
    "eval.lambada": RunConfig,
    "eval.run": RunConfig,
    "benchmarks.attention": AttentionConfig,
    "benchmarks.precision": PrecisionCheckConfig,
    "benchmarks.scaling": ScalingConfig,
    "benchmarks.targets": TargetsConfig,
    "benchmarks.throughput": LadderConfig,
    "gpt2modern.conversion": ConversionConfig,
    "gpt2modern.conversion.gguf": GGUFConfig,
}


def shell_commands(text):
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"prepare_data.py (export|report)", r"\1", line) for line in lines]
    commands = [re.sub(r"eval.compare (?=out)", "eval.compare --run ", line) for line in commands]
    commands = [line for line in commands if " verify " not in line]  # which takes folders, no flags
    return [line for line in commands if ARGUMENTS.keys() & set(shlex.split(line, comments=True))]


def test_the_readme_shows_every_command():
    shown = " ".join(shell_commands(README))
    assert all(program in shown for program in ARGUMENTS)


@pytest.mark.parametrize("line", [line for text in PAGES.values() for line in shell_commands(text)])
def test_a_command_has_flags_that_exist(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)
    position = next(index for index, word in enumerate(words) if word in ARGUMENTS)
    for name in re.findall(r"--train_file (\S+)", line):  # stands for the reader's own file
        (tmp_path / name).write_text("text")
    for name in re.findall(r"--model (\S+)", line):  # a folder that an earlier command has made
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    configurations = [word for word in words if word.startswith(("recipes/", "accelerate_configs/"))]
    for path in configurations:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((REPOSITORY / path).read_text())
    monkeypatch.chdir(tmp_path)
    parse_arguments(ARGUMENTS[words[position]], words[position + 1 :])


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_a_model_that_exists(recipe):
    parsed = parse_arguments(TrainConfig, ["--config", str(recipe), "--data_dir", "data", "--output_dir", "out"])
    GPT2ModernConfig.from_preset(parsed.model_preset, **parse_config_overrides(parsed.config_overrides))


def table_of(section):
    """The first cells of the rows of the table in a section of README, every name between backquotes."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_table_of_recipes_lists_all_of_them():
    assert table_of("Recipes") == {path.stem for path in REPOSITORY.glob("recipes/*.yaml")}


def test_the_table_of_settings_lists_the_model_s_own():
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
    others = {"max_position_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    own = {name for name in GPT2ModernConfig.__annotations__ if not name.startswith(("model_", "keys_", "base_model"))}
    assert table_of("Model settings") == own - sizes - others


def test_the_tree_lists_every_file_with_a_comment():
    tree = README.split("## Files\n")[1].split("```\n")[1]
    listed, folder = set(), []
    for line in tree.splitlines():
        name, _, comment = line.strip().partition("  ")
        assert comment.strip(), f"{name} has no comment"
        depth = (len(line) - len(line.lstrip())) // 4
        folder = [*folder[:depth], name]
        if not name.endswith("/"):
            listed.add("".join(folder))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    folders = (
        "modeling_gpt2modern/",
        "gpt2modern/",
        "eval/",
        "benchmarks/",
        "examples/",
        "docs/",
        "tests/support/",
        "tests/structure.py",
    )
    expected = {name for name in tracked if name.startswith(folders) and name.endswith((".py", ".md"))}
    expected |= {name for name in tracked if "/" not in name and name.endswith(".py")}
    expected = {name for name in expected if not name.endswith("__init__.py") and not name.startswith("eval/reports/")}
    assert listed == expected


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    folder = REPOSITORY if page == "README.md" else REPOSITORY / "docs"
    for path in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]+)?\)", PAGES[page]):
        assert (folder / path).exists(), path
