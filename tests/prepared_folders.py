"""Prepared folders written row by row, for what prepare_data.py would not make of a short text."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value

EOS = 0


def described(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_prepared(
    folder: Path,
    splits: dict[str, list[list[list[int]]]],
    *,
    tokenizer_dir: Path,
    block_size: int,
    packing: str = "best_fit",
    vocab_size: int = 300,
) -> Path:
    """A folder of format 2. splits: name -> shards -> rows -> the row's first token and its real targets."""
    features = Features({"input_ids": List(Value("uint16"), length=block_size + 1), "num_tokens": Value("int32")})
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    counts = {}
    for split, shards in splits.items():
        entries = []
        for index, rows in enumerate(shards):
            path = folder / split / f"shard-{index:05d}-of-{len(shards):05d}"
            columns = {
                "input_ids": [row + [EOS] * (block_size + 1 - len(row)) for row in rows],
                "num_tokens": [len(row) - 1 for row in rows],
            }
            Dataset.from_dict(columns, features=features).save_to_disk(path)
            entries.append(
                {
                    "path": path.relative_to(folder).as_posix(),
                    "rows": len(rows),
                    "tokens": sum(columns["num_tokens"]),
                    "files": {file.name: described(file) for file in sorted(path.iterdir())},
                }
            )
        rows, tokens = (sum(entry[name] for entry in entries) for name in ("rows", "tokens"))
        counts[split] = {"documents": rows, "bytes": 4 * tokens, "tokens": tokens, "rows": rows, "cut_documents": 0}
        counts[split] |= {"padding": rows * block_size - tokens, "shards": entries}
    manifest = {
        "format_version": 2,
        "block_size": block_size,
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "eos_token_id": EOS,
        "packing": packing,
        "tokenizer": {"name": None, "sha256": described(folder / "tokenizer" / "tokenizer.json")["sha256"]},
        "source": {"name": "rows"},
        "splits": counts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def random_rows(count: int, block_size: int, *, seed: int) -> list[list[int]]:
    """`count` rows of 1 to block_size real targets; ids 1 to 299 after an EOS."""
    rng = np.random.default_rng(seed)
    return [[EOS, *rng.integers(1, 300, size=rng.integers(1, block_size + 1)).tolist()] for _ in range(count)]
