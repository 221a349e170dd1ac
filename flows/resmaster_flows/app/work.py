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
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import methods
from resmaster_stages.errors import UserError
from resmaster_stages.library.callbacks import Callback
from resmaster_stages.library.drawing import generate, upscale
from resmaster_stages.library.images import open_image
from resmaster_stages.library.measuring import measure
from resmaster_stages.library.models import single
from resmaster_stages.models.downloads import downloads_of

if TYPE_CHECKING:
    from resmaster_stages.diffusion.canvas import Canvas

Shown = Callable[[str, Image.Image | None], None]
"""Called with what is done now, and a preview of the result if there is one."""
PREVIEW_SECONDS = 1.0
"""Least time between two previews. Each of them waits for the device."""


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
    stopped: bool
    """Whether the request was stopped: the result is then what the last step predicted."""
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

    def upscale(self, asked: Asked, show: Shown) -> Made:
        """Upscale an image. Raises ResMasterError with one line that says what to do."""
        if not asked.image:
            raise UserError("there is no image yet; choose a file, or make one from the prompt")
        with self._alone:
            self._stop.clear()
            start = time.monotonic()
            low_res, settings = open_image(asked.image), asked.settings()
            show(loading(asked.model), None)
            high_res = upscale(
                low_res,
                asked.prompt,
                model=asked.model,
                captions=asked.captions,
                seed=asked.seed,
                callback_on_step_end=self._after_each_step(show),
                **settings,
            )
            seconds = time.monotonic() - start
            file = Path(self._folder.name) / f"{Path(asked.image).stem}-{asked.method}-{asked.scale:g}x.png"
            high_res.save(file)
            metrics = measure(low_res, high_res, asked.prompt, model=asked.model)
            return Made(low_res, high_res, file, seconds, self._stop.is_set(), metrics)

    def generate(self, prompt: str, model: str, seed: int) -> Path:
        """Make an image of the model's native size from a prompt, as a PNG file. Raises ResMasterError."""
        if not prompt.strip():
            raise UserError("there is no prompt yet; write what the image shows")
        with self._alone:
            (image,) = generate([prompt], model=model, seed=seed)
            file = Path(self._folder.name) / f"generated-{seed}.png"
            image.save(file)
            return file

    def _after_each_step(self, show: Shown) -> Callback:
        """Shows steps and previews, and ends a request that was stopped."""
        latest = -PREVIEW_SECONDS

        def after(canvas: Canvas, step: int, timestep: float, values: dict[str, Any]) -> None:
            nonlocal latest
            due = time.monotonic() - latest >= PREVIEW_SECONDS
            show(f"step {step + 1} of {canvas.steps}", canvas.preview() if due else None)
            latest = time.monotonic() if due else latest
            canvas.interrupt = self._stop.is_set()

        return after


def loading(model: str) -> str:
    """What is done before the first step."""
    wait = ": it is not on this machine yet, and is downloaded first" if downloads_of(_config_of(model)) else ""
    return f"loading {model}{wait}"


def _config_of(model: str) -> DatasetConfig:
    return parse_config(single(model, "prompt"))


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
