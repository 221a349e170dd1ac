"""PixArt-alpha and PixArt-Sigma.

Both follow a variance-preserving path (`models.schedule`). The transformer reads latents in squares of 2 x 2 and T5's
states with their mask, by cross-attention. Its output has twice the latents' channels: eps, and a variance that is not
used. PixArt-alpha at 1024 px also reads a size and an aspect ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from resmaster_stages.models.bases.base import Base, Geometry, Rows, Sampling, Texts
from resmaster_stages.models.bases.transformer import Transformer
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind
from resmaster_stages.models.schedule import Step, Timing, make_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def reads_sizes(facts: Facts) -> bool:
    """Whether the transformer reads a size and an aspect ratio: PixArt-alpha at 1024 px."""
    told = facts.transformer.get("use_additional_conditions")
    return facts.transformer.get("sample_size", 128) == 128 if told is None else bool(told)


def sampling(facts: Facts) -> Sampling:
    """Classifier-free guidance, and none for LCM, which the scheduler or the name tells."""
    lcm = facts.scheduler.get("_class_name") == "LCMScheduler" or facts.named("lcm")
    if facts.guidance == "none" or (facts.guidance == "auto" and lcm):
        return Sampling("none", 4, 1.0, most_steps=16)
    return Sampling("cfg", 20, 4.5)


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """The path that the scheduler's configuration describes, or through the timesteps of `timing`."""
    return make_schedule(facts.scheduler, steps, timing.timesteps)


@dataclass(frozen=True, eq=False)
class PixArt(Transformer):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """T5's states and which of them are text."""
        states, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=self.tokens
        )
        return Texts(states, states.new_zeros(len(states), 0), mask.bool())

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The noise eps."""
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if reads_sizes(self.facts):
            size = rows.sizes[:, 4:]
            told = {"resolution": size.to(sample.dtype), "aspect_ratio": (size[:, :1] / size[:, 1:]).to(sample.dtype)}
        output: Tensor = self.denoiser.network(
            sample,
            encoder_hidden_states=rows.states,
            encoder_attention_mask=rows.mask,
            timestep=timestep.expand(len(sample)),
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
        return output[:, : sample.shape[1]]


def _sigma(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return PixArt.of(SIGMA, pipe, facts, geometry)


def _alpha(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return PixArt.of(ALPHA, pipe, facts, geometry)


SIGMA = Kind(
    name="PixArt-Sigma",
    pipelines="PixArtSigma(PAG)?Pipeline",
    pipeline="PixArtSigmaPipeline",
    transformer="PixArtTransformer2DModel",
    older="Transformer2DModel",
    vae="AutoencoderKL",
    channels=4,
    in_channels=lambda transformer: transformer.get("in_channels", 4),
    sampling=sampling,
    path=path,
    base=_sigma,
    live=11.3,
    tokens=lambda facts: 300,
    abilities=frozenset({"attention"}),
    shifted=False,
    native_px=lambda facts, factor: facts.transformer["sample_size"] * factor,
)

ALPHA = replace(
    SIGMA,
    name="PixArt-alpha",
    pipelines="PixArtAlphaPipeline",
    pipeline="PixArtAlphaPipeline",
    tokens=lambda facts: 120,
    base=_alpha,
)

PIXART_SIGMA, PIXART_ALPHA = family_of_kind(SIGMA), family_of_kind(ALPHA)
