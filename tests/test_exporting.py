"""Token files of nanoGPT and the speedrun: written from a prepared folder, and read back to the same tokens."""

import numpy as np
import pytest

from prepare_data import main
from tests.support.folders import make_texts, refusal, run, streams_of, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_dir):
    path = tmp_path_factory.mktemp("export")
    texts = write_jsonl(path / "a.jsonl", [text.replace("<|endoftext|>", "") for text in make_texts(100)])
    run(path / "data", "--train_file", texts, "--tokenizer_name", tokenizer_dir, "--block_size", 16, "--num_shards", 2)
    return path / "data"


def export(*flags) -> None:
    main(["export", *map(str, flags)])


def test_nanogpt_files_are_the_documents_each_with_its_eos(folder, tmp_path):
    export("--data_dir", folder, "--format", "nanogpt", "--output_dir", tmp_path / "out")
    for split, name in {"train": "train", "validation": "val"}.items():
        tokens = np.memmap(tmp_path / "out" / f"{name}.bin", dtype=np.uint16, mode="r")  # as nanoGPT opens it
        assert tokens.tolist() == [token for stream in streams_of(folder, split) for token in stream]


def test_speedrun_files_have_a_header_and_eos_before_each_document(folder, tmp_path):
    export("--data_dir", folder, "--format", "speedrun", "--output_dir", tmp_path / "out")
    for split, name in {"train": "train", "validation": "val"}.items():
        for shard, stream in enumerate(streams_of(folder, split)):
            content = (tmp_path / "out" / f"data_{name}_{shard:06d}.bin").read_bytes()
            header = np.frombuffer(content[:1024], dtype="<i4")
            assert header[:3].tolist() == [20240520, 1, len(stream)] and not header[3:].any()
            assert np.frombuffer(content[1024:], dtype="<u2").tolist() == [0, *stream[:-1]]


@pytest.mark.parametrize(("format", "flags"), [("nanogpt", ["--token_dtype", "uint16"]), ("speedrun", [])])
def test_what_is_exported_is_prepared_to_the_same_tokens(folder, tmp_path, tokenizer_dir, format, flags):
    export("--data_dir", folder, "--format", format, "--output_dir", tmp_path / "out")
    train, held_out = (sorted((tmp_path / "out").glob(pattern)) for pattern in ("*train*", "*val*"))
    flags = ["--train_file", *train, "--validation_file", *held_out, *flags, "--block_size", 16]
    run(tmp_path / "again", *flags, "--tokenizer_name", tokenizer_dir)
    assert streams_of(tmp_path / "again", "validation") == streams_of(folder, "validation")
    for split in ("train", "validation"):
        first, again = ([t for s in streams_of(each, split) for t in s] for each in (folder, tmp_path / "again"))
        assert sorted(first) == sorted(again)


def test_ids_of_32_bits_without_a_header_are_read(tmp_path, tokenizer_dir):
    tokens = np.array([5, 6, 0, 7, 0], dtype="<u4")
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    flags = ["--train_file", tmp_path / "a.bin", "--validation_file", tmp_path / "a.bin", "--token_dtype", "uint32"]
    run(tmp_path / "data", *flags, "--tokenizer_name", tokenizer_dir, "--block_size", 4)
    assert streams_of(tmp_path / "data", "validation") == [tokens.tolist()]


def test_a_file_without_header_and_dtype_is_refused(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "a.bin").write_bytes(np.arange(1, 40, dtype="<u2").tobytes())
    flags = ["--train_file", tmp_path / "a.bin", "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "data"]
    assert "if it is nanoGPT's, give --token_dtype uint16" in refusal(capsys, *flags)
    (tmp_path / "a.bin").write_bytes(b"123")
    assert "a.bin has 3 bytes, but whole uint16 ids take 2 bytes; copy the file again" in refusal(
        capsys, *flags, "--token_dtype", "uint16"
    )
    assert not (tmp_path / "data").exists()


def test_an_existing_output_and_best_fit_data_are_refused(folder, tmp_path, tokenizer_dir, capsys):
    flags = ["export", "--format", "nanogpt", "--output_dir", tmp_path]
    assert "exists; choose a new folder" in refusal(capsys, *flags, "--data_dir", folder)
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    run(tmp_path / "b", "--train_file", texts, "--tokenizer_name", tokenizer_dir, "--packing", "best_fit")
    flags = ["export", "--format", "nanogpt", "--output_dir", tmp_path / "out", "--data_dir", tmp_path / "b"]
    assert "has packing best_fit and uint16 ids; export needs concat" in refusal(capsys, *flags)
    assert not (tmp_path / "out").exists()
