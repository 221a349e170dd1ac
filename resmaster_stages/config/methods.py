"""Upscaling methods as a user writes them: the settings of each, and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from resmaster_stages.config.part import Operational, Part, offer_preset
from resmaster_stages.errors import ConfigError

DIFFUSION_METHODS = (
    "direct",
    "multidiffusion",
    "resmaster",
    "demofusion",
    "scalecrafter",
    "fouriscale",
    "freescale",
    "c_upscale",
)
"""Methods that denoise with the base model."""


METHODS = (*DIFFUSION_METHODS, "super_resolution", "lanczos")
"""Upscaling methods; each is one file in `resmaster_stages/methods`."""


DEMOFUSION_NEGATIVE_PROMPT = "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"
"""The negative prompt that the papers of this family share (methods: DemoFusion, FreeScale)."""


STRUCTURE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0},
    "paper_decay": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 1.0, "weight": "linear_decay"},
    "paper_early": {"cutoff": 0.8, "cutoff_units": "hr_nyquist", "stop": 0.6},
    "lr_nyquist": {"cutoff": 0.8, "cutoff_units": "lr_nyquist", "stop": 1.0},
}
"""Readings of the paper's cutoff (`structure: {preset: paper}`); explicit fields beside a preset win. The default is
`paper_early`, by measurement (docs/evaluation.md)."""


class StructureConfig(Part):
    """Structural guidance (ResMaster eq. 5 to 7): low frequencies of each predicted x0 come from the low-res reference."""

    model_config = ConfigDict(
        json_schema_extra=offer_preset(STRUCTURE_PRESETS, "A reading of the paper's cutoff; other fields win.")
    )

    enabled: bool = True
    """Off: the paper's ablation without structural guidance."""
    cutoff: float = Field(default=0.8, gt=0)
    """Standard deviation of the Gaussian low-pass filter, in `cutoff_units`. The paper says 0.8."""
    cutoff_units: Literal["lr_nyquist", "hr_nyquist"] = "hr_nyquist"
    """Nyquist frequency of the low-res reference (the same picture at any scale) or of the canvas (the paper's literal wording)."""
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the steps after which the swap begins."""
    stop: float = Field(default=0.6, ge=0, le=1)
    """Fraction of the steps after which the swap ends: the last ones, left free, draw the detail."""
    weight: Literal["constant", "linear_decay"] = "constant"
    """`linear_decay`: the swap fades from 1 to 0 over its steps."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and "preset" in values:
            preset = values["preset"]
            if preset not in STRUCTURE_PRESETS:
                raise ValueError(f"unknown preset {preset!r}; known: {', '.join(STRUCTURE_PRESETS)}")
            rest = {key: value for key, value in values.items() if key != "preset"}
            return {**STRUCTURE_PRESETS[preset], **rest}
        return values

    @model_validator(mode="after")
    def _check_range(self) -> StructureConfig:
        if self.stop <= self.start:
            raise ValueError(f"stop ({self.stop}) must be greater than start ({self.start})")
        return self


class ImagePromptConfig(Part):
    """Tailored image prompts (ResMaster eq. 8): each view's own crop of the reference through the IP-Adapter."""

    enabled: bool = True
    """Off: the paper's ablation without image prompts."""
    scale: float = Field(default=0.8, ge=0, le=2)
    """Weight of the image cross-attention (the paper's lambda)."""


class TextPromptConfig(Part):
    """Enhanced text prompts: each view's own caption instead of the global prompt."""

    enabled: bool = True
    """Off: every view gets the global prompt."""


class DemoFusionConfig(Part):
    """What only method `demofusion` reads."""

    phases: Literal["every", "doubling", "last"] = "every"
    """Sizes on the way to the target: 2, 3, 4, ... times the low-res size (the paper), 2, 4, ..., or the target at once."""
    refine: bool = False
    """A first phase at the low-res size: what the authors' code does with a user's own image."""
    start: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of each phase's steps that is left out at its noisy end. The authors leave out none."""
    cosine_scale_1: float = Field(default=3.0, ge=0)
    """Decay of the skip residual: the greater, the sooner a phase is on its own."""
    cosine_scale_2: float = Field(default=1.0, ge=0)
    """Decay of the dilated views' share of the prediction."""
    cosine_scale_3: float = Field(default=1.0, ge=0)
    """Decay of the blur before dilated views are cut."""
    sigma: float = Field(default=0.8, gt=0)
    """Standard deviation of that blur at the start, in latents."""
    jitter: Literal["clamped", "zeros", "off"] = "clamped"
    """Random shifts of local views: inside the canvas; beyond its border, where they see zeros (the authors); or none."""


class ScaleCrafterConfig(Part):
    """What only method `scalecrafter` reads. None: what the authors published for the canvas's size."""

    dilate_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps with dilated convolutions (the paper's tau; SDXL: 0.6, from 3x on 0.7)."""
    progressive: bool | None = None
    """Whether the dilation falls step by step (from 3x on)."""
    damped_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps with noise-damped guidance (0, from 3x on 0.7)."""
    down: bool = True
    """Below 3x: dilate the deepest down block too. The authors' list misses it on SDXL."""
    dispersed: bool = False
    """Dispersed convolution: the deepest layers reach as far by denser kernels of 5 x 5. The authors describe it; none of
    their published runs switches it on."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""


class FouriScaleConfig(Part):
    """What only method `fouriscale` reads."""

    full_until: float = Field(default=0.4, ge=0, le=1)
    """Fraction of the steps with full dilation."""
    until: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the steps at which the dilation has fallen to none."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """What the filter leaves of the highest frequencies. None, as the authors: 0.6 for SDXL, 0 for its predecessors."""
    amplification: float = Field(default=1.0, ge=1)
    """Times the guidance scale while dilation is full; the authors offer 2.4 against blurred results."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""

    @model_validator(mode="after")
    def _check_order(self) -> FouriScaleConfig:
        if self.until < self.full_until:
            raise ValueError(f"until ({self.until}) must not be less than full_until ({self.full_until})")
        return self


class FreeScaleConfig(Part):
    """What only method `freescale` reads."""

    phases: Literal["doubling", "every", "last"] = "doubling"
    """Sizes on the way to the target: 2, 4, ... times the low-res size (the paper), 2, 3, 4, ..., or the target at once."""
    start: float = Field(default=0.3, ge=0, lt=1)
    """Fraction of the steps that each stage leaves out at the noisy end: the higher, the closer to the low-res picture."""
    alpha: float = Field(default=2.0, ge=0)
    """Decay of the pull towards the enlarged picture: the lower, the closer. The authors: 2, at 8x 1."""
    alpha_elsewhere: float | None = Field(default=None, ge=0)
    """With a detail mask (column `detail_mask` of the prompts, `a.detail_mask.png` beside your image `a.png`, or `resmaster upscale
    --detail-mask`): the decay where the mask is black, and `alpha` where it is white; samples without a mask have `alpha`
    everywhere. The authors: alpha 3, elsewhere 0.5."""
    dilate_until: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the steps with dilated convolutions."""
    fusion: bool = True
    """Scale fusion. Off: about a quarter cheaper by the authors' times; objects may repeat."""
    blur: Literal["canvas", "features"] = "canvas"
    """What separates coarse from fine: a blur over the canvas (the paper), or also over feature channels (the authors' code)."""
    jitter: Literal["clamped", "zeros", "off"] = "clamped"
    """Random shifts of attention windows: inside the canvas; beyond its border, where they see zeros (the authors); or none."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""


class CUpscaleConfig(Part):
    """What only method `c_upscale` reads, besides `structure` and `text_prompt`."""

    start: float = Field(default=0.55, ge=0, lt=1)
    """Fraction of the steps that is left out at the noisy end: the higher, the closer to the low-res picture."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Share of the global prompt, as the whole picture attends to it, beside each view's caption; 0: no composer."""


class SuperResolutionConfig(Part):
    """What only method `super_resolution` reads; it reads nothing else but `scale`."""

    model: str = "picturebook"
    """The network: `picturebook` (the embedded pack's, for its own world), a file of weights such as BSRGAN.safetensors or
    BSRGAN.pth, or a hub id together with `weight_name`."""
    weight_name: str | None = None
    """File of the weights at the hub."""
    revision: str | None = None
    """Commit or tag at the hub."""
    allow_pickle: bool = Operational(False)
    """Read a .pth file: its tensors alone, no code runs."""
    tile: int = Field(default=256, ge=16)
    """Edge in px of the tiles of the low-res picture that go through the network, halo included. Lower it if memory runs out."""
    halo: int = Field(default=16, ge=0)
    """Border in px of each tile that only its neighbours see: 16 leaves differences of a level of 255."""

    @model_validator(mode="after")
    def _check_tile(self) -> SuperResolutionConfig:
        if self.tile <= 2 * self.halo:
            raise ValueError(f"tile ({self.tile}) must be greater than two halos ({2 * self.halo})")
        return self

    @model_validator(mode="after")
    def _check_file(self) -> SuperResolutionConfig:
        if self.model == "picturebook":
            return self
        name = self.weight_name or self.model
        if not name.endswith(".safetensors") and not self.allow_pickle:
            raise ValueError(
                f"{name} is not a .safetensors file; choose one that is, or set allow_pickle: true for a .pth file that you "
                "trust (its tensors alone are read)"
            )
        return self


METHOD_PARTS: dict[str, type[Part]] = {
    "demofusion": DemoFusionConfig,
    "scalecrafter": ScaleCrafterConfig,
    "fouriscale": FouriScaleConfig,
    "freescale": FreeScaleConfig,
    "c_upscale": CUpscaleConfig,
    "super_resolution": SuperResolutionConfig,
}
"""Methods with a part of their own in `UpscaleConfig`, of the method's name: no other method reads it."""


SHARED_PARTS: dict[str, tuple[str, ...]] = {
    "structure": ("resmaster", "c_upscale"),
    "text_prompt": ("resmaster", "c_upscale"),
    "image_prompt": ("resmaster",),
}
"""Parts of `UpscaleConfig` that some methods read, and which."""


FEWER_ROWS: dict[str, Any] = {
    "stepper": "dpmpp_2m",
    "steps": 25,
    "guidance_stop": 0.7,
    "init": "noised_lr",
    "start": 0.3,
    "shift": "every_step",
    "shift_stride": 1.0,
    "fuse": "linear",
    "shift_stop": 0.78,
}
"""Half the steps by a solver of second order; the last 30 % of them without guidance; none of the first 30 %, where a picture
becomes the reference anyway; on views that move without overlapping, but in the last five of 25 steps overlap, feathered, and stand
still."""


METHOD_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "resmaster": {
        "default": FEWER_ROWS,
        "faithful": {"stepper": "posterior", "structure": {"preset": "paper"}},
        "exact": {},
    },
    "demofusion": {
        "default": {},
        "faithful": {"stepper": "ddim_keep", "demofusion": {"start": 0.0, "jitter": "zeros"}},
    },
    "scalecrafter": {
        "default": {"stepper": "ddim_ancestral", "guidance_scale": 5.0},
        "faithful": {
            "stepper": "ddim_ancestral",
            "guidance_scale": 5.0,
            "negative_prompt": "",
            "scalecrafter": {"down": False, "freeu": True},
        },
    },
    "fouriscale": {
        "default": {"stepper": "ddim_ancestral", "guidance_scale": 5.0},
        "faithful": {
            "stepper": "ddim_ancestral",
            "guidance_scale": 5.0,
            "negative_prompt": "",
            "fouriscale": {"freeu": True},
        },
    },
    "freescale": {
        "default": {},
        "faithful": {"stepper": "ddim_keep", "freescale": {"blur": "features", "jitter": "zeros", "freeu": True}},
    },
    # Its path begins where ResMaster's swap has nearly ended, so it swaps at every step, by the gentler reading.
    "c_upscale": {preset: {"structure": {"preset": "lr_nyquist"}} for preset in ("default", "faithful")},
}
"""Settings by method and `upscale.preset`; explicit fields win. `default`: what we recommend, and what an absent preset
means. `faithful`: the authors' published settings. `exact`: every row is computed that `default` leaves out (docs/speed.md)."""


PRESETS = tuple(dict.fromkeys(name for presets in METHOD_PRESETS.values() for name in presets))
"""Every preset; not every method has all."""


IDLE_UNLESS: dict[str, tuple[str, str]] = {
    "start": ("init", "noised_lr"),
    "shift_stride": ("shift", "every_step"),
    "shift_stop": ("shift", "every_step"),
}
"""Fields of `UpscaleConfig` that are read only where another one has a certain value: a preset's go where it was set otherwise."""


OFF_FIELDS: dict[str, Any] = {
    "shift": "none",
    "shift_stride": None,
    "shift_stop": 1.0,
    "via": (),
    "start": 0.0,
    "guidance_stop": 1.0,
}
"""Fields of `UpscaleConfig` that came later, and the value at which the result is what it was before: then they are no part of
its identity."""


class UpscaleConfig(Part):
    """Stage 4: low-res image + captions -> high-res image.

    `preset: faithful` beside `method` sets the fields to what the method's authors published. ResMaster's default leaves out
    most of the work (at 4x five sixths); with `preset: exact` it is done.
    """

    method: str = Field(default="resmaster", json_schema_extra={"enum": list(METHODS)})
    """One of the upscaling methods: direct, multidiffusion, resmaster, demofusion, scalecrafter, fouriscale,
    freescale, c_upscale, super_resolution, lanczos."""
    preset: str = Field(default="default", json_schema_extra={"operational": True, "enum": list(PRESETS)})
    """Where fields that are not given come from: default, faithful (what the method's authors published) or exact (method
    resmaster: the work that its default leaves out is done)."""
    scale: float = Field(default=4.0, ge=1, le=64)
    """Target size over low-res size. Generated images must come out at a multiple of the latent factor (8)."""
    via: tuple[float, ...] = ()
    """Scales at which the picture is finished on the way, e.g. [4] at scale 8: each of these pictures is the next one's
    low-res picture, and its patches are captioned anew."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Classifier-free guidance scale."""
    guidance_stop: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the steps after which guidance ends: from there on, a view is evaluated once a step instead of twice. Methods
    scalecrafter and fouriscale have guidance of their own."""
    negative_prompt: str = DEMOFUSION_NEGATIVE_PROMPT
    """Used for prompts that bring none of their own."""
    stride: float = Field(default=0.5, gt=0, le=1)
    """Distance of neighbouring views, as a fraction of the window (the model's native size), for methods with views."""
    shift: Literal["none", "every_step"] = "none"
    """`every_step`: methods resmaster and multidiffusion move the whole grid of views from step to step, so that no border
    lies twice at the same place; a moved view takes caption and image prompt of the nearest view."""
    shift_stride: float | None = Field(default=None, gt=0, le=1)
    """With `shift: every_step`, the distance of neighbouring views while they move, of which there are the fewer the greater it is.
    Where there would be no fewer than at `stride` (up to 2x), they stand still. null: `stride`."""
    shift_stop: float = Field(default=1.0, gt=0, le=1)
    """With `shift: every_step`, the fraction of the steps after which views stand still, at `stride`."""
    fuse: Literal["uniform", "linear", "gaussian"] = "uniform"
    """Weight of a view's pixels where views overlap."""
    stepper: Literal["ddim_implied", "ddim_keep", "posterior", "ddim_ancestral", "dpmpp_2m"] = "ddim_implied"
    """How z_{t-1} follows from the edited x0: deterministic with implied or kept noise, ResMaster's stochastic eq. 7, DDIM
    with eta = 1, or DPM-Solver++(2M), which needs about half the steps."""
    init: Literal["noise", "noised_lr"] = "noise"
    """Start from pure noise (the paper) or from the noised low-res latent. Methods of several phases start in their own way."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """With `init: noised_lr`, the fraction of the steps that is left out at the noisy end (1 less img2img's strength): the
    higher, the closer to the low-res picture."""
    micro_conditioning: Literal["canvas", "native"] = "canvas"
    """What SDXL is told of size and crop: the canvas and the view's place in it, or a native-size image. Methods fouriscale and
    freescale tell a size of their own."""
    structure: StructureConfig = StructureConfig()
    """Structural guidance."""
    image_prompt: ImagePromptConfig = ImagePromptConfig()
    """Tailored image prompts."""
    text_prompt: TextPromptConfig = TextPromptConfig()
    """Enhanced text prompts."""
    demofusion: DemoFusionConfig = DemoFusionConfig()
    """Of method demofusion."""
    scalecrafter: ScaleCrafterConfig = ScaleCrafterConfig()
    """Of method scalecrafter."""
    fouriscale: FouriScaleConfig = FouriScaleConfig()
    """Of method fouriscale."""
    freescale: FreeScaleConfig = FreeScaleConfig()
    """Of method freescale."""
    c_upscale: CUpscaleConfig = CUpscaleConfig()
    """Of method c_upscale."""
    super_resolution: SuperResolutionConfig = SuperResolutionConfig()
    """Of method super_resolution."""
    view_batch: int | None = Operational(None, ge=1)
    """Views per UNet call at most (times two with guidance, at some steps three). null: what the device's memory allows, 16 on
    CPUs. Other numbers give the same picture up to rounding."""

    @model_validator(mode="wrap")
    @classmethod
    def _expand_preset(cls, values: Any, make: ModelWrapValidatorHandler[UpscaleConfig]) -> UpscaleConfig:
        """The preset's fields count as not set, so that they go where the method or the preset changes."""
        if not isinstance(values, dict):
            return make(values)
        method, preset = values.get("method", "resmaster"), values.get("preset", "default")
        presets = METHOD_PRESETS.get(method, {"default": {}}) if isinstance(method, str) else {"default": {}}
        if preset not in presets:
            raise ValueError(f"method {method}: unknown preset {preset!r}; known: {', '.join(presets)}")
        idle = {name for name, (field, value) in IDLE_UNLESS.items() if values.get(field, value) != value}
        chosen = {name: value for name, value in presets[preset].items() if name not in idle}
        merged = {**chosen, **values}
        own = values.get(method) if method in METHOD_PARTS else None
        if isinstance(own, dict):
            merged[method] = {**chosen.get(method, {}), **own}
        made = make(merged)
        made.__pydantic_fields_set__.difference_update(chosen.keys() - values.keys())
        return made

    @model_validator(mode="after")
    def _check_via(self) -> UpscaleConfig:
        path = (1.0, *self.via, self.scale)
        if self.via and not self.uses_diffusion():
            raise ValueError(f"via is set, which method {self.method} does not read; drop it")
        if self.via and not all(a < b for a, b in pairwise(path)):
            raise ValueError(f"via {list(self.via)}: give rising scales between 1 and the scale ({self.scale:g})")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> UpscaleConfig:
        if self.start and self.method in ("demofusion", "freescale", "c_upscale"):
            raise ValueError(f"start is set, which method {self.method} does not read; set {self.method}.start")
        if self.start and self.init == "noise":
            raise ValueError(
                "start is set, but a path from pure noise begins at its beginning; set init: noised_lr too"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_part(self) -> UpscaleConfig:
        if self.shift != "none" and self.method not in ("resmaster", "multidiffusion"):
            raise ValueError(f"shift is set, which method {self.method} does not read; drop it")
        for name in ("shift_stride", "shift_stop"):
            if self.shift == "none" and getattr(self, name) != OFF_FIELDS[name]:
                raise ValueError(f"{name} is set, but no view moves; set shift: every_step too, or drop it")
        if self.guidance_stop != 1 and self.method in ("scalecrafter", "fouriscale"):
            raise ValueError(f"guidance_stop is set, which method {self.method} does not read; drop it")
        for name, part in METHOD_PARTS.items():
            if name != self.method and getattr(self, name) != part():
                raise ValueError(
                    f"{name} is set, which method {self.method} does not read; use method {name}, or drop it"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_idle_parts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A stored configuration holds no part of another method: were its defaults to change, it would read as set."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name == self.method or name not in METHOD_PARTS}

    def identity(self) -> dict[str, Any]:
        """As of every part, less what the method does not read."""
        values = super().identity()
        if not self.uses_diffusion():
            return {name: values[name] for name in ("method", "scale", self.method) if name in values}
        idle = METHOD_PARTS.keys() - {self.method}
        idle |= {name for name, readers in SHARED_PARTS.items() if self.method not in readers}
        idle |= {name for name, off in OFF_FIELDS.items() if values[name] == off}
        return {name: value for name, value in values.items() if name not in idle}

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown method {value!r}; known: {', '.join(METHODS)}")
        return value

    def passes(self) -> tuple[UpscaleConfig, ...]:
        """The finished pictures on the way, the last one included: each one's scale is that over the one before."""
        path = (1.0, *self.via, self.scale)
        return tuple(self.model_copy(update={"via": (), "scale": after / before}) for before, after in pairwise(path))

    def uses_diffusion(self) -> bool:
        """Whether the result depends on the base model."""
        return self.method in DIFFUSION_METHODS

    def require_detail_mask(self, what: str) -> None:
        """Raises ConfigError, saying `what` brings a detail mask, unless the result depends on it."""
        if self.method != "freescale" or self.freescale.alpha_elsewhere is None:
            raise ConfigError(
                f"{what} a detail mask, which only method freescale reads, with upscale.freescale.alpha_elsewhere: set both "
                "(upscale: {method: freescale, freescale: {alpha: 3, alpha_elsewhere: 0.5}}), or leave the mask out"
            )

    def uses_captions(self) -> bool:
        """Whether the result depends on the captions stage."""
        return self.method in ("resmaster", "c_upscale") and self.text_prompt.enabled


def with_method(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What was set of an `UpscaleConfig`, for another `method`: without the part of the method before, without a preset that the
    other method has not, and without what is read only beside a value that a preset gave."""
    before = values.get("method", UpscaleConfig.model_fields["method"].default)
    if method == before:
        return dict(values)
    hanging = {name for name, (field, _) in IDLE_UNLESS.items() if field not in values}
    kept = {name: value for name, value in values.items() if name != before and name not in hanging}
    if kept.get("preset", "default") not in METHOD_PRESETS.get(method, {"default": {}}):
        del kept["preset"]
    return {**kept, "method": method}
