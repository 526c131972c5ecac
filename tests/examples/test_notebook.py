"""The notebook in examples/: it runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "examples" / "photos.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_stripped_and_compiles() -> None:
    """No output and no number of a run: a change shows as what it is."""
    codes = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(codes) > 5
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
    compile("\n".join("".join(cell["source"]) for cell in codes), NOTEBOOK.name, "exec")


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo's data, in a kernel of its own: pictures, neighbours of a kind."""
    nbformat = pytest.importorskip("nbformat", reason="pip install milan-pretrain[test]")
    nbclient = pytest.importorskip("nbclient", reason="pip install milan-pretrain[test]")
    pytest.importorskip("ipykernel", reason="pip install milan-pretrain[test]")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4
    assert "'images': 800" in str(outputs)
    assert "torch.Size([1, 128])" in str(outputs)
    assert not any(out["output_type"] == "error" for out in outputs)
    nbformat.write(notebook, tmp_path / "executed.ipynb")
