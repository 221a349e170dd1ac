"""Groups of settings that several methods share. A method's class inherits the groups that it reads.

Each group also brings the code that its fields need: for the forecast of a method's work and for its composition. This
module does not import torch before an image is made, so that a configuration is read quickly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from resmaster_stages.config.control import ControlConfig, ControlImage
from resmaster_stages.config.method import Method, OnlyWith, Source
from resmaster_stages.config.part import Later, Operational, Part
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.config.structure import StructureConfig
from resmaster_stages.config.wrap import Axes, Wrap, wrapped_axes
from resmaster_stages.diffusion.cost import CONTROL_SHARE, UnetWork
from resmaster_stages.diffusion.views import Grid, stride_of
from resmaster_stages.methods.passes import Pass, from_noise, phase_scales, phase_sizes
from resmaster_stages.models.bases.base import FURTHER, Asked, Family, Geometry
from resmaster_stages.models.bases.unet import like_sdxl
from resmaster_stages.models.schedule import Course, Timing

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from resmaster_stages.diffusion.conditions import Conditions
    from resmaster_stages.diffusion.guidance import ClassifierFree
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, Progress, X0Hook
    from resmaster_stages.diffusion.loop import Views as CutViews
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.parts import Models
    from resmaster_stages.models.schedule import Step

NEGATIVE_PROMPT = "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"
"""The negative prompt that the papers of this family share (among them DemoFusion and FreeScale)."""


MOST_VIA = 8
"""Maximum number of intermediate scales."""


def area(height: int, width: int, grid: Grid) -> float:
    """Area of `height` x `width` latents, in units of the native area of `grid`."""
    return height * width / grid.window**2


def timing_of(time_shift: str | float, grid: Grid, cells: int) -> Timing:
    """What the path of the canvas of `grid` depends on, by the setting `time_shift`, if a view has the area `cells`."""
    if time_shift == "sqrt":
        return Timing(cells, growth=(grid.height * grid.width / cells) ** 0.5)
    return Timing(cells, shift=time_shift if isinstance(time_shift, (int, float)) else None)


def unsuited_freeu(method: Method, family: Family, geometry: Geometry, model: str) -> Iterator[str]:
    """Says it if `method` switches FreeU on for a base model that its strengths were not chosen for.

    model: the name of the base model, for the message.
    """
    if getattr(method, "freeu", False) and not like_sdxl(family, geometry):
        yield (
            f"upscale.freeu: the strengths of FreeU were chosen for SDXL, and {model} is another model, whose images "
            "it may darken and discolour; set freeu: false"
        )


def needs_of_wrap(wrap: Wrap) -> Mapping[Ability, str]:
    """The ability that a base model needs to draw low-res images that wrap, and the setting that needs it."""
    return {} if wrap == "none" else {"convolutions": "low_res.wrap"}


class Enlargement(Method):
    """A method that needs no base model."""

    in_floats: ClassVar[bool] = False
    """Whether the method has `unrounded`. Other methods compute in 8 bits."""

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
        """`image` at `height` x `width` px, RGB. `progress` is called with (parts done, parts in all)."""

    def unrounded(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Tensor:
        """As `enlarge`, before values are rounded to 8 bits: [3, height, width], float32 from 0 to 1."""
        raise NotImplementedError(f"{self.method} computes in 8 bits")


class Diffusion(Method):
    """A method that denoises with the base model, in one or several passes of the canvas engine."""

    base_model: ClassVar[bool] = True
    in_one_piece: ClassVar[bool] = False
    """Whether the base model reads the whole canvas as one view."""

    via: tuple[float, ...] = ()
    """Intermediate scales at which the image is finished, e.g. [4] for scale 8. Each intermediate image becomes the
    low-res image of the next scale, and its patches are captioned anew. At most 8."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Classifier-free guidance scale."""
    negative_prompt: str = NEGATIVE_PROMPT
    """Negative prompt for prompts without one of their own."""
    stepper: Literal["ddim_implied", "ddim_keep", "posterior", "ddim_ancestral", "dpmpp_2m", "renoise"] = "ddim_implied"
    """How z_{t-1} follows from the edited x0. `ddim_implied` and `ddim_keep` are deterministic, with the noise that the
    edited x0 implies or with the predicted noise. `posterior` is ResMaster's stochastic eq. 7. `ddim_ancestral` is DDIM
    with eta = 1. `dpmpp_2m` is DPM-Solver++(2M), which needs about half the steps. `renoise` draws all noise anew at
    every step, for few-step checkpoints of the kinds LCM and DMD2."""
    time_shift: Literal["view", "sqrt"] | Annotated[float, Field(gt=0, le=1000)] = Later("view")
    """How far the steps of a flow-matching model are moved towards more noise. `view`: as for an image of a view's
    size. `sqrt`: by the square root of the canvas's area in views more. A number: by this factor (1: not at all). Other
    models have no time shift."""
    view_batch: int | None = Operational(None, ge=1, le=10_000)
    """The most views per call of the denoiser. With guidance each view is two rows of the call, at some steps three.
    null: as many as the device's memory allows, and 16 on CPUs. Other numbers give the same image up to rounding."""

    @model_validator(mode="after")
    def _check_via(self) -> Self:
        if len(self.via) > MOST_VIA:
            raise ValueError(f"via has {len(self.via):,} scales; give at most {MOST_VIA}")
        path = (1.0, *self.via, self.scale)
        if self.via and not all(a < b for a, b in pairwise(path)):
            raise ValueError(f"via {list(self.via)}: give rising scales between 1 and the scale ({self.scale:g})")
        return self

    def way(self) -> tuple[Self, ...]:
        """The settings for each finished image on the way (`Method.way`), without `via`."""
        path = (1.0, *self.via, self.scale)
        return tuple(self.model_copy(update={"via": (), "scale": after / before}) for before, after in pairwise(path))

    def facts(self) -> dict[str, Any]:
        """The settings that reports show."""
        return {"steps": self.steps, "guidance scale": self.guidance_scale}

    def needs(self) -> Mapping[Ability, str]:
        """Ability that the base model's family must have -> the method or setting that needs it, for messages."""
        return {}

    def asked(self) -> Asked:
        """The sampling that the method asks the base model for."""
        further = tuple(name for name in FURTHER if getattr(self, name, None) is not None)
        written = frozenset(self.model_fields_set)
        return Asked("upscale", self.steps, self.guidance_scale, written, self.stepper, further)

    def timing(self, grid: Grid) -> Timing:
        """What the path of a canvas with the views of `grid` depends on: the size of a view."""
        return timing_of(self.time_shift, grid, grid.window_height * grid.window_width)

    def branches(self, done: float, course: Course) -> int:
        """The number of guidance branches of a step before which the fraction `done` of the path lies."""
        return 2 if course.guided and self.guidance_scale > 1 else 1

    def rows(self, indices: Iterable[int], course: Course) -> int:
        """Denoiser evaluations of one view over the steps `indices`."""
        return sum(self.branches(course.done[index], course) for index in indices)

    def left(self, start: float, course: Course) -> range:
        """Indices of the steps that remain when the fraction `start` of the path is left out."""
        return range(course.first(start), len(course.done))

    @abstractmethod
    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """Forecast of the denoiser's work for an image with the views of `grid`, from the settings and the model's
        course.

        A test compares the numbers with what the engine counts.
        """

    def controls(self) -> ControlImage | None:
        """The kind of control image that a ControlNet is shown. None: the method uses no ControlNet."""
        return None

    def controlled(self, request: Request, composition: Composition, height: int, width: int) -> Composition:
        """`composition` of a pass of `height` x `width` latents, with the ControlNet that the settings ask for."""
        return composition

    @abstractmethod
    def passes(self, request: Request) -> tuple[Pass, ...]:
        """The passes of the denoising loop, in order. The canvas of the last one has the requested size."""


class GuidedByBand(Diffusion):
    """Guidance with another scale for low frequencies."""

    guidance_low: float | None = Later(None, ge=1)
    """Guidance scale of low frequencies, which are those of a wavelet's low band (sym4). HiWave has 1, beside 7.5 for
    high ones. null: `guidance_scale`, as for high ones. Without guidance (`guidance_scale: 1`) it is not read."""

    def guided_by_band(self, models: Models, scale: float, stop: float = 1.0) -> ClassifierFree:
        """The guidance rule with `scale` for high frequencies, up to the fraction `stop` of the path."""
        from resmaster_stages.diffusion.guidance import ByBand, ClassifierFree
        from resmaster_stages.diffusion.wavelets import low_band

        mix, low = models.base.guide, self.guidance_low
        if not models.guided(scale):
            return ClassifierFree(1.0, stop, mix)
        if low is None or low == scale:
            return ClassifierFree(scale, stop, mix)
        return ByBand(scale, stop, mix, low, partial(low_band, wavelet="sym4"))


class LateGuidance(GuidedByBand):
    """Guidance that may end before the last step."""

    guidance_stop: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the steps after which guidance ends. From there on, a view is evaluated once per step instead of
    twice."""

    def branches(self, done: float, course: Course) -> int:
        """The number of guidance branches of a step before which the fraction `done` of the path lies."""
        return super().branches(done, course) if done < self.guidance_stop else 1

    def guidance(self, models: Models) -> ClassifierFree:
        """The guidance rule: without an unconditional branch if the model has none."""
        return self.guided_by_band(models, self.guidance_scale, self.guidance_stop)


class Wrapping(Diffusion):
    """Images that continue at the opposite border."""

    wrap: Wrap = Later("none")
    """Makes an image that continues at the opposite border: `horizontal` (its right border at its left one, for
    panoramas), `vertical`, or `both` (textures). A low-res image that is followed must continue there, too:
    `low_res.wrap`."""

    @property
    def wraps(self) -> Axes:
        """Whether the image continues at the opposite border, along its height and along its width."""
        return wrapped_axes(self.wrap)


class MicroConditioned(Diffusion):
    """SDXL's conditions of size and crop."""

    micro_conditioning: Literal["canvas", "native"] = "canvas"
    """SDXL's conditions of size and crop. `canvas`: the size of the canvas and the view's place in it. `native`: those
    of a native-size image, in the shape of the canvas where it is drawn whole. PixArt-alpha at 1024 px reads the size
    alone."""


Way = Literal["image", "latent", "mixed", "network"]
"""How the low-res image becomes latents of the target's size."""


class Following(Diffusion):
    """A method that follows the latents of the low-res image."""

    own_way: ClassVar[Literal["image", "latent", "mixed"]] = "image"
    """How the method's authors enlarge the low-res image."""

    reference: ReferenceConfig = Later(ReferenceConfig())
    """How the low-res image becomes latents of the target's size."""

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference != ReferenceConfig() and not self.uses("reference"):
            raise ValueError("reference is set, but is read only with init: noised_lr; set that too, or drop reference")
        if self.reference.adds_noise and not self.begins_from_reference():
            raise ValueError("reference.edge_noise is read only with init: noised_lr; set that too, or drop edge_noise")
        if any(self.wraps) and (self.enlargement() == "network" or self.reference.adds_noise):
            raise ValueError(
                "reference.enlarge: network and reference.edge_noise do not continue at the opposite border; drop "
                "them, or wrap"
            )
        return self

    def begins_from_reference(self) -> bool:
        """Whether the first pass begins from the noised latents of the low-res image."""
        return True

    def enlargement(self) -> Way:
        """How the low-res image is enlarged."""
        return self.own_way if self.reference.enlarge == "own" else self.reference.enlarge

    def weights(self) -> str | None:
        """The identity of the weights of the network that enlarges latents; None if none does."""
        from resmaster_stages.models.identity import latent_network, network_identity

        return network_identity(latent_network(self.reference)) if self.enlargement() == "network" else None

    def networks(self) -> tuple[tuple[str, str, str | None], ...]:
        """The network that enlarges latents, if one does."""
        model = self.reference.model if self.enlargement() == "network" else None
        return (("network that enlarges latents", model, self.reference.revision),) if model else ()


class InPhases(Diffusion):
    """An image that grows in phases, from the low-res size to the target."""

    phases: Literal["doubling", "every", "last"] = "doubling"
    """Sizes on the way to the target. `doubling`: 2, 4, ... times the low-res size (the papers). `every`: 2, 3, 4, ...
    `last`: the target at once."""

    def canvases(self, grid: Grid) -> tuple[tuple[float, int, int], ...]:
        """(scale, rows, columns) of each phase on the way to the canvas of `grid`."""
        scales = phase_scales(self.scale, self.phases, refine=False)
        return phase_sizes(grid.height, grid.width, scales, grid.multiple)


class FromNoise(Following):
    """One pass that starts from noise or from the noised reference."""

    reads: ClassVar[tuple[Source, ...]] = ("reference",)

    init: Literal["noise", "noised_lr"] = "noise"
    """`noise`: start from pure noise (the paper). `noised_lr`: start from the latents of the enlarged low-res image,
    noised."""
    start: float = OnlyWith("init", "noised_lr", 0.0, ge=0, lt=1)
    """With `init: noised_lr`, the fraction of the steps that is left out at the noisy end (1 - strength in img2img). A
    higher value keeps the result closer to the low-res image."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and (what != "reference" or self.init == "noised_lr")

    def begins_from_reference(self) -> bool:
        """Whether the pass begins from the noised latents of the low-res image."""
        return self.init == "noised_lr"

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass with the composition that `compose` gives."""
        first = None if self.init == "noise" else request.course.first(self.start)
        return (from_noise(request, self.compose, first),)

    @abstractmethod
    def compose(self, request: Request) -> Composition:
        """The composition of the pass."""


Fuse = Literal["uniform", "linear", "gaussian", "narrow", "cosine", "feather"]
"""Weight of a view's pixels where views overlap."""


class Views(LateGuidance, MicroConditioned):
    """Overlapping views of the native size."""

    stride: float = Field(default=0.5, gt=0, le=1)
    """Distance of neighbouring views, as a fraction of the window (the model's native size)."""
    fuse: Fuse = "uniform"
    """Weight of a view's pixels where views overlap. `uniform`: all alike. `linear`: ramps over the overlap.
    `gaussian`: a bell with a standard deviation of a quarter of the view. `narrow`: a tenth (Mixture of Diffusers).
    `cosine`: half a wave. `feather`: blurred borders (PixelRush)."""
    control: ControlConfig = Later(ControlConfig())
    """A ControlNet, which reads each view's own crop of a control image."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        if what == "control":
            return self.control.acting
        return super().uses(what) or (what == "reference" and self.control.acting)

    def needs(self) -> Mapping[Ability, str]:
        """A ControlNet needs a UNet."""
        return {"control": "upscale.control.enabled"} if self.control.acting else {}

    def controls(self) -> ControlImage | None:
        """The kind of control image that a ControlNet is shown. None: the ControlNet is off."""
        return self.control.image if self.control.acting else None

    def controlled(self, request: Request, composition: Composition, height: int, width: int) -> Composition:
        """`composition` of a pass of `height` x `width` latents, with the ControlNet if it is on."""
        if not self.control.acting:
            return composition
        from resmaster_stages.diffusion.control import Control

        factor = request.models.geometry.latent_factor
        image = request.control_image(self.control.image, height * factor, width * factor)
        return Control(request.models, image, self.control).applied(composition)

    def views_work(self, steps: Sequence[int], views: int, size: float, course: Course) -> Iterator[UnetWork]:
        """Forecast of `views` views at each of the steps with the indices `steps`, and of the ControlNet where it acts.

        size: area of a view, in units of the native area.
        """
        yield UnetWork(self.rows(steps, course) * views, size)
        acting = [index for index in steps if self.control.weight(course.done[index])]
        if acting:
            yield UnetWork(self.rows(acting, course) * views, size, CONTROL_SHARE)

    @property
    def view_stride(self) -> float:
        """Distance of neighbouring views, as a fraction of the window."""
        return self.stride


class MovingViews(Views, FromNoise, Wrapping):
    """Views that can move from step to step."""

    shift: Literal["none", "every_step"] = "none"
    """`every_step`: the whole grid of views moves from step to step, so that no border lies twice at the same place. A
    moved view has the caption and image prompt of the nearest view."""
    shift_stride: float | None = OnlyWith("shift", "every_step", None, gt=0, le=1)
    """With `shift: every_step`, the distance of neighbouring views while they move, as a fraction of the window. A
    greater distance needs fewer views. If it does not give fewer views than `stride` (up to 2x), the views stand still.
    null: `stride`."""
    shift_stop: float = OnlyWith("shift", "every_step", 1.0, gt=0, le=1)
    """With `shift: every_step`, the fraction of the steps after which the views stand still, at distance `stride`."""

    def moving(self, grid: Grid) -> Grid | None:
        """The moving grid at shift 0. None if the views stand still.

        Moving views need one more view per axis that does not wrap. The purpose of `shift_stride` is to need fewer
        views, so nothing moves where it does not.
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

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The views of the steps in which they stand still, and of the steps in which they move."""
        left, moving, view = self.left(self.start, course), self.moving(grid), area(*grid.window_size, grid)
        moved = [index for index in left if moving and course.done[index] < self.shift_stop]
        still = sorted(set(left) - set(moved))
        yield from self.views_work(still, len(grid), view, course)
        if moving:
            yield from self.views_work(moved, len(moving), view, course)


class TextPromptConfig(Part):
    """Enhanced text prompts: each view's own caption instead of the global prompt."""

    enabled: bool = True
    """Off: every view gets the global prompt."""


class Steered(Views, Following):
    """Views that follow the reference's low frequencies, each with its own caption."""

    reads: ClassVar[tuple[Source, ...]] = ("reference", "captions")

    structure: StructureConfig = StructureConfig()
    """Structural guidance."""
    text_prompt: TextPromptConfig = TextPromptConfig()
    """Enhanced text prompts."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        if what == "control":
            return super().uses(what)
        return what in self.reads and (what != "captions" or self.text_prompt.enabled)

    def structural_guidance(
        self,
        request: Request,
        noise: CanvasNoise,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[X0Hook, ...]:
        """The hook that swaps low frequencies, or none if structural guidance is off.

        noise: of the pass. It is drawn from if the low-res image is predicted at every step. within: a context for
        these predictions.
        """
        from resmaster_stages.diffusion.reference_guidance import structural_guidance

        if not self.structure.enabled:
            return ()
        anchor = self._anchor(request, noise, within)
        scale = request.required_reference().scale
        return (structural_guidance(anchor, self.structure, scale, request.course.done, self.wraps),)

    def _anchor(
        self, request: Request, noise: CanvasNoise, within: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[Step], Tensor]:
        """The latents [B, C, H, W] whose low frequencies a step takes."""
        from resmaster_stages.methods.small_image import time_matched

        reference = request.required_reference()
        if self.structure.anchor == "time_matched":
            draw = noise.resized(*reference.small_latents.shape[-2:])()
            return time_matched(request, draw, self.guidance(request.models), within)
        latents = request.followed
        return lambda step: latents

    def anchor_work(self, steps: Iterable[int], grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The predictions of the low-res image that structural guidance takes over the steps with the indices
        `steps`."""
        if self.structure.anchor == "time_matched":
            acting = [index for index in steps if self.structure.acts(course.done[index])]
            yield UnetWork(self.rows(acting, course), self.small_area(grid))

    def small_area(self, grid: Grid) -> float:
        """Area of the low-res image (`Reference.small`) of a canvas with the views of `grid`, in units of the native
        area."""
        height, width = (
            max(1, round(side / grid.multiple / self.scale)) * grid.multiple for side in (grid.height, grid.width)
        )
        return area(height, width, grid)
