"""Type checkers know what the library's functions give, by what they are given."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

CALLS = """
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import resmaster_stages as rm
from resmaster_stages.diffusion.canvas import Canvas
from resmaster_stages.library.opened import FinishedSample, OpenedDataset


def callback(canvas: Canvas, step: int, timestep: float, given: dict[str, Any]) -> bool:
    assert_type(canvas.preview(), Image.Image)
    return step < 3


image = Image.new("RGB", (8, 8))
assert_type(rm.upscale("photo.png", "a house", scale=2, callback_on_step_end=callback), Image.Image)
assert_type(rm.upscale(Path("photo.png"), output_type="np"), NDArray[np.float32])
assert_type(rm.upscale(image, output_type="pt"), Tensor)
assert_type(rm.upscale(image, output_type="latent"), Tensor)
assert_type(rm.upscale([image, "photo.png"]), list[Image.Image])
assert_type(rm.upscale([image], output_type="np"), list[NDArray[np.float32]])
assert_type(rm.upscale(["photo.png"], ["a house"], output_type="pt"), list[Tensor])
assert_type(rm.generate("a house"), list[Image.Image])
assert_type(rm.generate(["a house"], output_type="latent", steps=3), list[Tensor])
assert_type(rm.open("out"), OpenedDataset)
assert_type(rm.open("out")["ab"], FinishedSample)
assert_type(rm.build({"name": "demo"}, on_sample=lambda sample: print(sample.prompt)), OpenedDataset)
assert_type(len(rm.open("out")), int)
"""
WRONG = """
import resmaster_stages as rm

rm.upscale("photo.png", output_type="png")
rm.open(3)
rm.upscale("photo.png").shape
"""


def checked(text: str, folder: Path) -> str:
    """What mypy says of a program."""
    path = folder / "program.py"
    path.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith(str(path)))


@pytest.mark.slow
def test_each_call_has_the_type_of_its_output(tmp_path: Path) -> None:
    assert checked(CALLS, tmp_path) == ""
    said = checked(WRONG, tmp_path)
    assert [line.split(":")[1] for line in said.splitlines() if " error: " in line] == ["4", "5", "6"], said
