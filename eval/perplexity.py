"""Loss, perplexity and bits per byte of a model on the held-out split of prepared data.

python -m eval.perplexity --model DIR --data DATA [--output FILE.json]
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import UserError, check_range, check_writable_file, exit_code_2_on_user_error, parse_arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from training.blocks import PackedBlocks


@dataclass
class PerplexityConfig:
    model: str = field(metadata={"help": "model folder, or a repository id on the Hub"})
    data: str = field(metadata={"help": "folder written by prepare_data.py, or its name on the Hub"})
    split: str = field(
        default="validation", metadata={"help": "train or validation", "choices": ["train", "validation"]}
    )
    block_size: int | None = field(default=None, metadata={"help": "tokens of context; default: that of the data"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "blocks per forward pass"})
    output: str | None = field(default=None, metadata={"help": "also write the result to this JSON file"})

    def __post_init__(self):
        check_range("--block_size", self.block_size, 1)
        check_range("--per_device_eval_batch_size", self.per_device_eval_batch_size, 1)
        check_writable_file("--output", self.output)


def evaluate_loss(
    model: "nn.Module",
    blocks: "PackedBlocks",
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    max_blocks: int | None = None,
    from_start: bool = False,
    should_stop: "Callable[[], bool] | None" = None,
) -> float | None:
    """Mean next-token loss (nats/token) of `model` over `blocks`, or over `max_blocks` of them: at equal distances,
    or the first ones `from_start`.

    The blocks are divided over the processes without padding, each sums in float64, and one reduction ends it; every
    process returns the same number. All make the same number of forward passes, because a sharded model is gathered by
    all together: one that has run out of blocks repeats one without counting it. The train/eval mode is put back.
    should_stop: asked before each pass, and answered alike on every process; after a yes the result is None.
    """
    import torch
    from tqdm import tqdm

    from training.models import summed_loss

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


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(PerplexityConfig, argv, __doc__)

    from eval.loading import load_model, longest_sequence
    from training.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
    from training.metrics import bits_per_byte, write_json

    blocks = PackedBlocks(config.data, config.split, config.block_size)
    refuse_other_tokenizer(config.model, blocks)
    model = load_model(config.model)
    refuse_larger_vocabulary(config.model, model.config.vocab_size, blocks)
    longest = longest_sequence(model)
    if longest is not None and blocks.block_size > longest:
        raise UserError(
            f"--block_size {blocks.block_size} is longer than the {longest} positions that {config.model} has learned; "
            f"use --block_size {longest}"
        )
    loss = evaluate_loss(model, blocks, batch_size=config.per_device_eval_batch_size)
    result = {
        "model": config.model,
        "data": config.data,
        "split": config.split,
        "block_size": blocks.block_size,
        "tokens": blocks.tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits_per_byte(loss, blocks.bytes_per_token),
    }
    print(json.dumps(result, indent=2))
    if config.output:
        write_json(Path(config.output), result)


if __name__ == "__main__":
    main()
