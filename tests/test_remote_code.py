"""A saved folder loads in a process that has transformers and torch but not this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import random_ids, tiny_model

FLAG_SETS = ("gpt2", "modern", "speedrun", "frontier_sliding_mixed")
CODE = {
    "attention_gpt2modern.py",
    "configuration_gpt2modern.py",
    "layers_gpt2modern.py",
    "loss_gpt2modern.py",
    "modeling_gpt2modern.py",
}

# Runs elsewhere; argv: the folder that holds one saved model per flag set. Prints one JSON object.
ELSEWHERE = """
import json, os, sys
sys.modules["modeling_gpt2modern"] = None  # this project is installed here: make importing it an error

import torch
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, pipeline,
)

def load(auto_class, folder, **kwargs):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

def difference(model, folder):
    expected = torch.load(os.path.join(root, "expected.pt"))[os.path.basename(folder)]
    with torch.no_grad():
        return (model(expected["input_ids"]).logits - expected["logits"]).abs().max().item()

root = sys.argv[1]
results = {}
for name in sorted(os.listdir(root)):
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        continue
    expected = torch.load(os.path.join(root, "expected.pt"))[name]
    model = load(AutoModelForCausalLM, folder)
    ids = expected["input_ids"]
    result = results[name] = {"logits": difference(model, folder)}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    result["generate"] = torch.equal(generated, expected["generated"])
    with torch.no_grad():
        states = load(AutoModel, folder)(ids).last_hidden_state
    result["base"] = (states - expected["hidden_states"]).abs().max().item()
    result["saves"] = []
    for count in ("second", "third"):
        again = os.path.join(root, count, name)
        model.save_pretrained(again)
        model = load(AutoModelForCausalLM, again)
        code = sorted(entry for entry in os.listdir(again) if entry.endswith(".py"))
        result["saves"].append([code, difference(model, again)])
    result["type"] = type(model).__name__

folder = os.path.join(root, "modern")
text = pipeline("text-generation", model=folder, trust_remote_code=True)("w1 w2 w3", max_new_tokens=4, do_sample=False)
results["pipeline"] = text[0]["generated_text"]
heads = {}
for auto_class in (
    AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification
):
    head = load(auto_class, folder, num_labels=3)
    logits = head(torch.tensor([[1, 2, 3]]))[0]
    head.save_pretrained(os.path.join(root, "heads", auto_class.__name__))
    again = load(auto_class, os.path.join(root, "heads", auto_class.__name__))
    difference = (again(torch.tensor([[1, 2, 3]]))[0] - logits).abs().max().item()
    heads[auto_class.__name__] = [list(logits.shape), difference]
results["heads"] = heads

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sharded = fully_shard(load(AutoModelForCausalLM, folder), mesh=dist.init_device_mesh("cpu", (1,)))
weights = {name: weight.full_tensor() for name, weight in sharded.state_dict().items()}
sharded.save_pretrained(os.path.join(root, "sharded"), state_dict=weights)
dist.destroy_process_group()
with open(os.path.join(root, "sharded", "config.json")) as file:
    results["sharded"] = {"files": os.listdir(os.path.join(root, "sharded")), "config": json.load(file)}
print("RESULTS" + json.dumps(results))
"""


def tokenizer() -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="w0", pad_token="w0")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save one folder per flag set, and return what their models compute in another process."""
    root = tmp_path_factory.mktemp("saved")
    input_ids, expected = random_ids(2, 12), {}
    for name in FLAG_SETS:
        model = tiny_model(name)
        model.save_pretrained(root / name)
        with torch.no_grad():
            expected[name] = {
                "input_ids": input_ids,
                "logits": model(input_ids).logits,
                "hidden_states": model.model(input_ids).last_hidden_state,
                "generated": model.generate(
                    input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=6, do_sample=False
                ),
            }
    tokenizer().save_pretrained(root / "modern")
    torch.save(expected, root / "expected.pt")
    return root


@pytest.fixture(scope="module")
def elsewhere(saved, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(saved)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[-1])


@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_logits_are_equal_elsewhere(elsewhere, flag_set):
    assert elsewhere[flag_set]["logits"] == 0


@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_generate_is_equal_elsewhere(elsewhere, flag_set):
    assert elsewhere[flag_set]["generate"]


@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_base_model_loads_elsewhere(elsewhere, flag_set):
    assert elsewhere[flag_set]["base"] == 0


@pytest.mark.parametrize("flag_set", FLAG_SETS)
@pytest.mark.parametrize("save", [0, 1], ids=["second save", "third save"])
def test_folder_saved_elsewhere_is_complete(elsewhere, flag_set, save):
    assert elsewhere[flag_set]["saves"][save] == [sorted(CODE), 0]


def test_pipeline_writes_text_elsewhere(elsewhere):
    assert elsewhere["pipeline"].startswith("w1 w2 w3") and elsewhere["pipeline"].count("w") == 3 + 4


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("AutoModelForQuestionAnswering", [1, 3]),
        ("AutoModelForSequenceClassification", [1, 3]),
        ("AutoModelForTokenClassification", [1, 3, 3]),
    ],
)
def test_other_head_loads_elsewhere(elsewhere, head, shape):
    assert elsewhere["heads"][head] == [shape, 0]


def test_folder_saved_from_fsdp2_is_complete(elsewhere):
    """FSDP2 gives a model a class from a module of torch; the saved code is still ours."""
    assert {name for name in elsewhere["sharded"]["files"] if name.endswith(".py")} == CODE
    assert elsewhere["sharded"]["config"]["architectures"] == ["GPT2ModernForCausalLM"]
    assert all(".GPT2Modern" in reference for reference in elsewhere["sharded"]["config"]["auto_map"].values())


def test_first_folder_has_the_code_and_no_package(saved):
    assert {entry.name for entry in (saved / "gpt2").glob("*.py")} == CODE


def test_installed_package_loads_without_trust(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "modern")
    assert type(model) is GPT2ModernForCausalLM


def test_installed_package_serves_those_who_trust_as_well(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "modern", trust_remote_code=True)
    expected = torch.load(saved / "expected.pt")["modern"]
    assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])


def test_installed_package_saves_the_code_after_loading(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved / "modern").save_pretrained(tmp_path)
    assert {entry.name for entry in tmp_path.glob("*.py")} == CODE


def test_auto_config_builds_the_model_from_its_type():
    config = AutoConfig.for_model("gpt2modern", hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    assert type(AutoModelForCausalLM.from_config(config)) is GPT2ModernForCausalLM
