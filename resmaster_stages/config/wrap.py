"""The setting `wrap`: the axes along which an image continues at the opposite border."""

from __future__ import annotations

from typing import Literal

Wrap = Literal["none", "horizontal", "vertical", "both"]

Axes = tuple[bool, bool]
"""Something of the two axes of an image: of its height, and of its width."""


def wrapped_axes(wrap: Wrap) -> Axes:
    """Whether an image continues along its height (below its last row with its first row) and along its width."""
    return wrap in ("vertical", "both"), wrap in ("horizontal", "both")


def wrap_of(axes: Axes) -> Wrap:
    """The setting with these axes: the inverse of `wrapped_axes`."""
    names: dict[Axes, Wrap] = {(False, False): "none", (False, True): "horizontal", (True, False): "vertical"}
    return names.get(axes, "both")
