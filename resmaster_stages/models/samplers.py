"""The names by which other programs know the steppers of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resmaster_stages.models.schedule import Timing

if TYPE_CHECKING:
    from resmaster_stages.models.bases.base import Base

_DETERMINISTIC = ("ddim_implied", "ddim_keep")
_NAMES = {**dict.fromkeys(_DETERMINISTIC, "DDIM"), "dpmpp_2m": "DPM++ 2M", "renoise": "LCM"}


def sampler_name(base: Base, stepper: str, steps: int) -> str:
    """The name that A1111 and ComfyUI have for a stepper on the path of a model; its own name where they have none.

    On the straight path of a flow-matching model, DDIM is Euler.
    """
    cells = (base.geometry.native_px // base.geometry.latent_factor) ** 2
    if stepper in _DETERMINISTIC and base.path(steps, Timing(cells))[0].prediction_type == "flow":
        return "Euler"
    return _NAMES.get(stepper, stepper)
