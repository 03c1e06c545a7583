"""docs/architecture.md and its diagram are what the code says."""

from tests.support.architecture import DIAGRAM, PAGE, diagram, page


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.support.architecture"
    assert DIAGRAM.read_text(encoding="utf-8") == diagram(), "run python -m tests.support.architecture"
