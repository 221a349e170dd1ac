"""Stable Diffusion 3 and 3.5: medium, large and turbo, with or without T5.

The transformer reads latents in squares of 2 x 2, the states of two CLIP encoders side by side, T5's states after them
(its padding included) and both pooled texts. A model without T5 reads zeros in its place. Positions come from a table,
from whose middle a view takes its own size, so a view has at most the table's size. Skip-layer guidance is left out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resmaster_stages.models.bases import sd3_files
from resmaster_stages.models.bases.base import (
    CLIP_TOKENS,
    Base,
    Geometry,
    ImageAdapter,
    Rows,
    Sampling,
    Texts,
    require_readable,
)
from resmaster_stages.models.bases.transformer import Transformer
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind, has
from resmaster_stages.models.flow import flow_schedule, image_shift
from resmaster_stages.models.schedule import Step, Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T5_TOKENS = 256
"""States of T5, or zeros in their place."""


def sampling(facts: Facts) -> Sampling:
    """Classifier-free guidance, and none for turbo, which its name tells. Version 3.5 normalises queries and keys."""
    if facts.guidance == "none" or (facts.guidance == "auto" and facts.named("turbo")):
        return Sampling("none", 4, 1.0, most_steps=16)
    return Sampling("cfg", 28, 4.5 if facts.transformer.get("qk_norm") else 7.0)


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """The scheduler's own levels, which it shifts twice towards noise: at its making and for a number of steps."""
    shift = image_shift(facts.scheduler, timing.cells // 4)
    return flow_schedule(facts.scheduler, steps, timing, shift=shift, spaced=False)


def largest_px(facts: Facts, factor: int) -> int | None:
    """The size of the table of positions. Positions of a model without one are computed for any size."""
    table = facts.transformer.get("pos_embed_max_size", 96)
    return None if table is None else int(table) * 2 * factor


@dataclass(frozen=True, eq=False)
class StableDiffusion3(Transformer):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """The states of CLIP and T5 one after the other, padding included, and CLIP's pooled texts."""
        length = T5_TOKENS if self.pipe.text_encoder_3 is None else self.tokens
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return Texts(states, pooled)

    def image_adapter(self) -> ImageAdapter | None:
        """The IP-Adapter, if one is loaded with its image encoder."""
        from resmaster_stages.models.sd3_adapter import adapter_of

        return adapter_of(self.denoiser.network, self.image_encoder)

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Sets the weight of the IP-Adapter, if one is loaded."""
        from resmaster_stages.models.sd3_adapter import adapter_scale

        return adapter_scale(self.denoiser.network, scale)

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The velocity eps - x0. Raises ConfigError for a view larger than the table of positions."""
        height, width = (side * self.geometry.latent_factor for side in sample.shape[-2:])
        require_readable(self.geometry, height, width, "a view", "use a method of views of the native size")
        return self.denoiser.network(
            hidden_states=sample,
            timestep=timestep.expand(len(sample)),
            encoder_hidden_states=rows.states,
            pooled_projections=rows.pooled,
            joint_attention_kwargs=None if rows.image is None else {"ip_adapter_image_embeds": rows.image[:, 0]},
            return_dict=False,
        )[0]


def _sd3(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return StableDiffusion3.of(KIND, pipe, facts, geometry)


KIND = Kind(
    name="Stable Diffusion 3",
    pipelines="StableDiffusion3(Img2Img|Inpaint|Inpainting|ControlNet|PAG)*Pipeline",
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    vae="AutoencoderKL",
    channels=16,
    in_channels=lambda transformer: transformer["in_channels"],
    sampling=sampling,
    path=path,
    base=_sd3,
    live=12.7,
    tokenizer="tokenizer_3",
    tokens=lambda facts: T5_TOKENS if has(facts.index, "tokenizer_3") else CLIP_TOKENS + 2,
    largest_px=largest_px,
    abilities=frozenset({"image_prompts"}),
    adapter_checks=sd3_files.checks,
    load_adapter=sd3_files.load,
)

SD3 = family_of_kind(KIND)
