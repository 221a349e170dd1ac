"""Changes the values of a configuration that a user has written, before they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resmaster_stages.config.method import DEFAULT, with_method


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration with `changes`, key by key. The settings of the method that another method does not
    know are dropped with the method."""
    known = dict(values)
    upscale, new = known.get("upscale"), changes.get("upscale")
    if isinstance(upscale, Mapping) and isinstance(new, Mapping):
        known["upscale"] = with_method(upscale, new.get("method", upscale.get("method", DEFAULT)))
    return {**known, **{name: _merged(known.get(name), value, top=True) for name, value in changes.items()}}


def _merged(old: Any, new: Any, top: bool = False) -> Any:
    """Two values of a key as one. A preset below the top stands for all the settings of its part."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping) or ("preset" in new and not top):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}
