"""Encodes prompts as text embeddings, every distinct prompt once.

A prompt with more tokens than the text encoders take loses its end. `truncated` tells which prompts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils import logging as of_diffusers
from torch import Tensor

from resmaster_stages.models.bases.base import Texts
from resmaster_stages.models.parts import Models
from resmaster_stages.models.quiet import quiet

_BATCH, _LARGE_BATCH = 32, 8
"""Texts at once, and for large text encoders, of which some pipelines take the states of all layers."""


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of distinct prompts, and the index of the prompt that each item uses."""

    states: Tensor  # [U, L, D]
    pooled: Tensor  # [U, P]; P = 0 where nothing pooled is read
    index: Tensor  # [N], long: item -> prompt
    mask: Tensor | None = None  # [U, L], bool: which states are read; None: all
    lengths: tuple[int, ...] = ()
    """With a mask: the number of states of each item that are read."""

    def padded(self, length: int) -> TextEmbeddings:
        """With `length` states per prompt, of which no further one is read."""
        texts = Texts(self.states, self.pooled, self.mask).padded(length)
        return replace(self, states=texts.states, mask=texts.mask)


def truncated(models: Models, prompts: Sequence[str]) -> list[bool]:
    """Whether each prompt has more tokens than the text encoders take."""
    return [count > models.base.tokens for count in models.base.count(prompts)]


def encode_prompts(models: Models, prompts: Sequence[str], *, negative: bool = False) -> TextEmbeddings:
    """Embeddings of `prompts`, one item each.

    A text may be embedded differently as a `negative` prompt than as a prompt.
    """
    base, distinct = models.base, list(dict.fromkeys(prompts))
    size = _LARGE_BATCH if base.family.large_text else _BATCH
    batches = [distinct[i : i + size] for i in range(0, len(distinct), size)]
    # quiet, because `truncated` tells of long prompts
    with torch.inference_mode(), models.using(*base.text_encoders), quiet(of_diffusers):
        parts = [base.encode(batch, negative, models.device) for batch in batches]
    longest = max(part.states.shape[1] for part in parts)
    parts = [part.padded(longest) for part in parts]
    states = torch.cat([part.states for part in parts]).to(models.dtype)
    pooled = torch.cat([part.pooled for part in parts]).to(models.dtype)
    masks = [part.mask for part in parts if part.mask is not None]
    places = {prompt: place for place, prompt in enumerate(distinct)}
    index = torch.tensor([places[prompt] for prompt in prompts], device=models.device)
    if not masks:
        return TextEmbeddings(states, pooled, index)
    mask = torch.cat(masks)
    read = mask.sum(dim=1).tolist()
    return TextEmbeddings(states, pooled, index, mask, tuple(read[places[prompt]] for prompt in prompts))
