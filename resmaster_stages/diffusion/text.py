"""Prompts to text embeddings, as the `encode_prompt` of diffusers' pipelines makes them; every distinct prompt once.

SDXL: penultimate states of both encoders side by side, and the pooled output of the second. Stable Diffusion 1.x and
2.x: the last states of the only encoder.

Knows nothing about views. Prompts beyond the encoders' 77 tokens lose their tail; `truncated` tells which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resmaster_stages.models.parts import Models

_BATCH = 32


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of distinct prompts, and which prompt each item uses."""

    states: Tensor  # [U, 77, D]
    pooled: Tensor  # [U, P]; P = 0 where the UNet reads none
    index: Tensor  # [N], long: item -> prompt


def count_tokens(models: Models, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt, start and end included; the greatest of all tokenizers."""
    counts = [[len(ids) for ids in tokenizer(list(prompts)).input_ids] for tokenizer in models.tokenizers]
    return [max(each) for each in zip(*counts)]


def truncated(models: Models, prompts: Sequence[str]) -> list[bool]:
    """Whether each prompt is longer than the text encoders take."""
    limit = min(tokenizer.model_max_length for tokenizer in models.tokenizers)
    return [count > limit for count in count_tokens(models, prompts)]


def _encode_batch(models: Models, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """([B, 77, D], [B, P]) of a batch of prompts."""
    states = []
    for tokenizer, encoder in zip(models.tokenizers, models.text_encoders):
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = encoder(tokens.input_ids.to(models.device), output_hidden_states=True)
        if not models.told_sizes:
            return output.last_hidden_state, output.last_hidden_state.new_zeros(len(prompts), 0)
        states.append(output.hidden_states[-2])
    return torch.cat(states, dim=-1), output[0]


def encode_prompts(models: Models, prompts: Sequence[str], *, negative: bool = False) -> TextEmbeddings:
    """Embeddings of `prompts`, one item each.

    As a `negative` prompt, the empty one is all zeros where the model was trained so (`force_zeros_for_empty_prompt`).
    """
    distinct = list(dict.fromkeys(prompts))
    with torch.inference_mode(), models.using(*models.text_encoders):
        parts = [_encode_batch(models, distinct[i : i + _BATCH]) for i in range(0, len(distinct), _BATCH)]
    states = torch.cat([part[0] for part in parts]).to(models.dtype)
    pooled = torch.cat([part[1] for part in parts]).to(models.dtype)
    if negative and models.zeros_for_empty_prompt and "" in distinct:
        states[distinct.index("")] = 0
        pooled[distinct.index("")] = 0
    places = {prompt: place for place, prompt in enumerate(distinct)}
    index = torch.tensor([places[prompt] for prompt in prompts], device=models.device)
    return TextEmbeddings(states, pooled, index)
