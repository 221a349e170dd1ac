"""Reads the sizes of a base model from its JSON files, without loading weights or importing torch."""

from __future__ import annotations

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.base import Geometry


def geometry_of(model: ModelConfig) -> Geometry:
    """The sizes of the model that `model` names: the pack, a folder or a hub id. Raises ConfigError."""
    return family_of(model).geometry(model)
