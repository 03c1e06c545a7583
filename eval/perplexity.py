"""Compute loss (nats/token), perplexity and bits per byte of a model on a split of prepared data, and print them.

python -m eval.perplexity --model DIR --data DATA [--document_masking true] [--stride 64] [--length_factors 1 2 4]

The model is any causal language model of transformers. Processes of accelerate launch or torchrun share the work.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.metrics import load_metric
from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import IGNORE_INDEX, PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import document_positions
from gpt2modern.files import check_writable_file, write_json
from gpt2modern.loading import load_model, longest_sequence, num_token_ids
from gpt2modern.settings import check_ranges, setting
from gpt2modern.training.distributed import Processes, joined_processes


@dataclass
class PerplexityConfig:
    model: str = setting(help="model folder, or Hub repository id (owner/name)")
    data: str = setting(help="folder written by prepare_data.py, or its Hub dataset id (owner/name)")
    split: Literal["train", "validation"] = setting("validation", "split of the data to evaluate on")
    block_size: int | None = setting(None, "context length in tokens; default: the block size of the data", least=1)
    document_masking: bool = setting(False, "each token attends to its own document only")
    stride: int | None = setting(None, "tokens that overlapping windows move by; default: separate blocks", least=1)
    length_factors: list[int] | None = setting(None, "also evaluate in blocks of these multiples of it", least=1)
    per_device_eval_batch_size: int = setting(8, "number of blocks per forward pass", least=1)
    output: str | None = setting(None, "JSON file to which the result is also written")

    def __post_init__(self):
        check_ranges(self)
        check_writable_file("--output", self.output)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PerplexityConfig, argv, __doc__)
        with joined_processes("no", 3600) as (accelerator, processes):
            torch.set_float32_matmul_precision("highest")  # TF32 would change the fourth digit
            blocks = PackedBlocks(config.data, config.split, config.block_size)
            refuse_other_tokenizer(config.model, blocks)
            model = load_model(config.model).to(accelerator.device)
            refuse_larger_vocabulary(config.model, num_token_ids(model.config), blocks)
            if blocks.block_size > (longest := longest_sequence(model) or math.inf):
                raise GPT2ModernError(
                    f"--block_size {blocks.block_size} is more than the {longest} positions of --model {config.model}; "
                    f"use --block_size {longest}"
                )
            rows = measure_lengths(
                model,
                blocks,
                [1, *(config.length_factors or [])],
                batch_size=config.per_device_eval_batch_size,
                document_masking=config.document_masking,
                stride=config.stride,
                processes=processes,
            )
            lengths = {"lengths": rows} if config.length_factors else {}
            result = {"model": config.model, "data": config.data, "split": config.split, **rows[0], **lengths}
            if processes.is_main:
                print(json.dumps(result, indent=2))
                if config.output:
                    write_json(Path(config.output), result)


def measure_lengths(
    model: PreTrainedModel, blocks: PackedBlocks, factors: Sequence[int], *, batch_size: int = 8, **options: Any
) -> list[dict[str, Any]]:
    """Return the result of `measure`, which takes the options, in blocks of each multiple of the block size; only size
    and note where the model has fewer positions. batch_size: at the block size; longer blocks have as many tokens."""
    rows, longest = [], longest_sequence(model) or math.inf
    for factor in dict.fromkeys(factors):
        size = blocks.block_size * factor
        rows.append({"block_size": size, "note": f"beyond its {longest} positions"})
        if size <= longest:
            longer = PackedBlocks(str(blocks.data_dir), blocks.split, size)
            rows[-1] = measure(model, longer, batch_size=max(1, batch_size // factor), **options)
    return rows


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    blocks: PackedBlocks,
    *,
    batch_size: int = 8,
    document_masking: bool = False,
    stride: int | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Return the loss (nats/token) of a causal language model on `blocks`, its standard error, perplexity, bits per
    byte, and the mean loss of targets that follow 1, 2 to 3, 4 to 7, ... tokens. The model is then in eval mode.

    document_masking: each token attends to its own document only, and its position is that in its document.
    stride: None: blocks are separate. Otherwise the split is one text; windows of up to block_size tokens move by
    `stride` tokens, and their last `stride` tokens are counted: each token of the text once.
    processes: of the launch; all must call this. They take whole batches in turn, and windows are summed in float64 and
    in order, so that the result is the same for any number of them.
    Raises GPT2ModernError for a stride that does not fit, a model that mixes documents, and a NaN or infinite loss.
    """
    model.eval()
    length = blocks.block_size
    if stride is not None and (blocks.packing != "concat" or stride > length):
        raise GPT2ModernError(
            f"--stride {stride} must be at most the block size {length}, and the data packed concat ({blocks.data_dir} "
            f"is packed {blocks.packing}); change it, or prepare the data again"
        )
    if document_masking:
        refuse_leaks(model)
    count = len(blocks) if stride is None else -(-blocks.tokens // stride)
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    index, num_processes = (processes.index, processes.count) if processes else (0, 1)
    found = []
    for batch in tqdm(batches[index::num_processes], "evaluating", leave=False, disable=index > 0):
        inputs, targets = windows(blocks, batch, stride)
        positions, options = torch.arange(length).expand_as(inputs), {}
        if document_masking:
            positions = document_positions(inputs, blocks.eos_token_id)
            options = {"position_ids": positions.to(model.device)}
        logits = model(input_ids=inputs.to(model.device), use_cache=False, **options).logits
        rows = zip(logits, targets.to(model.device), strict=True)  # a row at a time: fp32 copies are large
        nats = torch.stack([F.cross_entropy(row.float(), target, reduction="none") for row, target in rows])
        bins = torch.frexp(positions + 1.0).exponent.long() - 1  # log2, rounded down
        table = torch.zeros(len(batch), 2, length.bit_length(), dtype=torch.float64)
        table[:, 0].scatter_add_(1, bins, nats.cpu().double())
        table[:, 1].scatter_add_(1, bins, (targets != IGNORE_INDEX).double())
        found += zip(batch, table, strict=True)
    found = sorted(gather_object(found) if num_processes > 1 else found, key=lambda row: row[0])
    tables = torch.stack([table for _, table in found])  # (windows, 2, bins): nats and targets
    groups = torch.arange(count) * (stride or length) // length  # windows that overlap are no independent samples
    nats, targets = tables.new_zeros(int(groups[-1]) + 1, 2).index_add_(0, groups, tables.sum(2)).T.tolist()
    if not math.isfinite(sum(nats)):
        raise GPT2ModernError("the loss is NaN or infinite: the logits of --model overflow; use an earlier checkpoint")
    ends = [(2**k, min(2 ** (k + 1) - 1, length)) for k in range(length.bit_length())]
    names = [f"{first}-{last}" if first < last else str(first) for first, last in ends]
    of_bins = zip(names, *tables.sum(0).tolist(), strict=True)
    num_bytes = blocks.manifest["splits"][blocks.split]["bytes"]
    return {
        "block_size": length,
        "document_masking": document_masking,
        "stride": stride,
        "tokens": int(sum(targets)),
        **load_metric("perplexity").compute(nats=nats, tokens=[int(size) for size in targets]),
        **load_metric("bits_per_byte").compute(nats=[math.fsum(nats)], bytes=[num_bytes]),
        "loss_by_position": {name: of_bin / size for name, of_bin, size in of_bins if size},
    }


def windows(blocks: PackedBlocks, indices: Sequence[int], stride: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of the given windows of `measure`, (len(indices), block_size) each. Targets that are
    not counted are IGNORE_INDEX; padding is only at the end of a row, where no counted target sees it."""
    if stride is None:
        tokens = blocks.__getitems__(indices)
        return tokens[:, :-1].clamp(min=0), tokens[:, 1:]
    inputs = torch.zeros(len(indices), blocks.block_size, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, index in enumerate(indices):
        first = max(0, (index + 1) * stride - blocks.block_size)  # target of the window
        tokens = blocks.stream(first - 1, min((index + 1) * stride, blocks.tokens))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, index * stride - first : len(tokens) - 1] = tokens[index * stride - first + 1 :]
    return inputs, targets


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise GPT2ModernError if the logits of a row's second document depend on the first. Not every model and attention
    kernel of transformers finds documents in position_ids, flash attention only if the batch is a single row."""
    rows = [torch.tensor([[first, 2, 3, 4, 5, 2, 3, 4]] * 2, device=model.device) for first in (0, 1)]
    options = {"position_ids": torch.arange(4, device=model.device).repeat(2, 2), "use_cache": False}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not (takes_positions and torch.equal(*(model(input_ids=ids, **options).logits[:, 4:] for ids in rows))):
        raise GPT2ModernError(
            f"--document_masking: a {model.config.model_type} model with attention {model.config._attn_implementation} "
            "does not keep the documents of a row apart; omit the flag"
        )


if __name__ == "__main__":
    main()
