"""Compute the log-probabilities of texts that continue a context, with the context computed once for all of them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

# Layers of a cache that can be repeated for several continuations; by name, as a model may bring code of its own.
REPEATABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "TokenHistory"}


class Row(NamedTuple):
    """Hold the token ids of a context and of its continuation, neither empty, and the continuation's characters."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    characters: int = 0


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Return for each row the sum of the log-probabilities (nats) of the continuation's tokens, and 1 if each of them
    is the most likely one, otherwise 0: (rows, 2) in float64, the same on every process.

    Every process must call this. `rows` and `batch_size` alone decide which rows share a forward pass, so the results
    do not depend on the number of processes. All make the same number of passes, as a sharded model requires: one
    without a batch repeats the first, not counted. The model's train or eval mode is unchanged afterwards.
    should_stop: called before each batch, must return the same on every process; if it returns True, None is returned.
    """
    batches = list(batches_of(rows, batch_size))
    scores = torch.zeros(len(rows), 2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        # Compiled layers would be compiled again for every length. Where nothing is compiled, the import takes seconds.
        is_compiled = "torch._dynamo" in sys.modules
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
            starts = range(process_index, len(batches) + process_index, num_processes)
            for start in tqdm(starts, desc="scoring", unit="batch", leave=False, disable=process_index > 0):
                if should_stop():
                    return None
                mine = batches[start] if start < len(batches) else []
                found = score_batch(model, [rows[index] for index in mine or batches[0]])
                scores[mine] = found[: len(mine)].cpu()
    finally:
        model.train(was_training)
    if num_processes > 1:
        scores = scores.to(model.device)
        torch.distributed.all_reduce(scores)  # exact: all but one of the added values are zero
    return scores.cpu()


def batches_of(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Divide the indices of `rows` into batches with equally long contexts, so that none is padded, the longest first.
    A batch ends after the context with which it has `batch_size` rows; the rows of a context are never divided."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (-len(rows[index].context), rows[index].context)):
        context, last = rows[index].context, rows[batch[-1]].context if batch else ()
        if batch and (len(context) != len(last) or (len(batch) >= batch_size and context != last)):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def score_batch(model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
    """Return the results of `score_rows` for rows with equally long contexts, by two forward passes: one over the
    different contexts, one over the continuations, with the keys and values of the first."""
    contexts = {context: number for number, context in enumerate(dict.fromkeys(row.context for row in rows))}
    of_row = torch.tensor([contexts[row.context] for row in rows], device=model.device)
    context_ids = torch.tensor(list(contexts), device=model.device)  # (contexts, context_len)
    length, width = context_ids.shape[1], max(len(row.continuation) for row in rows)
    padded = [[*row.continuation, *[-100] * (width - len(row.continuation))] for row in rows]
    targets = torch.tensor(padded, device=model.device)  # (rows, width); right padding changes nothing before it
    input_ids = torch.cat([context_ids[of_row], targets[:, :-1].clamp(min=0)], dim=1)
    # The last token of a context is left to the second pass, whose logits are then those of the continuation.
    cache = model(input_ids=context_ids[:, : max(1, length - 1)], use_cache=True, logits_to_keep=1).get(
        "past_key_values"
    )
    # Other caches (Mamba, ...) cannot be repeated: their contexts are computed again with each continuation.
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if is_shared := length > 1 and bool(kinds) and kinds <= REPEATABLE:
        cache.batch_select_indices(of_row)
        input_ids = input_ids[:, length - 1 :]  # (rows, width)
    options = {"past_key_values": cache, "use_cache": True} if is_shared else {"use_cache": False}
    logits = model(input_ids=input_ids, logits_to_keep=width, **options).logits[:, -width:].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    is_greedy = ((logits.argmax(-1) == targets) | (targets < 0)).all(1)
    return torch.stack([-losses.double().sum(1), is_greedy.double()], dim=1)
