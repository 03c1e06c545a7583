"""Present a finished folder: print a table, build an HTML report, upload it to the Hub with a dataset card."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCardData
from tokenizers import Tokenizer

from gpt2modern.data.manifest import local_folder, read_manifest
from gpt2modern.errors import GPT2ModernError, first_line
from gpt2modern.files import check_writable_file, write_file
from gpt2modern.hub import hub_errors, retried
from gpt2modern.pages import render
from gpt2modern.settings import check_ranges, setting

COLUMNS = ("split", "documents", "bytes", "tokens", "bytes/token", "cut documents", "padding", "blocks", "shards")


def print_summary(output_dir: Path, manifest: dict, seconds: float) -> None:
    """Print the counts of the finished folder, the time taken, and the command that trains on it."""
    print(f"\n{output_dir}: {_summary(manifest)}")
    table = _table(manifest)
    widths = [max(map(len, column)) + 3 for column in zip(*table, strict=True)]
    for row in table:
        print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    text_bytes = sum(counts["bytes"] for counts in manifest["splits"].values())
    rate = f"{text_bytes / 1e6 / seconds:,.0f} MB of text per second"
    print(f"{seconds:.1f} s in total, {rate}; {output_dir / 'report.html'} shows sources, document lengths, blocks")
    print(f"next: python train_accelerate.py --config recipes/NAME.yaml --data_dir {output_dir} --output_dir out/NAME")


@dataclass
class ReportConfig:
    """Hold the flags of `prepare_data.py report`. Raises ValueError if a value is invalid."""

    data_dir: str = setting(help="Folder written by prepare_data.py, or its name on the Hub.")
    output: str = setting("report.html", "HTML file to write.")

    def __post_init__(self):
        check_ranges(self)
        check_writable_file("--output", self.output)


def write_report(config: ReportConfig) -> None:
    """Write the page about a finished folder. Raises GPT2ModernError if a file of the folder cannot be read."""
    folder = local_folder(config.data_dir)
    write_file(Path(config.output), report_page(folder, read_manifest(folder)))
    print(f"{config.output}: sources, packing, document lengths and samples of {config.data_dir}")


def report_page(folder: Path, manifest: dict) -> str:
    """Return an HTML page about a prepared folder: counts, sources, packing, document lengths, blocks as text. Raises
    GPT2ModernError if the tokenizer or a shard cannot be read."""
    source, blocks = manifest["source"]["name"], {}
    path, eos = folder / "tokenizer" / "tokenizer.json", manifest["eos_token_id"]
    try:
        tokenizer = Tokenizer.from_file(str(path))
        for split, counts in manifest["splits"].items():
            path = folder / counts["shards"][0]["path"]
            rows = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()["input_ids"]
            for index in sorted({0, len(rows) // 2, len(rows) - 1}):
                ids = rows[index].values.to_numpy()
                documents = np.split(ids, np.flatnonzero(ids == eos) + 1)
                texts = tokenizer.decode_batch([each[each != eos].tolist() for each in documents])
                blocks[f"{split}, {index:,}: {len(ids):,} tokens"] = texts
    except Exception as error:  # tokenizers raises Exception itself; pyarrow OSError and ValueError
        raise GPT2ModernError(f"{path} cannot be read: {first_line(error)}; prepare the data again") from None
    return render(
        "report.html",
        title=source if isinstance(source, str) else ", ".join(source[:3]) + ", ..." * (len(source) > 3),
        summary=_summary(manifest),
        table=_table(manifest),
        settings={"train_file": None, "validation_file": None} | manifest.get("settings", {}),
        splits=manifest["splits"],
        blocks=blocks,
        end_of_text=tokenizer.id_to_token(eos),
    )


def dataset_card(manifest: dict, repo_id: str | None = None) -> str:
    """Return the text of the dataset's README.md, whose metadata tells `load_dataset` the files of each split.

    repo_id: of the dataset on the Hub; None for a local folder."""
    source, name = manifest["source"]["name"], repo_id.split("/")[-1] if repo_id else "Packed token blocks"
    files = [{"split": split, "path": f"{split}/data-*.arrow"} for split in manifest["splits"]]
    data = DatasetCardData(
        pretty_name=name,
        tags=["gpt2-modern", "packed"],
        task_categories=["text-generation"],
        **manifest["source"].get("card", {}),
        source_datasets=[source] if isinstance(source, str) and source not in ("stdlib", "dataset") else None,
        configs=[{"config_name": "default", "data_files": files}],
    )
    place = repo_id or "path/of/this/folder"
    about = {"card": data, "summary": _summary(manifest), "table": _table(manifest), "manifest": manifest}
    return render("dataset_card.md", **about, place=place)


def push_to_hub(folder: Path, manifest: dict, repo_id: str, *, private: bool) -> None:
    """Upload a finished folder, with a dataset card, to `repo_id` on the Hub. The local folder is kept. Shards of an
    earlier upload, which `load_dataset` would read too, are deleted there.

    Uses HF_TOKEN or the token that `hf auth login` stored. Raises GPT2ModernError if the upload fails.
    """
    write_file(folder / "README.md", dataset_card(manifest, repo_id))
    advice = f"{folder} is finished, so run the same command again to retry only the upload"
    with hub_errors(f"--hub_dataset_id {repo_id}: the upload failed", advice):
        api, place = huggingface_hub.HfApi(), {"repo_id": repo_id, "repo_type": "dataset"}
        retried(api.create_repo, **place, private=private, exist_ok=True)
        place |= {"ignore_patterns": [".*"], "delete_patterns": [f"{name}/data-*.arrow" for name in manifest["splits"]]}
        retried(api.upload_folder, **place, folder_path=folder, commit_message="Packed token blocks")
    print(f"uploaded to {huggingface_hub.constants.ENDPOINT}/datasets/{repo_id}")


def _summary(manifest: dict) -> str:
    return (
        f"blocks of {manifest['block_size']:,} tokens, packing {manifest['packing']}, {manifest['vocab_size']:,} "
        f"vocabulary entries; validation: {manifest['validation_rule']}; empty documents skipped: "
        f"{manifest['source']['empty_documents']:,}; special tokens spelled in the text: "
        f"{manifest['source']['special_tokens']:,}"
    )


def _table(manifest: dict) -> list[tuple[str, ...]]:
    """Return the rows of a table: COLUMNS, then the formatted counts of each split."""
    rows = [COLUMNS]
    for split, counts in manifest["splits"].items():
        documents, size, tokens, cut, blocks = (
            f"{counts[name]:,}" for name in ("documents", "bytes", "tokens", "cut_documents", "rows")
        )
        padding = f"{counts['padding'] / (counts['padding'] + counts['tokens']):.2%}"
        ratio = f"{counts['bytes'] / counts['tokens']:.3f}"
        rows.append((split, documents, size, tokens, ratio, cut, padding, blocks, str(len(counts["shards"]))))
    return rows
