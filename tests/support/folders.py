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
    vocab_size: int = 300,
) -> Path:
    """A folder of format 3, packed best_fit and written by `datasets` alone.

    splits: name -> shards -> rows -> the token before the row, and the tokens of the row."""
    ids = Value("uint16")
    features = Features({"input_ids": List(ids), "previous_token": ids, "labels": List(ids)})
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    counts, files = {}, {}
    for split, shards in splits.items():
        entries = []
        for index, rows in enumerate(shards):
            path = folder / split / f"data-{index:05d}-of-{len(shards):05d}.arrow"
            tokens = [row[1:] for row in rows]
            columns = {"input_ids": tokens, "previous_token": [row[0] for row in rows], "labels": tokens}
            Dataset.from_dict(columns, features=features).save_to_disk(folder / "saved")
            path.parent.mkdir(exist_ok=True)
            (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
            shutil.rmtree(folder / "saved")
            name = path.relative_to(folder).as_posix()
            entries.append({"path": name, "rows": len(rows), "tokens": sum(map(len, tokens))})
            files[name] = described(path)
        rows, tokens = (sum(entry[name] for entry in entries) for name in ("rows", "tokens"))
        counts[split] = {"documents": rows, "bytes": 4 * tokens, "tokens": tokens, "rows": rows, "cut_documents": 0}
        counts[split] |= {"padding": rows * block_size - tokens, "shards": entries}
    manifest = {
        "format_version": 3,
        "block_size": block_size,
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "eos_token_id": EOS,
        "packing": "best_fit",
        "tokenizer": {"name": None, "sha256": described(folder / "tokenizer" / "tokenizer.json")["sha256"]},
        "source": {"name": "rows"},
        "splits": counts,
        "files": files | {f"tokenizer/{path.name}": described(path) for path in (folder / "tokenizer").iterdir()},
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


def rows_of(data_dir: Path, split: str) -> list[list[int]]:
    """The rows of a split, read with `datasets` alone."""
    return load_from_disk(str(data_dir / split))["input_ids"][:]


def streams_of(data_dir: Path, split: str) -> list[list[int]]:
    """The tokens of each shard in order, read with `datasets` alone; what the last row repeats is there once."""
    manifest, streams = json.loads((data_dir / "manifest.json").read_text()), []
    for shard in manifest["splits"][split]["shards"]:
        *full, last = Dataset.from_file(str(data_dir / shard["path"]))["input_ids"]
        tokens = [token for row in full for token in row]
        streams.append(tokens + last[len(tokens) + len(last) - shard["tokens"] :])
    return streams


def targets_of(data_dir: Path, split: str) -> list[int]:
    """The real targets of all shards, in order."""
    return [token for stream in streams_of(data_dir, split) for token in stream]


def documents_of(data_dir: Path, split: str) -> list[str]:
    """The documents of a split, each without its EOS."""
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    targets = np.array(targets_of(data_dir, split))
    documents = np.split(targets, np.flatnonzero(targets == EOS) + 1)[:-1]
    return tokenizer.decode_batch([document[:-1].tolist() for document in documents])


def reference_ids(data_dir: Path, texts: list[str]) -> list[int]:
    """What `tokenizers` makes of the texts, each followed by EOS; what spells a special token is text."""
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    eos = tokenizer.token_to_id("<|endoftext|>")
    return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, eos]]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
