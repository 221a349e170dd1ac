"""The images of docs/methods.md are cut from the sheet at the right places."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from resmaster_stages.evaluation.page import SheetRow, sheet
from tests.checkout import ROOT

COLOURS = {"low": (200, 0, 0), "a": (0, 200, 0), "b": (0, 0, 200)}


def script():
    spec = importlib.util.spec_from_file_location("method_images", ROOT / "docs" / "method_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(name: str, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), COLOURS[name])


def test_each_image_shows_the_low_res_image_and_its_own_method(tmp_path: Path) -> None:
    page = sheet([SheetRow("a prompt", plain("low", 64), {name: plain(name, 128) for name in "ab"})], ["a", "b"])
    for path in script().write(page, ["a", "b"], tmp_path):
        image = Image.open(path)
        step = image.width // 4
        for place, name in enumerate(["low", path.stem, "low", path.stem]):
            for x, y in ((12, 12), (step - 24, image.height - 12)):
                found = image.getpixel((place * step + x, y))
                assert all(abs(a - b) < 12 for a, b in zip(found, COLOURS[name])), (path.name, place)


def test_a_sheet_of_other_methods_is_refused(tmp_path: Path) -> None:
    page = sheet([SheetRow("a prompt", plain("low", 64), {"a": plain("a", 128)})], ["a"])
    with pytest.raises(SystemExit, match="must show 2 methods: a, b"):
        script().write(page, ["a", "b"], tmp_path)
