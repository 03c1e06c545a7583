"""Turn JSON lines into blocks of token ids as transformers' run_clm example does. Run and timed by benchmarks.data.

    python -m benchmarks.data_run_clm TOKENIZER_DIR OUTPUT_DIR NUM_PROC FILE.jsonl ...

`datasets.map` applies the tokenizer, then a function that joins the ids and cuts them into blocks, without EOS tokens;
labels and the attention mask are stored, too. Prints a JSON object: tokens (the number of ids before the incomplete
block is dropped, plus one EOS per document), and work_s (the seconds after imports and loading of the tokenizer).
"""

import itertools
import json
import sys
import time

import pyarrow.compute as pc
from datasets import load_dataset
from transformers import AutoTokenizer

BLOCK_SIZE = 1024


def main() -> None:
    tokenizer_dir, output_dir, num_proc, *files = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    started = time.perf_counter()

    def group(batch: dict[str, list]) -> dict[str, list]:
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in batch.items()}
        starts = range(0, len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE)
        rows = {name: [values[at : at + BLOCK_SIZE] for at in starts] for name, values in joined.items()}
        return rows | {"labels": rows["input_ids"].copy()}

    texts = load_dataset("json", data_files=files, split="train", cache_dir=f"{output_dir}/cache")
    workers = {"batched": True, "num_proc": int(num_proc)}
    tokenized = texts.map(lambda batch: tokenizer(batch["text"]), remove_columns=texts.column_names, **workers)
    grouped = tokenized.map(group, **workers)
    grouped.save_to_disk(f"{output_dir}/blocks")
    work_s = time.perf_counter() - started
    tokens = pc.sum(pc.list_value_length(tokenized.data.column("input_ids"))).as_py()
    print(json.dumps({"tokens": tokens + len(texts), "work_s": work_s}))


if __name__ == "__main__":
    main()
