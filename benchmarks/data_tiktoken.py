"""From JSON lines to uint16 shards as build-nanogpt's fineweb.py does; timed by benchmarks.data beside prepare_data.py.

    python -m benchmarks.data_tiktoken --train_file F.jsonl ... --tokenizer_name DIR --output_dir OUT

A pool of workers encodes one document each, EOS before it, and the parent fills shards of 10^8 ids. The workers parse
the JSON, which the example leaves to the parent: the parent would hold them up. Prints one JSON object: tokens, and
work_s, the seconds after imports and the tokenizer. Imports nothing of the project, whose imports would be timed.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # tokenizer.json only names it: ByteLevel, use_regex

TOKENS_PER_FILE = 10**8
DOCUMENTS_PER_TASK = 16
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def tiktoken_encoding(tokenizer_json: Path) -> tiktoken.Encoding:
    """Make GPT-2's encoding from the file that `tokenizers` reads, so that nothing has to be downloaded.

    Raises ValueError for a vocabulary that is not a byte-level BPE whose ids follow its merges.
    """
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    special_tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
    # Byte-level BPE writes a printable byte as its Latin-1 character and the n-th other one as chr(256 + n).
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    byte_of = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}
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


def encode(line: bytes) -> np.ndarray:
    """Encode the text of a JSON line, EOS first, with the encoding that this worker was forked with."""
    ids = [encoding.eot_token, *encoding.encode_ordinary(json.loads(line)["text"])]
    return np.array(ids, dtype=np.uint16)


def lines_of(names: list[str]) -> Iterator[bytes]:
    for name in names:
        with open(name, "rb") as file:
            yield from file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", nargs="+", required=True, help="JSON lines with a column text")
    parser.add_argument("--tokenizer_name", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--block_size", type=int, help="taken but not used: shards are not cut into blocks")
    parser.add_argument("--num_proc", type=int, default=2, help="worker processes")
    arguments = parser.parse_args()
    global encoding
    encoding = tiktoken_encoding(arguments.tokenizer_name / "tokenizer.json")
    arguments.output_dir.mkdir(parents=True)
    started = time.perf_counter()
    written, shard, filled = 0, np.empty(TOKENS_PER_FILE, dtype=np.uint16), 0

    def write(tokens: np.ndarray) -> None:
        tokens.tofile(arguments.output_dir / f"tokens_{written // TOKENS_PER_FILE:06d}.bin")

    with multiprocessing.get_context("fork").Pool(arguments.num_proc) as pool:
        for ids in pool.imap(encode, lines_of(arguments.train_file), chunksize=DOCUMENTS_PER_TASK):
            while filled + len(ids) >= TOKENS_PER_FILE:
                room = TOKENS_PER_FILE - filled
                shard[filled:] = ids[:room]
                write(shard)
                written, ids, filled = written + TOKENS_PER_FILE, ids[room:], 0
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
    write(shard[:filled])
    print(json.dumps({"tokens": written + filled, "work_s": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
