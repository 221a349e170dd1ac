"""The node that chooses a method and its settings."""

from __future__ import annotations

from typing import Any

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import DEFAULT, methods
from resmaster_stages.errors import ConfigError

from .written import WIDGET, settings_in

METHOD = "RESMASTER_METHOD"


def presets() -> list[str]:
    """The presets of all methods, `default` first."""
    return list(dict.fromkeys(["default", *(name for each in methods().values() for name in each.presets)]))


def written(method: str, preset: str, scale: float, steps: int, guidance_scale: float, settings: str) -> dict[str, Any]:
    """The settings as a configuration has them. Zeros are left out. Raises ConfigError."""
    numbers = {name: value for name, value in (("steps", steps), ("guidance_scale", guidance_scale)) if value}
    chosen = {} if preset == "default" else {"preset": preset}
    return {"method": method, **chosen, "scale": scale, **numbers, **settings_in(settings)}


class ChooseMethod:
    """Chooses a method and its settings."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Chooses the method of upscaling and its settings (docs/methods.md)."
    RETURN_TYPES = (METHOD,)
    RETURN_NAMES = ("method",)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        known = methods()
        of_preset = [f"{name}: {', '.join(each.presets)}" for name, each in known.items() if len(each.presets) > 1]
        zero = "0: as the method and the model recommend. Leave it at 0 for methods without it."
        return {
            "required": {
                "method": (list(known), {"default": DEFAULT}),
                "preset": (presets(), {"default": "default", "tooltip": "\n".join(of_preset)}),
                "scale": ("FLOAT", {"default": 2.0, "min": 1.0, "max": 64.0, "step": 0.25}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": zero}),
                "guidance_scale": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": zero}),
            },
            "optional": {"settings": WIDGET},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, method: str, preset: str, scale: float, steps: int, guidance_scale: float, settings: str = ""
    ) -> bool | str:
        """True, or what is wrong with the settings. Inputs that come from other nodes are not known yet (None)."""
        values = (method, preset, scale, steps, guidance_scale, settings)
        if None in values:
            return True
        try:
            parse_config({"name": "single", "upscale": written(*values)}, "ResMaster")
        except ConfigError as error:
            return str(error)
        return True

    def choose(
        self, method: str, preset: str, scale: float, steps: int, guidance_scale: float, settings: str = ""
    ) -> tuple[dict[str, Any]]:
        values = written(method, preset, scale, steps, guidance_scale, settings)
        parse_config({"name": "single", "upscale": values}, "ResMaster")
        return (values,)
