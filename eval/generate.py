"""Generate text after one or more prompts with a trained model, and print it.

python -m eval.generate --model DIR --prompt "def " "class " [--max_new_tokens 100] [--seed 1]
"""

from dataclasses import dataclass
from pathlib import Path

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.evaluation.generation import generate_text
from gpt2modern.files import check_writable_file, write_json
from gpt2modern.loading import best_device, load_model, load_tokenizer
from gpt2modern.settings import check_ranges, setting


@dataclass
class GenerateConfig:
    model: str = setting(help="model folder, or Hub repository id (owner/name)")
    prompt: list[str] = setting(help="one or more texts to continue", may_be_empty=True)
    max_new_tokens: int = setting(100, "maximum number of new tokens per prompt", least=1)
    temperature: float = setting(0.8, "sampling temperature; 0 always takes the most likely token", least=0)
    top_k: int = setting(50, "sample among this number of most likely tokens; 0 means all tokens", least=0)
    top_p: float = setting(
        1.0, "sample among the most likely tokens that have this probability in total", least=0.0, most=1.0
    )
    seed: int = setting(0, "random seed; the same seed gives the same text", least=0, most=2**63 - 1)
    output: str | None = setting(None, "JSON file to which prompts and texts are also written")

    def __post_init__(self):
        check_ranges(self)
        if 0 < self.temperature < 0.01:  # logits divided by a smaller number overflow
            raise ValueError(f"--temperature {self.temperature} must be 0 or at least 0.01")
        check_writable_file("--output", self.output)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(GenerateConfig, argv, __doc__)
        model, tokenizer = load_model(config.model).to(best_device()), load_tokenizer(config.model)
        sampling = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
        rows = []
        for prompt in config.prompt:
            text = generate_text(model, tokenizer, prompt, **sampling)
            rows.append({"prompt": prompt, "text": text})
            print(f"--- {prompt!r}\n{prompt}{text}\n")
        if config.output:
            write_json(Path(config.output), {"model": config.model, "seed": config.seed, "samples": rows})


if __name__ == "__main__":
    main()
