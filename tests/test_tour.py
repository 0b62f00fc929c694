"""The notebook, from data to a verdict."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

TOUR = REPO / "docs/tour.ipynb"


def outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_the_notebook_is_kept_as_it_was_run_from_top_to_bottom():
    cells = [c for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert outputs(cells)
    assert "error" not in {output["output_type"] for output in outputs(cells)}


@pytest.mark.slow
def test_the_notebook_goes_from_data_to_a_verdict(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # Its shell commands are those of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900).execute()
    texts = [o.get("data", {}).get("text/markdown", "") for o in outputs(notebook.cells)]
    (verdict,) = [text for text in texts if text]
    assert "| tract |" in verdict and "points" in verdict
