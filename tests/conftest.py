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
