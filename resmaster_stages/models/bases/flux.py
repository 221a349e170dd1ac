"""FLUX.1: dev, schnell, Krea-dev and checkpoints in their shape.

The transformer reads tokens of 2 x 2 latents, T5's states (its padding included) and CLIP's pooled text. dev and Krea
have distilled guidance: the guidance scale is a number that the transformer reads, and negative prompts have no effect.
schnell has none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import adapter_files, flux_files
from resmaster_stages.models.bases.base import Base, Geometry, ImageAdapter, Rows, Sampling, Texts
from resmaster_stages.models.bases.transformer import Transformer, packed, unpacked
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind, has
from resmaster_stages.models.flow import flow_schedule, image_shift
from resmaster_stages.models.schedule import Step, Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def sampling(facts: Facts) -> Sampling:
    """Embedded guidance for dev and Krea, none for schnell."""
    if facts.guidance == "cfg":
        return Sampling("cfg", 28, 3.5)
    if facts.guidance == "none" or not facts.transformer.get("guidance_embeds"):
        return Sampling("none", 4, 1.0, most_steps=16)
    return Sampling("embedded", 28, 3.5)


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """Evenly spaced levels, moved as for an image of the view's size."""
    return flow_schedule(facts.scheduler, steps, timing, shift=image_shift(facts.scheduler, timing.cells // 4))


def require(parts: tuple[str, ...], facts: Facts) -> None:
    """Raise ConfigError unless the `parts` that encode text are there, and three axes of positions share the values of
    an attention head."""
    for part in parts:
        if not has(facts.index, part):
            raise ConfigError(f"it has no {part}, which its text needs; give a whole pipeline")
    axes = facts.transformer.get("axes_dims_rope", (16, 56, 56))
    whole = isinstance(axes, list | tuple) and len(axes) == 3 and all(type(each) is int and each > 0 for each in axes)
    if not whole or sum(axes) != facts.transformer.get("attention_head_dim", 128):
        raise ConfigError(
            "transformer/config.json: axes_dims_rope are not three numbers with the sum attention_head_dim; download "
            "the model again"
        )


@lru_cache(maxsize=32)
def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position (0, row, column) of each token of a view of `height` x `width` latents: [h / 2 * w / 2, 3]."""
    import torch

    rows, cols = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).reshape(-1, 3).to(device, torch.float32)


@dataclass(frozen=True, eq=False)
class Flux(Transformer):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """T5's states, padding included, and CLIP's pooled text."""
        states, pooled, _ = self.pipe.encode_prompt(prompts, prompts, device=device, max_sequence_length=self.tokens)
        return Texts(states, pooled)

    @property
    def context_tokens(self) -> int:
        """T5's, and Redux' if it is loaded."""
        return self.tokens + getattr(self.image_encoder, "tokens", 0)

    def image_adapter(self) -> ImageAdapter | None:
        """The IP-Adapter or Redux, if one is loaded. Raises ConfigError for an unsupported kind."""
        from resmaster_stages.models.flux_adapters import flux_adapter_of

        processor = getattr(self.pipe, "feature_extractor", None)
        mean = tuple(getattr(processor, "image_mean", None) or adapter_files.CLIP_MEAN)
        std = tuple(getattr(processor, "image_std", None) or adapter_files.CLIP_STD)
        return flux_adapter_of(self.denoiser.network, self.image_encoder, mean, std)

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Sets the weight of the IP-Adapter or Redux, if one is loaded."""
        from resmaster_stages.models.flux_adapters import flux_adapter_scale

        return flux_adapter_scale(self.denoiser.network, self.image_encoder, scale)

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The velocity eps - x0."""
        height, width = sample.shape[-2:]
        tokens, states = packed(sample), self.states(rows)
        ip_adapter = None if rows.image is None or rows.image.ndim > 3 else {"ip_adapter_image_embeds": [rows.image]}
        output = self.denoiser.network(
            hidden_states=tokens,
            timestep=timestep.to(tokens.dtype).expand(len(tokens)) / 1000,
            encoder_hidden_states=states,
            txt_ids=timestep.new_zeros(states.shape[1], 3),
            img_ids=image_ids(height, width, tokens.device),
            joint_attention_kwargs=ip_adapter,
            return_dict=False,
            **self.conditions(tokens, states, rows),
        )[0]
        return unpacked(output, height, width)

    def states(self, rows: Rows) -> Tensor:
        """T5's states, and after them Redux' tokens [rows, 1, tokens, D] of image prompts: [rows, L, D]."""
        import torch

        if rows.image is None or rows.image.ndim == 3:
            return rows.states
        return torch.cat([rows.states, self.pipe.image_encoder.scale * rows.image[:, 0]], dim=1)

    def conditions(self, tokens: Tensor, states: Tensor, rows: Rows) -> dict[str, Any]:
        """What the transformer is told of the rows beside `states`: CLIP's pooled text and the guidance scale.

        tokens: the packed views.
        """
        scale = None
        if self.facts.transformer.get("guidance_embeds"):
            scale = tokens.new_full((len(tokens),), rows.guidance_scale)
        return {"pooled_projections": rows.pooled, "guidance": scale}


def _flux(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return Flux.of(KIND, pipe, facts, geometry)


KIND = Kind(
    name="FLUX.1",
    pipelines="Flux(Img2Img|Inpaint|ControlNet)*Pipeline",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    vae="AutoencoderKL",
    channels=16,
    in_channels=lambda transformer: transformer["in_channels"] // 4,
    sampling=sampling,
    path=path,
    require=partial(require, ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")),
    base=_flux,
    live=17.1,
    tokenizer="tokenizer_2",
    tokens=lambda facts: 256 if sampling(facts).kind == "none" else 512,
    abilities=frozenset({"image_prompts", "positions"}),
    adapter_checks=flux_files.checks,
    load_adapter=flux_files.load,
)

FLUX = family_of_kind(KIND)
