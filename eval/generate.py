"""Continue a prompt with a trained model.

python -m eval.generate --model DIR --prompt "def " "class " [--max_new_tokens 100] [--seed 1]
"""

from dataclasses import dataclass, field
from pathlib import Path

from gpt2modern.cli import check_range, check_writable_file, exit_code_2_on_user_error, parse_arguments


@dataclass
class GenerateConfig:
    model: str = field(metadata={"help": "model folder, or a repository id on the Hub"})
    prompt: list[str] = field(metadata={"help": "one or more texts to continue", "may_be_empty": True})
    max_new_tokens: int = field(default=100, metadata={"help": "tokens to write at most"})
    temperature: float = field(default=0.8, metadata={"help": "0 takes the likeliest token each time"})
    top_k: int = field(default=50, metadata={"help": "sample among this many likeliest tokens; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "sample among the likeliest tokens of this total probability"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same text"})
    output: str | None = field(default=None, metadata={"help": "also write prompts and texts to this JSON file"})

    def __post_init__(self):
        check_range("--max_new_tokens", self.max_new_tokens, 1)
        check_range("--temperature", self.temperature, 0)
        if 0 < self.temperature < 0.01:  # logits divided by less overflow
            raise ValueError(f"--temperature {self.temperature} must be 0 or at least 0.01")
        check_range("--top_k", self.top_k, 0)
        check_range("--seed", self.seed, 0, 2**63 - 1)
        check_writable_file("--output", self.output)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be above 0 and at most 1")


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(GenerateConfig, argv, __doc__)

    from gpt2modern.evaluation.generation import generate_text
    from gpt2modern.loading import load_model, load_tokenizer
    from gpt2modern.training.metrics import write_json

    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    texts = []
    for prompt in config.prompt:
        text = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        texts.append(text)
        print(f"--- {prompt!r}\n{prompt}{text}\n")
    if config.output:
        rows = [{"prompt": prompt, "text": text} for prompt, text in zip(config.prompt, texts, strict=True)]
        write_json(Path(config.output), {"model": config.model, "seed": config.seed, "samples": rows})


if __name__ == "__main__":
    main()
