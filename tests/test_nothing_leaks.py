"""No token is written, files have their user's modes, no code of a folder runs, nothing is written outside of it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2modern.data.manifest import read_tokenizer_files
from gpt2modern.training.checkpoints import find_problem, save_checkpoint
from tests.support.trainer import ENVIRONMENT, REPOSITORY, TINY, command, train

MARKER = "hf_ThisIsTheSecretOfTheTest"
SECRETS = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), MARKER)


def modules() -> list[Path]:
    folders = ("modeling_gpt2modern", "gpt2modern", "eval", "benchmarks")
    return [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))]


def dangers(source: str) -> list[str]:
    """List the calls that run what a user, a file or the network has written."""
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


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_text_is_run_as_code(path):
    """gpt2modern.cli._UniqueKeys derives from yaml.SafeLoader."""
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line", ["eval(x)", "os.system(x)", "run(x, shell=True)", "torch.load(x)", "yaml.load(x, Loader)", "pickle.load(x)"]
)
def test_such_a_call_would_be_found(line):
    assert dangers(line)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_a_run_leaves_no_token_and_writes_in_its_folder_only(data_dir, tmp_path, umask):
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
    (tmp_path / "secret").write_text("secret")
    checkpoint = save(tmp_path / "checkpoints", 1)
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    (checkpoint / "checksums.json").write_text(json.dumps({name: "0" * 64} | checksums))
    assert "is outside the checkpoint" in find_problem(checkpoint)


def test_code_of_a_model_folder_is_not_run(data_dir, tmp_path):
    """Our own model's files stand beside its weights for others; here they are not even read."""
    folder = train(data_dir, tmp_path / "model", max_steps=1, warmup_steps=0, save_steps=0)
    for path in folder.glob("*.py"):
        path.write_text("import os\nos.mkdir('made_by_remote_code')\n")
    code = (
        "import runpy, sys; from eval import generate, perplexity; model, data = sys.argv[1:]\n"
        "generate.main(['--model', model, '--prompt', 'def', '--max_new_tokens', '2'])\n"
        "perplexity.main(['--model', model, '--data', data])\n"
        "sys.argv[1:] = ['--model', model, '--output_dir', model + '_native']\n"
        "runpy.run_module('gpt2modern.conversion', run_name='__main__')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(data_dir)],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert (tmp_path / "model_native" / "config.json").exists()
    assert not (tmp_path / "made_by_remote_code").exists()


def copied(data_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(data_dir, folder))


def test_only_the_tokenizer_of_a_data_folder_goes_into_a_model(data_dir, tmp_path):
    """Weights, code and checksums that lie beside the tokenizer would replace those of the run."""
    data = copied(data_dir, tmp_path / "data")
    for name in ("model.safetensors", "config.json", "evil.py", "checksums.json", "optimizer.safetensors"):
        (data / "tokenizer" / name).write_text("not yours")
    run = train(data, tmp_path / "run", max_steps=2, save_steps=1)
    assert not any("not yours" in path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    assert find_problem(run / "checkpoints" / "step_0000002") is None and not (run / "evil.py").exists()


def test_a_link_in_the_tokenizers_folder_makes_nothing_public(data_dir, tmp_path, capsys):
    data = copied(data_dir, tmp_path / "data")
    (tmp_path / "private").write_text(MARKER)
    (data / "tokenizer" / "chat_template.jinja").symlink_to(tmp_path / "private")
    with pytest.raises(SystemExit) as caught:
        train(data, tmp_path / "run")
    assert caught.value.code == 2 and "chat_template.jinja is a link to a file outside of" in capsys.readouterr().err


def test_a_snapshot_of_the_hubs_cache_is_links_to_its_blobs(data_dir, tmp_path):
    snapshot = copied(data_dir, tmp_path / "datasets--me--mine" / "snapshots" / "c0ffee")
    blob = tmp_path / "datasets--me--mine" / "blobs" / "1"
    blob.parent.mkdir()
    (snapshot / "tokenizer" / "tokenizer.json").replace(blob)
    (snapshot / "tokenizer" / "tokenizer.json").symlink_to(blob)
    assert read_tokenizer_files(snapshot)["tokenizer.json"] == blob.read_bytes()


def test_an_altered_tokenizer_is_refused_at_the_start(data_dir, tmp_path, capsys):
    data = copied(data_dir, tmp_path / "data")
    content = (data / "tokenizer" / "tokenizer.json").read_bytes()
    (data / "tokenizer" / "tokenizer.json").write_bytes(content.replace(b'"version"', b'"Version"', 1))
    with pytest.raises(SystemExit) as caught:
        train(data, tmp_path / "run")
    assert (
        caught.value.code == 2
        and "tokenizer.json: the file was altered since it was written" in capsys.readouterr().err
    )


def test_a_run_needs_the_data_folder_for_its_tokens_only(data_dir, tmp_path):
    """The tokenizer is read when the run begins: a folder that vanishes (blocks stay mapped) costs no checkpoint."""
    data = copied(data_dir, tmp_path / "data")

    def vanish(event: str, **details) -> None:
        if event == "saving":
            shutil.rmtree(data / "tokenizer", ignore_errors=True)

    run = train(data, tmp_path / "run", max_steps=2, save_steps=1, callback=vanish)
    assert (run / "tokenizer.json").read_bytes() == (data_dir / "tokenizer" / "tokenizer.json").read_bytes()
    assert (run / "checkpoints" / "step_0000002" / "tokenizer.json").is_file()


def test_a_finished_run_is_exported_again(data_dir, tmp_path):
    """Only its checkpoints and metrics.jsonl are left in its folder."""
    run = train(data_dir, tmp_path / "run", max_steps=3, save_steps=3)
    for path in run.iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    assert (train(data_dir, tmp_path / "run", max_steps=3, save_steps=3) / "model.safetensors").is_file()
