"""What was prepared, for people: a table on the terminal and one page of HTML."""

import html
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
.bars td {{ border: 0; padding: .05em .6em }}
.bars td:last-child {{ width: 32em; text-align: left }}
.bars div {{ background: #4c78a8; height: 1em; min-width: 1px }}
</style>
<h1>{name}</h1>
<p>{summary}</p>
<table><tr><th>split</th>{heads}</tr>{rows}</table>
<p>Validation: {validation_rule}. Empty documents left out: {empty:,}.</p>
{histograms}
</html>
"""

COLUMNS = ("documents", "bytes", "tokens", "bytes/token", "cut documents", "padding", "blocks", "shards")


def split_row(counts: dict) -> list[str]:
    """One split's numbers, in the order of COLUMNS."""
    padding = counts["padding"] / max(1, counts["padding"] + counts["tokens"])
    numbers = [counts["documents"], counts["bytes"], counts["tokens"]]
    return [
        *(f"{number:,}" for number in numbers),
        f"{counts['bytes'] / counts['tokens']:.3f}",
        f"{counts['cut_documents']:,}",
        f"{padding:.2%}",
        f"{counts['rows']:,}",
        str(len(counts["shards"])),
    ]


def print_summary(output_dir: Path, manifest: dict, seconds: float) -> None:
    """What was made, how fast, and what to type next."""
    print(f"\n{output_dir}: {_describe(manifest)}")
    widths = (12, 16, 16, 13, 15, 9, 11, 8)
    print(f"{'':12}" + "".join(f"{column:>{width}}" for column, width in zip(COLUMNS, widths, strict=True)))
    for split, counts in manifest["splits"].items():
        cells = zip(split_row(counts), widths, strict=True)
        print(f"{split:12}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    text_bytes = sum(counts["bytes"] for counts in manifest["splits"].values())
    print(f"validation: {manifest['validation_rule']}; empty documents: {manifest['source']['empty_documents']:,}")
    print(
        f"{seconds:.1f} s in all, {text_bytes / 1e6 / seconds:,.0f} MB/s; {output_dir / 'report.html'} shows the rest"
    )
    print(f"next: python train_accelerate.py --config recipes/NAME.yaml --data_dir {output_dir} --output_dir out/NAME")


def write_report(path: Path, manifest: dict) -> None:
    """One page: the counts of each split, and a histogram of document lengths."""
    source = manifest["source"]["name"]
    name = source if isinstance(source, str) else ", ".join(source)
    rows, histograms = "", ""
    for split, counts in manifest["splits"].items():
        rows += f"<tr><td>{split}</td>" + "".join(f"<td>{cell}</td>" for cell in split_row(counts)) + "</tr>"
        histograms += f"<h2>{split}: tokens per document</h2>{_histogram(counts)}"
    page = PAGE.format(
        name=html.escape(name),
        summary=html.escape(_describe(manifest)),
        heads="".join(f"<th>{column}</th>" for column in COLUMNS),
        rows=rows,
        validation_rule=html.escape(manifest["validation_rule"]),
        empty=manifest["source"]["empty_documents"],
        histograms=histograms,
    )
    path.write_text(page, encoding="utf-8")


def _describe(manifest: dict) -> str:
    return (
        f"blocks of {manifest['block_size']:,} tokens, packing {manifest['packing']}, "
        f"{manifest['vocab_size']:,} vocabulary entries"
    )


def _histogram(counts: dict) -> str:
    lengths = {int(length): count for length, count in counts["document_lengths"].items()}
    most = max(lengths.values())
    rows = ""
    for exponent in range(min(lengths).bit_length() - 1, max(lengths).bit_length()):
        count = lengths.get(2**exponent, 0)
        rows += (
            f"<tr><td>{2**exponent:,} to {2 ** (exponent + 1) - 1:,}</td><td>{count:,}</td>"
            f'<td><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        )
    return f'<table class="bars">{rows}</table>'
