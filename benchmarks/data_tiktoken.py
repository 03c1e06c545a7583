"""From JSON lines to uint16 ids as build-nanogpt's fineweb.py does; timed by benchmarks.data beside prepare_data.py.

    python -m benchmarks.data_tiktoken TOKENIZER_DIR OUTPUT_DIR NUM_PROC FILE.jsonl ...

A pool of workers encodes one document each, EOS before it, and the parent writes the ids. The workers parse the JSON,
which the example leaves to the parent: the parent would hold them up. Prints one JSON object: tokens, and work_s, the
seconds after imports and the tokenizer. Imports nothing of the project, whose imports would be timed.
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
    """Make GPT-2's encoding from the file that `tokenizers` reads, so that nothing has to be downloaded.

    Right for a byte-level BPE whose ids follow its merges; any other would give another number of tokens, or KeyError.
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
    """Encode the text of a JSON line, EOS first, with the encoding that this worker was forked with."""
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
