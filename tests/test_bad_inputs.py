"""Every wrong input of tests/support/bad_inputs.py is answered with one line and exit code 2, and leaves nothing."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from eval import generate, perplexity
from prepare_data import main as prepare
from tests.support import bad_inputs
from tests.support.bad_inputs import CONVERT, PAGE, PREPARE, REPORT, TABLE, TRAIN, VERIFY
from tests.support.folders import change_json, change_tensors
from tests.support.models import export_fresh_model
from tests.support.trainer import REPOSITORY

MODULES = {
    TRAIN: "train_accelerate",
    PREPARE: "prepare_data",
    VERIFY: "prepare_data",
    REPORT: "prepare_data",
    CONVERT: "gpt2modern.conversion.convert",
}
RECIPES = {
    "typo.yaml": "sed: 1\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "tag.yaml": "seed: !!python/object/apply:os.mkdir [made_by_yaml]\n",
    "tab.yaml": "seed: 1\n\tmax_steps: 2\n",
    "nested.yaml": "training:\n  seed: 1\n",
    "deep.yaml": "seed: " + "[" * 2000 + "]" * 2000,
    "list.yaml": "- 1\n",
    "no_value.yaml": "seed:\n",
    "list_in_list.yaml": "sample_prompts: [[a], b]\n",
    "latin.yaml": b"project: caf\xe9\n",
    "nan.yaml": "learning_rate: nan\n",
    "digits.yaml": "seed: " + "9" * 5000,
    "hexadecimal.yaml": "seed: 0x" + "f" * 5000,
    "date.yaml": "seed: 2024-99-99\n",
    "date_key.yaml": "2024-99-99: 1\n",
    "no_digits.yaml": "seed: !!int ''\n",
    "no_pairs.yaml": "seed: !!map [1]\n",
}
TEXTS = {
    "text.txt": "a cat\na mat\na hat\n",
    "empty.txt": "",
    "latin.txt": b"caf\xe9 au lait",
    "table.xyz": "text\na\n",
    "broken.jsonl": "{oops\n",
    "body.jsonl": '{"body": "a"}\n',
    "label.jsonl": '{"ctx": "", "ctx_a": "", "ctx_b": "", "activity_label": "", "endings": ["a", "b"], "label": 2}\n',
}


def add_token(folder: Path) -> None:
    """Make "def" token 300, the first that a vocabulary of 300 does not have."""
    added = {"id": 300, "content": "def", "single_word": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "special": True}
    change_json(folder / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(added))


class MakesAFolder:
    def __reduce__(self):
        return os.mkdir, ("made_by_pickle",)


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": MakesAFolder()}, folder / "pytorch_model.bin")


def need_own_code(folder: Path) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    change_json(folder / "config.json", lambda config: config.update(model_type="evil", auto_map=names))
    (folder / "evil.py").write_text("import os\nos.mkdir('made_by_remote_code')\n")


SPOILED_MODELS = {
    "bloom": lambda folder: change_json(folder / "config.json", lambda config: config.update(model_type="bloom")),
    "gpt2_config": lambda folder: change_json(folder / "config.json", lambda config: config.update(model_type="gpt2")),
    "other_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "larger_tokenizer": add_token,
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half_weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "lost_tensor": lambda folder: change_tensors(
        folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight")
    ),
    "not_numbers": lambda folder: change_tensors(
        folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))
    ),
    "other_width": lambda folder: change_json(
        folder / "config.json", lambda config: config.update(intermediate_size=8)
    ),
    "own_code": need_own_code,
    "pickled": pickle_weights,
    "quantized": lambda folder: change_json(
        folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4})
    ),
    "broken_config": lambda folder: (folder / "config.json").write_text("{"),
}


def write_checkpoint(folder: Path, model: Path, names: dict[str, str]) -> None:
    shutil.copytree(model, folder)
    for name in ("optimizer.safetensors", "trainer_state.json"):
        (folder / name).write_text("{}")
    sums = dict.fromkeys(("model.safetensors", "optimizer.safetensors", "trainer_state.json"), "0" * 64)
    (folder / "checksums.json").write_text(json.dumps(names | sums))


@pytest.fixture(scope="module")
def places(data_dir, tmp_path_factory) -> Path:
    """Make the folder that the cases run in: sound data and models, and spoiled ones."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(data_dir, folder / "data")
    export_fresh_model(data_dir, folder / "model", "modern")
    export_fresh_model(data_dir, folder / "learned", "gpt2")
    for name, spoil in SPOILED_MODELS.items():
        spoil(shutil.copytree(folder / "model", folder / name))
    for name, text in (RECIPES | TEXTS).items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "loop").symlink_to("loop")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "README.md").write_text("precious")
    write_checkpoint(folder / "escaping", folder / "model", {"../model/model.safetensors": "0" * 64})
    write_checkpoint(folder / "altered", folder / "model", {})
    for name in ("broken_tokenizer", "damaged_tokenizer"):
        shutil.copytree(data_dir / "tokenizer", folder / name)
    (folder / "broken_tokenizer" / "tokenizer.json").write_text("{")
    change_json(
        folder / "damaged_tokenizer" / "tokenizer.json",
        lambda tokenizer: tokenizer["model"]["vocab"].update(zzz=4_000_000_000),
    )
    for name in ("escaping_data", "cut_data", "no_bytes", "odd_source"):
        shutil.copytree(data_dir, folder / name)
    shard = json.loads((data_dir / "manifest.json").read_text())["splits"]["validation"]["shards"][0]
    change_json(
        folder / "escaping_data" / "manifest.json",
        lambda manifest: manifest["files"].update({"../data/x.arrow": {"size": 1, "sha256": "0"}}),
    )
    change_json(
        folder / "no_bytes" / "manifest.json", lambda manifest: manifest["splits"]["validation"].update(bytes=0)
    )
    change_json(folder / "odd_source" / "manifest.json", lambda manifest: manifest["source"].update(name=[3]))
    os.truncate(folder / "cut_data" / shard["path"], 100)
    return folder


@pytest.fixture
def kept_environment():
    """Put back the variables of a launch that Accelerate leaves behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(path.relative_to(folder)), path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()
    ) + sorted((str(path.relative_to(folder)), 0) for path in folder.rglob("*") if path.is_dir())


CASES = [case for cases in TABLE.values() for case in cases]


def answer(case, capfd):
    """Run a case in the current folder and return its (exit code, stdout, stderr)."""
    module = MODULES.get(case.command, case.command)
    if case.without:  # as it would be imported there
        code = f"import sys; sys.modules[{case.without!r}] = None; import {module}; {module}.main()"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code, *case.argv]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout, result.stderr
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as caught:
        main(case.argv)
    return caught.value.code, *capfd.readouterr()


@pytest.mark.fault("F15 a wrong flag, recipe or batch size")
@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w.=-]+", "_", case.typed)[:80])
def test_a_wrong_input_is_one_line_and_leaves_nothing(case, places, capfd, kept_environment, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(places)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    before = tree(places)
    code, output, errors = answer(case, capfd)
    lines = errors.splitlines()
    assert code == 2
    assert lines[-1].startswith("error: ") and case.error in lines[-1], lines[-1]
    assert errors.count("error: ") == 1 and "Traceback" not in errors + output
    assert tree(places) == before


@pytest.mark.parametrize(
    "command",
    [
        "train_accelerate.py --config demo", "prepare_data.py verify data", "-m eval.perplexity --model a --data b",
        "-m eval.generate --model a --prompt b", "-m gpt2modern.conversion --model a --output_dir b",
    ],
)  # fmt: skip
def test_a_deleted_working_directory_is_one_line(tmp_path, command):
    """torch ends the process there with a message of MKL, transformers with a traceback."""
    python = f"{sys.executable} {command.replace('train', f'{REPOSITORY}/train', 1)}"
    python = python.replace(" prepare", f" {REPOSITORY}/prepare")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        ["sh", "-c", f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {python}"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "error: the current folder was deleted; change to an existing one with cd\n"


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == bad_inputs.page(), "python -m tests.support.bad_inputs writes it anew"


def test_the_sound_inputs_are_accepted(places, tmp_path, monkeypatch, capsys):
    """What the cases spoil would work: no case is refused for another reason than its own."""
    monkeypatch.chdir(places)
    generate.main(["--model", "model", "--prompt", "def ", "--max_new_tokens", "2"])
    perplexity.main(["--model", "model", "--data", "data"])
    prepare(["verify", "data"])
    assert "all files are valid (sha256 as recorded)" in capsys.readouterr().out
