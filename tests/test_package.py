"""The project as pip installs it: names, commands, package data, declared dependencies."""

import ast
import configparser
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
OURS = {"gpt2modern", "modeling_gpt2modern", "prepare_data", "train_accelerate", "eval", "benchmarks", "tests"}
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True
    )
    for name in names.stdout.split():
        if (REPOSITORY / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_no_generic_name_and_all_package_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"gpt2modern", "modeling_gpt2modern", "prepare_data.py", "train_accelerate.py"}
    for folder in ("recipes", "accelerate_configs", "gpt2modern/templates"):
        expected = {f"gpt2modern/{Path(folder).name}/{path.name}" for path in (REPOSITORY / folder).iterdir()}
        assert expected <= set(names)
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "gpt2modern").rglob("*.py")}
    assert modules <= set(names)


def plain_environment():
    """Return the environment without the checkout in PYTHONPATH, where pip would find the project installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel, whose dependencies are those that run this test."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "venv"), "install", "--no-deps", "-q", str(wheel)]
    subprocess.run(command, check=True, cwd=folder, env=plain_environment())
    dependencies = Path(sys.executable).parents[1] / site.relative_to(folder / "venv")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    for package in ("training", "eval"):  # the user's own, in the folder where he works
        (folder / "work" / package).mkdir(parents=True)
        (folder / "work" / package / "__init__.py").write_text("raise RuntimeError('this is not the project')\n")
    return folder


def run_installed(folder, *command):
    environment = plain_environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = str(folder / "venv" / "bin" / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_installed_commands_work_beside_packages_of_the_same_name_as_our_folders(installed):
    (installed / "work" / "text.txt").write_text("\n\n".join(f"Document {i} says {i * i}." for i in range(400)))
    flags = "--train_file text.txt --sample_by paragraph --train_tokenizer 300 --block_size 32 --output_dir data"
    prepared = run_installed(installed, "gpt2modern-prepare", *flags.split())
    assert prepared.returncode == 0, prepared.stderr
    flags = "--config demo --data_dir data --output_dir run --block_size 32 --total_batch_size 256 --max_steps 2"
    flags += " --per_device_train_batch_size 8 --eval_blocks 4"
    trained = run_installed(installed, "gpt2modern-train", *flags.split())
    assert trained.returncode == 0, trained.stderr
    assert (installed / "work" / "run" / "model.safetensors").is_file()
    code = (
        "import gpt2modern, modeling_gpt2modern\n"
        "for name in gpt2modern.__all__: exec(f'from gpt2modern import {name}')\n"
        "model = load_model('run')\n"
        "print(gpt2modern.__file__, modeling_gpt2modern.__file__, type(model).__name__)\n"
    )
    imported = run_installed(installed, "python", "-c", code)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.count(str(installed)) == 2 and "GPT2ModernForCausalLM" in imported.stdout


def test_every_package_that_is_imported_is_declared():
    requirements = SETUP["options"]["install_requires"] + "".join(SETUP["options.extras_require"].values())
    declared = {re.split(r"[<>=~]", line.strip())[0].lower().replace("_", "-") for line in requirements.splitlines()}
    distributions = packages_distributions()
    missing = set()
    for path in REPOSITORY.rglob("*.py"):
        inside = path.relative_to(REPOSITORY).parts[0]
        if inside not in OURS - {"tests"} and inside not in ("prepare_data.py", "train_accelerate.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - OURS - sys.stdlib_module_names:
                owners = {owner.lower().replace("_", "-") for owner in distributions.get(top, [top])}
                if not owners & declared:
                    missing.add(f"{top} in {path.relative_to(REPOSITORY)}")
    assert not missing


def test_importing_the_model_imports_only_what_gpt2_of_transformers_does():
    """The time of an import is that of its modules: ours adds its own five to 2,500."""
    script = (
        "import sys, transformers.models.gpt2.modeling_gpt2; before = set(sys.modules); import modeling_gpt2modern; "
        "print(*(name for name in set(sys.modules) - before if name.split('.')[0] != 'modeling_gpt2modern'))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
