"""gpt2modern.data.blocks: the blocks that were written, at any block size, and nothing from files that were altered."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader

import prepare_data
from gpt2modern.data.blocks import PackedBlocks, refuse_larger_vocabulary, refuse_other_tokenizer
from gpt2modern.data.manifest import find_problems
from gpt2modern.errors import GPT2ModernError
from tests.support.folders import random_rows, rows_of, run, streams_of, write_prepared

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
    """EOS and the tokens of each shard, read with `datasets` alone."""
    return [[0, *stream] for stream in streams_of(data_dir, split)]


def padded(block: list[int], block_size: int) -> list[int]:
    return block + [-100] * (block_size + 1 - len(block))


def change_manifest(data_dir: Path, change) -> None:
    path = data_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_blocks_are_the_rows_in_order(prepared):
    rows, blocks = rows_of(prepared, "train"), PackedBlocks(prepared, "train")
    assert len(blocks) == len(rows)
    assert [block[1:].tolist() for block in blocks if block[-1] != -100] == [
        row for row, block in zip(rows, blocks, strict=True) if block[-1] != -100
    ]
    assert any(block[-1] == -100 for block in blocks)


def test_fixture_has_several_record_batches_in_a_shard(prepared):
    tables = [pa.ipc.open_stream(path).read_all() for path in (prepared / "train").glob("*.arrow")]
    assert max(table.column("labels").num_chunks for table in tables) > 1


def test_labels_and_input_ids_are_the_same_bytes(prepared):
    for path in (prepared / "train").glob("*.arrow"):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        assert table.column_names == ["input_ids", "labels"] and table["labels"].equals(table["input_ids"])
        ids, labels = (table[name].chunk(0).values.buffers()[1].address for name in table.column_names)
        assert ids == labels and path.stat().st_size < 2.5 * len(table["labels"].combine_chunks().values)


def test_a_block_is_int64_with_one_token_more_than_the_block_size(prepared):
    block = PackedBlocks(prepared, "validation")[0]
    assert block.dtype == torch.int64 and block.shape == (BLOCK_SIZE + 1,)


@pytest.mark.parametrize(
    "block_size", [1, 2, 7, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, 100, 1500, 99_999]
)
def test_another_block_size_cuts_the_same_streams(prepared, block_size):
    expected = [
        padded(stream[start : start + block_size + 1], block_size)
        for stream in shard_streams(prepared, "train")
        for start in range(0, len(stream) - 1, block_size)
    ]
    train = PackedBlocks(prepared, "train", block_size)
    assert train.__getitems__(range(len(train))).tolist() == expected
    assert train.tokens == sum(len(stream) - 1 for stream in shard_streams(prepared, "train"))


@pytest.mark.parametrize("block_size", [1, 7, BLOCK_SIZE, 100])
def test_num_targets_counts_what_is_no_padding(prepared, block_size):
    train = PackedBlocks(prepared, "train", block_size)
    chosen = [0, -1, len(train) - 1, 5, 5, *range(len(train))]
    assert train.num_targets(chosen) == int((train.__getitems__(chosen)[:, 1:] != -100).sum())
    assert train.num_targets(range(len(train))) == train.tokens and train.num_targets([]) == 0


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
    assert validation.tokens == counts["tokens"] == counts["rows"] * BLOCK_SIZE - counts["padding"]
    assert validation.bytes_per_token * counts["tokens"] == pytest.approx(counts["bytes"])
    assert (validation.tokenizer_path / "tokenizer.json").is_file()


BEST_FIT = {"train": [random_rows(40, BLOCK_SIZE, seed=1), random_rows(7, BLOCK_SIZE, seed=2)]}


@pytest.fixture
def best_fit(prepared, tmp_path) -> Path:
    """Two shards of rows that are padded anywhere."""
    return write_prepared(tmp_path / "best_fit", BEST_FIT, tokenizer_dir=prepared / "tokenizer", block_size=BLOCK_SIZE)


def test_best_fit_rows_are_padded_wherever_they_end(best_fit):
    train = PackedBlocks(best_fit, "train")
    expected = [padded(row, BLOCK_SIZE) for shard in BEST_FIT["train"] for row in shard]
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert train.__getitems__(order).tolist() == [expected[index] for index in order]
    assert train.num_targets([3, 45]) == sum(len(BEST_FIT["train"][shard][row]) - 1 for shard, row in ((0, 3), (1, 5)))
    assert train.tokens == train.num_targets(range(len(train))) < len(train) * BLOCK_SIZE
    assert torch.equal(pickle.loads(pickle.dumps(train))[45], train[45])


def test_best_fit_has_one_block_size(best_fit):
    with pytest.raises(GPT2ModernError, match=rf"--block_size 7: .*packed best_fit for {BLOCK_SIZE}; omit the flag"):
        PackedBlocks(best_fit, "train", 7)
    assert len(PackedBlocks(best_fit, "train", BLOCK_SIZE)) == 47


def test_an_intact_folder_verifies(prepared):
    PackedBlocks(prepared, "train").verify_checksums()


# Refusals


def arrow_file(data_dir: Path) -> Path:
    return data_dir / "train" / "data-00001-of-00003.arrow"


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(GPT2ModernError, match=r"manifest\.json: no such file; name a folder that prepare_data\.py has"):
        PackedBlocks(tmp_path, "train")


def test_a_manifest_that_is_not_json_is_refused(altered):
    (altered / "manifest.json").write_text("{")
    with pytest.raises(GPT2ModernError, match=r"manifest\.json: the file is not valid JSON"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("version", [0, 2, None, "3"])
def test_another_format_version_is_refused(altered, version):
    change_manifest(altered, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(
        GPT2ModernError, match=r"manifest\.json: the file has format_version .*, but this code reads only 3"
    ):
        PackedBlocks(altered, "train")


def test_a_manifest_without_the_size_of_a_file_is_refused(altered):
    change_manifest(altered, lambda manifest: next(iter(manifest["files"].values())).pop("size"))
    assert ["'size'" in problem for problem in find_problems(altered)] == [True]
    with pytest.raises(GPT2ModernError, match=r"manifest\.json: a value is missing .*'size'"):
        PackedBlocks(altered, "train")


def test_more_shards_are_opened_than_the_process_may_have_files(tmp_path, corpus, tokenizer_dir):
    run(tmp_path, "--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 32, "--num_shards", 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        train = PackedBlocks(tmp_path, "train")
        assert len(train.__getitems__(range(len(train)))) == len(train)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("key", ["splits", "tokenizer", "vocab_size"])
def test_a_manifest_without_what_is_needed_is_refused(altered, key):
    change_manifest(altered, lambda manifest: manifest.pop(key))
    with pytest.raises(GPT2ModernError, match=rf"manifest\.json: a value is missing .*'{key}'"):
        PackedBlocks(altered, "train")


def test_a_missing_tokenizer_is_refused(altered):
    (altered / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(GPT2ModernError, match=r"tokenizer\.json: the file is missing"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F14 tokens that the tokenizer or the model lacks")
def test_a_token_id_beyond_the_vocabulary_is_refused(altered):
    change_manifest(altered, lambda manifest: manifest.update(vocab_size=10))
    with pytest.raises(GPT2ModernError, match=r"token id \d+, but the manifest says vocab_size 10"):
        PackedBlocks(altered, "train")[0]


def test_a_split_that_is_not_there_is_refused(prepared):
    with pytest.raises(GPT2ModernError, match="has no split 'test'; its splits are train, validation"):
        PackedBlocks(prepared, "test")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_a_missing_shard_is_refused(altered):
    shutil.rmtree(arrow_file(altered).parent)
    with pytest.raises(GPT2ModernError, match=r"train/data-0000\d-of-00003.arrow: the file is missing"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00001-of-00003.arrow"])
def test_a_missing_file_is_refused(altered, name):
    (arrow_file(altered).parent / name).unlink()
    with pytest.raises(GPT2ModernError, match=f"train/{name}: the file is missing"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
@pytest.mark.parametrize("size_change", [-1, 8])
def test_a_file_of_another_size_is_refused(altered, size_change):
    content = arrow_file(altered).read_bytes()
    arrow_file(altered).write_bytes(content[:size_change] if size_change < 0 else content + b"\0" * size_change)
    with pytest.raises(
        GPT2ModernError, match=r"data-00001-of-00003.*the file has \d+ bytes, but the manifest says \d+"
    ):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_another_number_of_rows_is_refused(altered):
    def change(manifest):
        manifest["splits"]["train"]["shards"][1]["rows"] += 1
        manifest["splits"]["train"]["rows"] += 1
        manifest["splits"]["train"]["padding"] += BLOCK_SIZE

    change_manifest(altered, change)
    with pytest.raises(GPT2ModernError, match=r"data-00001-of-00003.arrow has \d+ rows, but the manifest says \d+"):
        PackedBlocks(altered, "train")


def test_another_dtype_is_refused(altered):
    change_manifest(altered, lambda manifest: manifest.update(dtype="uint32"))
    with pytest.raises(
        GPT2ModernError, match=r"data-00000-of-00003.arrow: mixed formats: .*uint16.*, but the manifest says .*uint32"
    ):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_an_overwritten_header_is_refused(altered):
    content = bytearray(arrow_file(altered).read_bytes())
    content[:256] = bytes(256)
    arrow_file(altered).write_bytes(content)
    with pytest.raises(GPT2ModernError, match=r"data-00001-of-00003.arrow: cannot be read"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_a_flipped_bit_is_found_by_the_checksums(altered):
    content = bytearray(arrow_file(altered).read_bytes())
    content[len(content) // 4] ^= 1  # of a token; a change of the row lengths is found at once
    arrow_file(altered).write_bytes(content)
    with pytest.raises(GPT2ModernError, match=r"data-00001-of-00003.arrow: the file was altered since it was written"):
        PackedBlocks(altered, "train").verify_checksums()


@pytest.mark.fault("F14 tokens that the tokenizer or the model lacks")
def test_another_tokenizer_is_found_by_the_checksums(altered):
    path = altered / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(GPT2ModernError, match=r"tokenizer\.json: the file has \d+ bytes, but the manifest says"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
@pytest.mark.parametrize("key", ["rows", "tokens", "padding"])
def test_counts_that_the_shards_do_not_add_up_to_are_refused(altered, key):
    change_manifest(altered, lambda manifest: manifest["splits"]["train"].update({key: 1}))
    with pytest.raises(GPT2ModernError, match=r"manifest\.json: the split train has .*, but its shards have"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize("path", ["/etc", "../elsewhere", "train/../../elsewhere"])
def test_a_file_outside_of_the_folder_is_refused(altered, path):
    change_manifest(altered, lambda manifest: manifest["files"].update({path: {"size": 1, "sha256": "0"}}))
    with pytest.raises(GPT2ModernError, match=rf"manifest\.json: the file '{path}' is outside of the folder"):
        PackedBlocks(altered, "train")
    change_manifest(altered, lambda manifest: manifest["files"].pop(path))
    change_manifest(altered, lambda manifest: manifest["splits"]["train"]["shards"][0].update(path=path))
    with pytest.raises(GPT2ModernError, match=rf"the file '{path}' of the split train is not listed with its sha256"):
        PackedBlocks(altered, "train")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("packing", "zigzag", "packing is 'zigzag', but must be one of concat, best_fit"),
        ("dtype", "int8", "dtype is 'int8', but must be one of uint16, uint32"),
        ("block_size", "wide", "a value is missing or not of its type"),
        ("eos_token_id", 300, "contradict each other"),
        ("block_size", 15.0, "a value is missing or not of its type .*block_size is 15.0, not an integer"),
        ("settings", ["block_size"], "a value is missing or not of its type"),
        ("splits", {"train": {"documents": 1}}, "a value is missing or not of its type .*'bytes'"),
        ("splits", [], "a value is missing or not of its type"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(altered, key, value, message):
    change_manifest(altered, lambda manifest: manifest.update({key: value}))
    with pytest.raises(GPT2ModernError, match=rf"manifest\.json: .*{message}"):
        PackedBlocks(altered, "train")


def rewrite_shard(data_dir: Path, change) -> None:
    """Replace the second shard's table and vouch for the new file, as a mix of two preparations would."""
    path = arrow_file(data_dir)
    change(Dataset.from_file(str(path), in_memory=True)).save_to_disk(data_dir / "saved")
    (data_dir / "saved" / "data-00000-of-00001.arrow").replace(path)
    recorded = {"size": path.stat().st_size, "sha256": "0"}
    change_manifest(
        data_dir, lambda manifest: manifest["files"].update({path.relative_to(data_dir).as_posix(): recorded})
    )


def of_fixed_length(table: Dataset) -> Dataset:
    fixed = Features(dict.fromkeys(("input_ids", "labels"), List(Value("uint16"), length=BLOCK_SIZE)))
    return table.cast(fixed)


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (of_fixed_length, rf"input_ids fixed_size_list<.*>\[{BLOCK_SIZE}\]"),
        (lambda table: table.remove_columns("labels"), r"the columns input_ids list<[^,]*, but the manifest"),
        (lambda table: table.add_column("label", [0] * len(table)), "label int64"),
        (
            lambda table: table.cast(Features(dict.fromkeys(("input_ids", "labels"), List(Value("int64"))))),
            "input_ids list<item: int64>",
        ),
    ],
)
def test_a_shard_of_another_preparation_is_refused(altered, change, found):
    rewrite_shard(altered, change)
    with pytest.raises(GPT2ModernError, match=f"data-00001-of-00003.arrow: mixed formats: .*{found}"):
        PackedBlocks(altered, "train")


def test_a_shard_written_by_datasets_alone_is_read(altered):
    expected = PackedBlocks(altered, "train")
    expected = expected.__getitems__(range(len(expected)))
    rewrite_shard(altered, lambda table: table)
    again = PackedBlocks(altered, "train")
    assert torch.equal(again.__getitems__(range(len(again))), expected)


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_rows_of_unequal_length_in_a_concat_folder_are_refused(altered):
    rewrite_shard(
        altered, lambda table: table.map(lambda row, i: {k: v[: 15 - i % 2] for k, v in row.items()}, with_indices=True)
    )
    with pytest.raises(GPT2ModernError, match=r"data-00001-of-00003.arrow: mixed formats: the rows have 14 to 15 tok"):
        PackedBlocks(altered, "train")


@pytest.mark.fault("F13 data missing, cut, altered, of another size")
def test_a_file_that_is_truncated_while_it_is_read_is_one_line(altered):
    train = PackedBlocks(altered, "train")
    os.truncate(arrow_file(altered), arrow_file(altered).stat().st_size // 2)
    with pytest.raises(GPT2ModernError, match=r"data-00001-of-00003.arrow: cannot be read \(it was truncated\); prep"):
        train.__getitems__(range(len(train)))


def test_a_split_without_tokens_is_refused(prepared, tmp_path):
    empty = write_prepared(
        tmp_path / "empty", BEST_FIT | {"validation": []}, tokenizer_dir=prepared / "tokenizer", block_size=BLOCK_SIZE
    )
    with pytest.raises(GPT2ModernError, match="split 'validation' has no tokens"):
        PackedBlocks(empty, "validation")


@pytest.mark.fault("F14 tokens that the tokenizer or the model lacks")
def test_another_tokenizer_and_a_larger_vocabulary_than_the_models_are_refused(prepared, tmp_path):
    train = PackedBlocks(prepared, "train")
    refuse_other_tokenizer(str(prepared / "tokenizer"), train)
    refuse_other_tokenizer("user/model-of-the-hub", train)
    refuse_larger_vocabulary("the model", 300, train)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GPT2ModernError, match=rf"prepared with another tokenizer than {tmp_path}/tokenizer\.json"):
        refuse_other_tokenizer(str(tmp_path), train)
    with pytest.raises(
        GPT2ModernError,
        match=r"manifest\.json: the data has 300 token ids, but the vocab_size of the model is only 299",
    ):
        refuse_larger_vocabulary("the model", 299, train)


def test_find_problems_names_every_wrong_file(altered):
    assert find_problems(altered) == []
    shards = sorted((altered / "train").glob("*.arrow"))
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 4] ^= 1
    shards[0].write_bytes(content)
    shards[1].write_bytes(b"")
    shards[2].unlink()
    (altered / "tokenizer" / "tokenizer.json").write_text("{}")
    names = {path: problem for problem in find_problems(altered) for path in [problem.split(": ")[0]]}
    assert "has 2 bytes" in names.pop(str(altered / "tokenizer" / "tokenizer.json"))
    assert "sha256 differs" in names.pop(str(shards[0]))
    assert "the file has 0 bytes, but the manifest says" in names.pop(str(shards[1]))
    assert list(names) == [str(shards[2])] and "missing" in names[str(shards[2])]


def test_find_problems_of_a_folder_that_is_not_prepared(tmp_path):
    (problem,) = find_problems(tmp_path)
    assert "manifest.json: no such file" in problem


# Names of the Hub


def test_a_name_of_the_hub_is_fetched_at_one_commit_and_only_what_the_manifest_names(prepared, monkeypatch, tmp_path):
    calls = []

    def snapshot_download(name, *, repo_type, revision, allow_patterns):
        calls.append((name, repo_type, revision, allow_patterns))
        return str(prepared)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    blocks = PackedBlocks("someone/some-data", "validation")
    assert blocks.data_dir == prepared and len(blocks)
    (first, second) = calls
    assert first == ("someone/some-data", "dataset", None, ["manifest.json"])
    assert second[:3] == ("someone/some-data", "dataset", "data")
    assert {"tokenizer/tokenizer.json", "train/data-00002-of-00003.arrow", "train/state.json"} < set(second[3])


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # offline, as every test
    with pytest.raises(
        GPT2ModernError, match="someone/some-data: no such folder, and it cannot be downloaded from the Hub"
    ):
        PackedBlocks("someone/some-data", "train")


@pytest.mark.parametrize("name", ["nowhere", "./data/nowhere", "/data/nowhere", "a/b/c"])
def test_a_path_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(GPT2ModernError, match=r"nowhere/manifest\.json|a/b/c/manifest\.json"):
        PackedBlocks(name, "train")


def test_a_block_size_below_one_is_refused(prepared):
    with pytest.raises(GPT2ModernError, match="--block_size 0 must be at least 1"):
        PackedBlocks(prepared, "train", 0)
