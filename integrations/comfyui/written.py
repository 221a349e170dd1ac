"""Settings that a user writes into a node as YAML, as in a configuration."""

from __future__ import annotations

from typing import Any

import yaml

from resmaster_stages.errors import ConfigError

WIDGET = (
    "STRING",
    {"multiline": True, "default": "", "tooltip": "Further settings, one `key: value` a line (docs/configuration.md)."},
)
"""The input of a node for such settings."""


def settings_in(text: str) -> dict[str, Any]:
    """The settings in a YAML text; none in an empty one. Raises ConfigError."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = f"line {place.line + 1}" if place else "the text"
        raise ConfigError(f"settings: {line} is no YAML; write one `key: value` a line") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError("settings: there are no keys; write one `key: value` a line")
    return values
