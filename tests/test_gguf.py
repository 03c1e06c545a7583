"""A model with its tokenizer as one GGUF file: transformers reads the same from it, llama.cpp computes the same."""

import contextlib
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gpt2modern.conversion import gguf as command
from gpt2modern.conversion import to_native
from tests.support import clients
from tests.support.models import export_fresh_model, tiny_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")

SIZES = {"vocab_size": 320, "unpadded_vocab_size": 300, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 0}
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# name -> (flag set, overrides, the stock class, whether transformers reads it from GGUF)
FORMS = {
    "gpt2": ("gpt2", {}, "GPT2LMHeadModel", True),
    "llama": ("modern", {"rope_parameters": {"rope_theta": 5e5}}, "LlamaForCausalLM", True),
    "llama_grouped_untied": ("gqa", {"tie_word_embeddings": False}, "LlamaForCausalLM", True),
    "llama_biases": ("modern", BIASES, "LlamaForCausalLM", True),
    "qwen3": ("modern", {"use_qk_norm": True, "qk_norm_affine": False, "norm_affine": False}, "Qwen3ForCausalLM", True),
    "qwen3_wide_heads": ("gqa", {"use_qk_norm": True, "head_dim": 32}, "Qwen3ForCausalLM", True),
    "qwen2": ("modern", WINDOW, "Qwen2ForCausalLM", True),
    "mistral": ("modern", {"num_attention_heads": 3, "head_dim": 16}, "MistralForCausalLM", False),
    "apertus": ("gqa", {"mlp_type": "relu2", "use_qk_norm": True}, "ApertusForCausalLM", False),
    "arcee": ("modern", {"mlp_type": "relu2"}, "ArceeForCausalLM", False),
}
PROMPT = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(3))


def save(folder: Path, data_dir: Path, flag_set: str, **overrides):
    model = tiny_model(flag_set, **(SIZES | overrides))
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "tokenizer")
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def written(data_dir, tmp_path_factory):
    """Return a function that writes the file of a form by the command, once, and gives (file, stock model)."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def write(form):
        if form not in made:
            flag_set, overrides, stock_class, _ = FORMS[form]
            model, _ = save(root / form, data_dir, flag_set, **overrides)
            path = root / form / "files" / "model.gguf"
            path.parent.mkdir()
            command.main(["--model", str(root / form), "--output", str(path)])
            stock = to_native(model)
            assert type(stock).__name__ == stock_class
            made[form] = path, stock
        return made[form]

    return write


def logits(model, input_ids=PROMPT):
    with torch.no_grad():
        return model(input_ids).logits


def read_back(path, stock, **arguments):
    # transformers reads no head_dim of Qwen3 and no length of GPT-2, so it is told the configuration.
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=stock.config, **arguments)


@pytest.mark.parametrize("form", [form for form, (*_, readable) in FORMS.items() if readable])
def test_transformers_reads_the_same_logits_and_token_ids_from_it(form, written):
    path, stock = written(form)
    assert torch.equal(logits(read_back(path, stock)), logits(stock))
    if form != "qwen2":  # for which transformers chooses another class, which splits digits
        tokenizer, text = (
            AutoTokenizer.from_pretrained(path.parents[1]),
            "def f(x):\n\treturn 'caf\u00e9 12345'  # it's",
        )
        assert (
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text).input_ids == tokenizer(text).input_ids
        )


@contextlib.contextmanager
def llama_cpp(path):
    """Give a function that asks a llama.cpp server which has loaded the file."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, which brings llama.cpp, is not installed")
    with clients.llama_cpp(path) as ask:
        yield ask


@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_chooses_the_same_tokens(form, written):
    """Also as probable: ggml rounds activations to fp16 in places, hence the tolerance."""
    path, stock = written(form)
    count = 8 if "sliding_window" in FORMS[form][1] else 24  # within the window
    with llama_cpp(path) as ask:
        answer = ask(
            "completion", prompt=PROMPT[0].tolist(), n_predict=count, temperature=0, n_probs=1, return_tokens=True
        )
    expected = stock.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    assert answer["tokens"] == expected[0, PROMPT.shape[1] :].tolist()
    probable = logits(stock).log_softmax(-1)[0, -1].max().item()
    assert answer["completion_probabilities"][0]["logprob"] == pytest.approx(probable, abs=5e-3)


def test_llama_cpp_splits_text_as_the_tokenizer_does(written):
    path, _ = written("llama")
    tokenizer = AutoTokenizer.from_pretrained(path.parents[1])
    draw = random.Random(5)
    letters = [chr(c) for c in range(0x20, 0x3000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    texts = [
        "def f(x):\n\n\treturn  x['a'] + 12345  # it's WE'RE  <|endoftext|> caf\u00e9 \u6771\u4eac \U0001f642\r\n \n"
    ]
    texts += ["".join(draw.choices([*letters, *" \n\t'0" * 100], k=60)) for _ in range(30)]
    with llama_cpp(path) as ask:
        for text in texts:
            found = ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert found == tokenizer(text).input_ids, text


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def test_the_file_says_what_a_reader_must_know(written, data_dir, tmp_path):
    model, tokenizer = save(tmp_path / "chat", data_dir, "modern")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "chat")
    model.resize_token_embeddings(320)
    command.main(["--model", str(tmp_path / "chat"), "--output", str(tmp_path / "chat.gguf")])
    found, tensors = fields(tmp_path / "chat.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 0)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["llama.context_length"] == 64 and found["general.name"] == "chat"
    assert found["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"] == 300
    assert not [tensor.name for tensor in tensors if tensor.name == "output.weight"]  # tied


def test_a_window_that_llama_cpp_ignores_is_warned_of_and_limits_the_context(written, data_dir, tmp_path, capsys):
    save(tmp_path, data_dir, "modern", **WINDOW)
    command.main(["--model", str(tmp_path), "--output", str(tmp_path / "model.gguf")])
    assert "warning: llama.cpp ignores the sliding window of Qwen2ForCausalLM (24 tokens)" in capsys.readouterr().err
    assert fields(tmp_path / "model.gguf")[0]["qwen2.context_length"] == 24


def test_quantised_files_are_smaller_and_nearly_the_same(written, data_dir, tmp_path):
    path, stock = written("qwen3")
    sizes, largest = [path.stat().st_size], logits(stock).abs().max()
    for precision, tolerance in (("f16", 2e-3), ("bf16", 5e-2), ("q8_0", 5e-2)):
        output = tmp_path / f"{precision}.gguf"
        command.main(["--model", str(path.parents[1]), "--output", str(output), "--quantize", precision])
        difference = (logits(read_back(output, stock, dtype=torch.float32)) - logits(stock)).abs().max()
        assert 0 < difference < tolerance * largest
        sizes.append(output.stat().st_size)
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_quantize_the_weights_keep_their_precision(dtype, written, data_dir, tmp_path, capsys):
    model, _ = save(tmp_path, data_dir, "modern", use_qk_norm=True)
    model.to(dtype).save_pretrained(tmp_path)
    command.main(["--model", str(tmp_path), "--output", str(tmp_path / "model.gguf")])
    assert f": {command.DTYPES[dtype]}, " in capsys.readouterr().out
    stock = to_native(model)
    assert torch.equal(logits(read_back(tmp_path / "model.gguf", stock, dtype=dtype)), logits(stock))
    tensors = {tensor.name: tensor.tensor_type.name for tensor in fields(tmp_path / "model.gguf")[1]}
    assert tensors["blk.0.attn_q.weight"] == command.DTYPES[dtype].upper() and tensors["output_norm.weight"] == "F32"


def test_the_folder_of_a_run_and_its_stock_folder_give_the_same_file(data_dir, tmp_path):
    export_fresh_model(data_dir, tmp_path / "run", "modern")
    to_native(AutoModelForCausalLM.from_pretrained(tmp_path / "run")).save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "stock")
    for name in ("run", "stock"):
        command.main(["--model", str(tmp_path / name), "--output", str(tmp_path / name / "model.gguf")])
    assert (tmp_path / "run" / "model.gguf").read_bytes() == (tmp_path / "stock" / "model.gguf").read_bytes()


def split_digits(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save_pretrained(folder)


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
REFUSED = {
    "class": ("modern", {"norm_type": "layernorm"}, None, "StableLmForCausalLM cannot be written as GGUF; supported"),
    "gelu": ("gpt2", {"mlp_type": "gelu"}, None, "with activation_function='gelu_new' only, not with 'gelu'"),
    "biases": (
        "modern",
        {"use_qk_norm": True, "attention_bias": True},
        None,
        "attention_bias=False only, not with True",
    ),
    "rope": ("modern", LINEAR, None, "computes LlamaForCausalLM with rope_type='default' only, not with 'linear'"),
    "own": ("modern", {"use_unet_skips": True}, None, "LlamaForCausalLM, does not allow use_unet_skips=True"),
    "digits": ("modern", {}, split_digits, "the tokenizer is not a byte-level BPE that splits text as GPT-2's does"),
    "no tokenizer": ("modern", {}, lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer that can be"),
    "folder as output": (
        "modern",
        {},
        lambda folder: (folder.parent / "model.gguf").mkdir(),
        "model.gguf cannot be written",
    ),
    "no model": ("modern", {}, lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_gets_one_line_and_no_file(case, data_dir, tmp_path, capsys):
    flag_set, overrides, spoil, message = REFUSED[case]
    save(tmp_path / "model", data_dir, flag_set, **overrides)
    if spoil:
        spoil(tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "model.gguf")])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and str(tmp_path / "model") in error and message in error
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "model.gguf").is_file()


def test_without_the_package_the_command_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "gguf", None)
    with pytest.raises(SystemExit):
        command.main(["--model", "model", "--output", str(tmp_path / "model.gguf")])
    assert capsys.readouterr().err == "error: --output needs gguf, which is not installed: pip install gguf\n"
