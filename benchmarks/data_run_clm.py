"""From JSON lines to blocks as transformers' run_clm examples do; timed by benchmarks.data beside prepare_data.py.

    python -m benchmarks.data_run_clm --train_file F.jsonl ... --tokenizer_name DIR --output_dir OUT

`datasets.map` of the tokenizer, then of a function that joins and cuts lists; no EOS between documents; labels and
attention mask are stored beside the ids. Prints one JSON object: tokens (before anything is dropped), and work_s, the
seconds after imports and the tokenizer.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import pyarrow.compute as pc
from datasets import load_dataset
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", nargs="+", required=True, help="JSON lines with a column text")
    parser.add_argument("--tokenizer_name", required=True, help="folder of a tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens per block")
    parser.add_argument("--num_proc", type=int, default=2, help="worker processes of each map")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name)
    started = time.perf_counter()

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["text"])

    def group(batch: dict[str, list]) -> dict[str, list]:
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // arguments.block_size * arguments.block_size
        starts = range(0, end, arguments.block_size)
        rows = {name: [values[at : at + arguments.block_size] for at in starts] for name, values in joined.items()}
        return rows | {"labels": rows["input_ids"].copy()}

    cache = str(arguments.output_dir / "cache")
    texts = load_dataset("json", data_files=arguments.train_file, split="train", cache_dir=cache)
    tokenized = texts.map(tokenize, batched=True, num_proc=arguments.num_proc, remove_columns=texts.column_names)
    grouped = tokenized.map(group, batched=True, num_proc=arguments.num_proc)
    grouped.save_to_disk(arguments.output_dir / "blocks")
    work_s = time.perf_counter() - started
    tokens = pc.sum(pc.list_value_length(tokenized.data.column("input_ids"))).as_py()
    print(json.dumps({"tokens": tokens, "work_s": work_s}))


if __name__ == "__main__":
    main()
