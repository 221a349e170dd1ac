"""The files of a ControlNet for UNets: finds out before loading whether the net fits the base model.

A ControlNet adds features to those of the UNet's encoder, so both must have the same blocks and read the same text. A
union ControlNet reads several kinds of control images, and is told which by a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resmaster_stages.config.model import ControlNetConfig
from resmaster_stages.config.part import LONGEST_SHOWN
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.files import DIFFUSERS, folder_with, object_in, require_weights, say_missing
from resmaster_stages.models.places import ModelFiles

PLAIN, UNION = "ControlNetModel", "ControlNetUnionModel"
"""Diffusers' classes."""

MODES: Mapping[str, int] = {"canny": 3, "tile": 6}
"""Kind of control image -> its number in union ControlNets for SDXL (xinsir's, the tile since its ProMax version)."""

_OWN = {"in_channels": 4, "layers_per_block": 2, "block_out_channels": None, "cross_attention_dim": None}
"""What a net must have as the UNet has it -> what configurations mean that do not say."""


def kind_of(config: Mapping[str, Any]) -> str:
    """The class that loads a net with this configuration. Raises ConfigError if it is no ControlNet for UNets."""
    name = config.get("_class_name")
    if name not in (PLAIN, UNION, "ControlNetModel_Union"):  # the last is how the union's authors call it
        raise ConfigError(
            f"it is {repr(name)[:LONGEST_SHOWN]}, not a {PLAIN} or {UNION}; give a ControlNet for SDXL or Stable "
            "Diffusion in diffusers format"
        )
    return PLAIN if name == PLAIN and "num_control_type" not in config else UNION


def require_fit(net: Mapping[str, Any], unet: Mapping[str, Any], latent_factor: int, image: str | None = None) -> None:
    """Raise ConfigError unless a net with the configuration `net` can serve a UNet with the configuration `unet`.

    latent_factor: pixels per latent. image: the kind of control image that it shall read.
    """
    kind = kind_of(net)
    for name, default in _OWN.items():
        own, wanted = _plain(net.get(name, default)), _plain(unet.get(name, default))
        if own != wanted:
            raise ConfigError(
                f"it was made for another base model (its {name} is {own}, the UNet's {wanted}); give a ControlNet for "
                "this one"
            )
    if net.get("addition_embed_type") not in (None, unet.get("addition_embed_type")):
        raise ConfigError(
            f"it reads {repr(net['addition_embed_type'])[:LONGEST_SHOWN]}, which the base model does not have; give a "
            "ControlNet for this one"
        )
    if net.get("conditioning_channels", 3) != 3:
        raise ConfigError(
            f"its control image has {repr(net['conditioning_channels'])[:LONGEST_SHOWN]} channels, as for inpainting; "
            "give one that reads an image of 3"
        )
    _require_plain_embedding(net, latent_factor)
    if image is not None and kind == UNION:
        _require_mode(net, image)


def _plain(value: Any) -> Any:
    """A value of a configuration, so that it can be compared and shown."""
    return list(value) if isinstance(value, tuple) else value


def _require_plain_embedding(net: Mapping[str, Any], latent_factor: int) -> None:
    levels = net.get("conditioning_embedding_out_channels", (16, 32, 96, 256))
    found = 2 ** (len(levels) - 1) if isinstance(levels, (list, tuple)) and len(levels) < 16 else None
    if found != latent_factor:
        raise ConfigError(
            f"it makes one cell of {found} x {found} pixels of its control image, and the base model's latents have "
            f"{latent_factor} x {latent_factor}; give a ControlNet for this base model"
        )
    if net.get("controlnet_conditioning_channel_order", "rgb") != "rgb" or net.get("global_pool_conditions", False):
        raise ConfigError(
            "it reads its control image as BGR, or only its mean; give a ControlNet for tiles or edges that does not"
        )


def _require_mode(net: Mapping[str, Any], image: str) -> None:
    known = net.get("num_control_type", 6)
    if not isinstance(known, int) or known <= MODES[image]:
        raise ConfigError(
            f"it has {repr(known)[:LONGEST_SHOWN]} kinds of control images, and {image} is number {MODES[image]}; give "
            "the ProMax version, a ControlNet for this kind alone, or another upscale.control.image"
        )


def check(config: ControlNetConfig, unet: Mapping[str, Any], latent_factor: int, image: str | None) -> None:
    """Raise ConfigError unless the net's files are whole and fit the UNet, and NotOnThisMachine if they are at the
    hub."""
    name = _name(config)
    folder = folder_with(config.id, name, config.revision) / config.folder
    require_fit(object_in(folder / "config.json"), unet, latent_factor, image)
    if config.variant and not any(folder.glob(f"{DIFFUSERS}*.{config.variant}*.safetensors")):
        say_missing(config.id, f"no weights in {folder} are of the variant {config.variant!r}")
    require_weights(config.id, folder, DIFFUSERS, config.variant)


def configuration(config: ControlNetConfig) -> dict[str, Any]:
    """The net's configuration, which is downloaded if need be. Raises ConfigError."""
    return ModelFiles(config.id, config.revision).json(_name(config))


def _name(config: ControlNetConfig) -> str:
    return (Path(config.folder) / "config.json").as_posix()
