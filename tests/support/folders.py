"""Small corpora, what prepare_data.py makes of them, and folders written row by row that it would not make."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, load_from_disk
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from prepare_data import main

EOS = 0
WORDS = ["the", "cat", "sat", "on", "a", "mat\nand;", "saw", "1984", "birds", "over\tthere", "<|endoftext|>"]
WORDS += ["\u00e9t\u00e9", "\u6771\u4eac", "\U0001f642"]


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


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


def make_texts(count: int, offset: int = 0) -> list[str]:
    """`count` different documents of 5 to 40 words; document i depends on offset + i only."""
    texts = []
    for seed in range(offset, offset + count):
        rng = np.random.default_rng(seed)
        texts.append(f"{seed}: " + " ".join(rng.choice(WORDS, size=rng.integers(5, 40))))
    return texts


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return path


def run(output_dir: Path, *flags: object) -> dict:
    main([*map(str, flags), "--output_dir", str(output_dir)])
    return json.loads((output_dir / "manifest.json").read_text())


def refusal(capsys, *flags: object) -> str:
    """The one line with which `main` refuses."""
    with pytest.raises(SystemExit) as caught:
        main([str(flag) for flag in flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"\n{error}".count("\nerror: ") == 1 and "Traceback" not in error
    return error.rstrip("\n").splitlines()[-1].removeprefix("error: ")


def rows_of(data_dir: Path, split: str) -> np.ndarray:
    """(rows, block_size + 1), read with `datasets` alone."""
    shards = sorted((data_dir / split).iterdir())
    return np.concatenate([np.array(load_from_disk(str(shard))["input_ids"]) for shard in shards])


def targets_of(data_dir: Path, split: str) -> list[int]:
    """The real targets of all rows, in order."""
    shards = [load_from_disk(str(shard)) for shard in sorted((data_dir / split).iterdir())]
    return [token for shard in shards for row in shard for token in row["input_ids"][1 : row["num_tokens"] + 1]]


def documents_of(data_dir: Path, split: str) -> list[str]:
    """The documents of a split.

    The texts here hold "<|endoftext|>", which becomes EOS: each piece of a text counts as a document, on both sides.
    """
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    return pieces([tokenizer.decode(targets_of(data_dir, split)).removesuffix("<|endoftext|>")])


def pieces(texts: list[str]) -> list[str]:
    return [piece for text in texts for piece in text.split("<|endoftext|>")]


def reference_ids(data_dir: Path, texts: list[str]) -> list[int]:
    """What `tokenizers` makes of the texts, each followed by EOS."""
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, eos]]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
