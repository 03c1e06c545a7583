"""The examples of docs/extending.md run as they stand on the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainer import ENVIRONMENT

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (An? [^:\n]+): (\d) places?$(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
MOST_PLACES = {"An MLP": 2, "An optimizer": 3, "A data format": 2, "An evaluation metric": 3, "An evaluation task": 3}


def test_the_page_shows_each_kind_within_its_number_of_places():
    assert {name for name, _, _ in SECTIONS} == set(MOST_PLACES)
    for name, places, text in SECTIONS:
        assert int(places) <= MOST_PLACES[name]
        assert {int(number) for number in re.findall(r"# place (\d)", text)} == set(range(1, int(places) + 1))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, _, text in SECTIONS], ids=lambda value: value[:24])
def test_an_example_runs(name, text, data_dir, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    setup = f"data_dir, output_dir = {str(data_dir)!r}, {str(tmp_path / 'out')!r}\n"
    subprocess.run([sys.executable, "-c", setup + code], cwd=REPOSITORY, env=ENVIRONMENT, check=True, timeout=120)
