"""The methods as diffusers pipelines: the class `Upscaling` before a text-to-image pipeline of a known family.

`integrations/diffusers` has a file per method, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers.utils import BaseOutput

from resmaster_stages.library.drawing import upscale
from resmaster_stages.library.images import OutputType

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
"""A callback of diffusers: (pipeline, step, timestep, {"latents": ...}) -> the dictionary, perhaps changed."""


@dataclass
class UpscalingOutput(BaseOutput):
    """What a pipeline returns."""

    images: Any
    """The high-res images, in the form of `output_type`."""
    low_res: Any
    """The images that were enlarged, as PIL images or as they were given. None: they were given as latents."""


class Upscaling:
    """Gives a text-to-image pipeline a call that upscales. A class of both names the method:

    class ResMasterPipeline(Upscaling, StableDiffusionXLPipeline):
        method = "resmaster"
    """

    method: ClassVar[str]
    """Name of the method."""
    _interrupt: bool = False

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,
        *,
        scale: float = 4.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        captions: str | Sequence[str] | Sequence[Sequence[str]] = "prompt",
        generator: Any = None,
        latents: Any = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        low_res: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> UpscalingOutput | tuple[Any, ...]:
        """Upscale `image`, or an image that the pipeline itself makes from `prompt` first.

        image: as in `resmaster_stages.upscale`. None: the base pipeline makes it, with the arguments `low_res` and
        the same `generator`. latents: in place of `image`, latents of the base pipeline. num_inference_steps,
        guidance_scale, negative_prompt: of the upscaling; None leaves them to the method's preset. captions: one text
        per view, row-major; one such list per image; or `prompt`: every view gets the prompt. callback_on_step_end: is
        called with the pipeline after each step of the upscaling; setting the pipeline's `_interrupt` stops it.
        settings: further keys of the part `upscale` of a configuration.

        Raises UserError with one line that says what to do, and SampleError if nothing visible was made.
        """
        self._interrupt = False
        if image is None and latents is None:
            base: Any = super()
            image = base.__call__(prompt=prompt, generator=generator, **(low_res or {})).images
        asked: dict[str, Any] = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }
        made = upscale(
            image,
            prompt,
            model=self,
            captions=captions,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end and self._after(callback_on_step_end),
            method=self.method,
            scale=scale,
            **{name: value for name, value in asked.items() if value is not None},
            **settings,
        )
        images = made if isinstance(made, list) else [made]
        return UpscalingOutput(images, image) if return_dict else (images, image)

    def _after(self, callback: Callback) -> Callable[[Any, int, Any, dict[str, Any]], Any]:
        """A callback of diffusers as the library calls one."""

        def after(canvas: Any, step: int, timestep: Any, values: dict[str, Any]) -> Any:
            changed = callback(self, step, timestep, values)
            canvas.interrupt = canvas.interrupt or self._interrupt
            return changed

        return after
