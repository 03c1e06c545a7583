"""Show a finished folder: a table on the terminal, a page of HTML, a dataset of the Hub with its card."""

import html
from pathlib import Path

import huggingface_hub
from huggingface_hub import DatasetCard, DatasetCardData

from gpt2modern.data.formats.reading import cause_of
from gpt2modern.errors import GPT2ModernError
from gpt2modern.files import write_file

COLUMNS = ("documents", "bytes", "tokens", "bytes/token", "cut documents", "padding", "blocks", "shards")
WIDTHS = (12, 16, 16, 13, 15, 9, 11, 8)

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222 }}
th, td {{ padding: .1em .9em; text-align: right }}
div {{ background: #4c78a8; height: 1em; min-width: 1px }}
</style>
<h1>{name}</h1>
<p>{summary}</p>
<table><tr><th>split</th>{heads}</tr>{rows}</table>
<p>Validation: {validation_rule}. Empty documents left out: {empty:,}.</p>
{histograms}
</html>
"""

CARD = """
# {name}

Packed token blocks for training a language model: {summary}.

{table}

Each row holds `input_ids`, block_size + 1 = {row_size} tokens of which the first is context only, and `num_tokens`, the
number of targets that follow it; the rest of a row is padding with EOS (id {eos_token_id}). Documents end with EOS.
The tokenizer is in `tokenizer/`; `manifest.json` has the settings and the sha256 of shards and tokenizer.

Validation: {validation_rule}.

```python
from datasets import load_dataset

blocks = load_dataset("{repo_id}")
```

GPT2-Modern trains on it by name: `--data_dir {repo_id}`.
"""


def print_summary(output_dir: Path, manifest: dict, seconds: float) -> None:
    """Print what was made, how fast, and what to type next."""
    print(f"\n{output_dir}: {_summary(manifest)}")
    print(f"{'':12}" + "".join(f"{column:>{width}}" for column, width in zip(COLUMNS, WIDTHS, strict=True)))
    for split, counts in manifest["splits"].items():
        cells = zip(_row(counts), WIDTHS, strict=True)
        print(f"{split:12}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    text_bytes = sum(counts["bytes"] for counts in manifest["splits"].values())
    print(f"validation: {manifest['validation_rule']}; empty documents: {manifest['source']['empty_documents']:,}")
    print(
        f"{seconds:.1f} s in all, {text_bytes / 1e6 / seconds:,.0f} MB/s; {output_dir / 'report.html'} shows the rest"
    )
    print(f"next: python train_accelerate.py --config recipes/NAME.yaml --data_dir {output_dir} --output_dir out/NAME")


def report_page(manifest: dict) -> str:
    """Make a page of HTML: the counts of each split, and a histogram of document lengths."""
    source = manifest["source"]["name"]
    rows, histograms = "", ""
    for split, counts in manifest["splits"].items():
        rows += f"<tr><td>{split}</td>" + "".join(f"<td>{cell}</td>" for cell in _row(counts)) + "</tr>"
        histograms += f"<h2>{split}: tokens per document</h2>{_histogram(counts)}"
    return PAGE.format(
        name=html.escape(source if isinstance(source, str) else ", ".join(source)),
        summary=html.escape(_summary(manifest)),
        heads="".join(f"<th>{column}</th>" for column in COLUMNS),
        rows=rows,
        validation_rule=html.escape(manifest["validation_rule"]),
        empty=manifest["source"]["empty_documents"],
        histograms=histograms,
    )


def dataset_card(manifest: dict, repo_id: str) -> str:
    """Make README.md of the dataset; its metadata tells `load_dataset` which files are which split."""
    source, name = manifest["source"]["name"], repo_id.split("/")[-1]
    lines = [("split", *COLUMNS), ("---",) * (len(COLUMNS) + 1)]
    lines += [(split, *_row(counts)) for split, counts in manifest["splits"].items()]
    files = [{"split": split, "path": f"{split}/*/*.arrow"} for split in manifest["splits"]]
    data = DatasetCardData(
        pretty_name=name,
        tags=["gpt2-modern", "packed"],
        task_categories=["text-generation"],
        source_datasets=[source] if isinstance(source, str) and source not in ("stdlib", "dataset") else None,
        configs=[{"config_name": "default", "data_files": files}],
    )
    content = CARD.format(
        name=name,
        repo_id=repo_id,
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        row_size=manifest["block_size"] + 1,
        summary=_summary(manifest),
        eos_token_id=manifest["eos_token_id"],
        validation_rule=manifest["validation_rule"],
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n{content}"))


def push_to_hub(folder: Path, manifest: dict, repo_id: str, *, private: bool) -> None:
    """Upload a finished folder with its card; GPT2ModernError when the Hub refuses or is not there. The folder stays.

    The token is the one that `hf auth login` stored, or HF_TOKEN.
    """
    write_file(folder / "README.md", dataset_card(manifest, repo_id))
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Packed token blocks",
            ignore_patterns=[".*"],
        )
    except Exception as error:  # the network, the token, the name: none of it is a defect of ours
        raise GPT2ModernError(
            f"--hub_dataset_id {repo_id}: the upload failed ({cause_of(error)}); {folder} is finished: the same "
            "command tries the upload again"
        ) from error
    print(f"uploaded to https://huggingface.co/datasets/{repo_id}")


def _summary(manifest: dict) -> str:
    return (
        f"blocks of {manifest['block_size']:,} tokens, packing {manifest['packing']}, "
        f"{manifest['vocab_size']:,} vocabulary entries"
    )


def _row(counts: dict) -> list[str]:
    """Write one split's numbers in the order of COLUMNS."""
    numbers = [f"{counts[name]:,}" for name in ("documents", "bytes", "tokens", "cut_documents", "rows")]
    padding = counts["padding"] / max(1, counts["padding"] + counts["tokens"])
    bytes_per_token = f"{counts['bytes'] / counts['tokens']:.3f}"
    return [*numbers[:3], bytes_per_token, numbers[3], f"{padding:.2%}", numbers[4], str(len(counts["shards"]))]


def _histogram(counts: dict) -> str:
    lengths = {int(length): count for length, count in counts["document_lengths"].items()}
    rows = ""
    for exponent in range(min(lengths).bit_length() - 1, max(lengths).bit_length()):
        count = lengths.get(2**exponent, 0)
        rows += (
            f"<tr><td>{2**exponent:,} to {2 ** (exponent + 1) - 1:,}</td><td>{count:,}</td>"
            f'<td><div style="width:{30 * count / max(lengths.values()):.1f}em"></div></td></tr>'
        )
    return f"<table>{rows}</table>"
