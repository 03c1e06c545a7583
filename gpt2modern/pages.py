"""Build pages of one file from the templates in templates/. In HTML, values are escaped."""

from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=lambda name: ".html" in name,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(name: str, /, **values: Any) -> str:
    """Return the page, or part of one, that the template `name`.jinja makes of the values."""
    return ENVIRONMENT.get_template(f"{name}.jinja").render(values)
