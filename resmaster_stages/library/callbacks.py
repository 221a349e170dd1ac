"""A caller's `callback_on_step_end`, in the manner of diffusers, and how the engine calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from resmaster_stages.errors import ConfigError

if TYPE_CHECKING:
    from resmaster_stages.diffusion.canvas import Canvas

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) of each image, and of each scale of `via`."""
Callback: TypeAlias = "Callable[[Canvas, int, float, dict[str, Any]], Any]"
"""Called after each step with (the canvas, number of the step from 0, timestep, {"latents": the noisy latents}). It
gives nothing; or a dictionary, whose `latents` are gone on from; or False, which interrupts the drawing."""

PASSED = ["latents"]
"""The tensors that a callback gets."""


@dataclass
class Watch:
    """Calls what a caller gave after each step, and remembers whether the caller stopped the drawing."""

    callback: Callback | None = None
    progress: Progress | None = None
    number: int = 0
    """Number of the image that is drawn next, from 0."""
    interrupted: bool = False

    def __post_init__(self) -> None:
        wanted = getattr(self.callback, "tensor_inputs", PASSED)  # of diffusers' own callbacks
        if others := [name for name in wanted if name not in PASSED]:
            raise ConfigError(
                f"callback_on_step_end: {type(self.callback).__name__} wants {', '.join(others)}, and only "
                f"{', '.join(PASSED)} are passed; use the method's settings instead, such as guidance_stop"
            )

    @property
    def on_step(self) -> Callable[[Canvas], None] | None:
        """What the engine calls. None if the caller gave nothing, so that nothing is done."""
        return None if self.callback is None and self.progress is None else self._tell

    def _tell(self, canvas: Canvas) -> None:
        canvas.number = self.number
        if self.progress:
            self.progress(canvas.step + 1, canvas.steps)
        if self.callback:
            answer = self.callback(canvas, canvas.step, canvas.timestep, {"latents": canvas.latents})
            if answer is False:
                canvas.interrupt = True
            elif isinstance(answer, dict):
                canvas.latents = answer.get("latents", canvas.latents)
        self.interrupted = canvas.interrupt
