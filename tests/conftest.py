"""What several test files share: a small prepared dataset, and processes that stay small and offline."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sysconfig
from pathlib import Path

import pytest

BLOCK_SIZE = 32


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Blocks of 32 tokens, 300 vocabulary entries, made from one file of the standard library: about 45 blocks."""
    import prepare_data

    folder = tmp_path_factory.mktemp("data")
    lines = (Path(sysconfig.get_path("stdlib")) / "json" / "encoder.py").read_text().splitlines()
    (folder / "encoder.txt").write_text("\n".join(lines[:100]))
    arguments = f"--train_file {folder / 'encoder.txt'} --validation_split_percentage 25 --output_dir {folder / 'data'}"
    prepare_data.main([*arguments.split(), "--train_tokenizer", "300", "--block_size", str(BLOCK_SIZE)])
    return folder / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """300 different documents, one to a line."""
    from prepared_folders import make_texts, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(300))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, corpus) -> Path:
    """400 entries trained on `corpus`; the folder around it is what prepare_data.py wrote, in blocks of 32."""
    from prepared_folders import run

    output_dir = tmp_path_factory.mktemp("tokenizer") / "data"
    run(output_dir, "--train_file", corpus, "--train_tokenizer", 400, "--block_size", 32)
    return output_dir / "tokenizer"


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """WikiText-2, Tiny Shakespeare and GPT-2's tokenizer, which are no part of the project; GPT2_MODERN_TEXT_DIR."""
    folder = os.environ.get("GPT2_MODERN_TEXT_DIR")
    if not folder:
        pytest.skip("GPT2_MODERN_TEXT_DIR names no folder with real texts")
    return Path(folder)
