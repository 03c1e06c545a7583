"""Generate text from prompts: for the eval.generate command and for the samples of a training run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.loading import longest_sequence, num_token_ids


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
    add_special_tokens: bool = True,
    streamer: BaseStreamer | None = None,
) -> str:
    """Return the text that the model generates after `prompt`: at most `max_new_tokens` tokens, without the prompt.

    Sampling uses `seed`; temperature 0 is greedy. Generation stops at the end-of-text token, which also replaces an
    empty prompt. add_special_tokens: whether the tokenizer adds those that it puts around a text; a chat template has
    them already. streamer: receives the tokens one by one. Raises GPT2ModernError if the tokens exceed the model's
    learned positions or its vocabulary.
    """
    input_ids = (
        tokenizer(prompt, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids if prompt else None
    )
    if input_ids is None or input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])  # (1, prompt_len)
    vocab_size = num_token_ids(model.config)
    if input_ids.max() >= vocab_size:
        raise GPT2ModernError(
            f"the tokenizer returns token id {input_ids.max()}, but the model's vocab_size is only {vocab_size}; use "
            "the tokenizer that the model was trained with"
        )
    refuse_longer(f"the prompt {prompt[:30]!r}", input_ids.shape[1], max_new_tokens, model)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(seed)
    output_ids = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids).to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **(sampling if temperature > 0 else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}),
    )
    return tokenizer.decode(output_ids[0, input_ids.shape[1] :], skip_special_tokens=True)


def refuse_longer(prompt: str, length: int, max_new_tokens: int, model: PreTrainedModel) -> None:
    """Raise GPT2ModernError if `length` tokens of the prompt and `max_new_tokens` exceed the model's learned positions.
    Does nothing for a model without learned position embeddings."""
    longest = longest_sequence(model)
    if longest is not None and length + max_new_tokens > longest:
        raise GPT2ModernError(
            f"{prompt}: its {length} tokens and {max_new_tokens} new ones are in total more than the model's {longest} "
            "positions; shorten the prompt or generate fewer tokens"
        )


def check_prompts(
    prompts: Sequence[str] | None, max_new_tokens: int, tokenizer_path: Path, model: PreTrainedModel
) -> None:
    """Raise GPT2ModernError if a prompt and `max_new_tokens` are in total more than the model's learned positions."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path) if prompts else None
    for prompt in prompts or ():
        length = max(1, len(tokenizer(prompt).input_ids))
        refuse_longer(f"--sample_prompts {prompt[:30]!r}", length, max_new_tokens, model)


def generate_samples(
    model: PreTrainedModel, tokenizer_path: Path, prompts: Sequence[str], *, max_new_tokens: int, seeds: Sequence[int]
) -> list[dict[str, str]]:
    """Generate a text for each prompt with its seed, and return one {"prompt": ..., "text": ...} per prompt.

    Warns and returns [] if generation fails. The state of the random generators is unchanged afterwards; the model is
    left in eval mode. If the model is sharded, every process must call this.
    """
    device = model.device
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    model.eval()
    try:
        devices = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            return [
                {
                    "prompt": prompt,
                    "text": generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, seed=seed),
                }
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
    except Exception as error:
        warn(f"the samples could not be generated ({type(error).__name__}: {error}) and are skipped this time")
        return []


def fenced(text: str) -> str:
    """Return `text` as a Markdown code block whose fence has more backticks than any fence inside the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
