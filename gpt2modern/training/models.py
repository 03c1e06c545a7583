"""The model of a run: a preset, fitted to the data, with the user's overrides on top; and how its loss is asked for."""

import re
from typing import Any

import torch
import yaml
from torch import nn

from gpt2modern.cli import nearest
from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary
from gpt2modern.errors import GPT2ModernError
from modeling_gpt2modern import GPT2ModernConfig, GPT2ModernForCausalLM

# What the architecture reads: not what transformers keeps in every configuration, such as return_dict.
MODEL_SETTINGS = (*GPT2ModernConfig.__annotations__, *GPT2ModernConfig.attribute_map, "rope_theta", "rope_scaling")


def build_model(
    *,
    model_preset: str,
    config_overrides: str | None,
    attn_implementation: str,
    gradient_checkpointing: bool,
    blocks: PackedBlocks,
) -> GPT2ModernForCausalLM:
    """The preset, fitted to the data (vocabulary, context, special tokens), with --config_overrides on top."""
    overrides = parse_config_overrides(config_overrides)
    try:
        preset = GPT2ModernConfig.from_preset(model_preset)
        fitted = {
            "max_position_embeddings": blocks.block_size,
            "bos_token_id": blocks.eos_token_id,
            "eos_token_id": blocks.eos_token_id,
        }
        if blocks.vocab_size != (preset.unpadded_vocab_size or preset.vocab_size):
            fitted["vocab_size"] = blocks.vocab_size
            if preset.unpadded_vocab_size is not None:  # rows in multiples of 64 suit tensor cores
                fitted["vocab_size"] = -(-blocks.vocab_size // 64) * 64
                fitted["unpadded_vocab_size"] = blocks.vocab_size
        model_config = GPT2ModernConfig.from_preset(model_preset, **(fitted | overrides))
    except (ValueError, TypeError) as error:
        raise GPT2ModernError(f"--model_preset {model_preset} / --config_overrides: {error}") from None
    refuse_larger_vocabulary("the model", model_config.vocab_size, blocks)
    if blocks.block_size > model_config.max_position_embeddings:
        raise GPT2ModernError(
            f"--block_size {blocks.block_size} is longer than max_position_embeddings="
            f"{model_config.max_position_embeddings} of --config_overrides"
        )
    try:
        model = GPT2ModernForCausalLM._from_config(model_config, attn_implementation=attn_implementation)
    except (ValueError, ImportError, RuntimeError, AttributeError) as error:
        flags = f"--attn_implementation {attn_implementation} / --config_overrides"
        raise GPT2ModernError(f"{flags}: the model cannot be built: {str(error).splitlines()[0]}") from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def parse_config_overrides(text: str | None) -> dict[str, Any]:
    """'hidden_size=64,layer_types=[full_attention,sliding_attention]' -> typed values, read as YAML."""
    overrides = {}
    for pair in re.split(r",(?=\s*\w+=)", text) if text else []:
        key, separator, value = pair.partition("=")
        key = key.strip()
        if not separator:
            raise GPT2ModernError(f"--config_overrides: expected key=value, found {pair!r}")
        if key in overrides:
            raise GPT2ModernError(f"--config_overrides: {key!r} is given twice; keep one")
        if key not in MODEL_SETTINGS:
            raise GPT2ModernError(
                f"--config_overrides: the model has no setting {key!r}{nearest(key, MODEL_SETTINGS, '')}"
            )
        try:
            overrides[key] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            raise GPT2ModernError(f"--config_overrides: cannot read the value of {key!r}: {value!r}") from None
    return overrides


def summed_loss(
    model: nn.Module,
    batch: torch.Tensor,
    *,
    num_items: float | torch.Tensor = 1,
    separator: int | None = None,
) -> torch.Tensor:
    """Summed next-token loss of `batch` over `num_items`: a scalar in nats, in fp32; no logits are kept.

    batch: (sequences, block_size + 1) token ids; the last of each sequence is a target only. Padding, -100, is no
        target, and as an input it is id 0: what sees it comes after it and has no target either.
    separator: the token that ends a document; tokens then see none of the documents before their own in the block.
        The separator itself still predicts what follows it. None: every token sees all that stands before it.
    """
    return _loss_output(model, batch, num_items, separator).loss


def objective_and_loss(
    model: nn.Module, batch: torch.Tensor, *, num_items: float | torch.Tensor, separator: int | None, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is minimised, `summed_loss` plus z-loss with the coefficient `z_loss`; and `summed_loss` alone, detached."""
    if not z_loss:
        loss = summed_loss(model, batch, num_items=num_items, separator=separator)
        return loss, loss.detach()
    output = _loss_output(model, batch, num_items, separator, z_loss_coefficient=z_loss)
    return output.loss, output.loss.detach() - output.z_loss


def _loss_output(
    model: nn.Module, batch: torch.Tensor, num_items: float | torch.Tensor, separator: int | None, **kwargs
) -> Any:
    input_ids = batch[:, :-1].clamp(min=0)
    return model(
        input_ids=input_ids,
        position_ids=None if separator is None else document_positions(input_ids, separator),
        shift_labels=batch[:, 1:],
        num_items_in_batch=num_items,
        use_cache=False,
        skip_logits=True,
        **kwargs,
    )


def document_positions(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """(batch, seq_len) token ids -> positions that begin at 0 in each row and again after each `separator`."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.nn.functional.pad(input_ids[:, :-1] == separator, (1, 0))
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values
