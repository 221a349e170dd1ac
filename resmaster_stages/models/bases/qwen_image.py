"""Qwen-Image.

The transformer reads tokens of 2 x 2 latents and Qwen2.5-VL's states with a mask, in one length for all rows. Guidance
is classifier-free, and gives each token the norm that its conditional prediction had. The VAE is one for videos: it is
called with a time axis of one frame, and its latents are normalised channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import Base, Geometry, Rows, Sampling, Texts, guide
from resmaster_stages.models.bases.transformer import Transformer, packed, unpacked
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind, is_number
from resmaster_stages.models.flow import flow_schedule, image_shift
from resmaster_stages.models.schedule import Step, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

NATIVE_PX = 1328
"""Edge of square images of the sizes that the model was trained on, which its files do not tell."""

VARIANTS = {
    "guidance_embeds": "has distilled guidance, which diffusers cannot call",
    "zero_cond_t": "is one of Qwen-Image-Edit",
    "use_additional_t_cond": "is one of Qwen-Image-Layered",
    "use_layer3d_rope": "is one of Qwen-Image-Layered",
}
"""Switches of the transformer that plain Qwen-Image has not, and what they mean."""


def sampling(facts: Facts) -> Sampling:
    """Classifier-free guidance, and none for checkpoints whose name says that they are distilled to few steps."""
    distilled = facts.named("lightning", "turbo", "distill")
    if facts.guidance == "none" or (distilled and facts.guidance != "cfg"):
        return Sampling("none", 8, 1.0, most_steps=30)
    return Sampling("cfg", 50, 4.0)


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """Evenly spaced levels, moved as for an image of the view's size and stretched to the scheduler's last level."""
    return flow_schedule(facts.scheduler, steps, timing, shift=image_shift(facts.scheduler, timing.cells // 4))


def factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one axis. Raises LookupError and TypeError."""
    halvings = vae["temperal_downsample"]
    if not isinstance(halvings, list | tuple):
        raise TypeError(f"temperal_downsample is {halvings!r}")
    return 2 ** len(halvings)


def require_plain(facts: Facts) -> None:
    """Raise ConfigError for transformers of other tasks, and for damages that loading does not find."""
    for switch, meaning in VARIANTS.items():
        if facts.transformer.get(switch):
            raise ConfigError(f"its transformer ({switch}) {meaning}; give a plain base model")
    parts, width = (
        facts.transformer.get("axes_dims_rope", (16, 56, 56)),
        facts.transformer.get("attention_head_dim", 128),
    )
    if not isinstance(parts, list | tuple) or not all(map(is_number, parts)) or sum(parts) != width:
        raise ConfigError(
            f"transformer/config.json: axes_dims_rope do not sum up to {width!r}; download the model again"
        )
    channels = facts.vae.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        values = facts.vae.get(name)
        if not isinstance(values, list | tuple) or len(values) != channels or not all(map(is_number, values)):
            raise ConfigError(f"vae/config.json: {name} is no list of {channels} numbers; download the model again")
    if any(value <= 0 for value in facts.vae["latents_std"]):
        raise ConfigError("vae/config.json: latents_std has numbers below or equal to 0; download the model again")


class StillVae:
    """A VAE of videos that is called as VAEs of images are: pixels [B, 3, H, W], latents [B, C, h, w]."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        """The VAE's."""
        return self.network.dtype

    @property
    def config(self) -> Any:
        """The VAE's."""
        return self.network.config

    def parameters(self) -> Iterator[Any]:
        """The VAE's."""
        return self.network.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The VAE's."""
        return self.network.state_dict()

    def to(self, *args: Any, memory_format: object = None, **kwargs: Any) -> StillVae:
        """Moves the VAE. Weights of convolutions over time have five axes, which fit no `memory_format` of images."""
        if args or kwargs:
            self.network.to(*args, **kwargs)
        return self

    def encode(self, pixels: Tensor) -> Any:
        """The distribution of latents, of which the mode alone can be had."""
        posterior = self.network.encode(pixels.unsqueeze(2)).latent_dist
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: posterior.mode().squeeze(2)))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        """The pixels, in a tuple."""
        return (self.network.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2),)


@dataclass(frozen=True, eq=False)
class QwenImage(Transformer):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """Qwen2.5-VL's states, padded to the longest prompt."""
        states, mask = self.pipe.encode_prompt(list(prompts), device, max_sequence_length=self.tokens)
        if mask is None:
            mask = states.new_ones(states.shape[:2])
        return Texts(states, states.new_zeros(len(states), 0), mask.bool())

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The velocity eps - x0."""
        height, width = sample.shape[-2:]
        tokens = packed(sample)
        output = self.denoiser.network(
            hidden_states=tokens,
            timestep=timestep.to(tokens.dtype).expand(len(tokens)) / 1000,
            encoder_hidden_states=rows.states,
            encoder_hidden_states_mask=rows.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(tokens),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance. Each token of 2 x 2 latents gets back the norm of its conditional prediction."""
        guided, plain = packed(guide(unconditional, conditional, scale)), packed(conditional)
        norms = plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpacked(guided * norms, *conditional.shape[-2:])

    @cached_property
    def vae(self) -> StillVae:
        """The pipeline's, without its time axis."""
        return StillVae(self.pipe.vae)

    def to_canvas(self, latents: Tensor) -> Tensor:
        """(latents - mean) / spread, channel by channel."""
        mean, spread = self._moments(latents)
        return (latents - mean) / spread

    def from_canvas(self, latents: Tensor) -> Tensor:
        """The inverse of `to_canvas`."""
        mean, spread = self._moments(latents)
        return latents * spread + mean

    def _moments(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Means and spreads of the channels: [C, 1, 1] each."""
        config = self.pipe.vae.config
        return tuple(latents.new_tensor(each)[:, None, None] for each in (config.latents_mean, config.latents_std))


def _qwen_image(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return QwenImage.of(KIND, pipe, facts, geometry)


KIND = Kind(
    name="Qwen-Image",
    pipelines="QwenImage(Img2Img)?Pipeline",
    pipeline="QwenImagePipeline",
    transformer="QwenImageTransformer2DModel",
    vae="AutoencoderKLQwenImage",
    channels=16,
    in_channels=lambda transformer: transformer["in_channels"] // 4,
    vae_channels=lambda vae: vae.get("z_dim"),
    abilities=frozenset({"positions"}),
    template=5,
    require=require_plain,
    sampling=sampling,
    path=path,
    base=_qwen_image,
    live=14.1,
    factor=factor,
    native_px=lambda facts, factor: NATIVE_PX,
)

QWEN_IMAGE = family_of_kind(KIND)
