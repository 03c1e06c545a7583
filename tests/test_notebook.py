"""docs/quickstart.ipynb runs from the first cell to the last, with smaller numbers, and is saved without outputs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
SMALLER = 'DOCUMENTS, STEPS, SIZE = 12, 6, "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"'


def test_the_notebook_is_saved_without_outputs_and_without_places_of_one_machine():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert not re.search(r'"/\w|index-url|/home/|/content/', NOTEBOOK.read_text(encoding="utf-8"))
    assert [cell["metadata"].get("tags") for cell in code].index(["parameters"]) == 0


def test_the_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs python -m pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="needs python -m pip install nbclient ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell(SMALLER))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "loss on the validation split: " in printed and "def __init__(self" in printed
    assert not any("custom code" in output.get("text", "") for output in outputs)
    assert float(re.search(r"LlamaForCausalLM largest difference of a logit: (\S+)", printed)[1]) < 1e-4
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "quickstart" / "model" / "summary.json").is_file()
