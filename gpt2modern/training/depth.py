"""Derive the settings of a run from one number, the depth of its model (--depth)."""

import argparse
import math

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.dry_run import assumed_data
from gpt2modern.training.models import size_of_depth

TOKENS_PER_PARAMETER = 12
BASE_DEPTH, BASE_BATCH = 12, 2**19  # that the default learning rates and weight decay are for; tokens per step


def flags_of_depth(settings: argparse.Namespace, given: list[str]) -> list[str]:
    """Return the flags that follow from --depth, none without it. given: flags that the user or a recipe has set; what
    follows from their values is computed from them.

    The rules are those of nanochat (scripts/base_train.py): 12 tokens per parameter of the head and of the matrices in
    the layers; a batch proportional to the 0.383th power of the tokens, a power of two of sequences; learning rates to
    the root of the batch, AdamW's also to the inverse root of the width; weight decay to the root of the batch over the
    tokens. Raises GPT2ModernError if the data cannot be opened.
    """
    sizes = settings.depth, settings.block_size or 1, settings.total_batch_size or 1, settings.max_steps
    if settings.depth is None or min(sizes) < 1:
        return []  # TrainConfig refuses the value
    opened = settings.data_dir and PackedBlocks(settings.data_dir, "train", settings.block_size)
    data = opened or assumed_data(settings)
    widths = {depth: size_of_depth(depth)["hidden_size"] for depth in (BASE_DEPTH, settings.depth)}
    matrices = {depth: 12 * depth * width**2 + data.vocab_size * width for depth, width in widths.items()}
    tokens, base_tokens = (TOKENS_PER_PARAMETER * matrices[depth] for depth in (settings.depth, BASE_DEPTH))
    sequences = BASE_BATCH * (tokens / base_tokens) ** 0.383 / data.block_size
    batch = settings.total_batch_size or data.block_size * 2 ** max(0, round(math.log2(sequences)))
    if any(flag.partition("=")[0] == "--max_steps" for flag in given):
        tokens = settings.max_steps * batch
    root, width_root = math.sqrt(batch / BASE_BATCH), math.sqrt(widths[BASE_DEPTH] / widths[settings.depth])
    derived = {
        "total_batch_size": batch,
        "max_steps": max(1, round(tokens / batch)),
        "learning_rate": f"{TrainConfig.learning_rate * root * width_root:.3g}",
        "muon_learning_rate": f"{TrainConfig.muon_learning_rate * root:.3g}",
        "weight_decay": f"{TrainConfig.weight_decay * root * base_tokens / tokens:.3g}",
    }
    return [f"--{name}={value}" for name, value in derived.items()]
