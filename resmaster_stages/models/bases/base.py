"""What the engine asks of a base model: the contract that a file of this folder fulfils for its family.

A `Family` answers before any weights are loaded, so it is a table of functions that import torch only when they are
called. A `Base` is a loaded model of a family. Knows nothing about methods, views or any particular model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.models.places import ModelFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.models.schedule import Step

Ability = Literal["convolutions", "attention", "image_prompts"]
"""What a method may need of a family.

Convolutions and attentions under the names of diffusers' UNets, an IP-Adapter.
"""

Layers = Literal["sdxl", "sd1", "sd2"]
"""UNets whose layers some papers give settings for."""

TokenCounter = Callable[[str], int]
"""Number of content tokens of a text."""


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
class Family:
    """Base models that are loaded and called alike."""

    name: str
    """For messages."""
    pipelines: str
    """Names of diffusers' pipeline classes, by which a model's `model_index.json` or a loaded pipeline is recognised: a
    regular expression for the whole name."""
    abilities: frozenset[Ability]
    geometry: Callable[[ModelFiles], Geometry]
    """Read from a model's JSON files. Raises ConfigError."""
    token_counter: Callable[[ModelConfig], TokenCounter]
    """Counts tokens with a model's tokenizer alone. Raises ConfigError."""
    load: Callable[[ModelConfig, torch.dtype], Any]
    """A pipeline on the CPU, with the configuration's VAE and IP-Adapter: an object with `device`. Raises
    ConfigError."""
    base: Callable[[Any], Base]
    """The parts of a loaded pipeline, which may be a user's own. Raises ConfigError for one that cannot be used."""


@dataclass(frozen=True)
class Rows:
    """What the denoiser is told about the rows of one call."""

    states: Tensor  # [rows, L, D]
    """Text, as `Base.encode` makes it."""
    pooled: Tensor  # [rows, P]
    sizes: Tensor  # [rows, 6]
    """Original height and width, crop top and left, target height and width, all in px."""
    image: Tensor | None = None  # [rows, 1, ...]
    """Image prompts, as `ImageAdapter` makes them."""


class Denoiser(Protocol):
    """What predicts: a diffusers UNet, or anything else that is called like one."""

    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool, **arguments: Any) -> tuple[Tensor, ...]:
        """Outputs [N, C, h, w] (first of the tuple) for noisy latents [N, C, h, w] at one timestep []. arguments: what
        `Base.arguments` gives. What an output stands for is the path's affair (`Step.split`)."""


class ImageAdapter(Protocol):
    """Makes image prompts for the denoiser."""

    @property
    def encoder(self) -> Any:
        """A module."""

    def embed(self, crops: Tensor) -> Tensor:
        """Crops [N, 3, h, w] in [-1, 1] as embeddings [N, ...]."""

    def nothing(self, image: Tensor) -> Tensor:
        """The unconditional counterpart of embeddings [N, 1, ...], of their shape."""


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
        """What methods patch, too: for a UNet the module itself."""

    @property
    def vae(self) -> Any:
        """A module called like diffusers' AutoencoderKL: `encode(pixels).latent_dist.mode()`, `decode(latents)`."""

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """Modules that `encode` uses."""

    @property
    def image_encoder(self) -> Any | None:
        """Module that `image_adapter` uses."""

    @property
    def layers(self) -> Layers | None:
        """Whose layers its denoiser has; None if they are of no UNet that is named here."""

    @property
    def tokens(self) -> int:
        """Tokens that the text encoders read, start and end included. What a prompt has beyond them is lost."""

    def path(self, steps: int) -> tuple[Step, ...]:
        """The noise levels that are visited. Raises ConfigError for what cannot be followed."""

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end included."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """(states [N, L, D], pooled [N, P]) of prompts, or of negative prompts; P = 0 where nothing pooled is read."""

    def arguments(self, rows: Rows) -> dict[str, Any]:
        """Keyword arguments of one call of the denoiser."""

    def to_canvas(self, latents: Tensor) -> Tensor:
        """The VAE's latents [B, C, h, w] as the denoiser's."""

    def from_canvas(self, latents: Tensor) -> Tensor:
        """The denoiser's latents [B, C, h, w] as the VAE's."""

    def image_adapter(self) -> ImageAdapter | None:
        """None where none is loaded. Raises ConfigError for one that cannot be used."""

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Within the block image prompts have weight `scale`; with 0 they are out of the computation."""

    def row_bytes(self, height: int, width: int) -> int | None:
        """Greatest memory in bytes of one row of `height` x `width` latents in the denoiser; None if not known."""
