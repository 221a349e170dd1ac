"""FLUX.2: dev and klein, and checkpoints in their shape.

The transformer reads tokens of 2 x 2 latents, with four positions each (time, row, column, word), and the states of
three layers of a language model, its padding included. The VAE's latents are normalised by the statistics of a batch
norm: one mean and one variance for each channel and each place in a square of 2 x 2 latents. The time shift depends on
the number of steps.

dev has distilled guidance: the guidance scale is a number that the transformer reads, and negative prompts have no
effect. klein is distilled to few steps and has none, as its `model_index.json` says. klein-base has classifier-free
guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import Base, Geometry, Rows, Sampling, Texts
from resmaster_stages.models.bases.transformer import Transformer, packed, unpacked
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind, is_number
from resmaster_stages.models.flow import empirical_shift, flow_schedule
from resmaster_stages.models.schedule import Step, Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CFG, _DISTILLED = Sampling("cfg", 50, 4.0), Sampling("none", 4, 1.0, most_steps=16)


def dev_sampling(facts: Facts) -> Sampling:
    """Embedded guidance."""
    if facts.guidance == "cfg":
        return _CFG
    if facts.guidance == "none" or not facts.transformer.get("guidance_embeds"):
        return _DISTILLED
    return Sampling("embedded", 50, 4.0)


def klein_sampling(facts: Facts) -> Sampling:
    """Classifier-free guidance for klein-base, none for klein."""
    distilled = facts.index.get("is_distilled") if facts.guidance == "auto" else facts.guidance == "none"
    return _DISTILLED if distilled else _CFG


def require(facts: Facts) -> None:
    """Raise ConfigError unless the VAE's batch norm is as the engine computes it."""
    least, patch = facts.vae.get("batch_norm_eps", 1e-4), facts.vae.get("patch_size", [2, 2])
    if not is_number(least) or not 0 <= least < 1:
        said = f"batch_norm_eps is {repr(least)[:LONGEST_SHOWN]} and must be a small number"
    elif patch not in ([2, 2], (2, 2)):
        said = f"patch_size is {repr(patch)[:LONGEST_SHOWN]} and must be [2, 2]"
    else:
        return
    raise ConfigError(f"vae/config.json: {said}; download the model again")


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """Evenly spaced levels, moved as for an image of the view's size."""
    return flow_schedule(facts.scheduler, steps, timing, shift=empirical_shift(timing.cells // 4, steps))


@lru_cache(maxsize=32)
def positions(counts: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """The positions (time, row, column, word) of a grid with so many tokens along each axis: [tokens, 4]."""
    import torch

    return torch.cartesian_prod(*(torch.arange(count) for count in counts)).to(device)


@dataclass(frozen=True, eq=False)
class Flux2(Transformer):
    """A loaded model, with a Mistral as its language model."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which a user's own pipeline may have inside a processor of texts and images."""
        return getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt in the chat template."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        chats = format_input(list(prompts), self.pipe.system_message)
        template = self.pipe.tokenizer.apply_chat_template
        return [len(ids) for ids in template(chats, tokenize=True, return_dict=True)["input_ids"]]

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """The states of the language model, padding included."""
        states, _ = self.pipe.encode_prompt(prompts, device=device, max_sequence_length=self.tokens)
        return Texts(states, states.new_zeros(len(states), 0))

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The velocity eps - x0."""
        height, width = sample.shape[-2:]
        tokens = packed(sample)
        scale = None
        if self.facts.transformer.get("guidance_embeds"):
            scale = timestep.new_full((len(tokens),), rows.guidance_scale)
        output = self.denoiser.network(
            hidden_states=tokens,
            timestep=timestep.to(tokens.dtype).expand(len(tokens)) / 1000,
            guidance=scale,
            encoder_hidden_states=rows.states,
            txt_ids=positions((1, 1, 1, rows.states.shape[1]), tokens.device),
            img_ids=positions((1, height // 2, width // 2, 1), tokens.device),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def to_canvas(self, latents: Tensor) -> Tensor:
        """(latents - mean) / deviation, by the VAE's batch norm."""
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def from_canvas(self, latents: Tensor) -> Tensor:
        """The inverse of `to_canvas`."""
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents [B, C, h, w] with even sides: [1, C, h, w] each."""
        norm, (channels, height, width) = self.vae.bn, latents.shape[1:]
        deviation = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        mean, deviation = (
            values.view(1, channels, 2, 2).repeat(1, 1, height // 2, width // 2).to(latents)
            for values in (norm.running_mean, deviation)
        )
        return mean, deviation


@dataclass(frozen=True, eq=False)
class Klein(Flux2):
    """A loaded model with a Qwen as its language model."""

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt in the chat template."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        return [len(ids) for ids in self.tokenizer(texts, truncation=False, verbose=False).input_ids]


def _dev(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return Flux2.of(DEV, pipe, facts, geometry)


def _klein(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return Klein.of(KLEIN, pipe, facts, geometry)


DEV = Kind(
    name="FLUX.2",
    pipelines="Flux2Pipeline",
    pipeline="Flux2Pipeline",
    transformer="Flux2Transformer2DModel",
    vae="AutoencoderKLFlux2",
    channels=32,
    in_channels=lambda transformer: transformer["in_channels"] // 4,
    sampling=dev_sampling,
    path=path,
    base=_dev,
    live=21.3,
    require=require,
    plain_tokenizer=True,
    abilities=frozenset({"positions"}),
    template=48,  # the system message takes most of them
)

KLEIN = replace(
    DEV,
    name="FLUX.2 klein",
    pipelines="Flux2Klein(Inpaint)?Pipeline",
    pipeline="Flux2KleinPipeline",
    sampling=klein_sampling,
    base=_klein,
    plain_tokenizer=False,
    template=12,
)

FLUX_2, FLUX_2_KLEIN = family_of_kind(DEV), family_of_kind(KLEIN)
