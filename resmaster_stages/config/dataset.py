"""The configuration of a dataset and its parts, as frozen pydantic models with one docstring per field.

This module loads no model and does not access storage.

Invariants:
- `identity()` of a part holds the fields that change a result. The hash of a stage (`dataset.stages`) is made from it.
- Operational fields (batch size, device, offload, concurrency) are marked as such and are not in `identity()`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from resmaster_stages.config.image_format import ImageFormat
from resmaster_stages.config.method import AnyMethod, Method
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.part import (
    GREATEST_INTEGER,
    Later,
    LaterOn,
    OfPublication,
    Operational,
    Part,
    check_length,
)
from resmaster_stages.config.wrap import Wrap

LONGEST_NAME = 100
"""Maximum length of a dataset's name, in characters."""
MOST_STYLES = 20
"""Maximum number of captions of one image."""


class LowResConfig(Part):
    """Stage 2: the base-resolution image of each prompt."""

    height: int | None = Field(default=None, ge=16, le=16_384)
    """Height in px; default: the model's native size. The image is drawn in one piece, so its area is at most 64 times
    the native area."""
    width: int | None = Field(default=None, ge=16, le=16_384)
    """Width in px; default: the model's native size."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=1)
    """Classifier-free guidance scale."""
    negative_prompt: str = ""
    """Used for prompts that have no negative prompt of their own."""
    wrap: Wrap = Later("none")
    """Makes images that continue at the opposite border: `horizontal` (panoramas), `vertical`, or `both` (textures).
    Only for UNets."""
    batch_size: int = Operational(8, ge=1, le=10_000)
    """Prompts per call of the denoiser."""


class CaptionCheckConfig(Part):
    """The check of a captioner's captions: one that does not fit its patch, by CLIP, is replaced by a neighbour's."""

    places: ClassVar[tuple[str, ...]] = ("clip", "clip_revision")

    enabled: bool = True
    """Off: captions are used as they were written. Without a CLIP model there is no check either way."""
    clip: str | None = None
    """CLIP model that checks captions: `picturebook`, a hub id or folder. null: the model in `quality.clip`. With a
    model here, `quality.clip` can change without making captions anew."""
    clip_revision: str | None = None
    """Commit or tag, at the hub, of the model in `clip`."""
    margin: float = Field(default=3.0, ge=0, le=100)
    """A neighbour's caption replaces the patch's own if it fits better by more than this, in points of the CLIP score
    (0 to 100)."""

    @model_validator(mode="after")
    def _revision_of_something(self) -> CaptionCheckConfig:
        if self.clip_revision and self.clip is None:
            raise ValueError(
                "clip_revision needs a model in clip beside it; that of quality.clip is quality.clip_revision"
            )
        return self


class CaptionsConfig(Part):
    """Stage 3: one caption per patch (ResMaster's enhanced text prompts)."""

    places: ClassVar[tuple[str, ...]] = ("model", "revision", "base_url")

    source: Literal["model", "server", "attention", "prompt"] = "model"
    """`model`: a local captioner; `server`: an OpenAI-compatible server; `attention`: no captioner, a view gets the
    words of the prompt that the image attends to there, by the base model; `prompt`: no captioner, every view gets the
    global prompt."""
    model: str = "picturebook"
    """Captioner: `picturebook`, a hub id or folder of a Transformers image-text-to-text model, or the server's model
    name."""
    revision: str | None = None
    """Commit or tag at the hub."""
    grid: Literal["views", "tiles"] = "views"
    """`views`: a caption for every view (the paper); `tiles`: a caption for every non-overlapping tile, and each view
    takes the caption of the nearest tile (cheaper)."""
    instruction: str = (
        "Describe this image patch in detail in one sentence of at most 60 words, most salient first. "
        "Name only what is visible."
    )
    """The instruction to the captioner. Models that take no instruction ignore it."""
    max_new_tokens: int = Field(default=75, ge=4, le=512)
    """Maximum length of a caption, in the captioner's tokens."""
    style: str = ""
    """Text appended to each caption, e.g. `oil painting`, because patch captions otherwise lose the global style."""
    min_detail: float = Field(default=0.0, ge=0)
    """Patches whose luminance varies less than this (standard deviation, 0 to 255) get the global prompt."""
    coverage: float = Later(0.3, ge=0, le=1)
    """With `source: attention`, the least share of a patch that a word's place must cover. 0: every patch keeps the
    whole prompt."""
    noise_levels: int = Later(5, ge=1, le=100)
    """With `source: attention`, the number of noise levels at which the base model looks at the image: one evaluation
    of the low-res image each."""
    check: CaptionCheckConfig = CaptionCheckConfig()
    """The check of captions before they are used."""
    base_url: str | None = Operational(None)
    """Address of the OpenAI-compatible server, e.g. `http://127.0.0.1:8000/v1`; its key comes from OPENAI_API_KEY."""
    batch_size: int = Operational(16, ge=1, le=10_000)
    """Patches per captioner call."""

    @model_validator(mode="after")
    def _of_attention(self) -> CaptionsConfig:
        for name in ("coverage", "noise_levels"):
            if self.source != "attention" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set, but is read only with source: attention; set that, or drop {name}")
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that change the result, without `check`: the CLIP model that checks may be that of the part
        `quality`, so `DatasetConfig.caption_clip` decides about the check."""
        values = super().identity()
        del values["check"]
        return values


class ScoreConfig(Part):
    """A model that gives every large image a score: an image classifier with `label`, or a CLIP model with `head`."""

    places: ClassVar[tuple[str, ...]] = ("model", "revision", "label", "head")

    model: str
    """Hub id or folder of an image classifier or CLIP model of Transformers with safetensors weights."""
    revision: str | None = None
    """Commit or tag at the hub."""
    label: str | None = None
    """Label of the image classifier. The score is the label's probability, from 0 to 1."""
    head: str | None = None
    """File of linear layers, as safetensors. The score is their output for the CLIP model's image embedding, which is
    scaled to unit length first (docs/scores.md)."""
    activation: Literal["none", "relu"] = "none"
    """The function between the layers of `head`."""

    @model_validator(mode="after")
    def _one_kind(self) -> ScoreConfig:
        if (self.label is None) == (self.head is None):
            raise ValueError(
                "give label (an image classifier's) or head (a file of layers for a CLIP model), and one only"
            )
        if self.activation != "none" and self.head is None:
            raise ValueError("activation is that of head; give head, or drop activation")
        return self


SCORES = {"aesthetic": "min_aesthetic", "safety": "max_unsafe", "watermark": "max_watermark"}
"""The fields of `QualityConfig` that name a model for a score -> the fields with the limits of their flags."""


class RecaptionConfig(Part):
    """After the other stages, if it has styles: captions of the finished image as a whole, one for each style."""

    places: ClassVar[tuple[str, ...]] = ("model", "revision", "base_url")

    styles: dict[str, str] = Field(default_factory=dict)
    """Name of a style -> the instruction to the captioner, e.g. `{short: Describe this image in at most ten words.,
    tags: List what is visible as comma-separated tags.}`. Captioners that take no instruction write one style only.
    Without styles nothing is recaptioned."""
    source: Literal["model", "server"] | None = None
    """Where `model` is: `model`: a local captioner; `server`: an OpenAI-compatible server. null: `model`."""
    model: str | None = None
    """Captioner: `picturebook`, a hub id or folder of a Transformers image-text-to-text model, or the server's model
    name. null: the captioner of the part `captions`."""
    revision: str | None = None
    """Commit or tag at the hub."""
    max_new_tokens: int = Field(default=150, ge=4, le=4096)
    """Maximum length of a caption, in the captioner's tokens. Captions are not shortened to what the base model
    reads."""
    longest_px: int = Field(default=1024, ge=16, le=8192)
    """The image is reduced until its longer side has this many px, before the captioner sees it."""
    base_url: str | None = Operational(None)
    """Address of the server. null: `captions.base_url`."""

    @field_validator("styles")
    @classmethod
    def _named(cls, value: dict[str, str]) -> dict[str, str]:
        for name, instruction in value.items():
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name):
                raise ValueError(
                    f"style {name[:40]!r}: use 1 to 40 small letters, digits, dashes and underscores, starting with a "
                    "letter or digit"
                )
            if not instruction.strip():
                raise ValueError(f"style {name}: has no instruction; write what the captioner is asked")
            cls._check_text(instruction)
        if len(value) > MOST_STYLES:
            raise ValueError(f"has {len(value)} styles; give at most {MOST_STYLES}")
        return value

    @model_validator(mode="after")
    def _of_something(self) -> RecaptionConfig:
        for name in ("source", "revision", "base_url"):
            if getattr(self, name) is not None and self.model is None:
                raise ValueError(f"{name} needs a captioner in model beside it; name one, or drop {name}")
        return self


class QualityConfig(Part):
    """Stage 5: metrics and flags per image. Flags never delete an image."""

    places: ClassVar[tuple[str, ...]] = ("clip", "clip_revision")

    clip: str | None = "picturebook"
    """CLIP model for the CLIP score and the check of captions: `picturebook`, a hub id or folder; null: no model."""
    clip_revision: str | None = None
    """Commit or tag at the hub."""
    min_agreement_psnr: float = 18.0
    """Least PSNR (dB) of the down-scaled result against the low-res image. A sample below it is flagged `structure`."""
    max_seam: float = 1.5
    """Largest ratio of gradients on view borders to gradients elsewhere. A sample above it is flagged `seam`."""
    max_seam_worst: float = 6.0
    """Largest step (grey levels) along the worst stretch of a view border. A sample above it is flagged `border`."""
    max_lost_worst: float = 1.2
    """Largest mean loss of contours (Oklab times 100 per px) in the worst window. A sample above it is flagged
    `lost`."""
    max_added_worst: float = 1.5
    """Largest mean gain of contours (Oklab times 100 per px) in the worst window. A sample above it is flagged
    `added`."""
    max_colour_worst: float = 7.0
    """Largest difference of colour (Oklab times 100) in the worst place. A sample above it is flagged `colour`."""
    max_clipped: float = 0.25
    """Largest share of pure black or white pixels. A sample above it is flagged `clipped`."""
    aesthetic: ScoreConfig | None = Later(None)
    """Model for the column `aesthetic_score`; null: no such column. docs/scores.md names models for this and the next
    two scores."""
    min_aesthetic: float = Later(0.0)
    """Least aesthetic score. A sample below it is flagged `unaesthetic`. The scale is the model's own."""
    safety: ScoreConfig | None = Later(None)
    """Model for the column `unsafe_score`, which is high for images that are not safe for work; null: no such
    column."""
    max_unsafe: float = Later(0.5)
    """Largest unsafe score. A sample above it is flagged `unsafe`."""
    watermark: ScoreConfig | None = Later(None)
    """Model for the column `watermark_score`, which is high for images with a watermark; null: no such column."""
    max_watermark: float = Later(0.5)
    """Largest watermark score. A sample above it is flagged `watermark`."""
    features: Literal["none", "clip", "inception", "picturebook"] = Later("none")
    """Stores feature vectors of every image and of 10 crops, for FID and KID of any subset. `clip`: of the model in
    `clip`; `inception`: of the Inception network of 2015 (needs the extra `inception`); `picturebook`: of the embedded
    pack's classifier (only for its own world)."""
    near_duplicate_bits: int = OfPublication(4, ge=0, le=8)
    """Number of bits by which the perceptual hashes (64 bits) of two images may differ if the later image is to be
    flagged `near_duplicate`."""
    near_duplicate_cosine: float | None = OfPublication(None, gt=0, le=1)
    """Least cosine of the CLIP features of two images if the later image is to be flagged `near_duplicate`. Needs
    `features: clip`. The value depends on the model. null: hashes alone are compared."""
    device: str = Operational("auto")
    """Device on which metrics are computed and captions are checked."""

    @model_validator(mode="after")
    def _features_have_a_model(self) -> QualityConfig:
        if self.features == "clip" and self.clip is None:
            raise ValueError("features: clip needs a model; name one in clip, or set features: none")
        if self.near_duplicate_cosine is not None and self.features != "clip":
            raise ValueError("near_duplicate_cosine needs features: clip; set that, or drop near_duplicate_cosine")
        return self

    @model_validator(mode="after")
    def _limits_have_a_model(self) -> QualityConfig:
        for name, limit in SCORES.items():
            if getattr(self, name) is None and getattr(self, limit) != type(self).model_fields[limit].default:
                raise ValueError(f"{limit} is set, but there is no model in {name}; name one, or drop {limit}")
        return self


class DispatchConfig(Part):
    """How a build distributes its shards over workers. These keys change no result."""

    where: Literal["auto", "here", "workers", "dask", "ray"] = Operational("auto")
    """`workers`: runs of the deployment `process-shards`, on any number of machines; `here`: shards one after the other
    in the build's own process; `auto`: `workers` if a Prefect server is configured (PREFECT_API_URL), else `here`;
    `dask` or `ray`: on an existing cluster (DASK_SCHEDULER_ADDRESS, RAY_ADDRESS; needs the extra of that name)."""
    deployment: str | None = Operational(None)
    """Name of the deployment of `process-shards`; default: that of the pool of the build's own deployment, else
    `resmaster-shards`."""
    shards_per_run: int = Operational(8, ge=1, le=1000)
    """Maximum number of shards per run. A run gets fewer where workers would go without work otherwise. Starting a run
    and loading its models takes about half a minute, so a run should take an hour or more."""
    window: int = Operational(100, ge=1, le=199)
    """Maximum number of runs that wait for a worker. A worker fetches at most 200 waiting runs."""
    attempts: int = Operational(3, ge=1, le=20)
    """A shard is given up after this many runs have broken off at it."""
    poll_seconds: float = Operational(15.0, gt=0, le=86_400)
    """Time between two looks at commits and runs. A look takes one listing per stage and one request."""
    stall_seconds: float = Operational(7200.0, gt=0, le=31_536_000)
    """A run that commits nothing for this time is given up, and its shards are dispatched again. Must be longer than
    the slowest stage of a shard takes."""
    price: float | None = Operational(None, ge=0, le=1_000_000)
    """Price of one hour of one worker (a GPU, or a machine without one), in any currency. null: costs are told in
    hours alone."""
    max_cost: float | None = Operational(None, gt=0, le=1_000_000_000)
    """Budget of the dataset at `price`: a build begins no shard once all builds together have spent this much. Shards
    at work are finished. null: no limit."""
    max_hours: float | None = Operational(None, gt=0, le=8_784)
    """A build begins no shard once it has run for this many hours. Shards at work are finished. null: no limit."""

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> DispatchConfig:
        if self.max_cost is not None and not self.price:
            raise ValueError("max_cost needs a price; set price, of one worker's hour, or drop max_cost")
        return self


class DatasetConfig(Part):
    """A dataset: its place, its input, and the settings of each stage."""

    places: ClassVar[tuple[str, ...]] = ("root",)

    name: str
    """Name of the dataset's folder under the root: letters, digits, dash, underscore."""
    root: str = Operational("out")
    """A folder, or `s3://bucket/prefix`."""
    prompts: str | None = Operational(None)
    """File of prompts: .txt (one per line), .csv, .jsonl or .parquet. The path is relative to the configuration file.
    Columns: `prompt`, and optionally `negative_prompt` and `detail_mask` (an image file in the same folder; see
    `alpha_elsewhere` of method freescale)."""
    images: str | None = Operational(None)
    """Your own low-res images instead of generated ones: a folder, or WebDataset shards (.tar, or a folder of them).
    Read are PNG, JPEG, WebP, TIFF, BMP, GIF and AVIF."""
    limit: int | None = Operational(None, ge=1)
    """Use only the first N prompts or images."""
    allow_overwriting_store: bool = Operational(False)
    """Allow a build on a store that lets two writers create the same name (`resmaster doctor` tests this). On such a
    store, run only one process at a time."""
    seed: int = Field(default=0, ge=0, le=GREATEST_INTEGER)
    """Base seed. The seeds of a sample are derived from the base seed and the sample's key."""
    replicas: int = Field(default=1, ge=1, le=100_000)
    """Images per prompt."""
    samples_per_shard: int = Field(default=64, ge=1, le=100_000)
    """Samples per WebDataset shard."""
    image_format: ImageFormat = "webp"
    """File format of images in the tars. `jxl` (JPEG XL) needs the extra `jxl`. Low-res images are always lossless:
    with `avif`, which cannot be lossless here, they are WebP."""
    webp_quality: int = Field(default=95, ge=1, le=100)
    """WebP quality of high-res images; 100 is lossless."""
    avif_quality: int = Field(default=90, ge=1, le=100)
    """AVIF quality of high-res images. Their colours have full resolution (4:4:4). No quality is lossless."""
    jxl_quality: int = Field(default=95, ge=1, le=100)
    """JPEG XL quality of high-res images; 100 is lossless."""
    image_metadata: Literal["full", "source", "none"] = LaterOn("full", before="none")
    """What image files say of themselves (docs/provenance.md). `source`: that a model made them (IPTC digital source
    type) and its name. `full`: also the prompt and the generation parameters, as A1111 and ComfyUI read them. `none`:
    nothing is written, and nothing is read from your own images either, whose files may hold prompts. A dataset keeps
    what it was made with until this is set."""
    max_failure_ratio: float = Field(default=0.02, ge=0, le=1)
    """A shard with a greater share of failed samples is not committed. One failed sample of a shard is always
    tolerated. A build with a greater share of failed samples ends with exit status 1."""
    spill_seconds: float | None = Operational(5.0, ge=0)
    """Finished samples of an uncommitted shard are saved in `cache/` whenever they took at least this long. So a killed
    run loses at most this much work, and the two samples (or batches) that are being computed and encoded. null: no
    samples are saved."""
    model: ModelConfig = ModelConfig()
    """The base diffusion model."""
    low_res: LowResConfig = LowResConfig()
    """Stage 2."""
    captions: CaptionsConfig = CaptionsConfig()
    """Stage 3."""
    upscale: AnyMethod = Field(default_factory=lambda: Method.model_validate({}))
    """Stage 4."""
    quality: QualityConfig = QualityConfig()
    """Stage 5."""
    recaption: RecaptionConfig = RecaptionConfig()
    """Stage 6, if it has styles."""
    dispatch: DispatchConfig = DispatchConfig()
    """How the work is distributed over workers."""

    @property
    def image_quality(self) -> int:
        """The quality of high-res images in their format."""
        return {"webp": self.webp_quality, "png": 100, "avif": self.avif_quality, "jxl": self.jxl_quality}[
            self.image_format
        ]

    def tolerated(self, samples: int) -> int:
        """How many of `samples` samples may fail."""
        return max(1, int(self.max_failure_ratio * samples + 1e-9))  # 0.29 * 100 is 28.99...

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
            raise ValueError("use letters, digits, dash and underscore, starting with a letter or digit")
        if len(value) > LONGEST_NAME:
            raise ValueError(f"has {len(value)} characters; use at most {LONGEST_NAME}")
        return value

    @field_validator("prompts", "images")
    @classmethod
    def _possible(cls, value: str | None) -> str | None:
        if value is not None:
            check_length(value)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if self.prompts and self.images:
            raise ValueError("give prompts or images, not both (prompts for your images go beside them as .txt files)")
        return self

    @model_validator(mode="after")
    def _recaptioned_by_something(self) -> DatasetConfig:
        source = self.captions.source
        if self.recaption.styles and self.recaption.model is None and source in ("attention", "prompt"):
            raise ValueError(
                f"recaption.model: is missing, and captions.source: {source} has no captioner to describe images; name "
                "one, e.g. recaption.model: picturebook"
            )
        return self

    def recaptioner(self) -> CaptionsConfig:
        """The captioner of finished images: that of the part `recaption` or, if it names none, of `captions`."""
        own = self.recaption
        changes: dict[str, Any] = {"max_new_tokens": own.max_new_tokens}
        if own.model is not None:
            changes |= {"source": own.source or "model", "model": own.model, "revision": own.revision}
        if own.base_url is not None:
            changes["base_url"] = own.base_url
        return self.captions.model_copy(update=changes)

    def caption_clip(self) -> tuple[str, str | None] | None:
        """The CLIP model that checks captions, and its revision. None if captions are not checked."""
        check = self.captions.check
        if self.captions.source in ("attention", "prompt") or not check.enabled:
            return None
        if check.clip is not None:
            return check.clip, check.clip_revision
        return None if self.quality.clip is None else (self.quality.clip, self.quality.clip_revision)

    def plan_identity(self) -> dict[str, Any]:
        """The fields that fix the keys and their order in shards. They may not change in an existing dataset."""
        return {
            "name": self.name,
            "seed": self.seed,
            "replicas": self.replicas,
            "samples_per_shard": self.samples_per_shard,
            "source": "images" if self.images else "prompts",
            "height": self.low_res.height,
            "width": self.low_res.width,
        }
