"""Compute the next-token loss of a batch, for training and evaluation, and its mean over prepared blocks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gpt2modern.data.blocks import PackedBlocks
from modeling_gpt2modern import GPT2ModernConfig


def batch_loss(
    model: nn.Module,
    batch: torch.Tensor,
    *,
    num_items: float | torch.Tensor = 1,
    separator: int | None = None,
    max_document_length: int | None = None,
    z_loss: float = 0.0,
    later_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the next-token losses of `batch` divided by `num_items`, with and without auxiliary losses.

    The first result is minimised: the loss, plus the z-loss with coefficient `z_loss`, plus the losses of the tokens
    after the next one times `later_weights`, (later,). The second is the next-token loss alone, detached. Both are fp32
    scalars in nats. No logits are kept.
    batch: (sequences, block_size + 1) token ids; the last of each sequence is a target only. Padding (-100) is never a
    target; as an input it becomes id 0, which is harmless because only padding follows padding.
    separator: id of the token that ends a document; each token then attends to its own document only, and the separator
    still has the next document's first token as target. None: each token attends to all tokens before it.
    max_document_length: longer documents are masked as several ones of at most so many tokens; targets are unchanged.
    """
    input_ids = batch[:, :-1].clamp(min=0)  # (sequences, block_size)
    output = model(
        input_ids=input_ids,
        position_ids=None if separator is None else document_positions(input_ids, separator, max_document_length),
        shift_labels=batch[:, 1:],
        num_items_in_batch=num_items,
        use_cache=False,
        skip_logits=True,
        **({"z_loss_coefficient": z_loss} if z_loss else {}),
        **({} if later_weights is None else later_targets(batch, later_weights, separator)),
    )
    loss = output.loss.detach()
    return output.loss, loss - output.auxiliary_loss if z_loss or later_weights is not None else loss


def later_targets(batch: torch.Tensor, weights: torch.Tensor, separator: int | None) -> dict[str, torch.Tensor]:
    """Return `weights`, (later,), and the tokens 2, 3, ... places after each input of `batch`, as the model takes them:
    (sequences, block_size, later), with -100 beyond the block and, if there is a `separator`, in another document."""
    ends = batch[:, :-1] == (-1 if separator is None else separator)
    targets, labels = batch[:, 1:].masked_fill(ends, -100), []
    for _ in weights:
        targets = nn.functional.pad(targets[:, 1:], (0, 1), value=-100).masked_fill(ends, -100)
        labels.append(targets)
    return {"later_labels": torch.stack(labels, dim=-1), "later_weights": weights}


def loss_from_logits(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the sum of the next-token losses (nats) of `batch`, (sequences, block_size + 1), for any causal language
    model of transformers. All logits of the batch are in memory at once."""
    logits = model(input_ids=batch[:, :-1].clamp(min=0), use_cache=False).logits  # (sequences, block_size, vocab_size)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def document_positions(input_ids: torch.Tensor, separator: int, max_length: int | None = None) -> torch.Tensor:
    """Return the position of each token in its document: positions restart at 0 after each `separator` token, and in
    documents longer than `max_length` after so many tokens. input_ids and result: (batch, seq_len) integers."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = torch.nn.functional.pad(input_ids[:, :-1] == separator, (1, 0))
    positions = positions - torch.where(starts, positions, 0).cummax(dim=1).values
    return positions if max_length is None else positions % max_length


class Metric(NamedTuple):
    """Describe a result of an evaluation. label: its name and unit in the model card. of: computes it from the mean
    loss (nats/token) and the evaluated blocks."""

    label: str
    of: Callable[[float, PackedBlocks], float]


# The results in metrics.jsonl, summary.json, the checkpoints and the model card of every run, under these names.
METRICS = {
    "eval_loss": Metric("validation loss (nats/token)", lambda loss, blocks: loss),
    "bits_per_byte": Metric(
        "validation bits per byte", lambda loss, blocks: bits_per_byte(loss, blocks.bytes_per_token)
    ),
}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token to bits per UTF-8 byte of the text, a value that is comparable between
    tokenizers. bytes_per_token: mean number of bytes of text per token."""
    return loss / math.log(2) / bytes_per_token


def evaluated_blocks(num_blocks: int, *, max_blocks: int | None, from_start: bool) -> list[int]:
    """Return the indices of the blocks that an evaluation uses: all `num_blocks`, or only `max_blocks` of them, which
    are the first ones if `from_start`, and otherwise spread at equal distances."""
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

    Every process must call this. Each evaluates its share of the blocks, and the float64 sums are added at the end. All
    make the same number of forward passes, as a sharded model requires: a process without blocks left repeats one that
    is not counted. The train or eval mode of the model is unchanged afterwards.
    should_stop: called before each pass, must return the same on every process; if it returns True, None is returned.
    """
    chosen = evaluated_blocks(len(blocks), max_blocks=max_blocks, from_start=from_start)
    mine = chosen[process_index::num_processes]
    passes = -(-len(chosen[::num_processes]) // batch_size)  # of process 0, which has the most blocks
    device = next(model.parameters()).device
    is_stock = isinstance(model, PreTrainedModel) and model.config.model_type != GPT2ModernConfig.model_type
    losses = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for index in tqdm(range(passes), desc="evaluating", unit="batch", leave=False, disable=process_index > 0):
                if should_stop is not None and should_stop():
                    return None
                part = mine[index * batch_size : (index + 1) * batch_size]
                batch = blocks.__getitems__(part or chosen[:1]).to(device)
                loss = loss_from_logits(model, batch) if is_stock else batch_loss(model, batch)[0]
                if part:
                    losses.append(loss)
    finally:
        model.train(was_training)
    nats = torch.tensor(sum(torch.stack(losses).tolist()) if losses else 0.0, dtype=torch.float64)
    if num_processes > 1:
        nats = nats.to(device)
        torch.distributed.all_reduce(nats)
    return nats.item() / blocks.num_targets(chosen)
