"""Build HTML pages of one file: tables, bars, pictures, texts. What is not Markup is escaped."""

import base64
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

STYLE = Markup("""\
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em; color: #1f2937 }
h2 { margin-top: 2em } img { max-width: 100%; height: auto } section { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #e5e7eb } b { color: #4c78a8 }
td > div { background: #4c78a8; height: 1em; margin-top: .25em; min-width: 1px }
td:has(> div) { width: 30em; min-width: 4em } .numbers { font-variant-numeric: tabular-nums; white-space: nowrap }
.texts td + td { font: 13px/1.5 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40em) {
  .texts, .texts tr, .texts td { display: block } .texts th { display: none } .texts td:first-child { font-weight: 600 }
  .texts td + td::before { content: attr(title); color: #6b7280; display: block }
  .numbers { font-size: 13px } .numbers td, .numbers th { padding: .3em .4em } td:first-child { white-space: normal }
}
""")


def page(title: str, *parts: str) -> str:
    """Return a page with its title as heading. parts: paragraphs, and Markup of the other functions."""
    head = Markup(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{0}</title><style>{1}</style>\n<h1>{0}</h1>"
    ).format(title, STYLE)
    blocks = (part if isinstance(part, Markup) else Markup("<p>{}</p>").format(part) for part in parts)
    return "\n".join([head, *blocks, "</html>\n"])


def heading(text: str) -> Markup:
    return Markup("<h2>{}</h2>").format(text)


def table(rows: Sequence[Sequence[str]], kind: str = "numbers") -> Markup:
    """Return a table whose first row is its head. kind: "texts" keeps the line breaks of its cells, and sets them one
    below the other, each under the head of its column, where the window is narrow."""
    head, *others = rows
    lines = [Markup("<tr>{}</tr>").format(Markup("").join(Markup("<th>{}</th>").format(each) for each in head))]
    cell = Markup('<td title="{}">{}</td>' if kind == "texts" else "<td>{1}</td>")
    for row in others:
        cells = Markup("").join(cell.format(name, each) for name, each in zip(head, row, strict=True))
        lines.append(Markup("<tr>{}</tr>").format(cells))
    return Markup('<section><table class="{}">{}</table></section>').format(kind, Markup("\n").join(lines))


def bar(share: float) -> Markup:
    """Return a bar that fills `share` of its cell."""
    return Markup('<div style="width:{:.1f}%"></div>').format(100 * share)


def picture(png: Path, description: str) -> Markup:
    """Return a PNG file as an image inside the page, so that the page can be moved alone."""
    data = base64.b64encode(png.read_bytes()).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(description, data)


def continued(prompt: str, text: str) -> Markup:
    """Return a prompt in another colour, and the text after it."""
    return Markup("<b>{}</b>{}").format(prompt, text)
