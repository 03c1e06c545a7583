"""Two usual ways from JSON lines to tokens on disk, timed by `benchmarks.data` beside prepare_data.py.

    python -m benchmarks.data_peers run_clm --train_file F.jsonl ... --tokenizer_name DIR --output_dir OUT

run_clm: `datasets.map` of the tokenizer, then of a function that joins and cuts lists, as transformers' run_clm
examples do; no EOS between documents, labels and attention mask stored beside the ids.
tiktoken: a pool of workers that encode one document each, the parent filling uint16 shards, as build-nanogpt's
fineweb.py does; EOS before each document.

Prints one JSON object: tokens (before anything is dropped), and work_s, the seconds after imports and the tokenizer.
Plain argparse, because `command_line` loads transformers, which the second one would not.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

TOKENS_PER_FILE = 10**8
DOCUMENTS_PER_TASK = 16


def run_clm(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokenise, group, save; each of the two `map` calls in `num_proc` processes with its default batch of 1,000."""
    import pyarrow.compute as pc
    from datasets import load_dataset
    from transformers import AutoTokenizer

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
    return {"tokens": pc.sum(pc.list_value_length(tokenized.data.column("input_ids"))).as_py(), "work_s": work_s}


def tiktoken_encoding(tokenizer_json: Path) -> "tiktoken.Encoding":
    """GPT-2's encoding from the file that `tokenizers` reads, so that nothing has to be downloaded.

    Raises ValueError for a vocabulary that is not a byte-level BPE whose ids follow its merges.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # tokenizer.json only names it: ByteLevel, use_regex

    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    special_tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = _byte_of_character()
    try:
        vocabulary = {token: id for token, id in content["model"]["vocab"].items() if token not in special_tokens}
        ranks = {bytes(byte_of[character] for character in token): id for token, id in vocabulary.items()}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
        merged = [vocabulary[left + right] for left, right in merges]
    except KeyError as error:
        raise ValueError(f"{tokenizer_json}: not a byte-level BPE as GPT-2's ({error} is missing)") from None
    if merged != sorted(merged) or len(ranks) != 256 + len(merged):
        raise ValueError(f"{tokenizer_json}: the ids do not follow the merges, which tiktoken needs")
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a printable byte as its Latin-1 character and the n-th other one as chr(256 + n)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class _DocumentEncoder:
    """One line of a file to ids, EOS first; made before the workers are forked, so that they share it."""

    def __init__(self, tokenizer_json: Path):
        self.encoding = tiktoken_encoding(tokenizer_json)
        self.eos_token_id = self.encoding.eot_token

    def __call__(self, line: bytes) -> "np.ndarray":
        import numpy as np

        ids = [self.eos_token_id, *self.encoding.encode_ordinary(json.loads(line)["text"])]
        return np.array(ids, dtype=np.uint16)


def tiktoken_pool(arguments: argparse.Namespace) -> dict[str, float]:
    """Encode in `num_proc` processes, write `tokens_000000.bin`, ... of 10^8 uint16 each.

    Workers parse the JSON, which the example leaves to the parent: the parent would hold them up.
    """
    import multiprocessing

    import numpy as np

    global _encode
    _encode = _DocumentEncoder(Path(arguments.tokenizer_name) / "tokenizer.json")
    started = time.perf_counter()
    tokens, buffer, filled = 0, np.empty(TOKENS_PER_FILE, dtype=np.uint16), 0
    arguments.output_dir.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(arguments.num_proc) as pool:
        for ids in pool.imap(_encode_line, _lines(arguments.train_file), chunksize=DOCUMENTS_PER_TASK):
            while filled + len(ids) >= TOKENS_PER_FILE:
                room = TOKENS_PER_FILE - filled
                buffer[filled:] = ids[:room]
                _write(buffer, arguments.output_dir, tokens)
                tokens, ids, filled = tokens + TOKENS_PER_FILE, ids[room:], 0
            buffer[filled : filled + len(ids)] = ids
            filled += len(ids)
    _write(buffer[:filled], arguments.output_dir, tokens)
    return {"tokens": tokens + filled, "work_s": time.perf_counter() - started}


def _encode_line(line: bytes) -> "np.ndarray":
    return _encode(line)


def _lines(names: list[str]) -> Iterator[bytes]:
    for name in names:
        with open(name, "rb") as file:
            yield from file


def _write(tokens: "np.ndarray", folder: Path, first_token: int) -> None:
    tokens.tofile(folder / f"tokens_{first_token // TOKENS_PER_FILE:06d}.bin")


PEERS = {"run_clm": run_clm, "tiktoken": tiktoken_pool}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--train_file", nargs="+", required=True, help="JSON lines with a column text")
    parser.add_argument("--tokenizer_name", required=True, help="folder with tokenizer.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens per block (run_clm)")
    parser.add_argument("--num_proc", type=int, default=2, help="worker processes")
    arguments = parser.parse_args()
    print(json.dumps(PEERS[arguments.peer](arguments)))


if __name__ == "__main__":
    main()
