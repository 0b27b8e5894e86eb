"""The notebooks of ``examples/`` run from top to bottom, on a tiny model."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def unprinted(notebook: nbformat.NotebookNode) -> list[str]:
    """Sources of cells that print something and have no output."""
    return [cell.source for cell in notebook.cells if "print(" in cell.source and not cell.get("outputs", True)]


def shape(notebook: nbformat.NotebookNode) -> list[list[tuple[str, tuple[str, ...]]]]:
    """What each cell shows: kinds of outputs, and the fields of values; numbers and texts are those of a model."""
    return [
        list(
            dict.fromkeys(
                (one.output_type, tuple(re.findall(r"(\w+)=", one.get("data", {}).get("text/plain", ""))))
                for one in cell.get("outputs", [])
                if one.get("name") != "stderr"
            )
        )
        for cell in notebook.cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, llama: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert unprinted(notebook) == [], "saved without what it prints, which the site shows"
    saved = shape(notebook)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nMODEL, LENGTH = {str(llama)!r}, 32"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert unprinted(notebook) == []
    assert shape(notebook) == saved, "saved with what an earlier version showed: execute it again"
