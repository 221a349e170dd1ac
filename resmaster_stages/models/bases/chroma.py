"""Chroma: FLUX.1's transformer without pooled text and distilled guidance.

The transformer reads T5's states under a mask that keeps the first pad token and hides the others. Guidance is
classifier-free, except in Flash, which has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from resmaster_stages.models.bases import flux
from resmaster_stages.models.bases.base import Base, Geometry, Rows, Sampling, Texts
from resmaster_stages.models.bases.transformer_files import Facts, family_of_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def sampling(facts: Facts) -> Sampling:
    """Classifier-free guidance, none for Flash."""
    if facts.guidance == "none" or (facts.guidance == "auto" and facts.named("flash")):
        return Sampling("none", 12, 1.0)
    return Sampling("cfg", 35, 5.0)


@dataclass(frozen=True, eq=False)
class Chroma(flux.Flux):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """T5's states, and the mask of the words and the first pad token."""
        states, _, mask, *_ = self.pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return Texts(states, states.new_zeros(len(states), 0), mask.bool())

    def conditions(self, tokens: Tensor, states: Tensor, rows: Rows) -> dict[str, Any]:
        """The mask over text and image, of truth values. As numbers, as diffusers' `encode_prompt` gives the text's, it
        would be added to the scores, and hide nothing."""
        import torch

        assert rows.mask is not None
        image = rows.mask.new_ones(len(tokens), states.shape[1] - rows.mask.shape[1] + tokens.shape[1])
        return {"attention_mask": torch.cat([rows.mask, image], dim=1)}


def _chroma(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return Chroma.of(KIND, pipe, facts, geometry)


KIND = replace(
    flux.KIND,
    name="Chroma",
    pipelines="Chroma(Img2Img|Inpaint)?Pipeline",
    pipeline="ChromaPipeline",
    transformer="ChromaTransformer2DModel",
    sampling=sampling,
    require=partial(flux.require, ("tokenizer", "text_encoder")),
    base=_chroma,
    tokenizer="tokenizer",
    tokens=lambda facts: 512,
)

CHROMA = family_of_kind(KIND)
