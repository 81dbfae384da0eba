"""The notebooks run from beginning to end, and are committed with what they print."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

EXPECTED = {"01_first_finetune.ipynb": ('{"answer": "Stockholm"}', "reward rose: True", "tiny.Q8_0.gguf")}
"""What each prints when it went well."""
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    for output in cell.outputs:
        yield output.get("text", "") or output.get("data", {}).get("text/plain", "")


def test_there_are_some():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_committed(path):
    """Every cell was run, in order, without an error, and no folder of somebody's machine is in the results."""
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(
        r"/(home|root|tmp|work|Users)/", "".join(t for c in cells(notebook) for t in texts(c))
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path, tmp_path, monkeypatch):
    # One device and fast programs, as its reader has.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    notebook = nbformat.read(path, as_version=4)
    for cell in cells(notebook):
        cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(text for cell in cells(notebook) for text in texts(cell))
    assert [text for text in EXPECTED[path.name] if text not in printed] == []
