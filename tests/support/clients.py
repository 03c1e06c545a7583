"""Take a model folder, as training has left it, to the programs that people use, and print a table of what worked.

python -m tests.support.clients --model out/demo [--clients gguf onnx]

Each client starts in a fresh process, and what it computes is compared with the model itself. The exit code is 1 if one
that is installed fails. `make try-everything` installs them and runs this on the folder of `make demo`.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from gpt2modern.cli import nearest, one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.settings import check_ranges, setting

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PROMPT, NEW_TOKENS = "def __init__(self", 16
CHAT = [{"role": "user", "content": "x = 1"}, {"role": "assistant", "content": "return x"}]
PAIR = {"prompt": "def f(x):\n", "chosen": "return x", "rejected": "pass"}
TASK = {
    "task": "texts",
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


@dataclass
class ClientsConfig:
    """Hold the flags. Raises ValueError if a value is invalid."""

    model: str = setting("out/demo", "model folder of a training run; `make demo` writes the default")
    clients: list[str] | None = setting(None, "names in the first column of the table; default: all")

    def __post_init__(self):
        check_ranges(self)
        if not Path(self.model, "config.json").is_file():
            raise ValueError(f"--model {self.model} has no config.json; name a model folder, or write one by make demo")
        for name in self.clients or []:
            if name not in CLIENTS:
                known = f"; choose from {', '.join(CLIENTS)}"
                raise ValueError(f"--clients {name} is unknown{nearest(name, CLIENTS, known)}")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        config, failed = parse_arguments(ClientsConfig, argv, __doc__), False
        os.environ |= OFFLINE
        for name in config.clients or CLIENTS:
            function, *packages = CLIENTS[name]
            if missing := [package for package in packages if find_spec(package) is None]:
                result = f"not installed: pip install {' '.join(missing)}"
            else:
                worked, result = in_a_fresh_process(function, Path(config.model).resolve(), Path(folder, name))
                failed |= not worked
            print(f"{name:10} {function.__doc__:59} {result}", flush=True)
        if failed:
            raise SystemExit(1)


def in_a_fresh_process(function: Callable[[Path, Path], str], model: Path, folder: Path) -> tuple[bool, str]:
    """Let a client work in the new folder `folder`; returns whether it worked, and its result or the reason of the
    failure with the time that it took. What a failed client has printed goes to stderr."""
    folder.mkdir()
    log, start = folder / "log.txt", time.monotonic()
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), print_to, (log,)) as fresh:
            worked, result = fresh.submit(attempt, function, model, folder).result()
    except BrokenProcessPool:
        worked, result = False, "the process crashed"
    if not worked:
        print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
    return worked, f"{'' if worked else 'FAILED: '}{result} ({time.monotonic() - start:.0f} s)"


def print_to(log: Path) -> None:
    """Write what this process prints, and those that it starts, into a file."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def attempt(function: Callable[[Path, Path], str], model: Path, folder: Path) -> tuple[bool, str]:
    """Return (True, result) of a client, or (False, first line of the error): not every error can be pickled."""
    try:
        return True, function(model, folder)
    except NotPossible as reason:
        return True, f"not possible: {reason}"
    except Exception as error:
        traceback.print_exc()
        return False, first_line(error)


# What the clients share


class NotPossible(GPT2ModernError):
    """Say why a client cannot take a model by its design, which is no failure."""


def require(holds: bool, otherwise: str) -> None:
    """Raise GPT2ModernError with the message `otherwise` unless the result of a client is the expected one."""
    if not holds:
        raise GPT2ModernError(otherwise)


def run(*words: Any, folder: Path = ROOT) -> None:
    """Run a Python program in a folder; raises GPT2ModernError with its last line if it fails."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=600)
    print(done.stdout, done.stderr, sep="\n")
    last = " ".join(done.stderr.strip().splitlines()[-1:])
    require(done.returncode == 0, f"{' '.join(command[1:3])}: {last or 'it failed'}")


def load(folder: Path) -> PreTrainedModel:
    """Load the model of a folder in fp32, with its own code if it has some."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def stock_of(folder: Path) -> Path:
    """Return the folder of the stock model in a model folder; raises GPT2ModernError if it is missing, NotPossible if
    no class has the same logits."""
    stock = folder / "stock"
    if not stock.is_dir():
        with tempfile.TemporaryDirectory() as place:
            try:
                run("-m", "gpt2modern.conversion", "--model", folder, "--output_dir", Path(place, "stock"))
            except GPT2ModernError as error:
                if "does not allow" not in str(error):  # the settings of the model
                    raise
                raise NotPossible(str(error)) from None
        raise GPT2ModernError("stock/ is missing; write it by python -m gpt2modern.conversion")
    return stock


def continuation(folder: Path, prompt: str = PROMPT, count: int = NEW_TOKENS) -> str:
    """Return the likeliest `count` tokens after a prompt, as text, by the model of a folder with its own code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = load(folder).generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def difference(model: PreTrainedModel, other: Callable[[torch.Tensor], Any], length: int = 31) -> float:
    """Return the largest difference between the logits of a model and those that `other` returns for the same ids."""
    input_ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    return (model(input_ids).logits - torch.as_tensor(other(input_ids))).abs().max().item()


# The clients. Each gets the model folder and an empty one for its files, and returns the last column of its row.


def use_pipeline(model: Path, folder: Path) -> str:
    """transformers: pipeline, with the code of the folder"""
    generate = pipeline("text-generation", model=str(model), trust_remote_code=True, device="cpu")
    require(type(generate.model).__module__.startswith("transformers_modules"), "the code is not that of the folder")
    text = generate(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS)[0]["generated_text"]
    require(text == PROMPT + continuation(model), f"{text!r} is not the likeliest text")
    return repr(text)


def use_stock(model: Path, folder: Path) -> str:
    """transformers: pipeline on stock/, without code of the model"""
    generate = pipeline("text-generation", model=str(stock_of(model)), trust_remote_code=False, device="cpu")
    text = generate(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS)[0]["generated_text"]
    require(text == PROMPT + continuation(model), f"{text!r} is not the text of the model itself")
    return f"{type(generate.model).__name__}: the same text"


def use_weights(model: Path, folder: Path) -> str:
    """safetensors, save_pretrained, torch.save: read, save, load"""
    loaded, file = load(model), folder / "weights.pt"
    expected = loaded.state_dict()
    loaded.save_pretrained(folder / "again")
    torch.save(expected, file)
    again = load(folder / "again").state_dict(), torch.load(file, weights_only=True)
    for found in (load_file(model / "model.safetensors"), *again):
        same = all(torch.equal(tensor.to(expected[name].dtype), expected[name]) for name, tensor in found.items())
        require(len(found) > 0 and same, "the tensors differ")
    return f"{len(expected)} tensors, all equal"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Any]:
    """Start `transformers serve` on a folder, and give an OpenAI client of it."""
    import openai  # noqa: PLC0415 an optional package

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([sys.executable, *words, "--device", "cpu"], env=os.environ | OFFLINE) as server:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                require(server.poll() is None, "transformers serve has ended")
                time.sleep(0.5)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        finally:
            server.kill()


def use_serve(model: Path, folder: Path) -> str:
    """transformers serve on stock/, asked by openai: text, chat"""
    stock, texts = stock_of(model), [continuation(model)]
    tokenizer = AutoTokenizer.from_pretrained(stock)
    arguments = {"model": str(stock), "temperature": 0, "max_tokens": NEW_TOKENS}
    with serving(stock) as client:
        found = [client.completions.create(prompt=PROMPT, **arguments).choices[0].text]
        stream = client.completions.create(prompt=PROMPT, stream=True, **arguments)
        streams = [[chunk.choices[0].text for chunk in stream]]
        if tokenizer.chat_template:
            chat = CHAT[:1]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            texts.append(continuation(model, prompt))
            found.append(client.chat.completions.create(messages=chat, **arguments).choices[0].message.content)
            stream = client.chat.completions.create(messages=chat, stream=True, **arguments)
            streams.append([chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices])
    streamed = ["".join(parts) for parts in streams]  # without bytes of a character that the last token leaves open
    expected = [text.rstrip("\ufffd") for text in texts]
    require(found == texts and streamed == expected, f"the texts are {found}, {streamed}, not {texts}")
    require(len(list(filter(None, streams[0]))) > 1, f"the text came in one piece, {streams[0]}")
    return f"{'text and chat' if texts[1:] else 'text (no chat template)'}, the same, also in pieces"


def write_gguf(model: Path, folder: Path) -> Path:
    """Write a model folder as a GGUF file by the command of this project."""
    stock_of(model)
    run("-m", "gpt2modern.conversion.gguf", "--model", model, "--output", folder / "model.gguf")
    return folder / "model.gguf"


def use_gguf(model: Path, folder: Path) -> str:
    """gpt2modern.conversion.gguf, read by transformers"""
    path, stock = write_gguf(model, folder), load(stock_of(model))
    # transformers reads no head_dim of Qwen3 and no length of GPT-2, so it is told the configuration.
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, config=stock.config)
    found = difference(stock, lambda input_ids: read(input_ids).logits)
    require(found == 0, f"the logits differ by {found}")
    tokenizers = [AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(folder, gguf_file=path.name)]
    ids = [tokenizer(Path(__file__).read_text()).input_ids for tokenizer in tokenizers]
    require(ids[0] == ids[1], "the tokenizer of the file gives other ids")
    return f"{path.stat().st_size / 1e6:.1f} MB, difference 0, the same token ids"


@contextlib.contextmanager
def llama_cpp(path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Give a function that asks a llama.cpp server which has loaded a GGUF file: ask(route, **body)."""
    import xllamacpp  # noqa: PLC0415 an optional package

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 64, 1, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)

    def ask(route: str, **body: Any) -> dict[str, Any]:
        url, headers = f"{server.listening_address}/{route}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield ask


def use_llama_cpp(model: Path, folder: Path) -> str:
    """the same file in llama.cpp (xllamacpp): ids, text"""
    with llama_cpp(write_gguf(model, folder)) as ask:
        ids = ask("tokenize", content=PROMPT, add_special=True, parse_special=True)["tokens"]
        new = ask("completion", prompt=PROMPT, n_predict=NEW_TOKENS, temperature=0, return_tokens=True)["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.decode(new, skip_special_tokens=True)
    require(ids == tokenizer(PROMPT).input_ids, f"the prompt has other ids, {ids}")
    require(text == continuation(model), f"{text!r} is not the text of the model itself")
    return "the same ids, the same text"


def use_onnx(model: Path, folder: Path) -> str:
    """torch.onnx, ONNX Runtime: the model, and stock/"""
    import onnxruntime  # noqa: PLC0415 an optional package

    found = []
    for each in filter(Path.is_dir, (model, model / "stock")):
        loaded, path = load(each), str(folder / f"{each.name}.onnx")
        inputs = {"input_ids": torch.arange(24)[None], "use_cache": False}
        shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}  # another length is compared below
        torch.onnx.export(loaded, kwargs=inputs, f=path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(path)
        found.append(difference(loaded, lambda ids, session=session: session.run(None, {"input_ids": ids.numpy()})[0]))
    require(max(found) < 1e-4, f"the logits differ by {found}")
    return f"difference {max(found):.1e} at most"


def write_task(folder: Path, texts: list[str]) -> None:
    """Write a task of lm-eval, named texts, which asks for the bits per byte of some texts, into a new folder."""
    folder.mkdir()
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"dataset_kwargs": {"data_files": {"validation": str(path)}}}
    (folder / "texts.yaml").write_text(json.dumps(TASK | source))  # JSON is YAML


def bits_per_byte(model: Path, text: str, folder: Path) -> float:
    """Let the command of lm-eval score a text by a model folder; returns bits per byte."""
    write_task(folder / "task", [text])
    words = ["--model", "hf", "--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "texts", "--include_path", "task", "--output_path", "results", "--device", "cpu"]
    # Not from the checkout: the model's code must be that of its folder.
    run("-m", "lm_eval", *words, folder=folder)
    (written,) = folder.glob("results/**/results*.json")
    return json.loads(written.read_text())["results"]["texts"]["bits_per_byte,none"]


def use_lm_eval(model: Path, folder: Path) -> str:
    """lm-eval: a text in the model's context, with its code"""
    loaded, tokenizer, text = load(model), AutoTokenizer.from_pretrained(model), "def f(x):\n    return x\n" * 20
    while len(ids := tokenizer(text).input_ids) >= loaded.config.max_position_embeddings:
        text = text[:-1]
    row = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        nats = loaded(row, labels=row).loss.item() * len(ids)
    found, expected = bits_per_byte(model, text, folder), nats / math.log(2) / len(text.encode())
    require(math.isclose(found, expected, rel_tol=1e-5), f"{found} bits per byte, not {expected}")
    return f"{found:.4f} bits per byte, the same"


def train_by(script: str, model: Path, folder: Path, **flags: Any) -> str:
    """Train on a model folder for five steps by a script of examples/, and load what it has written."""
    flags |= {"model": model, "output_dir": folder / "out", "max_steps": 5, "logging_steps": 1, "learning_rate": 3e-3}
    flags |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    run(f"examples/{script}", *(f"--{name}={value}" for name, value in flags.items()))
    (state,) = folder.glob("out/checkpoint-*/trainer_state.json")
    losses = [row["loss"] for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    require(len(losses) == 5 and losses[-1] < losses[0], f"the losses are {losses}")
    continuation(folder / "out")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 5 steps; loaded"


def use_trl_sft(model: Path, folder: Path) -> str:
    """examples/sft.py: TRL's SFTTrainer on conversations"""
    (folder / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    return train_by("sft.py", model, folder, chat_file=folder / "chats.jsonl")


def use_trl_dpo(model: Path, folder: Path) -> str:
    """examples/dpo.py: TRL's DPOTrainer on pairs of answers"""
    (folder / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 8)
    return train_by("dpo.py", model, folder, preference_file=folder / "pairs.jsonl")


def use_peft(model: Path, folder: Path) -> str:
    """prepare_data.py, then examples/lora.py: PEFT and Trainer"""
    text = folder / "text.txt"
    text.write_text("import os\n" * 2000)
    files = ["--train_file", text, "--validation_file", text, "--tokenizer_name", model]
    run("prepare_data.py", *files, "--block_size", 32, "--output_dir", folder / "data")
    return train_by("lora.py", model, folder, data_dir=folder / "data")


# Name -> the client, and the packages that it needs besides those that training needs.
CLIENTS = {
    "pipeline": (use_pipeline,),
    "stock": (use_stock,),
    "weights": (use_weights,),
    "serve": (use_serve, "fastapi", "openai", "uvicorn"),
    "gguf": (use_gguf, "gguf"),
    "llama.cpp": (use_llama_cpp, "gguf", "xllamacpp"),
    "onnx": (use_onnx, "onnx", "onnxruntime", "onnxscript"),
    "lm_eval": (use_lm_eval, "lm_eval"),
    "sft": (use_trl_sft, "trl"),
    "dpo": (use_trl_dpo, "trl"),
    "lora": (use_peft, "peft"),
}

if __name__ == "__main__":
    main()
