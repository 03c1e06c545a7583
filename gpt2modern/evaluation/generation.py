"""Generate text from prompts: for the eval.generate command and for the samples of a training run."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer
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
    input_ids = encode_prompt(model, tokenizer, prompt, add_special_tokens=add_special_tokens)
    refuse_longer(f"the prompt {prompt[:30]!r}", input_ids.shape[1], max_new_tokens, model)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(seed)
    output_ids = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **(sampling if temperature > 0 else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}),
    )
    return tokenizer.decode(output_ids[0, input_ids.shape[1] :], skip_special_tokens=True)


def encode_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, add_special_tokens: bool = True
) -> torch.Tensor:
    """Return the tokens of `prompt` on the model's device: (1, prompt_len) int64; of an empty one, the end-of-text
    token. Raises GPT2ModernError if a token exceeds the model's vocabulary."""
    ids = tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids if prompt else []
    ids, vocab_size = ids or [tokenizer.eos_token_id], num_token_ids(model.config)
    if max(ids) >= vocab_size:
        raise GPT2ModernError(
            f"the tokenizer returns token id {max(ids)}, but the model's vocab_size is only {vocab_size}; use the "
            "tokenizer that the model was trained with"
        )
    return torch.tensor([ids], device=model.device)


class _Parts(TextIteratorStreamer):
    """Yield parts of a text as they are generated, until a part is refused: `put` then ends the generation."""

    is_read = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_read:
            raise CancelledError
        super().put(value)


def stream_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **sampling: Any
) -> Iterator[str]:
    """Yield the growing text that `generate_text` generates with the same arguments, the whole text last. Generation
    ends at the next token once the iterator is closed."""
    parts = _Parts(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(generate_text, model, tokenizer, prompt, streamer=parts, **sampling)
        whole.add_done_callback(lambda _: parts.end())  # also after an error
        try:
            yield from itertools.accumulate(parts)
            yield whole.result()
        finally:
            parts.is_read = False


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, number: int = 6
) -> dict[str, float]:
    """Return the most likely tokens after `prompt`, as a Python literal with the id, and their probabilities, the
    highest first. They do not depend on temperature, top_k and top_p."""
    input_ids = encode_prompt(model, tokenizer, prompt)
    refuse_longer(f"the prompt {prompt[:30]!r}", input_ids.shape[1], 0, model)
    best = model(input_ids).logits[0, -1].float().softmax(-1).topk(number)  # (number,)
    ids, shares = best.indices.tolist(), best.values.tolist()
    return {f"{tokenizer.decode([each])!r} ({each})": share for each, share in zip(ids, shares, strict=True)}


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
