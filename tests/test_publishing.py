"""What a finished folder is to others: checked byte by byte, a dataset of the Hub, a page to look at."""

import hashlib
import html
import json
import re
import shutil
from math import inf
from pathlib import Path

import datasets
import pytest
import yaml
from tokenizers import Tokenizer

from gpt2modern.data.publishing import dataset_card
from prepare_data import main
from tests.support.folders import contents, make_texts, refusal, rows_of, run, write_jsonl


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus, tokenizer_dir) -> tuple[Path, tuple]:
    folder = tmp_path_factory.mktemp("published")
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--block_size", 16, "--num_shards", 2)
    run(folder / "data", *flags)
    return folder / "data", flags


# verify


def test_verify_is_content_with_what_was_written(prepared, capsys):
    main(["verify", str(prepared[0])])
    assert capsys.readouterr().out == f"{prepared[0]}: all files are valid (sha256 as recorded)\n"


def test_verify_names_every_wrong_file(prepared, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(prepared[0], folder)
    altered, cut = sorted((folder / "train").glob("*.arrow"))
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    with cut.open("r+b") as file:
        file.truncate(1000)
    (folder / "validation" / "state.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    line = refusal(capsys, "verify", folder)
    assert f"{altered}: the file was altered since it was written (its sha256 differs)" in line
    assert f"{cut}: the file has 1000 bytes, but the manifest says " in line
    assert f"{folder / 'validation' / 'state.json'}: the file is missing" in line
    assert f"{folder / 'tokenizer' / 'tokenizer.json'}: the file has 2 bytes, but the manifest says" in line
    assert line.count("prepare the data again") == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "usage: python prepare_data.py verify FOLDER"), (["nowhere"], "nowhere/manifest.json: no such file")],
)
def test_verify_refuses_what_is_no_prepared_folder(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, "verify", *flags).startswith(message)


# The Hub


def test_push_to_hub_uploads_the_folder_as_a_dataset(prepared, hub):
    folder, flags = prepared
    run(folder, *flags, "--push_to_hub", "--hub_dataset_id", "someone/blocks", "--hub_private_repo")
    repository = hub.repositories["datasets/someone/blocks"]
    (upload,) = repository.uploads
    assert repository.visibility == "private"
    uploaded = {name: hashlib.sha256(upload.files[name]).hexdigest() for name in upload.changed}
    assert uploaded == contents(folder)


def test_a_failing_upload_is_one_line_and_leaves_the_folder_whole(tmp_path, corpus, tokenizer_dir, capsys, hub):
    hub.fail("POST .*/commit/", 500, inf)
    flags = ("--train_file", corpus, "--tokenizer_name", tokenizer_dir, "--output_dir", tmp_path / "data")
    line = refusal(capsys, *flags, "--push_to_hub", "--hub_dataset_id", "someone/blocks")
    assert "someone/blocks: the upload failed: HfHubHTTPError: " in line and f"(endpoint {hub.url})" in line
    assert "run the same command again to retry only the upload" in line
    main(["verify", str(tmp_path / "data")])


def test_the_card_tells_load_dataset_which_files_are_which_split(prepared, tmp_path):
    folder = tmp_path / "blocks"
    shutil.copytree(prepared[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "README.md").write_text(dataset_card(manifest, "someone/blocks"))
    _, front_matter, text = (folder / "README.md").read_text().split("---\n", 2)
    (config,) = yaml.safe_load(front_matter)["configs"]
    assert [files["split"] for files in config["data_files"]] == ["train", "validation"]
    assert 'load_dataset("someone/blocks")' in text and "`input_ids`, 16 tokens" in text
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        assert loaded[split]["input_ids"][:] == loaded[split]["labels"][:] == rows_of(folder, split)
        assert loaded[split].num_rows == manifest["splits"][split]["rows"]


def test_only_a_dataset_of_the_hub_is_named_as_the_source_of_another(prepared):
    manifest = json.loads((prepared[0] / "manifest.json").read_text())

    def sources(name) -> list[str] | None:
        card = dataset_card(manifest | {"source": manifest["source"] | {"name": name}}, "someone/blocks")
        return yaml.safe_load(card.split("---\n")[1]).get("source_datasets")

    assert not {"license", "language"} & yaml.safe_load(dataset_card(manifest).split("---\n")[1]).keys()
    assert sources("HuggingFaceFW/fineweb-edu") == ["HuggingFaceFW/fineweb-edu"]
    assert sources("stdlib") is None and sources(["a.jsonl"]) is None


def test_what_is_uploaded_holds_names_and_no_paths(hub, tmp_path, capsys):
    """The source is a folder in somebody's home, once as files and once as a dataset."""
    home = tmp_path / "secretuser"
    (home / "corpus").mkdir(parents=True)
    corpus = write_jsonl(home / "corpus" / "train.jsonl", make_texts(60))
    run(home / "files", "--train_file", corpus, "--train_tokenizer", 300, "--block_size", 16)
    named = ("--tokenizer_name", home / "files" / "tokenizer", "--block_size", 16)
    manifest = run(home / "dataset", "--dataset_name", home / "corpus", *named)
    assert manifest["source"]["name"] == "corpus"
    for folder in (home / "files", home / "dataset"):
        flags = ("--train_file", corpus, "--train_tokenizer", 300, "--block_size", 16)
        flags = flags if folder.name == "files" else ("--dataset_name", home / "corpus", *named)
        run(folder, *flags, "--push_to_hub", "--hub_dataset_id", "someone/blocks")
        contents = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert "README.md" in contents and not [name for name in contents if b"secretuser" in contents[name]]
    capsys.readouterr()
    other = home / "elsewhere" / "corpus"
    shutil.copytree(home / "corpus", other)
    assert "dataset_name was " in refusal(capsys, "--dataset_name", other, *named, "--output_dir", home / "dataset")


# The page


def report_of(folder: Path, output: Path) -> str:
    main(["report", "--data_dir", str(folder), "--output", str(output)])
    return output.read_text()


def text_of(page: str) -> str:
    """Return what a browser would show."""
    return html.unescape(re.sub("<[^>]*>", "", page))


def test_the_report_command_writes_the_page_that_the_preparation_has_written(prepared, tmp_path):
    assert report_of(prepared[0], tmp_path / "page.html") == (prepared[0] / "report.html").read_text()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_report_shows_sources_padding_cut_documents_and_blocks(tmp_path, corpus, tokenizer_dir, packing):
    validation = write_jsonl(tmp_path / "held_out.jsonl", make_texts(9, offset=1000))
    flags = ("--train_file", corpus, "--validation_file", validation, "--tokenizer_name", tokenizer_dir)
    manifest = run(tmp_path / "data", *flags, "--block_size", 64, "--packing", packing)
    page = report_of(tmp_path / "data", tmp_path / "page.html")
    for path, purpose in ((corpus, "training"), (validation, "validation")):
        assert f"<td>{path.name}</td><td>{path.stat().st_size:,}</td><td>{purpose}</td>" in page
    assert (manifest["splits"]["train"]["padding"] > 100) == (packing == "best_fit")
    decoder = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for split, counts in manifest["splits"].items():
        padding, size = counts["padding"], counts["padding"] + counts["tokens"]
        share = f"<td>{padding:,} of {size:,}</td><td>{padding / size:.2%}</td>"
        assert f"<td>{split}: padding</td>{share}" in page
        cut = f"{counts['cut_documents']:,} of {counts['documents']:,}"
        assert f"<td>{split}: cut documents</td><td>{cut}</td>" in page
        rows = rows_of(tmp_path / "data", split)
        for index in (0, len(rows) // 2 if len(rows) % 2 else 0, len(rows) - 1):
            shown = f"{split}, {index:,}: {len(rows[index]):,} tokens"
            assert shown + decoder.decode(rows[index], skip_special_tokens=False) in text_of(page)
    assert "<b>&lt;|endoftext|&gt;</b>" in page


@pytest.mark.parametrize("name", ["train/*.arrow", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_report_of_a_damaged_folder_is_one_line(prepared, tmp_path, capsys, name, content):
    shutil.copytree(prepared[0], tmp_path / "data")
    path = min((tmp_path / "data").glob(name))
    path.unlink() if content is None else path.write_bytes(content)
    line = refusal(capsys, "report", "--data_dir", tmp_path / "data", "--output", tmp_path / "page.html")
    assert line.startswith(f"{path} cannot be read: ") and line.endswith("; prepare the data again")
    assert not (tmp_path / "page.html").exists()


def test_report_has_the_counts_and_a_bar_for_each_length(prepared):
    page = (prepared[0] / "report.html").read_text()
    for counts in json.loads((prepared[0] / "manifest.json").read_text())["splits"].values():
        assert f"<td>{counts['documents']:,}</td><td>{counts['bytes']:,}</td><td>{counts['tokens']:,}</td>" in page
        assert sum(counts["document_lengths"].values()) == counts["documents"]
        for least, count in counts["document_lengths"].items():
            row = page.split(f"<tr><td>{int(least):,} to {2 * int(least) - 1:,}</td>")
            assert any(part.startswith(f'<td>{count:,}</td><td><div style="width:') for part in row[1:])


def test_report_shows_names_as_text(tmp_path, tokenizer_dir):
    (tmp_path / "a<b>&c.jsonl").write_text(write_jsonl(tmp_path / "a.jsonl", make_texts(250)).read_text())
    flags = ("--train_file", tmp_path / "a<b>&c.jsonl", "--tokenizer_name", tokenizer_dir, "--block_size", 16)
    run(tmp_path / "data", *flags)
    page = (tmp_path / "data" / "report.html").read_text()
    assert "<h1>a&lt;b&gt;&amp;c.jsonl</h1>" in page and "a<b>" not in page
