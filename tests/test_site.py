"""The documentation builds as a site: links lead somewhere, the reference has every public name."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gpt2modern
import modeling_gpt2modern

REPOSITORY = Path(__file__).parents[1]
NEEDED = ("material", "mkdocstrings_handlers", "latex2mathml")
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason="needs python -m pip install -e '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


def test_every_page_is_built_and_linked(site):
    index = page(site, "index.html")
    for path in (REPOSITORY / "docs").glob("*.md"):
        assert (site / path.with_suffix(".html").name).is_file()
        assert f'href="{path.stem}.html"' in index, path.name
    assert "Train a language model of the size of GPT-2" in index
    assert "Train a language model" in (site / "search" / "search_index.json").read_text()


def test_links_and_pictures_lead_to_files_of_the_site(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r'(?:href|src)="([^":#?]+)[#"]', text):
            assert path.name == "404.html" or (path.parent / target).exists(), f"{path.name}: {target}"


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.glob("*.html"):
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', page(site, path.name)), path.name


def test_the_reference_has_every_public_name_and_setting(site):
    text = page(site, "reference.html")
    for package in (gpt2modern, modeling_gpt2modern):
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value):
                assert f'id="{value.__module__}.{name}"' in text, name
                first = re.match(r"\w+ \w+", value.__doc__)[0]
                assert first in text, name
    for config in (gpt2modern.PrepareConfig, gpt2modern.TrainConfig):
        assert all(f"<code>{name}</code>" in text for name in config.__dataclass_fields__)


def test_formulas_are_mathml(site):
    text, source = page(site, "architecture.html"), (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", source, re.DOTALL)
    assert text.count("<math") == len(formulas) > 20 and "arithmatex" not in text and "\\mathrm" not in text
    assert "architecture.svg" in text and (site / "architecture.svg").is_file()
