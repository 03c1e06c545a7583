"""Present a finished folder: print a table, build an HTML report, upload it to the Hub with a dataset card."""

import html
from pathlib import Path

import huggingface_hub
from huggingface_hub import DatasetCardData

from gpt2modern.files import write_file
from gpt2modern.hub import hub_errors, retried

COLUMNS = ("split", "documents", "bytes", "tokens", "bytes/token", "cut documents", "padding", "blocks", "shards")
STYLE = "body { font: 15px sans-serif } td { padding: .1em 1em } div { background: #4c78a8; height: 1em }"


def print_summary(output_dir: Path, manifest: dict, seconds: float) -> None:
    """Print the counts of the finished folder, the time taken, and the command that trains on it."""
    print(f"\n{output_dir}: {_summary(manifest)}")
    table = _table(manifest)
    widths = [max(map(len, column)) + 3 for column in zip(*table, strict=True)]
    for row in table:
        print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    text_bytes = sum(counts["bytes"] for counts in manifest["splits"].values())
    rate = f"{text_bytes / 1e6 / seconds:,.0f} MB of text per second"
    print(f"{seconds:.1f} s in total, {rate}; {output_dir / 'report.html'} shows the document lengths")
    print(f"next: python train_accelerate.py --config recipes/NAME.yaml --data_dir {output_dir} --output_dir out/NAME")


def report_page(manifest: dict) -> str:
    """Return an HTML page with the counts of each split and a histogram of document lengths."""
    source = manifest["source"]["name"]
    name = html.escape(source if isinstance(source, str) else ", ".join(source))
    parts = [f"<h1>{name}</h1><p>{html.escape(_summary(manifest))}</p>", _html_table(_table(manifest))]
    for split, counts in manifest["splits"].items():
        lengths = {int(least): count for least, count in counts["document_lengths"].items()}
        rows = []
        for exponent in range(min(lengths).bit_length() - 1, max(lengths).bit_length()):
            count = lengths.get(2**exponent, 0)
            bar = f'<div style="width:{30 * count / max(lengths.values()):.1f}em"></div>'
            rows.append((f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,}", f"{count:,}", bar))
        parts.append(f"<h2>{split}: tokens per document</h2>{_html_table(rows)}")
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return "\n".join([head, *parts, "</html>\n"])


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
    head, *rows = (f"| {' | '.join(row)} |" for row in _table(manifest))
    table = "\n".join([head, f"|{' --- |' * len(COLUMNS)}", *rows])
    return f"""---
{data.to_yaml()}
---
# {name}

Packed token blocks for training a language model: {_summary(manifest)}.

{table}

Each row holds `input_ids`, {"" if manifest["packing"] == "concat" else "at most "}{manifest["block_size"]} tokens, and
`labels`, the same tokens (Trainer and TRL shift them). Documents end with EOS (id {manifest["eos_token_id"]}). The
tokenizer is in `tokenizer/`; `manifest.json` has the settings and the sha256 of every file.

```python
from datasets import load_dataset

blocks = load_dataset("{repo_id or "path/of/this/folder"}")
```

GPT2-Modern trains on it: `--data_dir {repo_id or "path/of/this/folder"}`.
"""


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


def _html_table(rows: list[tuple[str, ...]]) -> str:
    return "<table>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows) + "</table>"
