"""The interface between the engine and base models. Each file of this folder implements it for one family.

A `Family` is used before any weights are loaded. So it is a table of functions that import torch only when they are
called. A `Base` is a loaded model of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.models.files import Check
from resmaster_stages.models.places import ModelFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.models.schedule import Step

Ability = Literal["convolutions", "attention", "image_prompts"]
"""What a method may need of a family: convolutions or attentions under the names of diffusers' UNets, or an
IP-Adapter."""

NO_ADAPTER = "model {}: image prompts need an IP-Adapter; set model.ip_adapter, or upscale.image_prompt.enabled: false"
"""What is said of a model without an IP-Adapter where image prompts are asked for."""

Layers = Literal["sdxl", "sd1", "sd2"]
"""UNets for whose layers some papers give settings."""

TokenCounter = Callable[[str], int]
"""A text -> the number of its content tokens."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a base model."""

    native_px: int
    """Edge of the square images that the model was trained on (1024 for SDXL)."""
    latent_factor: int
    """Pixels per latent along one axis (8 for SDXL)."""

    @property
    def native(self) -> int:
        """`native_px` in latents."""
        return self.native_px // self.latent_factor


@dataclass(frozen=True)
class Demand:
    """What a dataset asks of its base model."""

    image_prompts: bool
    """Whether the method reads image prompts."""
    steps: Mapping[str, int]
    """Setting -> number of denoising steps."""


@dataclass(frozen=True)
class Family:
    """A family of base models that are loaded and called in the same way."""

    name: str
    """The family's name in messages."""
    pipelines: str
    """A regular expression for the whole name of diffusers' pipeline classes. It recognises a model by its
    `model_index.json`, or a loaded pipeline by its class."""
    abilities: frozenset[Ability]
    geometry: Callable[[ModelFiles], Geometry]
    """Reads the sizes from a model's JSON files. Raises ConfigError."""
    token_counter: Callable[[ModelConfig], TokenCounter]
    """Gives a counter that uses a model's tokenizer alone. Raises ConfigError."""
    load: Callable[[ModelConfig, torch.dtype], Any]
    """Loads a pipeline on the CPU, with the configuration's VAE and IP-Adapter: an object with `device`. Raises
    ConfigError."""
    base: Callable[[Any], Base]
    """Gives the parts of a loaded pipeline, which may be a user's own. Raises ConfigError if it cannot be used."""
    checks: Callable[[ModelConfig, Demand], Iterable[Check]] = lambda config, demand: ()
    """Gives what can be checked of a model before its weights are loaded. Downloads nothing."""


@dataclass(frozen=True)
class Rows:
    """The conditions of the rows of one denoiser call."""

    states: Tensor  # [rows, L, D]
    """Text states, as `Base.encode` makes them."""
    pooled: Tensor  # [rows, P]
    sizes: Tensor  # [rows, 6]
    """Original height and width, crop top and left, target height and width, all in px."""
    image: Tensor | None = None  # [rows, 1, ...]
    """Image prompts, as `ImageAdapter` makes them."""


class Denoiser(Protocol):
    """The network that predicts: a diffusers UNet, or anything else that is called like a UNet."""

    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool, **arguments: Any) -> tuple[Tensor, ...]:
        """Outputs [N, C, h, w] (first of the tuple) for noisy latents [N, C, h, w] at one timestep [].

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

    def path(self, steps: int) -> tuple[Step, ...]:
        """The steps of the noise schedule. Raises ConfigError for a schedule that is not supported."""

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt, start and end included."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """(states [N, L, D], pooled [N, P]) of prompts or negative prompts. P = 0 if the denoiser reads no pooled
        text."""

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
