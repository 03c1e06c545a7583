"""Text that a model writes after a prompt."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2modern.errors import GPT2ModernError
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
    """The continuation of `prompt` (without it), sampled with `seed`; stops early at the end-of-text token.

    An empty prompt starts from the end-of-text token, which is what precedes a document in training. Raises GPT2ModernError
    for more tokens than a model with learned positions has, and for a tokenizer of another model.
    """
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids if prompt else None
    if input_ids is None or input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])
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
