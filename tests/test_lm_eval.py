"""lm-eval (the harness of EleutherAI) takes a model folder as it is, and scores a text as eval.perplexity does."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer

from eval import perplexity
from tests.support.folders import run, write_jsonl
from tests.support.models import export_fresh_model
from tests.support.trainer import environment

EOS = "<|endoftext|>"
TASK = """
task: one_text
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {path}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


def whole_blocks(text, tokenizer, block_size) -> str:
    """Cut a text so that its tokens and the EOS fill blocks: lm-eval gives a shorter last block more context."""
    while (len(tokenizer(text).input_ids) + 1) % block_size:
        text = text[:-1]
    return text


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs python -m pip install lm_eval (350 MB)")
@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_lm_eval_agrees_with_eval_perplexity(data_dir, tmp_path, preset):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    text = whole_blocks("def f(x):\n    return x\n" * 30, tokenizer, 32)
    assert len(tokenizer(text).input_ids) > 64
    files = [f"--{name}_file={write_jsonl(tmp_path / f'{name}.jsonl', [text])}" for name in ("train", "validation")]
    run(tmp_path / "data", *files, "--tokenizer_name", data_dir / "tokenizer", "--block_size", 32)
    export_fresh_model(tmp_path / "data", tmp_path / "model", preset)
    perplexity.main(
        [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'ours.json'}"]
    )
    ours = json.loads((tmp_path / "ours.json").read_text())

    (tmp_path / "tasks").mkdir()
    path = write_jsonl(tmp_path / "text.jsonl", [text + EOS])
    (tmp_path / "tasks" / "one_text.yaml").write_text(TASK.format(path=path))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "one_text", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "theirs")]
    offline = environment(HF_HOME=str(tmp_path / "home"), HF_DATASETS_OFFLINE="1", TRUST_REMOTE_CODE="1")
    # Not from the checkout: the model's code must be that of its folder.
    finished = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (written,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]["one_text"]
    nats = math.log(theirs["byte_perplexity,none"]) * len((text + EOS).encode())
    assert ours["tokens"] % 32 == 0 and nats == pytest.approx(ours["loss"] * ours["tokens"], rel=1e-6)
