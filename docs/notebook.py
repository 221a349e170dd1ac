"""Runs docs/library.ipynb from the beginning, and writes it with its new outputs.

python docs/notebook.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "library.ipynb"
CELL_SECONDS = 600


def executed(notebook: Any, folder: Path) -> Any:
    """A copy of the notebook with the outputs of a run in `folder`. A cell that fails raises CellExecutionError."""
    run = nbformat.from_dict(notebook)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    options = {"timeout": CELL_SECONDS, "kernel_name": "python3", "coalesce_streams": True}
    NotebookClient(run, resources={"metadata": {"path": str(folder)}}, **options).execute()
    for cell in run.cells:
        cell.metadata.clear()  # times of execution
    run.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return run


if __name__ == "__main__":
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.parent), NOTEBOOK)
