"""The request to a method: the size of the canvas, the prompts and, in most cases, a reference to follow.

Invariants:
- A batch has one prompt, one negative prompt and one seed per sample, and one size for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from resmaster_stages.config.control import ControlImage
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.conditions import Conditions, make_conditions
from resmaster_stages.diffusion.edges import canny, edge_density
from resmaster_stages.diffusion.memory import view_limit
from resmaster_stages.diffusion.reference import enlarged, resized
from resmaster_stages.diffusion.views import Grid, canvas_size, view_grid, whole_canvas
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.settings import Diffusion, Following, Way
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Course, Step, course_of

if TYPE_CHECKING:
    from resmaster_stages.diffusion.loop import CanvasNoise


@dataclass(frozen=True, eq=False)
class Reference:
    """The enlarged low-res images B^L, and tensors that are derived from them once."""

    models: Models
    pixels: Tensor  # [B, 3, H, W] in [-1, 1], sides padded to multiples of `Geometry.step_px`
    scale: float
    low_res: Tensor
    """The low-res images themselves: [B, 3, h, w] in [-1, 1], of any size."""
    wraps: Axes = (False, False)
    """Whether the images continue at the opposite border, along their height and along their width."""
    given: Tensor | None = None
    """The latents of `low_res` [B, C, h/f, w/f], if a caller has them."""

    @cached_property
    def latents(self) -> Tensor:
        """`pixels`, encoded: [B, C, H/f, W/f], float32."""
        return autoencoder.encode(self.models, self.pixels, self.wraps)

    @cached_property
    def small(self) -> Tensor:
        """The low-res images at a size whose enlargement by `scale` is about that of `pixels`: [B, 3, ~h, ~w], sides
        multiples of `Geometry.step_px`.

        If the sizes fit exactly, these are `low_res`. Otherwise they are `pixels`, which include the padding, reduced.
        """
        factor = self.models.geometry.step_px
        height, width = (max(1, round(side / factor / self.scale)) * factor for side in self.pixels.shape[-2:])
        exact = all(side == low * self.scale for side, low in zip(self.pixels.shape[-2:], self.low_res.shape[-2:]))
        if exact and self.low_res.shape[-2:] == (height, width):
            return self.low_res
        return resized(self.pixels, height, width, wraps=self.wraps, antialias=True).clamp(-1, 1)

    @cached_property
    def small_latents(self) -> Tensor:
        """`small`, encoded: [B, C, ~h/f, ~w/f], float32. The latents that were given, if they are those of `small`."""
        if self.given is not None and self.small is self.low_res:
            return self.given
        return autoencoder.encode(self.models, self.small, self.wraps)


@dataclass(frozen=True, eq=False)
class Request:
    """One batch of images to be made by one method."""

    models: Models
    config: Diffusion
    height: int
    """Height of the images, in px."""
    width: int
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...] | None = None
    """Captions by sample and view, views in row-major order. None: every view has the sample's prompt."""
    image_prompts: tuple[Tensor, ...] | None = None
    """Images [1, 3, h, w] in [-1, 1] of any sizes, one per view of each sample. None: each view's crop of the
    reference."""
    reference: Reference | None = None
    """None when there is nothing to follow, as when the low-res images themselves are generated."""
    detail: Tensor | None = None
    """Mask [B or 1, 1, h, w] of any size, from 0 to 1. Where it is 1, more detail is drawn anew."""

    @cached_property
    def path(self) -> tuple[Step, ...]:
        """The steps of the noise schedule. Raises ConfigError for a schedule that is not supported."""
        return self.models.base.path(self.config.steps, self.config.timing(self.views()))

    @cached_property
    def course(self) -> Course:
        """The course of `path`."""
        return course_of(self.path, self.models.guided(self.config.guidance_scale))

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) of the canvas, in latents."""
        return canvas_size(self.models.geometry, self.height, self.width)

    @cached_property
    def view_limit(self) -> int:
        """The most views per UNet call."""
        grid = self.views()
        branches = self.models.branches(self.config.guidance_scale)
        return view_limit(self.models, self.config.view_batch, grid.window_size, branches)

    def required_reference(self) -> Reference:
        """The reference. Raises ConfigError if there is none."""
        if self.reference is None:
            raise ConfigError(
                f"method {self.config.method} follows a low-res image; to generate without one, use method direct"
            )
        return self.reference

    def image_before(self, previous: Tensor | None) -> Tensor:
        """The images that a pass enlarges, [B, 3, h, w] in [-1, 1]: those of the clean latents `previous` of the pass
        before, or the low-res images if there was none. Raises ConfigError if there are no low-res images."""
        if previous is None:
            return self.required_reference().small
        return autoencoder.decode(self.models, previous).clamp(-1, 1)

    @cached_property
    def followed(self) -> Tensor:
        """The latents of the low-res images at the size of the canvas [B, C, H, W], enlarged as the method's settings
        say.

        Raises ConfigError if there are no low-res images, or if the network cannot be used.
        """
        assert isinstance(self.config, Following)
        reference = self.required_reference()
        way = self.config.enlargement()
        if way == "image":
            return reference.latents
        return self._enlarged(reference.small_latents, *self.canvas_size, way)

    def _enlarged(self, small: Tensor, height: int, width: int, way: Way) -> Tensor:
        """Latents [B, C, h, w] at `height` x `width`: by the network, or bicubically."""
        assert isinstance(self.config, Following)
        if way == "network":
            from resmaster_stages.models.latent_enlarger_files import enlarge_latents

            return enlarge_latents(self.models, small, height, width, self.config.reference)
        return resized(small, height, width, wraps=self.config.wraps)

    def latents_before(self, previous: Tensor | None, height: int, width: int, way: Way | None = None) -> Tensor:
        """The latents that a pass of `height` x `width` latents begins from: those of the clean latents `previous` of
        the pass before, or of the low-res images if there was none, enlarged.

        way: as the method's settings say if None. Raises ConfigError if there are no low-res images, or if the network
        cannot be used.
        """
        assert isinstance(self.config, Following)
        reference, way = self.required_reference(), way or self.config.enlargement()
        if way == "image":
            factor = self.models.geometry.latent_factor
            large = enlarged(self.image_before(previous), height * factor, width * factor)
            return autoencoder.encode(self.models, large)
        small = reference.small_latents if previous is None else previous
        return self._enlarged(small, height, width, way)

    def roughened(self, latents: Tensor, noise: CanvasNoise) -> Tensor:
        """`latents` [B, C, H, W] that a pass begins from, with noise where the low-res images have edges, if the
        settings ask for it. The noise is drawn after the pass's own, which stays the same."""
        assert isinstance(self.config, Following)
        low, high = self.config.reference.edge_noise
        if high == 0:
            return latents
        density = edge_density(self.required_reference().small, *latents.shape[-2:]).to(latents.device)
        return latents + (low + (high - low) * density) * noise()

    def control_image(self, kind: ControlImage, height: int, width: int) -> Tensor:
        """What a ControlNet is shown on a canvas of `height` x `width` px: [B, 3, height, width] in [0, 1].

        tile: the low-res images, enlarged. canny: their edges, enlarged in the same way.
        """
        reference = self.required_reference()
        if kind == "canny":
            shown = canny(reference.small).expand(-1, 3, -1, -1) * 2 - 1
        else:
            whole = reference.pixels.shape[-2:] == (height, width)
            shown = reference.pixels if whole else reference.small
        return (shown if shown.shape[-2:] == (height, width) else enlarged(shown, height, width)) / 2 + 0.5

    def views(self) -> Grid:
        """The grid of native-size views."""
        return view_grid(self.models.geometry, self.height, self.width, self.config.view_stride, self.config.wraps)

    def canvas(self) -> Grid:
        """The grid whose only view is the whole canvas."""
        return whole_canvas(self.models.geometry, self.height, self.width)

    def sized(self, rows: int, cols: int) -> Request:
        """The same request for a canvas of `rows` x `cols` latents."""
        factor = self.models.geometry.latent_factor
        return replace(self, height=rows * factor, width=cols * factor)

    def view_conditions(self, micro_conditioning: str, image: tuple[Tensor, Tensor] | None = None) -> Conditions:
        """The conditions of all views: each has its caption or, without captions, the prompt of its sample.

        image: as `make_conditions` takes it.
        """
        grid = self.views()
        return make_conditions(
            self.models,
            grid,
            self.view_texts(grid),
            self.per_view(self.negative_prompts, grid),
            guidance_scale=self.config.guidance_scale,
            micro_conditioning=micro_conditioning,
            image=image,
        )

    def view_texts(self, grid: Grid) -> list[str]:
        """Each view's caption or, without captions, the prompt of its sample."""
        if self.captions is None:
            return self.per_view(self.prompts, grid)
        return [caption for captions in self.captions for caption in captions]

    def per_view(self, texts: tuple[str, ...], grid: Grid) -> list[str]:
        """`texts` (one per sample), repeated for each view of the sample."""
        return [text for text in texts for _ in range(len(grid))]
