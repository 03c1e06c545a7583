"""The next-token loss of a batch, for training and evaluation, and its mean over prepared blocks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from gpt2modern.data.blocks import PackedBlocks


def batch_loss(
    model: nn.Module,
    batch: torch.Tensor,
    *,
    num_items: float | torch.Tensor = 1,
    separator: int | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the next-token losses of `batch` and divide by `num_items`; no logits are kept.

    Returns what is minimised, the loss plus z-loss with the coefficient `z_loss`, and the loss alone, detached: scalars
    in nats, fp32.
    batch: (sequences, block_size + 1) token ids; the last of each sequence is a target only. Padding, -100, is no
    target, and as an input it is id 0: what attends to it comes after it and has no target either.
    separator: the token that ends a document; tokens then attend to none of the documents before their own in the
    block, and the separator itself still predicts what follows it. None: every token attends to all before it.
    """
    input_ids = batch[:, :-1].clamp(min=0)  # (sequences, block_size)
    output = model(
        input_ids=input_ids,
        position_ids=None if separator is None else document_positions(input_ids, separator),
        shift_labels=batch[:, 1:],
        num_items_in_batch=num_items,
        use_cache=False,
        skip_logits=True,
        **({"z_loss_coefficient": z_loss} if z_loss else {}),
    )
    return output.loss, output.loss.detach() - output.z_loss if z_loss else output.loss.detach()


def document_positions(input_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """Number the tokens of each row from 0, and again from 0 after each `separator`: (batch, seq_len) to the same."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.nn.functional.pad(input_ids[:, :-1] == separator, (1, 0))
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values


class Metric(NamedTuple):
    """A result of an evaluation. label: with its unit, as the model card shows it; of: from the mean loss (nats/token)
    and the blocks that were evaluated."""

    label: str
    of: Callable[[float, PackedBlocks], float]


# In metrics.jsonl, summary.json, the checkpoints and the model card of every run, by these names.
METRICS = {
    "eval_loss": Metric("validation loss (nats/token)", lambda loss, blocks: loss),
    "bits_per_byte": Metric(
        "validation bits per byte", lambda loss, blocks: bits_per_byte(loss, blocks.bytes_per_token)
    ),
}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert nats per token to bits per UTF-8 byte of the text, which does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


def evaluated_blocks(num_blocks: int, *, max_blocks: int | None, from_start: bool) -> list[int]:
    """List the blocks of a split that an evaluation uses: all, or `max_blocks` at equal distances or from its start."""
    count = min(num_blocks, max_blocks or num_blocks)
    return [index if from_start else index * num_blocks // count for index in range(count)]


def evaluate_loss(
    model: nn.Module,
    blocks: PackedBlocks,
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    max_blocks: int | None = None,
    from_start: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> float | None:
    """Return the mean next-token loss (nats/token) of `model` over the `evaluated_blocks`, the same on every process.

    The blocks are divided over the processes without padding, each sums in float64, and one reduction ends it. All make
    the same number of forward passes, because a sharded model is gathered by all together: a process that has run out
    of blocks repeats one without counting it. The train/eval mode is put back.
    should_stop: asked before each pass, and answered alike on every process; after a yes the result is None.
    """
    chosen = evaluated_blocks(len(blocks), max_blocks=max_blocks, from_start=from_start)
    mine = chosen[process_index::num_processes]
    passes = -(-len(chosen[::num_processes]) // batch_size)  # of process 0, which has the most blocks
    device = next(model.parameters()).device
    losses = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for index in tqdm(range(passes), desc="evaluating", unit="batch", leave=False, disable=process_index > 0):
                if should_stop is not None and should_stop():
                    return None
                part = mine[index * batch_size : (index + 1) * batch_size]
                loss, _ = batch_loss(model, blocks.__getitems__(part or chosen[:1]).to(device))
                if part:
                    losses.append(loss)
    finally:
        model.train(was_training)
    nats = torch.tensor(sum(torch.stack(losses).tolist()) if losses else 0.0, dtype=torch.float64)
    if num_processes > 1:
        nats = nats.to(device)
        torch.distributed.all_reduce(nats)
    return nats.item() / blocks.num_targets(chosen)
