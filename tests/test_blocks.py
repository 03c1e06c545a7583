"""training.blocks: the blocks that were written, at any block size, and nothing from files that were altered."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from torch.utils.data import DataLoader

import prepare_data
from command_line import UserError
from training import blocks
from training.blocks import PackedBlocks

BLOCK_SIZE = 15  # odd: a block of another size can then begin at any place in a row


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Three training shards of more than 1,000 rows in all, so that one of them has two Arrow record batches."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(10_000, size=rng.integers(2, 60)))) for _ in range(900)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--train_tokenizer", "300", "--block_size", str(BLOCK_SIZE), "--num_shards", "3"]
    flags += ["--train_file", str(folder / "corpus.jsonl"), "--output_dir", str(folder / "data")]
    prepare_data.main(flags)
    return folder / "data"


@pytest.fixture
def altered(prepared, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def shard_streams(data_dir: Path, split: str) -> list[list[int]]:
    """The token stream of each shard, read with `datasets` alone: the first token of all, then every target."""
    streams = []
    for shard in sorted((data_dir / split).iterdir()):
        rows = np.array(load_from_disk(str(shard))["input_ids"])
        streams.append([rows[0, 0], *rows[:, 1:].ravel()])
    return streams


def change_manifest(data_dir: Path, change) -> None:
    path = data_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_blocks_are_the_rows_in_order(prepared):
    rows = [row for shard in sorted((prepared / "train").iterdir()) for row in load_from_disk(str(shard))["input_ids"]]
    train = PackedBlocks(prepared, "train")
    assert [block.tolist() for block in train] == rows and len(train) == len(rows)


def test_fixture_has_several_record_batches_in_a_shard(prepared):
    assert len(PackedBlocks(prepared, "train")._chunks) > 3


def test_a_block_is_int64_with_one_token_more_than_the_block_size(prepared):
    block = PackedBlocks(prepared, "validation")[0]
    assert block.dtype == torch.int64 and block.shape == (BLOCK_SIZE + 1,)


@pytest.mark.parametrize("block_size", [1, 2, 7, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, 100, 1500])
def test_another_block_size_cuts_the_same_streams(prepared, block_size):
    expected = [
        stream[start : start + block_size + 1]
        for stream in shard_streams(prepared, "train")
        for start in range(0, len(stream) - block_size, block_size)
    ]
    train = PackedBlocks(prepared, "train", block_size)
    assert train.__getitems__(range(len(train))).tolist() == expected
    assert train.tokens == len(expected) * block_size


@pytest.mark.parametrize("block_size", [None, 7, 100])
def test_random_access_equals_sequential(prepared, block_size):
    train = PackedBlocks(prepared, "train", block_size)
    in_order = torch.stack([train[index] for index in range(len(train))])
    order = np.random.default_rng(0).integers(len(train), size=200).tolist()
    assert torch.equal(train.__getitems__(order), in_order[order])


def test_a_data_loader_takes_whole_batches_through_worker_processes(prepared):
    train = PackedBlocks(prepared, "train")
    loader = DataLoader(
        train, batch_size=64, collate_fn=lambda batch: batch, num_workers=1, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), train.__getitems__(range(len(train))))


def test_pickling_carries_the_arguments_and_not_the_tokens(prepared):
    train = PackedBlocks(prepared, "train", 7)
    pickled = pickle.dumps(train)
    assert len(pickled) < 1000 and torch.equal(pickle.loads(pickled)[5], train[5])


def test_negative_indices_count_from_the_end(prepared):
    train = PackedBlocks(prepared, "train")
    assert torch.equal(train[-1], train[len(train) - 1])


@pytest.mark.parametrize("past", [0, 1])
def test_indices_out_of_range_raise(prepared, past):
    train = PackedBlocks(prepared, "train")
    with pytest.raises(IndexError):
        train[-len(train) - 1 if past else len(train)]


def test_properties_are_the_manifest_s(prepared):
    validation = PackedBlocks(prepared, "validation")
    counts = json.loads((prepared / "manifest.json").read_text())["splits"]["validation"]
    assert (validation.block_size, validation.vocab_size, validation.eos_token_id) == (BLOCK_SIZE, 300, 0)
    assert validation.tokens == counts["tokens"] == counts["rows"] * BLOCK_SIZE
    all_tokens = counts["tokens"] + counts["dropped_tokens"]
    assert validation.bytes_per_token * all_tokens == pytest.approx(counts["bytes"])
    assert (validation.tokenizer_path / "tokenizer.json").is_file()


def test_writer_and_reader_have_the_same_format_version():
    assert blocks.FORMAT_VERSION == prepare_data.FORMAT_VERSION


def test_an_intact_folder_verifies(prepared):
    PackedBlocks(prepared, "train").verify_checksums()


# Refusals


def arrow_file(data_dir: Path) -> Path:
    return data_dir / "train" / "shard-00001-of-00003" / "data-00000-of-00001.arrow"


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file; --data_dir is a folder"):
        PackedBlocks(tmp_path, "train")


def test_a_manifest_that_is_not_json_is_refused(altered):
    (altered / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not JSON"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_refused(altered, version):
    change_manifest(altered, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(UserError, match=r"manifest\.json: format_version .*, this code reads 1"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("key", ["splits", "tokenizer", "vocab_size"])
def test_a_manifest_without_what_is_needed_is_refused(altered, key):
    change_manifest(altered, lambda manifest: manifest.pop(key))
    with pytest.raises(UserError, match=rf"manifest\.json: has no {key}"):
        PackedBlocks(altered, "train")


def test_a_missing_tokenizer_is_refused(altered):
    (altered / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        PackedBlocks(altered, "train")


def test_a_token_id_beyond_the_vocabulary_is_refused(altered):
    change_manifest(altered, lambda manifest: manifest.update(vocab_size=10))
    with pytest.raises(UserError, match=r"token id \d+, but the manifest says vocab_size 10"):
        PackedBlocks(altered, "train")[0]


def test_a_split_that_is_not_there_is_refused(prepared):
    with pytest.raises(UserError, match="no split 'test'; there is train, validation"):
        PackedBlocks(prepared, "test")


def test_a_missing_shard_is_refused(altered):
    shutil.rmtree(arrow_file(altered).parent)
    with pytest.raises(UserError, match=r"shard-00001-of-00003/.*: missing"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_missing_file_is_refused(altered, name):
    (arrow_file(altered).parent / name).unlink()
    with pytest.raises(UserError, match=f"shard-00001-of-00003/{name}: missing"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("size_change", [-1, 8])
def test_a_file_of_another_size_is_refused(altered, size_change):
    content = arrow_file(altered).read_bytes()
    arrow_file(altered).write_bytes(content[:size_change] if size_change < 0 else content + b"\0" * size_change)
    with pytest.raises(UserError, match=r"shard-00001-of-00003/data.*has \d+ bytes, the manifest says \d+"):
        PackedBlocks(altered, "train")


def test_another_number_of_rows_is_refused(altered):
    def change(manifest):
        manifest["splits"]["train"]["shards"][1]["rows"] += 1

    change_manifest(altered, change)
    with pytest.raises(UserError, match=r"shard-00001-of-00003: has \d+ rows, the manifest says \d+"):
        PackedBlocks(altered, "train")


def test_another_dtype_is_refused(altered):
    change_manifest(altered, lambda manifest: manifest.update(dtype="uint32"))
    with pytest.raises(UserError, match="shard-00000-of-00003: does not hold uint32"):
        PackedBlocks(altered, "train")


def test_an_overwritten_header_is_refused(altered):
    content = bytearray(arrow_file(altered).read_bytes())
    content[:256] = bytes(256)
    arrow_file(altered).write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001-of-00003: (cannot be read|has 0 rows)"):
        PackedBlocks(altered, "train")


def test_a_flipped_bit_is_found_by_the_checksums(altered):
    content = bytearray(arrow_file(altered).read_bytes())
    content[len(content) // 2] ^= 1
    arrow_file(altered).write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001-of-00003/data.*: altered since it was written"):
        PackedBlocks(altered, "train").verify_checksums()


def test_another_tokenizer_is_found_by_the_checksums(altered):
    path = altered / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: altered since it was written"):
        PackedBlocks(altered, "train").verify_checksums()


def test_a_block_size_longer_than_every_shard_is_refused_with_the_longest(prepared):
    longest = max(len(stream) for stream in shard_streams(prepared, "train")) - 1
    assert len(PackedBlocks(prepared, "train", longest)) >= 1
    with pytest.raises(UserError, match=f"--block_size {longest + 1}: .* has {longest} tokens"):
        PackedBlocks(prepared, "train", longest + 1)


def test_a_block_size_below_one_is_refused(prepared):
    with pytest.raises(UserError, match="--block_size 0: must be at least 1"):
        PackedBlocks(prepared, "train", 0)
