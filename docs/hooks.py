"""Build the site from the files as they are on GitHub: hooks of mkdocs, named in mkdocs.yml."""

import dataclasses
import html
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

import gpt2modern
import modeling_gpt2modern

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[\w./-]+")
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


def on_files(files, config):
    """Add README.md, the reference, and what pages link to outside of docs/: reports as pages, other files as such."""
    files.append(File.generated(config, "reference.md", content=reference()))
    pages = sorted((ROOT / "docs").glob("*.md"))
    for page in pages:  # grows: README.md and reports are pages, too
        for name in LINK.findall(page.read_text(encoding="utf-8")):
            target = Path(os.path.normpath(page.parent / name))
            if target.is_file() and files.get_file_from_path(uri_of(target)) is None:
                files.append(File.generated(config, uri_of(target), abs_src_path=str(target)))
                pages += [target] * (target.suffix == ".md")
    return files


def uri_of(path: Path) -> str:
    """Return the place in the site of a file of the repository: README.md is index.md, and docs/ the root."""
    return "index.md" if path == ROOT / "README.md" else path.relative_to(ROOT).as_posix().removeprefix("docs/")


def on_page_markdown(markdown, page, **_):
    """Replace links between files of the repository by links between files of the site."""

    def moved(link):
        target = Path(os.path.normpath(Path(page.file.abs_src_path or ROOT / "docs" / "reference.md").parent / link[0]))
        return posixpath.relpath(uri_of(target), posixpath.dirname(page.file.src_uri)) if target.is_file() else link[0]

    return LINK.sub(moved, markdown)


def on_page_content(content, **_):
    """Replace LaTeX by MathML, which browsers draw without a script."""
    return FORMULA.sub(lambda f: convert(html.unescape(f[2]), display="inline" if f[1] == "(" else "block"), content)


def reference() -> str:
    """Write the page on the public names: mkdocstrings fills the lines with `:::`; settings have their help."""
    lines = ["# Reference\n\nThe public names of `gpt2modern` and `modeling_gpt2modern`."]
    for title, package in {"Library": gpt2modern, "Model": modeling_gpt2modern}.items():
        lines.append(f"\n## {title}")
        for value in filter(callable, (getattr(package, name) for name in package.__all__)):
            lines.append(f"\n::: {value.__module__}.{value.__qualname__}\n")
            for f in (f for f in getattr(value, "__dataclass_fields__", {}).values() if "help" in f.metadata):
                default = "required" if f.default is dataclasses.MISSING else f"default `{f.default!r}`"
                lines.append(f"- `{f.name}` ({default}): {html.escape(f.metadata['help'])}")
    return "\n".join(lines)
