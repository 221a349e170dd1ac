"""Upscaling methods: one file per paper, each a `compose(request)` that says what the canvas engine is made of.

Invariant: the names here are those of `config.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

from resmaster_stages.diffusion.loop import Composition
from resmaster_stages.methods import direct, multidiffusion, resmaster
from resmaster_stages.methods.request import Request

METHODS: dict[str, Callable[[Request], Composition]] = {
    "direct": direct.compose,
    "multidiffusion": multidiffusion.compose,
    "resmaster": resmaster.compose,
}
