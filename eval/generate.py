"""Continue prompts with one or more trained models, side by side with the same seeds, or chat with one in the terminal.

python -m eval.generate --model DIR [DIR ...] --prompt "def " "class " [--num_samples 2] [--output FILE.html]
python -m eval.generate --model DIR --chat
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.generation import fenced, generate_text
from gpt2modern.files import check_writable_file, public_name, write_file, write_json
from gpt2modern.loading import best_device, load_model, load_tokenizer
from gpt2modern.pages import render
from gpt2modern.settings import check_ranges, setting


@dataclass
class GenerateConfig:
    model: list[str] = setting(help="one or more model folders, or Hub repository ids (owner/name)")
    prompt: list[str] | None = setting(None, "one or more texts to continue", may_be_empty=True)
    chat: bool = setting(False, "answer what is typed, line by line, with a model that was trained on conversations")
    max_new_tokens: int = setting(100, "maximum number of new tokens per prompt", least=1)
    temperature: float = setting(0.8, "sampling temperature; 0 always takes the most likely token", least=0)
    top_k: int = setting(50, "sample among this number of most likely tokens; 0 means all tokens", least=0)
    top_p: float = setting(
        1.0, "sample among the most likely tokens that have this probability in total", least=0.0, most=1.0
    )
    num_samples: int = setting(1, "number of texts per prompt and model, with the seeds seed, seed + 1, ...", least=1)
    seed: int = setting(0, "random seed; the same seed gives the same text", least=0, most=2**63 - 1)
    output: str | None = setting(None, "file to which the texts are also written: .json, .md (Markdown) or .html")

    def __post_init__(self):
        check_ranges(self)
        if self.chat == (self.prompt is not None):
            raise ValueError("give either a --prompt to continue or --chat")
        if self.chat and len(self.model) > 1:
            raise ValueError(f"--chat talks to one model, but --model names {len(self.model)}; name one")
        if 0 < self.temperature < 0.01:  # logits divided by a smaller number overflow
            raise ValueError(f"--temperature {self.temperature} must be 0 or at least 0.01")
        check_writable_file("--output", self.output)
        if self.output and Path(self.output).suffix not in WRITERS:
            raise ValueError(f"--output {self.output} must end in {', '.join(WRITERS)}")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(GenerateConfig, argv, __doc__)
        sampling = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
        if config.chat:
            tokenizer = load_tokenizer(config.model[0])
            if not tokenizer.chat_template:
                raise GPT2ModernError(f"--chat: {config.model[0]} has no chat template; continue a --prompt instead")
            return chat(load_model(config.model[0]).to(best_device()), tokenizer, seed=config.seed, **sampling)
        samples = []
        for name in config.model:  # one model in memory at a time
            model, tokenizer = load_model(name).to(best_device()), load_tokenizer(name)
            for prompt in config.prompt:
                for seed in range(config.seed, config.seed + config.num_samples):
                    text = generate_text(model, tokenizer, prompt, seed=seed, **sampling)
                    samples.append({"model": name, "prompt": prompt, "seed": seed, "text": text})
                    of_model = f" ({name})" if len(config.model) > 1 else ""
                    print(f"--- {prompt!r}, seed {seed}{of_model}\n{prompt}{text}\n")
        if config.output:
            WRITERS[Path(config.output).suffix](Path(config.output), samples, sampling)


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, **sampling: Any) -> None:
    """Answer each line of standard input as the assistant of one conversation, until it ends (Ctrl-D).

    The words appear as they are generated. The answers have the seeds seed, seed + 1, ...; sampling: arguments of
    `generate_text`."""
    messages, streamer = [], TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return print()
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = generate_text(
            model,
            tokenizer,
            prompt,
            seed=seed + len(messages) // 2,
            streamer=streamer,
            add_special_tokens=False,
            **sampling,
        )
        messages.append({"role": "assistant", "content": answer})


def write_samples(path: Path, samples: list[dict[str, Any]], sampling: dict[str, Any]) -> None:
    """Write the samples and how they were drawn as JSON."""
    write_json(path, {"sampling": sampling, "samples": samples})


def write_page(path: Path, samples: list[dict[str, Any]], sampling: dict[str, Any]) -> None:
    """Write HTML, with a line for each prompt and seed and a column for each model, or the same texts as Markdown."""
    samples = [each | {"model": public_name(each["model"])} for each in samples]
    models = dict.fromkeys(each["model"] for each in samples)
    values = {"title": "Samples", "label": "seed", "sampling": sampling, "fenced": fenced}
    write_file(path, render(f"samples{path.suffix}", **values, models=models, texts=by_prompt(samples)))


def by_prompt(samples: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, str]]:
    """Return the text of each model, by prompt and seed."""
    grouped: dict[tuple[str, int], dict[str, str]] = {}
    for each in samples:
        grouped.setdefault((each["prompt"], each["seed"]), {})[each["model"]] = each["text"]
    return grouped


WRITERS = {".json": write_samples, ".md": write_page, ".html": write_page}

if __name__ == "__main__":
    main()
