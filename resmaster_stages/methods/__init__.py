"""Upscaling methods: one file per paper, each of which says what the canvas engine is made of.

Methods of one stage have a `compose(request)`, the others a `stages(request)`.

Invariant: the names here are those of `config.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

from resmaster_stages.methods import (
    c_upscale,
    demofusion,
    direct,
    fouriscale,
    freescale,
    multidiffusion,
    resmaster,
    scalecrafter,
)
from resmaster_stages.methods.passes import Stage, single
from resmaster_stages.methods.request import Request

METHODS: dict[str, Callable[[Request], tuple[Stage, ...]]] = {
    "direct": single(direct.compose),
    "multidiffusion": single(multidiffusion.compose),
    "resmaster": single(resmaster.compose),
    "demofusion": demofusion.stages,
    "scalecrafter": single(scalecrafter.compose),
    "fouriscale": single(fouriscale.compose),
    "freescale": freescale.stages,
    "c_upscale": c_upscale.stages,
}
