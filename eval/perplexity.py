"""Compute loss (nats/token), perplexity and bits per byte of a model on a split of prepared data, and print them.

python -m eval.perplexity --model DIR --data DATA [--output FILE.json]
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.loss import bits_per_byte, evaluate_loss
from gpt2modern.files import check_writable_file, write_json
from gpt2modern.loading import best_device, load_model, longest_sequence
from gpt2modern.settings import check_ranges, setting


@dataclass
class PerplexityConfig:
    model: str = setting(help="model folder, or Hub repository id (owner/name)")
    data: str = setting(help="folder written by prepare_data.py, or its Hub dataset id (owner/name)")
    split: Literal["train", "validation"] = setting("validation", "split of the data to evaluate on")
    block_size: int | None = setting(None, "context length in tokens; default: the block size of the data", least=1)
    per_device_eval_batch_size: int = setting(8, "number of blocks per forward pass", least=1)
    output: str | None = setting(None, "JSON file to which the result is also written")

    def __post_init__(self):
        check_ranges(self)
        check_writable_file("--output", self.output)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse_arguments(PerplexityConfig, argv, __doc__)
        blocks = PackedBlocks(config.data, config.split, config.block_size)
        refuse_other_tokenizer(config.model, blocks)
        model = load_model(config.model).to(best_device())
        vocab_size = getattr(model.config, "unpadded_vocab_size", None) or model.config.vocab_size
        refuse_larger_vocabulary(config.model, vocab_size, blocks)
        longest = longest_sequence(model)
        if longest is not None and blocks.block_size > longest:
            raise GPT2ModernError(
                f"--block_size {blocks.block_size} is more than the {longest} positions of --model {config.model}; use "
                f"--block_size {longest}"
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
