"""benchmarks.quantised: a trained model and its stock twin in int8 and 4 bit, by torchao and by bitsandbytes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

from benchmarks import quantised
from benchmarks.quantised import WEIGHTS, QuantisedConfig, measure
from eval import evidence
from gpt2modern.errors import GPT2ModernError
from gpt2modern.loading import load_model
from tests.support.trainer import environment, train

MISSING = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra quantise): {', '.join(MISSING)}")
WIDTH, LAYERS = 64, 2  # the width is that of a group of weights with one scale
MATRICES = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 2 * WIDTH)  # of q, k, v, o; gate, up, down
FITS_NO_CPU = "torchao int4"  # its kernels are for GPUs


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory) -> Path:
    """A finished run whose model has a stock twin."""
    sizes = f"hidden_size={WIDTH},num_hidden_layers={LAYERS},num_attention_heads=2,intermediate_size={2 * WIDTH}"
    flags = {"model_preset": "modern-muon", "config_overrides": sizes, "export_stock": "true"}
    return train(data_dir, tmp_path_factory.mktemp("quantised") / "run", max_steps=4, save_steps=0, **flags)


@pytest.fixture
def log_on_stderr():
    """What `load` switches off for the whole process."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_default_handler()
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def config(run, data_dir) -> QuantisedConfig:
    return QuantisedConfig(model=str(run), data=str(data_dir), eval_blocks=4)


@pytest.fixture(scope="module")
def references(config):
    return {folder: measure(config, folder, "bf16") for folder in ("", "stock")}


@needs_packages
@pytest.mark.parametrize("folder", ["", "stock"])
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != FITS_NO_CPU])
def test_a_quantised_model_is_small_and_predicts_as_before(config, references, log_on_stderr, folder, weights):
    """Beside the quantised matrices: scales, which are at most 8 bytes for 64 weights."""
    found, reference = measure(config, folder, weights), references[folder]
    per_weight = {"fp32": 4, "bf16": 2}.get(weights, 1 if "int8" in weights else 0.5)
    saved = MATRICES * (2 - per_weight) if weights != "fp32" else -reference["bytes"]
    scales = 0 if weights in ("fp32", "bf16") else MATRICES // 64 * 8 + 2000
    assert reference["bytes"] - saved <= found["bytes"] <= reference["bytes"] - saved + scales
    differences = np.subtract(found["losses"], reference["losses"])
    assert 0 < np.abs(differences).max() < 0.05 if weights != "bf16" else not differences.any()
    assert found["prompt"] > 0 and found["generated"] > 0


def test_the_unquantised_model_has_the_bytes_of_its_tensors(config, run, references, log_on_stderr):
    tensors = load_model(str(run)).state_dict().values()
    assert references[""]["bytes"] == 2 * sum({each.data_ptr(): each.numel() for each in tensors}.values())


@needs_packages
def test_what_no_cpu_can_do_has_the_reason_of_the_library(config, log_on_stderr):
    with pytest.raises(GPT2ModernError, match=r"^Requires mslk"):
        measure(config, "", FITS_NO_CPU)


@needs_packages
def test_the_report_has_a_line_for_each_way_and_each_class(run, data_dir, tmp_path):
    """Of a folder without a stock twin, which takes half of the time."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("stock"))
    summary = json.loads((run / "summary.json").read_text()) | {"stock_class": None}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    flags = ["--model", str(tmp_path / "run"), "--data", str(data_dir), "--output", str(tmp_path / "reports")]
    quantised.main([*flags, "--weights", "torchao int8", FITS_NO_CPU, "--eval_blocks", "4", "--repetitions", "1"])
    (path,) = (tmp_path / "reports").glob("*_quantised_cpu.json")
    report = json.loads(path.read_text())
    header, *lines = report["table"]
    numbers = [each["found"][0] for each in report["results"][:2]]
    assert [line[:2] for line in lines] == [
        ["GPT2ModernForCausalLM", name] for name in ("bf16", "torchao int8", FITS_NO_CPU)
    ]
    assert all(len(line) == len(header) for line in lines)
    of_bf16, _, failed = lines
    assert of_bf16[3] == "+0.0000 +- 0.0000" and numbers[1]["bytes"] < numbers[0]["bytes"]
    assert of_bf16[6] == of_bf16[8] == "1.00 (1.00 to 1.00)"
    assert failed[2] == "not possible: Requires mslk >= 1.0.0"
    assert "torchao 0." in report["versions"] and "bitsandbytes" in report["versions"]
    assert [type(each["found"]) for each in report["results"]] == [list, list, str]


# Runs elsewhere; argv: the model. Prints the largest difference of the logits for each way.
ELSEWHERE = """
import json, sys
sys.modules["modeling_gpt2modern"] = None  # this project is installed here: make importing it an error

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

ids = torch.arange(1, 30)[None]
def logits(**options):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
    with torch.no_grad():
        return model(ids).logits[..., :300].float()

ways = [TorchAoConfig(Int8WeightOnlyConfig()), BitsAndBytesConfig(load_in_4bit=True)]
expected = logits(dtype=torch.bfloat16)
spread = expected.std().item()
found = [logits(dtype=torch.bfloat16, quantization_config=way) for way in ways]
print(json.dumps([(each - expected).abs().max().item() / spread for each in found]))
"""


@needs_packages
def test_a_user_loads_the_code_of_the_folder_in_int8_and_4_bit(run, tmp_path):
    places = environment(HF_MODULES_CACHE=str(tmp_path), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    command = [sys.executable, "-c", ELSEWHERE, str(run)]
    done = subprocess.run(command, cwd=tmp_path, env=places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert all(0 < each < 0.5 for each in differences), differences


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("torchao", "torchao is not installed; run python -m pip install torchao"),
        (None, "has no summary.json; finish the run with train_accelerate.py"),
    ],
)
def test_wrong_inputs_are_one_line(data_dir, tmp_path, monkeypatch, capsys, missing, line):
    def version(name):
        if name == missing:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(evidence, "version", version)
    with pytest.raises(SystemExit) as caught:
        quantised.main(["--model", str(tmp_path), "--data", str(data_dir), "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.endswith(f"{line}\n")
    assert error.count("\n") == 1 and torch.is_grad_enabled()
