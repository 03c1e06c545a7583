"""Turn JSON lines into a file of uint16 token ids as build-nanogpt's fineweb.py does. Run and timed by benchmarks.data.

    python -m benchmarks.data_tiktoken TOKENIZER_DIR OUTPUT_DIR NUM_PROC FILE.jsonl ...

Each worker of a pool encodes one document at a time, with EOS before it; the parent process writes the ids. Unlike in
fineweb.py, the workers parse the JSON, so that they need not wait for the parent. Prints a JSON object: tokens (the
number of ids) and work_s (the seconds after imports and loading of the tokenizer). Imports nothing of this project.
"""

import fileinput
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # tokenizer.json only names it: ByteLevel, use_regex

DOCUMENTS_PER_TASK = 16


def tiktoken_encoding(tokenizer_json: Path) -> tiktoken.Encoding:
    """Build tiktoken's encoding from GPT-2's tokenizer.json, so that nothing has to be downloaded.

    With other kinds of tokenizer than byte-level BPE with ids in merge order, the ids are wrong or it raises KeyError.
    """
    content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    special_tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
    # Byte-level BPE writes a printable byte as its Latin-1 character and the n-th other one as chr(256 + n).
    others = [byte for byte in range(256) if not chr(byte).isprintable() or byte == ord(" ")]
    byte_of = {chr(byte): byte for byte in range(256)} | {chr(256 + n): byte for n, byte in enumerate(others)}
    vocabulary = content["model"]["vocab"].items()
    ranks = {bytes(map(byte_of.__getitem__, token)): id for token, id in vocabulary if token not in special_tokens}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)


def encode(line: bytes) -> np.ndarray:
    """Return the ids of the text in a JSON line as uint16, EOS first, from the global `encoding` of this worker."""
    ids = [encoding.eot_token, *encoding.encode_ordinary(json.loads(line)["text"])]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    global encoding
    tokenizer_dir, output_dir, num_proc, *files = sys.argv[1:]
    encoding = tiktoken_encoding(Path(tokenizer_dir, "tokenizer.json"))
    Path(output_dir).mkdir(parents=True)
    started = time.perf_counter()
    with (
        fileinput.input(files, mode="rb") as lines,
        open(Path(output_dir, "tokens.bin"), "wb") as output,
        multiprocessing.get_context("fork").Pool(int(num_proc)) as pool,
    ):
        output.writelines(pool.imap(encode, lines, chunksize=DOCUMENTS_PER_TASK))
        tokens = output.tell() // 2
    print(json.dumps({"tokens": tokens, "work_s": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
