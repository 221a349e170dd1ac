"""The interface between the engine and base models. Each file of this folder implements it for one family.

A `Family` is used before any weights are loaded. So it is a table of functions that import torch only when they are
called. A `Base` is a loaded model of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.files import Check
from resmaster_stages.models.schedule import Course, Timing, even_course

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.models.schedule import Step

Ability = Literal["convolutions", "attention", "image_prompts", "positions", "few_step_weights", "control"]
"""What a method or setting may need of a family: convolutions or attentions under the names of diffusers' UNets, an
IP-Adapter, rotary positions that `diffusion.positions` can scale, weights of `model.few_step`, or a UNet that a
ControlNet can be added to."""

NO_ADAPTER = "model {}: image prompts need an IP-Adapter; set model.ip_adapter, or upscale.image_prompt.enabled: false"
"""What is said of a model without an IP-Adapter where image prompts are asked for."""

NO_CONTROL = "model {}: upscale.control needs a ControlNet; set model.controlnet, or upscale.control.enabled: false"
"""What is said of a model without a ControlNet where one is asked for."""

NO_TIME_SHIFT = "upscale.time_shift: only flow-matching models have one, and {} is none; leave it out"
"""What is said of a model with another path where a time shift is asked for."""

Layers = Literal["sdxl", "sd1", "sd2"]
"""UNets for whose layers some papers give settings."""

Offload = Literal["none", "text", "model"]
"""The modules that are on the device only while they work: none, the text encoders, or all."""

TokenCounter = Callable[[str], int]
"""A text -> the number of its content tokens."""

CLIP_TOKENS = 75
"""Content tokens that CLIP's text encoders read: 77 less the begin and end marks."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a base model."""

    native_px: int
    """Edge of the square images that the model was trained on (1024 for SDXL)."""
    latent_factor: int
    """Pixels per latent along one axis (8 for SDXL)."""
    multiple: int = 1
    """Sides of canvases and views are multiples of this many latents: 2 for a transformer with patches of 2 x 2."""
    largest_px: int | None = None
    """The longest side of a view that the model can read. None: any."""

    @property
    def step_px(self) -> int:
        """Sides of images that need no padding are multiples of this many px."""
        return self.latent_factor * self.multiple

    @property
    def native(self) -> int:
        """`native_px` in latents."""
        return self.native_px // self.latent_factor


def require_unshifted(timing: Timing, model: str) -> None:
    """Raise ConfigError if a time shift is asked of a model whose path has none."""
    if timing.shift is not None or timing.growth != 1:
        raise ConfigError(NO_TIME_SHIFT.format(model))


def require_readable(geometry: Geometry, height: int, width: int, setting: str, way_out: str) -> None:
    """Raise ConfigError if the model cannot read a view of `height` x `width` px.

    setting: what asks for the view. way_out: what to do instead.
    """
    if geometry.largest_px is not None and max(height, width) > geometry.largest_px:
        raise ConfigError(
            f"{setting}: the model reads at most {geometry.largest_px} px a side in one piece, and this is {width} x "
            f"{height} px; {way_out}"
        )


def sized(config: ModelConfig, native_px: int, step_px: int) -> int:
    """The native size of a model: `model.native_px`, or else `native_px`. Raises ConfigError unless it is a multiple of
    `step_px`."""
    chosen = config.native_px or native_px
    if chosen % step_px or chosen < step_px:
        below = max(1, chosen // step_px) * step_px
        raise ConfigError(
            f"model.native_px: {chosen} is no multiple of {step_px}; set it to {below} or {below + step_px}"
        )
    return chosen


GuidanceKind = Literal["cfg", "embedded", "none"]
"""What a guidance scale does. cfg: classifier-free guidance, with an unconditional branch and negative prompts.
embedded: the denoiser reads the scale as a number. none: nothing, because guidance was distilled into the model."""


@dataclass(frozen=True)
class Sampling:
    """What can be asked of a model's sampling, and what its authors recommend."""

    kind: GuidanceKind = "cfg"
    steps: int = 50
    """Recommended number of denoising steps."""
    guidance_scale: float = 7.5
    """Recommended guidance scale, as this project counts it (1: no guidance)."""
    most_steps: int = 1000
    """The most steps that the model can use. Few for models that were distilled to few steps."""
    only_steps: tuple[int, ...] = ()
    """The numbers of steps that the model was distilled to. Empty: any number up to `most_steps`."""
    steppers: tuple[str, ...] = ()
    """The values of the setting `stepper` that fit the model, the recommended one first. Empty: all."""


@dataclass(frozen=True)
class Asked:
    """The sampling that a part of a configuration asks for."""

    part: str
    """Name of the part in a configuration, for messages: `low_res` or `upscale`."""
    steps: int | None
    """None: the steps are a method's own, and the number that the model recommends does not bind them."""
    guidance_scale: float
    written: frozenset[str] = frozenset({"steps", "guidance_scale"})
    """The settings that a user chose. The others have this project's defaults, which were chosen for SDXL."""
    stepper: str = "ddim_keep"
    further: tuple[str, ...] = ()
    """The settings with further guidance scales that have a value."""


FURTHER = ("guidance_low", "guidance_last")
"""Settings of methods with further guidance scales. The first needs an unconditional branch."""


@dataclass(frozen=True)
class Demand:
    """What a dataset asks of its base model."""

    image_prompts: bool
    """Whether the method reads image prompts."""
    sampling: tuple[Asked, ...]
    """The sampling of each part that denoises."""
    time_shift: bool = False
    """Whether the configuration sets a time shift."""
    control: str | None = None
    """The kind of control image that the method shows a ControlNet. None: it uses none."""


@dataclass(frozen=True)
class Family:
    """A family of base models that are loaded and called in the same way."""

    name: str
    """The family's name in messages."""
    pipelines: str
    """A regular expression for the whole name of diffusers' pipeline classes. It recognises a model by its
    `model_index.json`, or a loaded pipeline by its class."""
    abilities: frozenset[Ability]
    geometry: Callable[[ModelConfig], Geometry]
    """Reads the sizes from a model's JSON files. Raises ConfigError."""
    token_counter: Callable[[ModelConfig], TokenCounter]
    """Gives a counter that uses a model's tokenizer alone. Raises ConfigError."""
    load: Callable[[ModelConfig, torch.dtype], Any]
    """Loads a pipeline on the CPU, with the configuration's VAE and IP-Adapter: an object with `device`. Raises
    ConfigError."""
    base: Callable[[Any, ModelConfig], Base]
    """Gives the parts of a loaded pipeline, which may be a user's own. Of the configuration, it reads `native_px` and
    `guidance`. Raises ConfigError if the pipeline cannot be used."""
    content_tokens: Callable[[ModelConfig], int] = lambda config: CLIP_TOKENS
    """The most tokens of a text that a model reads, as the counter counts. Raises ConfigError."""
    checks: Callable[[ModelConfig, Demand], Iterable[Check]] = lambda config, demand: ()
    """Gives what can be checked of a model before its weights are loaded. Downloads nothing."""
    sampling: Callable[[ModelConfig], Sampling] = lambda config: Sampling()
    """Says what can be asked of the sampling of a model whose weights are not loaded. Raises ConfigError."""
    course: Callable[[ModelConfig, int, Timing], Course] = lambda config, steps, timing: even_course(steps)
    """Gives the course of the path of a model whose weights are not loaded. Raises ConfigError."""
    half: Literal["float16", "bfloat16"] = "float16"
    """The number format on CUDA if a configuration names none."""
    large_text: bool = False
    """Whether the text encoders are so large that they leave the GPU after use if a configuration says nothing."""


@dataclass(frozen=True)
class Rows:
    """The conditions of the rows of one denoiser call."""

    states: Tensor  # [rows, L, D]
    """Text states, as `Base.encode` makes them."""
    mask: Tensor | None  # [rows, L], bool
    """Which of the states are read. None: all."""
    pooled: Tensor  # [rows, P]
    guidance_scale: float
    """Read by denoisers with embedded guidance."""
    sizes: Tensor  # [rows, 6]
    """Original height and width, crop top and left, target height and width, all in px."""
    image: Tensor | None = None  # [rows, 1, ...]
    """Image prompts, as `ImageAdapter` makes them."""
    lengths: tuple[int, ...] = ()
    """With a mask: how many states of each row are read."""


@dataclass(frozen=True)
class Texts:
    """Texts as a denoiser reads them."""

    states: Tensor  # [N, L, D]
    pooled: Tensor  # [N, P]; P = 0 if the denoiser reads no pooled text
    mask: Tensor | None = None  # [N, L], bool: which states are read; None: all

    def padded(self, length: int) -> Texts:
        """With `length` states, of which no further one is read. Raises ValueError if all states are read."""
        from torch.nn.functional import pad

        more = length - self.states.shape[1]
        if more == 0:
            return self
        if self.mask is None or more < 0:
            raise ValueError(f"{self.states.shape[1]} states cannot become {length}")
        return Texts(pad(self.states, (0, 0, 0, more)), self.pooled, pad(self.mask, (0, more)))


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + scale * (conditional - unconditional)


def require_sampling(sampling: Sampling, asked: Asked, model: str) -> None:
    """Raise ConfigError unless a model can use the sampling that a part of a configuration asks for.

    model: its name, for messages.
    """
    values = {"guidance_scale": f"{sampling.guidance_scale:g}"}
    if asked.steps is not None:
        values = {"steps": str(sampling.steps), **values}
        if sampling.steppers:
            values["stepper"] = sampling.steppers[0]
    *others, last = (f"{asked.part}.{name}: {value}" for name, value in values.items())
    good = f"set {' and '.join(filter(None, (', '.join(others), last)))}, which are recommended for it"
    scale, steps = asked.guidance_scale, asked.steps
    if sampling.kind == "none" and scale != 1:
        raise ConfigError(
            f"{asked.part}.guidance_scale: {scale:g} has no effect on {model}, whose guidance is distilled; {good}"
        )
    if sampling.kind == "embedded" and scale > 1 and "guidance_scale" not in asked.written:
        raise ConfigError(f"{asked.part}.guidance_scale: {scale:g} was chosen for SDXL, not for {model}; {good}")
    for name in asked.further:
        if sampling.kind == "none" or (sampling.kind == "embedded" and name == FURTHER[0]):
            raise ConfigError(
                f"{asked.part}.{name}: has no effect on {model}, which has no unconditional branch; set it to null"
            )
    if steps is None:
        return
    if steps > sampling.most_steps:
        raise ConfigError(f"{asked.part}.steps: {steps} are too many for {model}, which is made for few; {good}")
    if sampling.only_steps and steps not in sampling.only_steps:
        made = " or ".join(str(each) for each in sampling.only_steps)
        raise ConfigError(f"{asked.part}.steps: {steps} are not the {made} that {model} is made for; {good}")
    if sampling.steppers and asked.stepper not in sampling.steppers:
        raise ConfigError(f"{asked.part}.stepper: {asked.stepper} does not fit {model}; {good}")


def network_of(denoiser: Any) -> Any:
    """The torch module inside a denoiser, without what wraps it; the denoiser itself if nothing does."""
    return getattr(denoiser, "network", getattr(denoiser, "_orig_mod", denoiser))  # torch.compile wraps in the latter


class Denoiser(Protocol):
    """The network that predicts: a diffusers UNet, or anything else that is called like a UNet."""

    dtype: torch.dtype
    """The number format in which it computes."""

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool, **arguments: Any) -> tuple[Tensor, ...]:
        """Outputs [N, C, h, w] (first of the tuple) for noisy latents [N, C, h, w] at one timestep [] (`Step.t`).

        arguments: what `Base.arguments` gives. `Step.split` interprets an output."""


class ImageAdapter(Protocol):
    """Makes image prompts for the denoiser."""

    @property
    def encoder(self) -> Any:
        """The module that embeds images."""

    def embed(self, crops: Tensor) -> Tensor:
        """Crops [N, 3, h, w] in [-1, 1] as embeddings [N, ...]."""

    def nothing(self, image: Tensor) -> Tensor:
        """The unconditional counterpart of embeddings [N, 1, ...], of the same shape."""


class Base(Protocol):
    """A loaded base model, as the engine uses it."""

    @property
    def family(self) -> Family: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def denoiser(self) -> Denoiser:
        """The network that predicts. Methods patch it. For a UNet it is the module itself."""

    @property
    def vae(self) -> Any:
        """A module called like diffusers' AutoencoderKL: `encode(pixels).latent_dist.mode()`, `decode(latents)`."""

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """The modules that `encode` uses."""

    @property
    def image_encoder(self) -> Any | None:
        """The module that `image_adapter` uses."""

    @property
    def layers(self) -> Layers | None:
        """The UNet whose layers the denoiser has. None if it is not one of `Layers`."""

    @property
    def tokens(self) -> int:
        """Tokens that the text encoders read, start and end included. Further tokens of a prompt are lost."""

    @property
    def sampling(self) -> Sampling:
        """What can be asked of the sampling."""

    def path(self, steps: int, timing: Timing) -> tuple[Step, ...]:
        """The steps of the noise schedule: `steps` of the model's own, or through `timing.timesteps`.

        Raises ConfigError for a schedule that is not supported."""

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of predictions [N, C, h, w]. Called only if the kind of guidance is `cfg`."""

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt, start and end included."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """Prompts or negative prompts as the denoiser reads them."""

    def arguments(self, rows: Rows) -> dict[str, Any]:
        """Keyword arguments for one call of the denoiser."""

    def to_canvas(self, latents: Tensor) -> Tensor:
        """Converts the VAE's latents [B, C, h, w] to the denoiser's."""

    def from_canvas(self, latents: Tensor) -> Tensor:
        """Converts the denoiser's latents [B, C, h, w] to the VAE's."""

    def image_adapter(self) -> ImageAdapter | None:
        """The loaded image adapter, or None. Raises ConfigError if it cannot be used."""

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Within the block, image prompts have weight `scale`. With 0 they are not computed at all."""

    def row_bytes(self, height: int, width: int) -> int | None:
        """Peak memory in bytes of one row of `height` x `width` latents in the denoiser. None if not known."""
