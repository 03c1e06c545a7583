"""Mean loss of a model over prepared blocks."""

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.training.models import summed_loss


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
    """Mean next-token loss (nats/token) of `model` over `blocks`, or over `max_blocks` of them: at equal distances,
    or the first ones `from_start`.

    The blocks are divided over the processes without padding, each sums in float64, and one reduction ends it; every
    process returns the same number. All make the same number of forward passes, because a sharded model is gathered by
    all together: one that has run out of blocks repeats one without counting it. The train/eval mode is put back.
    should_stop: asked before each pass, and answered alike on every process; after a yes the result is None.
    """
    count = len(blocks) if max_blocks is None else min(max_blocks, len(blocks))
    chosen = [index if from_start else index * len(blocks) // count for index in range(count)]
    mine = chosen[process_index::num_processes]
    passes = -(-len(chosen[::num_processes]) // batch_size)  # of process 0, which has the most blocks
    device = next(model.parameters()).device
    losses = []
    stopped = False
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index in tqdm(range(passes), desc="evaluating", unit="batch", leave=False, disable=process_index > 0):
            if should_stop is not None and (stopped := should_stop()):
                break
            part = mine[index * batch_size : (index + 1) * batch_size]
            loss = summed_loss(model, blocks.__getitems__(part or chosen[:1]).to(device))
            if part:
                losses.append(loss)
    model.train(was_training)
    if stopped:
        return None
    nats = torch.tensor(sum(torch.stack(losses).tolist()) if losses else 0.0, dtype=torch.float64)
    if num_processes > 1:
        nats = nats.to(device)
        torch.distributed.all_reduce(nats)
    return nats.item() / blocks.num_targets(chosen)
