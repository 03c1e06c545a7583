"""Build HTML pages of one file from the templates in templates/. Values are escaped."""

from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: Any) -> str:
    """Return the page, or part of one, that the template `name`.html.jinja makes of the values."""
    return ENVIRONMENT.get_template(f"{name}.html.jinja").render(values)
