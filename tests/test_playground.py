"""The page of eval.playground, as a Space runs it and as a browser shows it."""

import contextlib
import html
import importlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import yaml

from eval import playground
from gpt2modern import hub
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.generation import encode_prompt, generate_text, next_tokens, stream_text
from gpt2modern.loading import load_model, load_tokenizer
from tests.support.models import export_fresh_model
from tests.support.trainer import train

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SAMPLING = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 20, "top_p": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory) -> list[Path]:
    """A finished run with samples, and a model alone, which can chat."""
    folder = tmp_path_factory.mktemp("models")
    prompts = ("--sample_prompts", "def <f>", "--sample_max_new_tokens", "8")
    run = train(data_dir, folder / "run", prompts, save_steps=0, max_steps=4)
    fresh = export_fresh_model(data_dir, folder / "modern", "modern")
    tokenizer = load_tokenizer(fresh)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(fresh)
    return [run, fresh]


@pytest.fixture(scope="module")
def learned(data_dir, tmp_path_factory) -> Path:
    """A model with 32 positions."""
    return export_fresh_model(data_dir, tmp_path_factory.mktemp("learned") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def loaded(models):
    return load_model(str(models[0])), load_tokenizer(models[0])


# What the page is made of, without a page


def test_a_text_grows_to_what_is_generated_at_once(loaded):
    parts = list(stream_text(*loaded, "def f", **SAMPLING))
    assert len(parts) > 5 and all(later.startswith(part) for part, later in itertools.pairwise(parts))
    assert parts[-1] == generate_text(*loaded, "def f", **SAMPLING)


def test_a_text_that_nobody_reads_on_is_not_generated_to_its_end(loaded):
    tokens = []
    hook = loaded[0].register_forward_hook(lambda *_: tokens.append(1))
    text = stream_text(*loaded, "def f", **SAMPLING | {"max_new_tokens": 100_000})
    next(text)
    text.close()
    hook.remove()
    assert 0 < len(tokens) < 1000


def test_an_error_of_the_generation_reaches_the_reader(loaded, learned):
    with pytest.raises(GPT2ModernError, match="in total more than the model's 32 positions"):
        list(stream_text(load_model(str(learned)), loaded[1], "def f", **SAMPLING))


@pytest.mark.parametrize("prompt", ["def f", ""])
def test_the_next_tokens_have_the_probabilities_of_the_model(loaded, prompt):
    model, tokenizer = loaded
    with torch.no_grad():
        expected = model(encode_prompt(model, tokenizer, prompt)).logits[0, -1].softmax(-1)
    found = next_tokens(model, tokenizer, prompt, number=5)
    ids = [int(name.rpartition("(")[2].rstrip(")")) for name in found]
    assert ids == expected.topk(5).indices.tolist()
    assert list(found.values()) == pytest.approx(expected.topk(5).values.tolist())
    assert next(iter(found)) == f"{tokenizer.decode([ids[0]])!r} ({ids[0]})"


# The page, in the folder that is uploaded as a Space


class Hub:
    """Keeps what is uploaded."""

    calls: dict
    kept: Path

    def create_repo(self, **arguments):
        self.calls["create_repo"] = arguments

    def upload_folder(self, *, folder_path, **arguments):
        self.calls["upload_folder"] = arguments
        shutil.copytree(folder_path, self.kept)


@pytest.fixture(scope="module")
def space(models, tmp_path_factory) -> Path:
    pytest.importorskip("gradio", reason="the page needs gradio, the extra `ui`")
    Hub.calls, Hub.kept = {}, tmp_path_factory.mktemp("space") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", Hub)
        flags = ["--model", str(models[0]), "--compare", str(models[1]), "--push_to_space", "someone/page"]
        playground.main([*flags, "--private", "true"])
    return Hub.kept


def test_a_space_has_a_card_pinned_requirements_and_no_paths(space, models):
    place = {"repo_id": "someone/page", "repo_type": "space"}
    assert Hub.calls["create_repo"] == place | {"space_sdk": "gradio", "private": True, "exist_ok": True}
    assert place.items() <= Hub.calls["upload_folder"].items()
    card = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and "models" not in card
    lines = (space / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines and all("==" in line for line in lines)
    files = {path.relative_to(space).as_posix(): path for path in space.rglob("*") if path.is_file()}
    assert {"model/run/model.safetensors", "model/run/metrics.jsonl", "compare/modern/config.json"} <= files.keys()
    assert not [name for name, path in files.items() if str(models[0].parent).encode() in path.read_bytes()]


def test_a_space_names_models_of_the_hub(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio, the extra `ui`")
    config = playground.PlaygroundConfig(model="someone/model", push_to_space="someone/page")
    playground.write_space(config, tmp_path)
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["models"] == ["someone/model"]
    assert (tmp_path / "app.py").read_text().endswith("main(['--model', 'someone/model'])\n")


def test_a_failed_upload_is_one_line(models, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the page needs gradio, the extra `ui`")
    monkeypatch.setattr(hub, "RETRY_S", ())
    lost = SimpleNamespace(create_repo=lambda **_: None, upload_folder=Mock(side_effect=ConnectionError("lost")))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: lost)
    for flags, line in (
        (
            ["--model", str(models[1])],
            "--push_to_space someone/page: the upload failed: ConnectionError: lost (endpoint ",
        ),
        (["--model", str(models[1]), "--compare", "nowhere"], "--compare nowhere is neither a folder nor a Hub repo"),
    ):
        with pytest.raises(SystemExit) as caught:
            playground.main(["--model", str(models[1]), *flags, "--push_to_space", "someone/page"])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.startswith(f"error: {line}") and error.count("\n") == 1


def test_a_missing_gradio_is_one_line(models, monkeypatch, capsys):
    monkeypatch.setattr(playground, "gr", None)
    with pytest.raises(SystemExit):
        playground.main(["--model", str(models[1])])
    assert capsys.readouterr().err == "error: gradio is not installed; run python -m pip install -e '.[ui]'\n"


@pytest.fixture(scope="module")
def address(space, tmp_path_factory):
    """Start app.py of the Space in its folder, as the Hub does, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = [
        each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and not Path(each, "eval").exists()
    ]
    changes = {"PYTHONPATH": os.pathsep.join(others), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with log.open("w") as output:
        command, environment = [sys.executable, "app.py"], os.environ | changes
        server = subprocess.Popen(command, cwd=space, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_a_space_streams_the_texts_of_both_models_on_the_same_seed(address, models):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    prompt = "def <f>"
    answers = list(client.submit(prompt, *SAMPLING.values(), api_name="/answer"))
    assert len(answers) > 4 and answers[0][1] == "" and len(answers[0][0]) < len(answers[-1][0])
    for folder, shown, tokens in zip(models, answers[-1][:2], answers[-1][2:], strict=True):
        model, tokenizer = load_model(str(folder)), load_tokenizer(folder)
        assert "<b>def &lt;f&gt;</b>" in shown
        text = generate_text(model, tokenizer, prompt, **SAMPLING)
        assert html.unescape(re.sub("<[^>]*>", "", shown)) == prompt + text
        assert tokens["label"] == next(iter(next_tokens(model, tokenizer, prompt)))


def test_an_emptied_seed_is_0(address):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    emptied, zero = (
        client.predict("def", *(SAMPLING | {"seed": seed}).values(), api_name="/answer") for seed in (None, 0)
    )
    assert emptied == zero


def test_a_model_with_a_chat_template_answers_a_conversation(address, models):
    """The second answer knows the first question and its answer."""
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    model, tokenizer = load_model(str(models[1])), load_tokenizer(models[1])
    prompt = ""
    for question in ("def f", "and then?"):
        prompt += f"user: {question}\nassistant:"
        parts = list(client.submit(question, *SAMPLING.values(), api_name="/reply"))
        expected = generate_text(model, tokenizer, prompt, add_special_tokens=False, **SAMPLING)
        assert len(parts) > 4 and parts[-1] == expected
        prompt = prompt.replace("assistant:", "assistant: ") + f"{expected}\n"
    names = [each["label"] for each in client.view_api(return_format="dict")["named_endpoints"]["/reply"]["parameters"]]
    assert names[1:] == ["New tokens", "Temperature", "Top k (0: all)", "Top p", "Seed"]


def test_an_error_of_the_generation_is_shown_on_the_page(learned):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio, the extra `ui`")
    (answer,) = (each.fn for each in playground.build_page([str(learned)]).fns.values() if each.api_name == "answer")
    with pytest.raises(gradio.Error, match="in total more than the model's 32 positions"):
        list(answer("def f", *SAMPLING.values()))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as player:
        path = shutil.which("chromium") or shutil.which("google-chrome") or player.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        started = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.e2e
@pytest.mark.parametrize("width", [1280, 400])
def test_a_text_streams_into_the_page_after_a_click(address, browser, width, models):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    page.get_by_label("Prompt").fill("def <f>")
    lengths = []
    page.expose_function("note", lambda length: lengths.append(length))
    page.evaluate(
        "new MutationObserver(() => note([...document.querySelectorAll('.shown .text')].map(e => e.innerText.length)))"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("number input for New tokens").fill("120")
    page.get_by_role("button", name="Generate").click()
    sampling = {"max_new_tokens": 120, "temperature": 0.8, "top_k": 50, "seed": 0}  # what the page starts with
    both = [(load_model(str(folder)), load_tokenizer(folder)) for folder in models]
    texts = ["def <f>" + generate_text(*each, "def <f>", **sampling) for each in both]
    texts = [text.replace("\0", "") for text in texts]  # which no page can show
    expect = importlib.import_module("playwright.sync_api").expect
    expect(page.locator(".shown .text")).to_have_text(texts, timeout=60_000)
    grown = [first for first, *_ in filter(None, lengths)]
    assert len(set(grown)) > 3 and grown == sorted(grown), grown
    page.get_by_text("Training", exact=True).click()
    page.locator(".records img").wait_for()
    assert "Samples of the last step" in page.locator(".records").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
