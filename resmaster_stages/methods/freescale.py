"""FreeScale (Qiu et al., ICCV 2025): a cascade of whole-canvas passes, each from the enlarged image of the one before.

Each pass decodes, enlarges in RGB, encodes, adds noise up to step 15 of 50 and denoises from there, with
- restrained dilation: nine deep convolutions on the way down are dilated by the canvas's scale, until step 35;
- scale fusion: every self-attention takes its coarse part from windows of the native size (`scale_fusion`);
- detail control: every noisy latent is pulled to that of the enlarged image, by cosine ** `alpha`.

From the authors:
- all of the above, and `fusion: fast`, which is their fast mode;
- preset `faithful`: FreeU; windows that see zero tokens beyond the canvas; a blur that also mixes neighbouring feature
  channels, as their kernel does although their paper does not say so. Preset `default` has none of these three, which
  is our choice;
- detail control by region (`alpha_elsewhere` and a mask of the image). The user provides the mask.

Different from the authors in both presets:
- Images between two passes are clamped to [-1, 1], decoded and encoded in blended tiles, and encoded to the mode
  instead of a sample.
- Convolutions are dilated by the longer side over the native size. Theirs take the width, so theirs dilate tall images
  less.
- Windows are square also if the image is not square. Their places are drawn once per step and level instead of once per
  layer.
- In the fast mode, sides need not be multiples of the native size, nor the image square.

Ours: `fusion: neighbourhood`, which takes ScaleDiff's attention (`diffusion.neighbourhood`) instead of scale fusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import Source, register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import Following, InPhases, LateGuidance, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.convolutions import Dilated, LayerRule
    from resmaster_stages.diffusion.guidance import Branch
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, Patch
    from resmaster_stages.methods.passes import Begin
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step


@register
class FreeScale(LateGuidance, Following, InPhases):
    """A cascade of whole canvases: faster than DemoFusion, with more memory."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "faithful": {"stepper": "ddim_keep", "blur": "features", "jitter": "zeros", "freeu": True},
    }
    reads: ClassVar[tuple[Source, ...]] = ("reference", "detail_mask")
    with_detail_mask: ClassVar[Mapping[str, Any]] = {"alpha": 3, "alpha_elsewhere": 0.5}

    method: Literal["freescale"] = "freescale"
    start: float = Field(default=0.3, ge=0, lt=1)
    """Fraction of the steps that each pass leaves out at the noisy end. A higher value keeps the result closer to the
    low-res image."""
    alpha: float = Field(default=2.0, ge=0)
    """Decay of the pull towards the enlarged image. A lower value keeps the result closer to it. The authors use 2, and
    1 at 8x."""
    alpha_elsewhere: float | None = Field(default=None, ge=0)
    """With a detail mask (column `detail_mask` of the prompts, `a.detail_mask.png` beside your image `a.png`, or
    `resmaster upscale --detail-mask`): the decay where the mask is black. Where the mask is white, the decay is
    `alpha`. Samples without a mask have `alpha` everywhere. The authors use `alpha` 3 and 0.5 elsewhere."""
    dilate_until: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the steps with dilated convolutions."""
    fusion: Literal[True, False, "fast", "neighbourhood"] = True
    """Scale fusion. `false`: none, which takes about a quarter less time (by the authors' times), but objects may
    repeat. `fast`: global attention is among every n-th token of the canvas, in n x n parts at n times the native size
    (the authors' fast mode). `neighbourhood`: instead of scale fusion, each place attends to the native-size window
    around it alone, as in ScaleDiff (ours)."""
    blur: Literal["canvas", "features"] = "canvas"
    """The blur that separates coarse from fine. `canvas`: over the canvas (the paper). `features`: over the feature
    channels too (the authors' code)."""
    jitter: Literal["clamped", "zeros", "off"] = "clamped"
    """Random shifts of attention windows. `clamped`: inside the canvas. `zeros`: also beyond its border, where windows
    see zeros (the authors). `off`: no shifts. With `fusion: neighbourhood`, only `off` differs from the others."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and (what != "detail_mask" or self.alpha_elsewhere is not None)

    def needs(self) -> Mapping[Ability, str]:
        """Convolutions are dilated, and scales are fused in self-attention."""
        return {"convolutions": "method freescale", "attention": "method freescale"}

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas of every pass."""
        for _, height, width in self.canvases(grid):
            yield UnetWork(self.rows(self.left(self.start, course), course), area(height, width, grid))

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass per size, each of which starts in the middle of the path."""
        request.required_reference()
        first = request.course.first(self.start)
        return tuple(
            Pass(rows, cols, self.beginning(request, scale, rows, cols), first)
            for scale, rows, cols in self.canvases(request.views())
        )

    def beginning(self, request: Request, scale: float, rows: int, cols: int) -> Begin:
        """The start of the pass of `rows` x `cols` latents: the image of the pass before, enlarged and noised."""
        here = request.sized(rows, cols)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            draw = noise()
            x0 = request.roughened(request.latents_before(previous, rows, cols), noise)
            return step.noised(x0, draw), self.compose(here, scale, x0, noise, draw)

        return begin

    def compose(self, request: Request, scale: float, x0: Tensor, noise: CanvasNoise, draw: Tensor) -> Composition:
        """The pass at `scale` times the low-res size, which is pulled to `x0` [B, C, h, w] noised by `draw`."""
        from resmaster_stages.diffusion.convolutions import changed_layers
        from resmaster_stages.diffusion.reference_guidance import skip_residual

        models, reference = request.models, request.required_reference()
        factor = max(1, max(request.height, request.width) // models.geometry.native_px)
        rules = layer_rules(models.base.denoiser, factor, round(self.dilate_until * self.steps))
        patches: tuple[Patch, ...] = (partial(changed_layers, rules=rules), *self._attention(request, scale, noise))
        return whole_canvas_composition(
            request,
            self.guidance(request.models),
            latent_hooks=(skip_residual(x0, draw, detail_control(request, self, *request.canvas_size)),),
            patches=patches,
            freeu=self.freeu,
            size=reference.small.shape[-2:],
        )

    def _attention(self, request: Request, scale: float, noise: CanvasNoise) -> tuple[Patch, ...]:
        """The patch that changes self-attention, or none."""
        from resmaster_stages.diffusion.neighbourhood import Tiles, neighbourhood
        from resmaster_stages.diffusion.scale_fusion import Fusion, Windows, scale_fusion

        canvas, geometry = request.canvas_size, request.models.geometry
        if not self.fusion:
            return ()
        if self.fusion == "neighbourhood":
            return (partial(neighbourhood, tiles=Tiles(*canvas, geometry.native, self.jitter != "off")),)
        windows = Windows(*canvas, geometry.native, self.jitter, noise.generators)
        down, across = (max(1, side // geometry.native) if self.fusion == "fast" else 1 for side in canvas)
        fusion = Fusion(windows, max(1, round(scale)) - 1, self.blur == "features", (down, across))
        return (partial(scale_fusion, fusion=fusion),)


DILATED = ("down_blocks.-2.downsamplers", "down_blocks.-1.resnets", "mid_block.resnets")


def layer_rules(unet: object, factor: int, until: int) -> dict[str, LayerRule]:
    """Rules that dilate the nine convolutions by `factor` before step `until`."""
    from resmaster_stages.diffusion.convolutions import PLAIN, Dilated
    from resmaster_stages.diffusion.patches import chosen_layers

    def rule(index: int, branch: Branch) -> Dilated:
        return Dilated(float(factor)) if index < until else PLAIN

    if factor == 1:
        return {}
    return dict.fromkeys(chosen_layers(unet, dict.fromkeys(DILATED, float(factor)), "freescale"), rule)


def detail_control(request: Request, settings: FreeScale, height: int, width: int) -> float | Tensor:
    """Exponent of the pull to the enlarged image: one number, or with a mask one per place [B or 1, 1, height,
    width]."""
    import torch.nn.functional as F

    if request.detail is None or settings.alpha_elsewhere is None:
        return settings.alpha
    mask = F.interpolate(request.detail, (height, width), mode="bilinear", align_corners=False, antialias=True)
    mask = mask.to(request.models.device)
    return settings.alpha_elsewhere + (settings.alpha - settings.alpha_elsewhere) * mask
