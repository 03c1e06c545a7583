"""Continue a prompt with a trained model.

python -m eval.generate --model DIR --prompt "def " "class " [--max_new_tokens 100] [--seed 1]
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import UserError, check_range, check_writable_file, exit_code_2_on_user_error, parse_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The continuation of `prompt` (without it), sampled with `seed`; stops early at the end-of-text token.

    An empty prompt starts from the end-of-text token, which is what precedes a document in training. Raises UserError
    for more tokens than a model with learned positions has, and for a tokenizer of another model.
    """
    import torch

    from eval.loading import longest_sequence

    input_ids = tokenizer(prompt, return_tensors="pt").input_ids if prompt else None
    if input_ids is None or input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])
    vocab_size = getattr(model.config, "unpadded_vocab_size", None) or model.config.vocab_size
    if input_ids.max() >= vocab_size:
        raise UserError(
            f"the tokenizer gives token id {input_ids.max()}, the model's vocab_size is only {vocab_size}; use the "
            "tokenizer that it was trained with"
        )
    longest = longest_sequence(model)
    if longest is not None and input_ids.shape[1] + max_new_tokens > longest:
        raise UserError(
            f"the prompt's {input_ids.shape[1]} tokens and --max_new_tokens {max_new_tokens} are more than the "
            f"{longest} positions that the model has learned; shorten one of them"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(seed)
    output_ids = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids).to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}),
    )
    return tokenizer.decode(output_ids[0, input_ids.shape[1] :], skip_special_tokens=True)


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(GenerateConfig, argv, __doc__)

    from eval.loading import load_model, load_tokenizer
    from training.metrics import write_json

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
