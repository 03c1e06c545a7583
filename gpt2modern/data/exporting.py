"""Export a prepared folder to the token files that nanoGPT and the speedrun repositories read."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gpt2modern.data.blocks import PackedBlocks
from gpt2modern.data.formats.tokens import write_tokens
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import atomic_folder, check_writable_folder
from gpt2modern.settings import check_ranges, setting


@dataclass
class ExportConfig:
    """Hold the flags of `prepare_data.py export`. Raises ValueError if a value is invalid."""

    data_dir: str = setting(help="Folder written by prepare_data.py with --packing concat, or its name on the Hub.")
    format: Literal["nanogpt", "speedrun"] = setting(
        help="nanogpt: train.bin and val.bin, uint16 ids with EOS after each document. speedrun: one file per shard as "
        "in kjj0/fineweb10B-gpt2, with a header and EOS before each document."
    )
    output_dir: str = setting(help="Folder to create.")

    def __post_init__(self):
        check_ranges(self)
        check_writable_folder("--output_dir", self.output_dir)


def export(config: ExportConfig) -> None:
    """Write the token files of all splits. Raises GPT2ModernError if the output folder exists, or the data was packed
    best_fit (which reorders documents) or has ids that do not fit into uint16."""
    output_dir = Path(config.output_dir)
    if output_dir.exists():
        raise GPT2ModernError(f"--output_dir {output_dir} exists; choose a new folder, or remove this one")
    splits = {"train": PackedBlocks(config.data_dir, "train"), "val": PackedBlocks(config.data_dir, "validation")}
    blocks, name = splits["train"], splits["train"].data_dir.name
    if blocks.packing != "concat" or blocks.manifest["dtype"] != "uint16":
        raise GPT2ModernError(
            f"{blocks.data_dir} has packing {blocks.packing} and {blocks.manifest['dtype']} ids; export needs concat "
            "and uint16, so prepare the data with --packing concat and a vocabulary below 65,536"
        )
    with atomic_folder(output_dir) as build:
        for split, blocks in splits.items():
            shards = [blocks.shard_tokens(index) for index in range(blocks.num_shards)]
            if config.format == "nanogpt":
                write_tokens(build / f"{split}.bin", itertools.chain(*shards), has_header=False)
                continue
            for index, parts in enumerate(shards):
                parts = _with_eos_first(parts, blocks.eos_token_id)
                write_tokens(build / f"{name}_{split}_{index:06d}.bin", parts, has_header=True)
    for path in sorted(output_dir.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _with_eos_first(parts: Iterator[np.ndarray], eos_token_id: int) -> Iterator[np.ndarray]:
    """Move the EOS at the end of each document to its start: yield EOS, then all tokens but the last, which is EOS."""
    waiting = np.array([eos_token_id])
    for part in parts:
        yield waiting
        waiting = part[-1:]
        yield part[:-1]
