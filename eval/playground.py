"""Try a model in the browser: text that appears as it is generated, two models on the same seed, the likely next
tokens, the curves and samples of their training.

python -m eval.playground --model out/mine [--compare out/other]
python -m eval.playground --model out/mine --push_to_space owner/name     # the same page as a Space of the Hub

Needs the extra `ui`. A Space has the code of this project and the models that are folders.
"""

import configparser
import html
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
from huggingface_hub import SpaceCardData

from eval.compare import compared
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.generation import next_tokens, stream_text
from gpt2modern.files import is_hub_name, public_name
from gpt2modern.hub import hub_errors, retried
from gpt2modern.loading import best_device, load_model, load_tokenizer
from gpt2modern.pages import TEMPLATES, render
from gpt2modern.settings import check_ranges, setting

try:
    import gradio as gr
except ImportError:  # the extra `ui`
    gr = None

REPOSITORY = Path(__file__).parents[1]
CODE = ("eval/*.py", "gpt2modern/**/*.py", "gpt2modern/templates/*", "modeling_gpt2modern/*.py")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors*", "token*.json", "chat_template*")
MODEL_FILES += ("metrics.jsonl", "samples.jsonl")
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


@dataclass
class PlaygroundConfig:
    """Hold the flags of eval.playground. Raises ValueError if a value is invalid."""

    model: str = setting(help="model folder, or Hub repository id (owner/name)")
    compare: str | None = setting(None, "a second model, which answers beside the first")
    push_to_space: str | None = setting(None, "Space of the Hub (owner/name) to create or update, in place of the page")
    private: bool = setting(False, "only you can see the Space, if it is new")

    def __post_init__(self):
        check_ranges(self)
        if self.push_to_space is not None and not is_hub_name(self.push_to_space):
            raise ValueError(f"--push_to_space {self.push_to_space} must have the form owner/name")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PlaygroundConfig, argv, __doc__)
        if gr is None:
            raise GPT2ModernError("gradio is not installed; run python -m pip install -e '.[ui]'")
        if config.push_to_space:
            return push_to_space(config)
        names = [name for name in (config.model, config.compare) if name]
        style = (TEMPLATES / "style.css").read_text("utf-8")
        build_page(names).launch(css=f".records, .shown {{ {style} }} .shown .text {{ padding-top: 1.5em }}")


def build_page(names: list[str]) -> "gr.Blocks":
    """Return the page for one or two models. Raises GPT2ModernError if a model or its tokenizer cannot be loaded."""
    models = [(load_model(name).to(best_device()), load_tokenizer(name)) for name in names]

    def answer(prompt: str, *sampling: float) -> Iterator[list]:
        """Yield a text and the next tokens of each model, again and again while the texts grow."""
        flags = dict(zip(SAMPLING, (each or 0 for each in sampling), strict=True))  # None: an emptied field
        try:
            texts, tokens = [""] * len(models), [next_tokens(*model, prompt) for model in models]
            for number, model in enumerate(models):
                for text in stream_text(*model, prompt, **flags):
                    texts[number] = f'<div class="text"><b>{html.escape(prompt)}</b>{html.escape(text)}</div>'
                    yield [*texts, *tokens]
        except GPT2ModernError as error:
            raise gr.Error(str(error)) from None

    def reply(model: tuple, message: str, history: list[dict], *sampling: float) -> Iterator[str]:
        """Yield the growing answer of a model, with its tokenizer, to a message after those of the conversation."""
        messages = [*history, {"role": "user", "content": message}]
        for each in messages:  # the page sends parts of a message, a client of its API a text
            each["content"] = each["content"] if isinstance(each["content"], str) else each["content"][0]["text"]
        prompt = model[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            flags = dict(zip(SAMPLING, (each or 0 for each in sampling), strict=True))  # None: an emptied field
            yield from stream_text(*model, prompt, add_special_tokens=False, **flags)
        except GPT2ModernError as error:
            raise gr.Error(str(error)) from None

    labels = [public_name(name) for name in names]
    with gr.Blocks(title=", ".join(labels), analytics_enabled=False) as page:
        gr.Markdown(f"# {' and '.join(labels)}")
        prompt = gr.Textbox(label="Prompt", lines=3, placeholder="A text to continue; Shift + Enter generates")
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
        with gr.Accordion("Sampling", open=False), gr.Row():
            sampling = [
                gr.Slider(1, 1000, 100, step=1, label="New tokens"),
                gr.Slider(0, 2, 0.8, step=0.05, label="Temperature"),
                gr.Slider(0, 200, 50, step=1, label="Top k (0: all)"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top p"),
                gr.Number(0, precision=0, minimum=0, maximum=2**53, label="Seed"),
            ]
        texts, look = [], {"container": True, "min_height": 180, "apply_default_css": False, "elem_classes": "shown"}
        with gr.Row(equal_height=True):
            for label in labels:
                with gr.Column(min_width=300):
                    texts.append(gr.HTML(label=label, show_label=True, **look))
        with gr.Row():
            tokens = [gr.Label(label=f"{each}: next token", show_heading=False, min_width=300) for each in labels]
        event = gr.on([start.click, prompt.submit], answer, [prompt, *sampling], [*texts, *tokens])
        stop.click(None, cancels=event)
        for label, model in zip(labels, models, strict=True):
            if model[1].chat_template:
                with gr.Accordion(f"Chat with {label}", open=False):
                    gr.ChatInterface(partial(reply, model), additional_inputs=sampling, api_name="reply")
        if runs := [name for name in names if (Path(name) / "metrics.jsonl").exists()]:
            with tempfile.TemporaryDirectory() as folder, gr.Accordion("Training", open=False):
                records = render("runs.html", **compared(runs, Path(folder, "curves.png")))
                gr.HTML(records, apply_default_css=False, elem_classes="records")
    return page


def push_to_space(config: PlaygroundConfig) -> None:
    """Upload the page to a Space. Raises GPT2ModernError if a model cannot be loaded, or the upload fails."""
    with tempfile.TemporaryDirectory() as folder:
        write_space(config, Path(folder))
        what, advice = (
            f"--push_to_space {config.push_to_space}: the upload failed",
            "run the same command again to retry",
        )
        with hub_errors(what, advice):
            api, place = huggingface_hub.HfApi(), {"repo_id": config.push_to_space, "repo_type": "space"}
            retried(api.create_repo, **place, space_sdk="gradio", private=config.private, exist_ok=True)
            retried(api.upload_folder, **place, folder_path=folder, commit_message="Page of a model")
    print(f"uploaded to {huggingface_hub.constants.ENDPOINT}/spaces/{config.push_to_space}")


def write_space(config: PlaygroundConfig, folder: Path) -> None:
    """Write what a Space needs into an empty folder: card, requirements, code, and the models that are folders. Raises
    GPT2ModernError if a model cannot be loaded."""
    arguments, hub_models, files = [], [], {}
    for flag, name in {"model": config.model, "compare": config.compare}.items():
        if name and is_hub_name(name):
            hub_models.append(name)
        elif name:
            load_model(name, flag=f"--{flag}"), load_tokenizer(name, flag=f"--{flag}")
            source, name = Path(name), f"{flag}/{public_name(name)}"
            files |= {f"{name}/{path.name}": path for pattern in MODEL_FILES for path in source.glob(pattern)}
        arguments += [f"--{flag}", name] if name else []
    code = (path for pattern in CODE for path in REPOSITORY.glob(pattern))
    for target, path in (files | {path.relative_to(REPOSITORY): path for path in code}).items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / target)
    (folder / "app.py").write_text(f"from eval.playground import main\n\nmain({arguments!r})\n")
    declared = configparser.ConfigParser()
    declared.read(REPOSITORY / "setup.cfg")
    needed = (declared["options"]["install_requires"] + declared["options.extras_require"]["train"]).split()
    names = (re.match(r"[\w-]+", each)[0] for each in needed)
    pinned = (f"{name}=={version(name).partition('+')[0]}\n" for name in names)
    (folder / "requirements.txt").write_text("".join(pinned))
    title = config.push_to_space.split("/")[-1]
    about = {"title": title, "sdk": "gradio", "sdk_version": gr.__version__, "app_file": "app.py"}
    card = SpaceCardData(**about, models=hub_models or None)
    (folder / "README.md").write_text(f"---\n{card}\n---\n# {title}\n\nThe page of eval.playground of GPT2-Modern.\n")


if __name__ == "__main__":
    main()
