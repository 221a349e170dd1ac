"""What a user writes: frozen pydantic models, one docstring per field. The hash of a stage's part is the stage's identity.

This module loads no model and touches no storage.

Invariants:
- `stage_hash` covers what changes a result, an explicit stage version, and the upstream stage's hash.
- Operational fields (batch size, device, offload, concurrency) are marked as such and are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from resmaster_stages.disclosure import holds_credentials
from resmaster_stages.errors import ConfigError
from resmaster_stages.identity import digest

Stage = Literal["low_res", "captions", "high_res", "quality"]
STAGES: tuple[Stage, ...] = ("low_res", "captions", "high_res", "quality")
"""The stages that work on shards, in order. (Stage 1, prompt ingestion, makes the plan that they follow.)"""

STAGE_VERSIONS: dict[str, int] = {"low_res": 1, "captions": 1, "high_res": 1, "quality": 2}
"""Raised by hand whenever a stage's code changes its result: old commits then no longer count as done."""

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


SDXL: dict[str, Any] = {
    "id": "stabilityai/stable-diffusion-xl-base-1.0",
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "ip_adapter": {
        "id": "h94/IP-Adapter",
        "subfolder": "sdxl_models",
        "weight_name": "ip-adapter_sdxl_vit-h.safetensors",
        "image_encoder_folder": "models/image_encoder",
    },
}
"""The model part of a configuration for SDXL with image prompts."""


LONGEST_NAME = 100
"""Characters of a dataset's name at most."""


def Operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how fast or where a result is computed, but not the result: left out of `identity()`."""
    return Field(default=default, json_schema_extra={"operational": True}, **kwargs)


def _offer_preset(presets: Iterable[str], text: str) -> Callable[[dict[str, Any]], None]:
    """Adds the key `preset`, which is expanded before validation, to a part's JSON schema: forms are made from it."""

    def add(schema: dict[str, Any]) -> None:
        schema["properties"]["preset"] = {
            "type": "string",
            "enum": list(presets),
            "title": "Preset",
            "description": text,
        }

    return add


class Part(BaseModel):
    """Base of all parts: frozen, no unknown keys, field docstrings become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        if isinstance(value, str) and holds_credentials(value):
            raise ValueError(
                "holds a user, password, signature or token, which would be kept with the dataset; leave it out and set the "
                "environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, OPENAI_API_KEY, HF_TOKEN)"
            )
        return value

    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as JSON-ready values."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                continue
            value = getattr(self, name)
            values[name] = value.identity() if isinstance(value, Part) else value
        return values


class IpAdapterConfig(Part):
    """Where the IP-Adapter and its image encoder come from."""

    id: str
    """Hub id or folder, e.g. `h94/IP-Adapter`."""
    subfolder: str = ""
    """Folder of the adapter's weights inside it, e.g. `sdxl_models`."""
    weight_name: str
    """File of the adapter's weights, e.g. `ip-adapter_sdxl_vit-h.safetensors`."""
    image_encoder_folder: str = "image_encoder"
    """Folder of the CLIP image encoder inside it, e.g. `models/image_encoder`."""
    revision: str | None = None
    """Commit or tag at the hub."""


class ModelConfig(Part):
    """Which weights are loaded, from where, and onto which device."""

    id: str = "picturebook"
    """`picturebook` (the embedded pack), a hub id such as `stabilityai/stable-diffusion-xl-base-1.0`, or a folder."""
    revision: str | None = None
    """Commit or tag at the hub. Name one: it is part of the dataset's identity."""
    variant: str | None = None
    """Weight variant, e.g. `fp16`."""
    vae: str | None = None
    """Another VAE by hub id or folder, e.g. `madebyollin/sdxl-vae-fp16-fix`."""
    ip_adapter: IpAdapterConfig | None = None
    """Image prompts. The picturebook pack brings its own adapter and needs nothing here."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float16 on CUDA, float32 elsewhere. Beside `bfloat16` the VAE stays in float32."""
    device: str = Operational("auto")
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    offload: Literal["none", "model"] = Operational("none")
    """`model`: keep only the part at work on the GPU; slower, needs less memory."""
    compile: Literal["auto", "blocks", "off"] = Operational("auto")
    """`blocks`: the UNet's transformer blocks are compiled at first use (about a minute), each shape once; where a method changes
    them, they run as they are. `auto`: on CUDA."""
    exactness: Literal["bytes", "fast"] = Operational("bytes")
    """`bytes`: a re-run on the same kind of machine gives the same bytes. `fast`: cuDNN chooses convolutions by a race, so bytes
    may differ by rounding. Commit records say which."""
    quantise: Literal["none", "fp8"] = "none"
    """`fp8`: the UNet's large linear layers compute in 8 bits, on CUDA from compute capability 8.9 on, compiled. Needs the extra
    `fp8`."""

    def identity(self) -> dict[str, Any]:
        """As of every part; without quantising it is what it was before there was any."""
        values = super().identity()
        if self.quantise == "none":
            del values["quantise"]
        return values


class LowResConfig(Part):
    """Stage 2: the base-resolution image of each prompt."""

    height: int | None = Field(default=None, ge=16)
    """Height in px; default: the model's native size."""
    width: int | None = Field(default=None, ge=16)
    """Width in px; default: the model's native size."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance scale."""
    negative_prompt: str = ""
    """Used for prompts that bring none of their own."""
    batch_size: int = Operational(8, ge=1)
    """Prompts per UNet call."""


class CaptionCheckConfig(Part):
    """The check of captions: one that CLIP finds wrong for its patch gives way to that of a neighbouring patch."""

    enabled: bool = True
    """Off: captions are used as they were written. Without a CLIP model there is no check either."""
    clip: str | None = None
    """CLIP model that judges: `picturebook`, a hub id or folder. null: that of `quality.clip`; name one here to change the metric
    without making captions anew."""
    clip_revision: str | None = None
    """Commit or tag at the hub, of the model in `clip`."""
    margin: float = Field(default=3.0, ge=0, le=100)
    """A neighbour's caption takes over if it fits by more than this, in points of the CLIP score (0 to 100)."""

    @model_validator(mode="after")
    def _revision_of_something(self) -> CaptionCheckConfig:
        if self.clip_revision and self.clip is None:
            raise ValueError(
                "clip_revision needs a model in clip beside it; that of quality.clip is quality.clip_revision"
            )
        return self


class CaptionsConfig(Part):
    """Stage 3: one caption per patch (ResMaster's enhanced text prompts)."""

    source: Literal["model", "server", "prompt"] = "model"
    """`model`: a local captioner; `server`: an OpenAI-compatible server; `prompt`: no captioner, the global prompt everywhere."""
    model: str = "picturebook"
    """Captioner: `picturebook`, a hub id or folder of a Transformers image-text-to-text model, or the server's model name."""
    revision: str | None = None
    """Commit or tag at the hub."""
    grid: Literal["views", "tiles"] = "views"
    """`views`: a caption for every view (the paper); `tiles`: for non-overlapping tiles, each view takes its nearest (cheaper)."""
    instruction: str = (
        "Describe this image patch in detail in one sentence of at most 60 words, most salient first. "
        "Name only what is visible."
    )
    """What the captioner is asked; models that take no instruction ignore it."""
    max_new_tokens: int = Field(default=75, ge=4, le=512)
    """Length limit of a caption."""
    style: str = ""
    """Appended to each caption, e.g. `oil painting`: patch captions otherwise lose the global style."""
    min_detail: float = Field(default=0.0, ge=0)
    """Patches whose luminance varies less than this (standard deviation, 0 to 255) fall back to the global prompt."""
    check: CaptionCheckConfig = CaptionCheckConfig()
    """Captions are checked before they are used."""
    base_url: str | None = Operational(None)
    """Address of the OpenAI-compatible server, e.g. `http://127.0.0.1:8000/v1`; its key comes from OPENAI_API_KEY."""
    batch_size: int = Operational(16, ge=1)
    """Patches per captioner call."""

    def identity(self) -> dict[str, Any]:
        """As of every part, without the check: whether there is one is the dataset's to say (`DatasetConfig.caption_clip`)."""
        values = super().identity()
        del values["check"]
        return values


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
        json_schema_extra=_offer_preset(STRUCTURE_PRESETS, "A reading of the paper's cutoff; other fields win.")
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


class QualityConfig(Part):
    """Stage 5: metrics per image. Flags never delete."""

    clip: str | None = "picturebook"
    """CLIP model for the CLIP score and the check of captions: `picturebook`, a hub id or folder, or null for none."""
    clip_revision: str | None = None
    """Commit or tag at the hub."""
    min_agreement_psnr: float = 18.0
    """Below this PSNR (dB) of the down-scaled result against the low-res image, a sample is flagged `structure`."""
    max_seam: float = 1.5
    """Above this ratio of gradients on view borders to gradients elsewhere, a sample is flagged `seam`."""
    max_seam_worst: float = 6.0
    """Above this step (grey levels) along the worst stretch of a view border, a sample is flagged `border`."""
    max_lost_worst: float = 1.2
    """Above this mean loss of contours (Oklab times 100 per px) in the worst window, a sample is flagged `lost`."""
    max_added_worst: float = 1.5
    """Above this mean gain of contours (Oklab times 100 per px) in the worst window, a sample is flagged `added`."""
    max_colour_worst: float = 7.0
    """Above this difference of colour (Oklab times 100) in the worst place, a sample is flagged `colour`."""
    max_clipped: float = 0.25
    """Above this share of pure black or white pixels, a sample is flagged `clipped`."""
    features: Literal["none", "clip", "inception", "picturebook"] = "none"
    """Keep feature vectors of every image and of 10 crops, for FID and KID of any subset: of the CLIP model above, of the
    Inception network of 2015 (needs the extra `inception`), or of the embedded pack's classifier (for its own world)."""
    device: str = Operational("auto")
    """Where the metrics are computed, and the check of captions."""

    @model_validator(mode="after")
    def _features_have_a_model(self) -> QualityConfig:
        if self.features == "clip" and self.clip is None:
            raise ValueError("features: clip needs a model; name one in clip, or set features: none")
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that change the result. Without features it is what it was before there were any."""
        values = super().identity()
        if self.features == "none":
            del values["features"]
        return values


class DispatchConfig(Part):
    """How a build shares its shards among workers. Changes no result."""

    where: Literal["auto", "here", "workers", "dask", "ray"] = Operational("auto")
    """`workers`: runs of the deployment `process-shards`, on any number of machines; `here`: one after the other in the
    build's own process; `auto`: workers if a Prefect server is configured (PREFECT_API_URL); `dask` or `ray`: on a cluster
    that is there already (DASK_SCHEDULER_ADDRESS, RAY_ADDRESS; needs the extra of that name)."""
    deployment: str | None = Operational(None)
    """Name of the deployment of `process-shards`; default: that of the build's own deployment, else `process`."""
    shards_per_run: int = Operational(8, ge=1, le=1000)
    """Shards per run. Starting a run and loading its models takes about half a minute: aim at runs of an hour or more."""
    window: int = Operational(100, ge=1, le=199)
    """Runs that may wait for a worker at a time; a worker asks for 200 at most."""
    attempts: int = Operational(3, ge=1, le=20)
    """How many runs may break off at a shard before it is given up."""
    poll_seconds: float = Operational(15.0, gt=0)
    """Time between looks at commits and runs: one listing per stage and one request."""
    stall_seconds: float = Operational(7200.0, gt=0)
    """A run that commits nothing for so long is given up, and its shards are dispatched anew: more than a shard's slowest
    stage takes."""


class DatasetConfig(Part):
    """A dataset: where it lives, what goes in, and what each stage does."""

    name: str
    """The dataset's folder under the root: letters, digits, dash, underscore."""
    root: str = Operational("out")
    """A folder or an fsspec URL such as `s3://bucket/prefix`."""
    prompts: str | None = Operational(None)
    """File of prompts: .txt (one per line), .csv, .jsonl or .parquet; relative to the configuration file. Columns: `prompt`, and if
    you like `negative_prompt` and `detail_mask` (an image file in the same folder; see `upscale.freescale.alpha_elsewhere`)."""
    images: str | None = Operational(None)
    """Your own low-res images instead of generated ones: a folder, or WebDataset shards (.tar, or a folder of them)."""
    limit: int | None = Operational(None, ge=1)
    """Take only the first N prompts or images."""
    allow_overwriting_store: bool = Operational(False)
    """Build on a store that lets two writers both win (`resmaster doctor` finds out). Run one process at a time then."""
    seed: int = Field(default=0, ge=0)
    """Base seed; every sample's seeds derive from it and the sample's key."""
    replicas: int = Field(default=1, ge=1)
    """Images per prompt."""
    samples_per_shard: int = Field(default=64, ge=1, le=100_000)
    """Samples per WebDataset shard."""
    image_format: Literal["webp", "png"] = "webp"
    """File format in the tars. Low-res images are always lossless."""
    webp_quality: int = Field(default=95, ge=1, le=100)
    """Quality of high-res WebP; 100 is lossless."""
    max_failure_ratio: float = Field(default=0.02, ge=0, le=1)
    """A shard with a greater share of failed samples is not committed. One failure is always tolerated."""
    spill_seconds: float | None = Operational(5.0, ge=0)
    """A killed run loses at most this much work, and the two samples (or batches) that are just computed and encoded: finished samples
    of a shard that is not committed yet are kept in `cache/` whenever they took that long. null: none are kept."""
    model: ModelConfig = ModelConfig()
    """The base diffusion model."""
    low_res: LowResConfig = LowResConfig()
    """Stage 2."""
    captions: CaptionsConfig = CaptionsConfig()
    """Stage 3."""
    upscale: UpscaleConfig = UpscaleConfig()
    """Stage 4."""
    quality: QualityConfig = QualityConfig()
    """Stage 5."""
    dispatch: DispatchConfig = DispatchConfig()
    """How the work is shared among workers."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
            raise ValueError("use letters, digits, dash and underscore, starting with a letter or digit")
        if len(value) > LONGEST_NAME:
            raise ValueError(f"has {len(value)} characters; use at most {LONGEST_NAME}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if self.prompts and self.images:
            raise ValueError("give prompts or images, not both (prompts for your images go beside them as .txt files)")
        return self

    def stages(self) -> tuple[Stage, ...]:
        """The stages that this dataset needs, in order: captions are skipped where no caption is used."""
        return tuple(stage for stage in STAGES if stage != "captions" or self.upscale.uses_captions())

    def caption_clip(self) -> tuple[str, str | None] | None:
        """The CLIP model that checks captions and its revision; None where captions are not checked."""
        check = self.captions.check
        if self.captions.source == "prompt" or not check.enabled:
            return None
        if check.clip is not None:
            return check.clip, check.clip_revision
        return None if self.quality.clip is None else (self.quality.clip, self.quality.clip_revision)

    def plan_identity(self) -> dict[str, Any]:
        """What fixes keys and their order in shards; may not change under a dataset that exists."""
        return {
            "name": self.name,
            "seed": self.seed,
            "replicas": self.replicas,
            "samples_per_shard": self.samples_per_shard,
            "source": "images" if self.images else "prompts",
            "height": self.low_res.height,
            "width": self.low_res.width,
        }


@dataclass(frozen=True)
class Weights:
    """Names of the exact weights that a dataset is made with (`resmaster_stages.models.identity.weights_of`)."""

    model: str
    """Base model with VAE and adapter."""
    captioner: str | None = None
    """Captioner; None where there is none."""
    clip: str | None = None
    """CLIP model of the quality stage; None where there is none."""
    features: str | None = None
    """The pack whose classifier gives the quality stage's features; None where another network does, or none."""
    super_resolution: str | None = None
    """Network of method super_resolution; None where another method is used."""
    caption_check: str | None = None
    """CLIP model that checks captions; None where they are not checked."""


def stage_hash(config: DatasetConfig, stage: Stage, weights: Weights) -> str:
    """Identity (64 hex digits) of what `stage` computes: its part of the configuration, its weights, its version, and
    all that is upstream of it."""
    model = {**config.model.identity(), "weights": weights.model}
    own: dict[str, Any]
    upstream: list[Stage]
    if stage == "low_res":
        own = {"plan": config.plan_identity(), "image_format": config.image_format}
        if not config.images:
            own |= {"low_res": config.low_res.identity(), "model": model}
        upstream = []
    elif stage == "captions":
        own = {
            "captions": config.captions.identity(),
            "views": {"scale": config.upscale.passes()[0].scale, "stride": config.upscale.stride},
            "weights": weights.captioner,
            "tokenizer": weights.model,
        }
        if judge := config.caption_clip():  # unchecked captions are what they were before there was a check
            own["check"] = {"clip": judge, "weights": weights.caption_check, "margin": config.captions.check.margin}
        upstream = ["low_res"]
    elif stage == "high_res":
        network = {"model": model} if config.upscale.uses_diffusion() else {"weights": weights.super_resolution}
        own = {
            "upscale": config.upscale.identity(),
            **network,
            "image_format": config.image_format,
            "webp_quality": config.webp_quality,
        }
        upstream = ["low_res", "captions"] if config.upscale.uses_captions() else ["low_res"]
    else:
        own = {"quality": config.quality.identity(), "weights": weights.clip}
        if weights.features:
            own["features"] = weights.features
        upstream = ["high_res"]
    return digest(
        {
            "stage": stage,
            "version": STAGE_VERSIONS[stage],
            "config": own,
            "upstream": {name: stage_hash(config, name, weights) for name in upstream},
        }
    )


def _explain(error: ValidationError, source: str) -> str:
    """The first mistake of a configuration, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        part = type_at(first["loc"][:-1])
        known = ", ".join(part.model_fields) if part else ""
        return f"{source}: unknown key {where!r}" + (f"; known here: {known}" if known else "")
    message = first["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    return f"{source}: {where}: {message}" + (f" (and {more} more)" if more else "")


def type_at(location: tuple[Any, ...]) -> type[Part] | None:
    """The part of the configuration at a path such as ("upscale", "structure"), or None."""
    part: type[Part] = DatasetConfig
    for name in location:
        field = part.model_fields.get(str(name))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Part)]
        if not found:
            return None
        part = found[0]
    return part


def parse_config(values: Any, source: str = "configuration") -> DatasetConfig:
    """`values` (a mapping) as a configuration. Raises ConfigError with one line that names the key at fault."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {type(values).__name__}")
    try:
        return DatasetConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def load_config(path: str | Path, **overrides: Any) -> DatasetConfig:
    """Read a YAML (or JSON) configuration file. Relative `prompts` and `images` paths in it are relative to the file.

    Overrides that are None are ignored; they replace top-level keys, and their paths are relative to the current folder.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; examples are in deployments/datasets/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the configuration file inside it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a configuration is YAML in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{place}: {getattr(error, 'problem', error)}") from None
    if isinstance(values, dict):
        for key in ("prompts", "images"):
            value = values.get(key)
            if isinstance(value, str) and "://" not in value and not Path(value).is_absolute():
                values[key] = str((path.parent / value).resolve())
        given = {key: value for key, value in overrides.items() if value is not None}
        if "images" in given:
            values.pop("prompts", None)
        if "prompts" in given:
            values.pop("images", None)
        values |= given
    return parse_config(values, str(path))
