"""The notebooks of docs/ run from top to bottom, and are committed without their outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
SHORTER = {"first_private_model": ("", ""), "ablation": ('steps, seeds = 300, "0,1,2"', 'steps, seeds = 8, "0,1"')}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder, where `!dpopt` is this checkout's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore")  # of the kernel's own event loop
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, workplace):
    notebook = nbformat.read(path, as_version=4)
    whole, shorter = SHORTER[path.stem]
    assert sum(whole in cell.source for cell in notebook.cells) >= 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(whole, shorter)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(workplace)}}).execute()
    figures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    if path.stem == "first_private_model":
        found = [float(line.split(": ")[1].split("%")[0]) for line in printed(notebook).splitlines() if "% of" in line]
        assert len(found) == 3 and found[0] < found[2] and found[2] > 75 and len(figures) == 1
    else:
        assert len(list((workplace / "runs").glob("*/result.json"))) == 8 and len(figures) == 2
        assert printed(notebook).count("no interval") == 3  # three groups next to the baseline


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_install_first(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "%pip install" in code[0].source and "google.colab" in code[0].source
    assert path.name in (ROOT / "docs/notebooks/README.md").read_text()


def test_every_notebook_is_tested():
    assert set(SHORTER) == {path.stem for path in NOTEBOOKS}
