"""The upscaling methods as diffusers pipelines: `Upscaling` before a text-to-image pipeline of a known family.

`integrations/diffusers` has a file per method for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`. This
module may import every package of `resmaster_stages`, as the library does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers.utils import BaseOutput
from PIL import Image

from resmaster_stages.library import upscale
from resmaster_stages.models.parts import Models


@dataclass
class UpscalingOutput(BaseOutput):  # type: ignore[misc]  # diffusers is untyped
    """What a pipeline returns."""

    images: list[Image.Image]
    """The high-res images."""
    low_res: list[Image.Image]
    """The images that were enlarged."""


class Upscaling:
    """Turns a text-to-image pipeline into one that upscales. A class of both names the method:

    class ResMasterPipeline(Upscaling, StableDiffusionXLPipeline):
        method = "resmaster"
    """

    method: ClassVar[str]

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,
        *,
        scale: float = 4.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        captions: str | Sequence[str] = "prompt",
        generator: Any = None,
        low_res: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **settings: Any,
    ) -> UpscalingOutput | tuple[list[Image.Image], ...]:
        raise NotImplementedError
