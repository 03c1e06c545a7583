"""lm-eval (the harness of EleutherAI) takes a model folder as it is, and scores a text as eval.perplexity does."""

import json
import math
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer

from eval import perplexity
from tests.support import clients
from tests.support.folders import run, write_jsonl
from tests.support.models import export_fresh_model

EOS = "<|endoftext|>"


def whole_blocks(text, tokenizer, block_size) -> str:
    """Cut a text so that its tokens and the EOS fill blocks: lm-eval gives a shorter last block more context."""
    while (len(tokenizer(text).input_ids) + 1) % block_size:
        text = text[:-1]
    return text


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
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

    bits = clients.bits_per_byte(tmp_path / "model", text + EOS, tmp_path)
    nats = bits * math.log(2) * len((text + EOS).encode())
    assert ours["tokens"] % 32 == 0 and nats == pytest.approx(ours["loss"] * ours["tokens"], rel=1e-6)
