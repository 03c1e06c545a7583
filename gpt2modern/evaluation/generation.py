"""Text that a model writes after a prompt: by hand, and as the samples of a training run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.loading import longest_sequence


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue `prompt` and return the new text; sampled with `seed`, ended early by the end-of-text token.

    An empty prompt starts from the end-of-text token, which is what precedes a document in training. Raises
    GPT2ModernError for more tokens than a model with learned positions has, and for a tokenizer of another model.
    """
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids if prompt else None
    if input_ids is None or input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])  # (1, prompt_len)
    vocab_size = getattr(model.config, "unpadded_vocab_size", None) or model.config.vocab_size
    if input_ids.max() >= vocab_size:
        raise GPT2ModernError(
            f"the tokenizer gives token id {input_ids.max()}, the model's vocab_size is only {vocab_size}; use the "
            "tokenizer that it was trained with"
        )
    longest = longest_sequence(model)
    if longest is not None and input_ids.shape[1] + max_new_tokens > longest:
        raise GPT2ModernError(
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


def check_prompts(
    prompts: Sequence[str] | None, max_new_tokens: int, tokenizer_path: Path, model: PreTrainedModel
) -> None:
    """Raise GPT2ModernError for a prompt that leaves a model with learned positions no room for `max_new_tokens`."""
    longest = longest_sequence(model)
    if prompts and longest is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        for prompt in prompts:
            length = max(1, len(tokenizer(prompt).input_ids))
            if length + max_new_tokens > longest:
                raise GPT2ModernError(
                    f"--sample_prompts {prompt[:30]!r}: its {length} tokens and --sample_max_new_tokens "
                    f"{max_new_tokens} are more than the {longest} positions that the model has learned"
                )


def generate_samples(
    model: PreTrainedModel, tokenizer_path: Path, prompts: Sequence[str], *, max_new_tokens: int, seeds: Sequence[int]
) -> list[dict[str, str]]:
    """Continue each prompt with its seed and return rows of `prompt` and `text`; a failure is a warning, without rows.

    The random generators are put back as they were; the model is left in eval mode. A sharded model is asked on all
    processes, since each holds a part.
    """
    device = model.device
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return [
                {
                    "prompt": prompt,
                    "text": generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, seed=seed),
                }
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
    except Exception as error:
        warn(f"no samples: {type(error).__name__}: {error}")
        return []
