"""Loss, perplexity and bits per byte of a model on the held-out split of prepared data.

python -m eval.perplexity --model DIR --data DATA [--output FILE.json]
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from gpt2modern.cli import check_range, check_writable_file, exit_code_2_on_user_error, parse_arguments
from gpt2modern.errors import GPT2ModernError


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


@exit_code_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(PerplexityConfig, argv, __doc__)

    from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
    from gpt2modern.evaluation.loss import evaluate_loss
    from gpt2modern.loading import load_model, longest_sequence
    from gpt2modern.training.metrics import bits_per_byte, write_json

    blocks = PackedBlocks(config.data, config.split, config.block_size)
    refuse_other_tokenizer(config.model, blocks)
    model = load_model(config.model)
    refuse_larger_vocabulary(config.model, model.config.vocab_size, blocks)
    longest = longest_sequence(model)
    if longest is not None and blocks.block_size > longest:
        raise GPT2ModernError(
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
