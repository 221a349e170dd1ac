"""What the page does when a button is pressed, by the functions of the library. Knows nothing of Gradio.

Invariant: one request computes at a time, because models are not thread-safe. Any thread may stop it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from resmaster_stages.config.method import methods
from resmaster_stages.errors import UserError
from resmaster_stages.library import generate, measure, open_image, upscale

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Stopped(Exception):
    """Raised within a request that was stopped."""


@dataclass(frozen=True)
class Asked:
    """What a user asks for. Values of None or "" leave the choice to the method's preset."""

    image: str | None
    """Path of the image."""
    prompt: str
    model: str
    method: str
    preset: str
    scale: float
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    seed: int = 0
    captions: str = "auto"
    further: str = ""
    """Further settings of the part `upscale` of a configuration, as YAML."""

    def settings(self) -> dict[str, Any]:
        """The keys of the part `upscale`. `further` may overrule the fields. Raises UserError."""
        own: Mapping[str, Any] = methods()[self.method].model_fields if self.method in methods() else {}
        asked = {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt or None,
        }
        given = {name: value for name, value in asked.items() if value is not None and name in own}
        fixed = {"method": self.method, "preset": self.preset, "scale": self.scale}
        return {**fixed, **given, **mapping_of(self.further)}


@dataclass(frozen=True)
class Made:
    """What a request gave."""

    low_res: Image.Image
    high_res: Image.Image
    file: Path
    """The result as a PNG file."""
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Work:
    """The requests of one page."""

    def __init__(self) -> None:
        self._alone = threading.Lock()
        self._stop = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="resmaster-app-")

    def close(self) -> None:
        """Stop what is at work, and remove the results' files."""
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """Stop the request that is at work, after its current step."""
        self._stop.set()

    def upscale(self, asked: Asked, progress: Progress) -> Made:
        """Upscale an image. Raises Stopped, and ResMasterError with one line that says what to do."""
        if not asked.image:
            raise UserError("there is no image yet; choose a file, or make one from the prompt")
        with self._alone:
            self._stop.clear()
            start = time.monotonic()
            low_res = open_image(asked.image)
            high_res = upscale(
                low_res,
                asked.prompt,
                model=asked.model,
                captions=asked.captions,
                seed=asked.seed,
                progress=self._watched(progress),
                **asked.settings(),
            )
            seconds = time.monotonic() - start
            file = Path(self._folder.name) / f"{Path(asked.image).stem}-{asked.method}-{asked.scale:g}x.png"
            high_res.save(file)
            return Made(low_res, high_res, file, seconds, measure(low_res, high_res, asked.prompt, model=asked.model))

    def generate(self, prompt: str, model: str, seed: int) -> Path:
        """Make an image of the model's native size from a prompt, as a PNG file. Raises ResMasterError."""
        if not prompt.strip():
            raise UserError("there is no prompt yet; write what the image shows")
        with self._alone:
            (image,) = generate([prompt], model=model, seed=seed)
            file = Path(self._folder.name) / f"generated-{seed}.png"
            image.save(file)
            return file

    def _watched(self, progress: Progress) -> Progress:
        """`progress`, which also ends a request that was stopped."""

        def step(done: int, total: int) -> None:
            if self._stop.is_set():
                raise Stopped
            progress(done, total)

        return step


def mapping_of(text: str) -> dict[str, Any]:
    """The mapping that YAML describes; {} for an empty text. Raises UserError."""
    try:
        values = yaml.safe_load(text) if text.strip() else {}
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise UserError(f"further settings: no YAML{line}; write one `key: value` per line") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError("further settings: write one `key: value` per line")
    return values
