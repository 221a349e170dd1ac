"""docs/library.ipynb: small, free of machine's names, and what it shows is what it gives when it is run again."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from docs.notebook import NOTEBOOK, executed
from tests.checkout import PYTHONPATH, ROOT

MOST_BYTES = 600_000
LEVELS = 4.0
"""How far two runs' images may lie apart on average, in levels of 255: other processors round otherwise, and JPEG."""


def outputs(notebook: Any) -> list[list[Any]]:
    """What each code cell shows: texts, and images as arrays."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found.append([_shown(output) for output in cell.outputs])
    return found


def _shown(output: Any) -> Any:
    if output.output_type == "stream":
        return output.name, output.text
    assert output.output_type == "display_data", output
    data = base64.b64decode(output.data["image/jpeg"])
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)


def test_the_notebook_is_small_and_whole() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < MOST_BYTES
    assert not re.search(r"\B/(home|tmp|root|Users|opt|work)/|Warning", text)
    shown = outputs(notebook)
    assert all(shown[1:]), "every cell but the first shows something"
    assert {name for cell in shown for name, _ in (each for each in cell if isinstance(each, tuple))} == {"stdout"}
    assert sum(isinstance(each, np.ndarray) for cell in shown for each in cell) >= 4
    assert all(each.std() > 10 for cell in shown for each in cell if isinstance(each, np.ndarray))


def test_the_links_of_the_notebook_lead_somewhere() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)#]+)[^)]*\)", cell.source)]
    assert links
    assert all((NOTEBOOK.parent / link).exists() for link in links), links


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_gives_its_outputs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    again = executed(notebook, tmp_path)
    for expected, found in zip(outputs(notebook), outputs(again), strict=True):
        assert len(expected) == len(found)
        for one, other in zip(expected, found):
            if isinstance(one, tuple):
                assert one == other
            else:
                assert one.shape == other.shape
                assert np.abs(one - other).mean() < LEVELS
    assert not list(tmp_path.iterdir()), "the notebook leaves nothing behind"
    assert ROOT in NOTEBOOK.parents
