"""Tokens stay where they are, files have their user's modes, nothing of a folder runs, nothing lies outside of it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ENVIRONMENT, TINY, command

from training.checkpoints import find_problem, save_checkpoint

ROOT = Path(__file__).parents[1]
MARKER = "hf_ThisIsTheSecretOfTheTest"
SECRETS = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), MARKER)


def modules() -> list[Path]:
    folders = ("modeling_gpt2modern", "preparation", "training", "eval")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]


def dangers(source: str) -> list[str]:
    """Calls that run what a user, a file or the network has written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen") or name.startswith(("pickle.", "marshal.", "shelve.")):
            found.append(name)
        if keywords.get("shell") == "True" or keywords.get("trust_remote_code") == "True":
            found.append(ast.unparse(node))
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(name)
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") and "UniqueKeys" not in ast.unparse(node):
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_no_text_is_run_as_code(path):
    """command_line.UniqueKeys derives from yaml.SafeLoader."""
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line", ["eval(x)", "os.system(x)", "run(x, shell=True)", "torch.load(x)", "yaml.load(x, Loader)", "pickle.load(x)"]
)
def test_such_a_call_would_be_found(line):
    assert dangers(line)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_a_run_leaves_no_token_no_other_modes_and_nothing_outside_of_its_folder(data_dir, tmp_path, umask):
    """With two trackers and an upload that fails; HOME and the working directory are fresh."""
    home, output_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    flags = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "push_to_hub": True, "hub_model_id": "nobody/nothing"}
    kept = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("HF_", "XDG_", "TRACKIO"))}
    result = subprocess.run(
        [*command(data_dir, output_dir, config_overrides=TINY, **flags), "--report_to", "tensorboard", "trackio"],
        cwd=home,
        env=kept | SECRETS | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        umask=umask,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (output_dir / "model.safetensors") in files and (output_dir / "tensorboard").is_dir()
    assert [path for path in files if MARKER.encode() in path.read_bytes()] == []
    assert MARKER not in result.stdout + result.stderr
    outside = {path.relative_to(home).parts[0] for path in home.rglob("*") if path.is_file()}
    assert outside <= {".cache", ".config"}, outside
    for path in output_dir.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, f"{path.name}: {oct(path.stat().st_mode)}"


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(
        folder,
        step,
        save_model=lambda path: (path / "model.safetensors").write_text("weights"),
        optimizer_state={},
        trainer_state={"step": step},
        save_total_limit=1,
    )


def test_rotation_does_not_follow_a_link_out_of_the_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("precious")
    save(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints" / "step_0000001").symlink_to(elsewhere)
    save(tmp_path / "checkpoints", 3)
    assert os.listdir(tmp_path / "checkpoints") == ["step_0000003"]
    assert (elsewhere / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_checksums_name_nothing_outside_of_the_checkpoint(tmp_path, name):
    import json

    (tmp_path / "secret").write_text("secret")
    checkpoint = save(tmp_path / "checkpoints", 1)
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    (checkpoint / "checksums.json").write_text(json.dumps({name: "0" * 64} | checksums))
    assert "is outside of the checkpoint" in find_problem(checkpoint)


def test_code_of_a_model_folder_is_not_run(data_dir, tmp_path):
    """Our own model's files stand beside its weights for others; here they are not even read."""
    from test_eval import export_fresh_model

    folder = export_fresh_model(data_dir, tmp_path / "model", "modern")
    for path in folder.glob("*.py"):
        path.write_text("import os\nos.mkdir('made_by_remote_code')\n")
    code = (
        "from eval import generate, perplexity; from modeling_gpt2modern import conversion_gpt2modern as conversion\n"
        "import sys; model, data = sys.argv[1:]\n"
        "generate.main(['--model', model, '--prompt', 'def', '--max_new_tokens', '2'])\n"
        "perplexity.main(['--model', model, '--data', data])\n"
        "conversion.main(['--model', model, '--output_dir', model + '_native'])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(data_dir)],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert (tmp_path / "model_native" / "config.json").exists()
    assert not (tmp_path / "made_by_remote_code").exists()
