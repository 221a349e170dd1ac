"""Settings that several methods have, in groups: a method's class is made of those that it reads.

Each group brings what its fields mean for the work of a method and for what the canvas engine is made of. Imports no
torch before an image is made, so that reading a configuration stays quick.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from resmaster_stages.config.method import Method, OnlyWith, Source
from resmaster_stages.config.part import Operational, Part
from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid, stride_of
from resmaster_stages.methods.passes import Pass, first_step, from_noise

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL import Image

    from resmaster_stages.diffusion.conditions import Conditions
    from resmaster_stages.diffusion.guidance import ClassifierFree
    from resmaster_stages.diffusion.loop import Composition, Progress, X0Hook
    from resmaster_stages.diffusion.loop import Views as CutViews
    from resmaster_stages.methods.request import Reference, Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Step

NEGATIVE_PROMPT = "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"
"""The negative prompt that the papers of this family share (methods: DemoFusion, FreeScale)."""


def area(height: int, width: int, grid: Grid) -> float:
    """Of `height` x `width` latents, in units of `grid`'s native area."""
    return height * width / grid.window**2


class Enlargement(Method):
    """A method that needs no base model."""

    @abstractmethod
    def enlarge(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Image.Image:
        """`image` at `height` x `width` px, RGB. `progress` hears (parts done, parts in all)."""


class Diffusion(Method):
    """A method that denoises with the base model, in one or several passes of the canvas engine."""

    base_model: ClassVar[bool] = True

    via: tuple[float, ...] = ()
    """Scales at which the image is finished on the way, e.g. [4] at scale 8: each of these images is the next one's
    low-res image, and its patches are captioned anew."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Classifier-free guidance scale."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Used for prompts that bring none of their own."""
    stepper: Literal["ddim_implied", "ddim_keep", "posterior", "ddim_ancestral", "dpmpp_2m"] = "ddim_implied"
    """How z_{t-1} follows from the edited x0: deterministic with implied or kept noise, ResMaster's stochastic eq. 7,
    DDIM with eta = 1, or DPM-Solver++(2M), which needs about half the steps."""
    view_batch: int | None = Operational(None, ge=1)
    """Views per UNet call at most (times two with guidance, at some steps three). null: what the device's memory
    allows, 16 on CPUs. Other numbers give the same image up to rounding."""

    @model_validator(mode="after")
    def _check_via(self) -> Self:
        path = (1.0, *self.via, self.scale)
        if self.via and not all(a < b for a, b in pairwise(path)):
            raise ValueError(f"via {list(self.via)}: give rising scales between 1 and the scale ({self.scale:g})")
        return self

    def way(self) -> tuple[Self, ...]:
        """As of every method, less `via`."""
        path = (1.0, *self.via, self.scale)
        return tuple(self.model_copy(update={"via": (), "scale": after / before}) for before, after in pairwise(path))

    def facts(self) -> dict[str, Any]:
        """What reports say of the settings."""
        return {"steps": self.steps, "guidance scale": self.guidance_scale}

    def needs(self) -> Mapping[Ability, str]:
        """What the base model's family must be able to do, and the method or setting that needs it, for messages."""
        return {}

    def branches(self, index: int) -> int:
        """Guidance branches of step `index` of the path."""
        return 2 if self.guidance_scale > 1 else 1

    def rows(self, indices: Iterable[int]) -> int:
        """Evaluations of one view in these steps."""
        return sum(self.branches(index) for index in indices)

    def left(self, start: float) -> range:
        """Numbers of the steps that are left behind the fraction `start` of the path."""
        return range(first_step(start, self.steps), self.steps)

    @abstractmethod
    def work(self, grid: Grid) -> Iterator[UnetWork]:
        """What the UNet evaluates for an image with `grid`'s views, from the settings alone; a test holds the numbers
        to what the engine counts."""

    @abstractmethod
    def passes(self, request: Request) -> tuple[Pass, ...]:
        """What is denoised, one canvas after the other, the last one of the size asked for."""


class LateGuidance(Diffusion):
    """Guidance that may end before the path does."""

    guidance_stop: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the steps after which guidance ends: from there on, a view is evaluated once a step instead of
    twice."""

    def branches(self, index: int) -> int:
        """Guidance branches of step `index` of the path."""
        return super().branches(index) if index / self.steps < self.guidance_stop else 1

    def guidance(self) -> ClassifierFree:
        """The guidance rule."""
        from resmaster_stages.diffusion.guidance import ClassifierFree

        return ClassifierFree(self.guidance_scale, self.guidance_stop)


class MicroConditioned(Diffusion):
    """SDXL's size conditions."""

    micro_conditioning: Literal["canvas", "native"] = "canvas"
    """What SDXL is told of size and crop: the canvas and the view's place in it, or a native-size image."""


class FromNoise(Diffusion):
    """One pass, from noise or from the noised reference."""

    reads: ClassVar[tuple[Source, ...]] = ("reference",)

    init: Literal["noise", "noised_lr"] = "noise"
    """Start from pure noise (the paper) or from the noised low-res latent."""
    start: float = OnlyWith("init", "noised_lr", 0.0, ge=0, lt=1)
    """With `init: noised_lr`, the fraction of the steps that is left out at the noisy end (1 less img2img's strength):
    the higher, the closer to the low-res image."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and (what != "reference" or self.init == "noised_lr")

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """The canvas of `compose`."""
        first = None if self.init == "noise" else first_step(self.start, self.steps)
        return (from_noise(request, self.compose, first),)

    @abstractmethod
    def compose(self, request: Request) -> Composition:
        """What the pass is made of."""


class Views(LateGuidance, MicroConditioned):
    """Overlapping views of the native size."""

    stride: float = Field(default=0.5, gt=0, le=1)
    """Distance of neighbouring views, as a fraction of the window (the model's native size)."""
    fuse: Literal["uniform", "linear", "gaussian"] = "uniform"
    """Weight of a view's pixels where views overlap."""

    @property
    def view_stride(self) -> float:
        """Distance of neighbouring views, as a fraction of the window."""
        return self.stride


class MovingViews(Views, FromNoise):
    """Views that may move from step to step."""

    shift: Literal["none", "every_step"] = "none"
    """`every_step`: the whole grid of views moves from step to step, so that no border lies twice at the same place; a
    moved view takes caption and image prompt of the nearest view."""
    shift_stride: float | None = OnlyWith("shift", "every_step", None, gt=0, le=1)
    """With `shift: every_step`, the distance of neighbouring views while they move, of which there are the fewer the
    greater it is. Where there would be no fewer than at `stride` (up to 2x), they stand still. null: `stride`."""
    shift_stop: float = OnlyWith("shift", "every_step", 1.0, gt=0, le=1)
    """With `shift: every_step`, the fraction of the steps after which views stand still, at `stride`."""

    def moving(self, grid: Grid) -> Grid | None:
        """The grid that moves, where it lies at shift 0; None where none does.

        Windows that move need one more of them per axis. A stride of their own is there to have fewer: where it does
        not, none move.
        """
        if self.shift == "none":
            return None
        if self.shift_stride is None:
            return replace(grid, shift=(0, 0))
        moving = replace(grid, stride=stride_of(grid.window, self.shift_stride), shift=(0, 0))
        return moving if len(moving) < len(grid) else None

    def placed(
        self, grid: Grid, conditions: Conditions, device: torch.device
    ) -> Callable[[Step], tuple[CutViews, Conditions]]:
        """The views and their conditions at each step."""
        from resmaster_stages.diffusion.shifted_views import placed

        return placed(grid, conditions, self.fuse, device, moving=self.moving(grid), stop=self.shift_stop)

    def work(self, grid: Grid) -> Iterator[UnetWork]:
        """The views that stand still, and those that move."""
        left, moving, view = self.left(self.start), self.moving(grid), area(*grid.window_size, grid)
        moved = [index for index in left if moving and index / self.steps < self.shift_stop]
        yield UnetWork(self.rows(set(left) - set(moved)) * len(grid), view)
        if moving:
            yield UnetWork(self.rows(moved) * len(moving), view)


class TextPromptConfig(Part):
    """Enhanced text prompts: each view's own caption instead of the global prompt."""

    enabled: bool = True
    """Off: every view gets the global prompt."""


class Steered(Views):
    """Views that are held to the reference's low frequencies, each with its own caption."""

    reads: ClassVar[tuple[Source, ...]] = ("reference", "captions")

    structure: StructureConfig = StructureConfig()
    """Structural guidance."""
    text_prompt: TextPromptConfig = TextPromptConfig()
    """Enhanced text prompts."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return what in self.reads and (what != "captions" or self.text_prompt.enabled)

    def structural_guidance(self, reference: Reference) -> tuple[X0Hook, ...]:
        """The hook that swaps low frequencies, where it is on."""
        from resmaster_stages.diffusion.reference_guidance import structural_guidance

        if not self.structure.enabled:
            return ()
        return (structural_guidance(reference.latents, self.structure, reference.scale, self.steps),)
