"""The datasets of a comparison: one per method and scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import yaml

from resmaster_stages.config.changes import changed
from resmaster_stages.config.dataset import LONGEST_NAME, DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import methods
from resmaster_stages.errors import ConfigError, did_you_mean
from resmaster_stages.keys import digest
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.identity import PACK_MODELS


@dataclass(frozen=True)
class Variant:
    """One method at one scale."""

    method: str
    """The method as the user wrote it, e.g. `resmaster+sg`."""
    scale: str
    """Height x width in native sizes, e.g. `2x4`."""
    config: DatasetConfig
    """The configuration of the variant's dataset."""


def variants(config: DatasetConfig, methods: str, scales: str) -> list[Variant]:
    """The variants that `--methods` and `--scales` (comma-separated) ask for, by scale, then method.

    Raises ConfigError for unknown methods, switches, keys or scales, and if two datasets would have the same name.
    """
    found: list[Variant] = []
    for scale in _listed(scales, "--scales"):
        sized = at_scale(config, scale)
        for method in _listed(methods, "--methods"):
            found.append(Variant(method, scale, _with_method(sized, method, scale)))
    names = [variant.config.name for variant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--methods {methods}: two of them would be the dataset {min(twice)!r}; leave one out")
    return found


def _listed(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError(f"{option}: is empty; give a comma-separated list")
    return items


def at_scale(config: DatasetConfig, scale: str) -> DatasetConfig:
    """`config` for a target of `HxW` native sizes, e.g. `2x4` (twice as high, four times as wide).

    The low-res image has the target's aspect ratio and about the native area, as nearly as the latent grid allows. Both
    sides are enlarged by the same factor. The user's own images keep their size, so both numbers of `scale` must be
    equal there, and are the factor.
    """
    parts = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", scale)
    if not parts:
        raise ConfigError(f"--scales {scale}: give height x width in native sizes, e.g. 2x2,2x4,4x4")
    rows, cols = int(parts[1]), int(parts[2])
    if config.images:
        if rows != cols:
            raise ConfigError(f"--scales {scale}: your own images keep their shape; give equal numbers, e.g. 2x2,4x4")
        return _changed(config, f"--scales {scale}", {"scale": rows}, {})
    geometry = geometry_of(config.model)
    height, width = low_res_size(rows, cols, geometry.native_px, geometry.step_px)
    return _changed(
        config, f"--scales {scale}", {"scale": rows * geometry.native_px / height}, {"height": height, "width": width}
    )


def low_res_size(rows: int, cols: int, native: int, factor: int) -> tuple[int, int]:
    """(height, width) in px in the ratio `rows`:`cols`, multiples of `factor`, with the area nearest to `native`
    squared."""
    common = gcd(rows, cols)
    tall, wide = rows // common * factor, cols // common * factor
    nearest = max(1, round(native / (tall * wide) ** 0.5))
    unit = min((nearest - 1 or 1, nearest, nearest + 1), key=lambda n: (abs(n * n * tall * wide - native**2), n))
    return unit * tall, unit * wide


def _with_method(config: DatasetConfig, text: str, scale: str) -> DatasetConfig:
    """`config` with a method written as `multidiffusion`, `resmaster+sg+tip`, `resmaster-etp` or
    `resmaster:stride=0.75`."""
    head, *settings = text.split(":")
    parts = re.fullmatch(r"([a-z_]+)((?:\+[a-z]+)*|(?:-[a-z]+)*)", head)
    if not parts:
        raise ConfigError(
            f"--methods {text}: write a method, e.g. multidiffusion, resmaster, resmaster+sg, resmaster-etp"
        )
    method, named = parts[1], re.findall(r"[a-z]+", parts[2])
    switches = methods()[method].switches if method in methods() else {}
    for name in named:
        if name not in switches:
            having = [f"{each} has {', '.join(known.switches)}" for each, known in methods().items() if known.switches]
            raise ConfigError(
                f"--methods {text}: no switch {name!r}{did_you_mean(name, switches)} here; {'; '.join(having)}"
            )
    upscale: dict[str, Any] = {"method": method}
    if named:
        keep = parts[2][0] == "+"
        for name, part in switches.items():
            upscale[part] = {"enabled": (name in named) == keep}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--methods {text}: write settings as key=value, e.g. resmaster:stride=0.75")
        inner = upscale
        *above, last = path.split(".")
        for name in above:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--methods {text}: {name} has a value and keys below it; give one of both")
        inner[last] = _value(value, text)
    label = re.sub(r"[^A-Za-z0-9-]+", "_", text)
    room = LONGEST_NAME - len(f"{config.name}--{scale}")
    if len(label) > room:
        mark = digest(text)[:8]
        label = f"{label[: max(0, room - len(mark) - 1)]}-{mark}"
    own = "picturebook" if config.model.id in PACK_MODELS else "clip"
    quality = {"features": own} if config.quality.features == "none" else {}
    named_config = config.model_copy(update={"name": f"{config.name}-{label}-{scale}"})
    return _changed(named_config, f"--methods {text}", upscale, {}, quality)


def _value(written: str, text: str) -> Any:
    """The value that is written in YAML in one of the settings of `text`. Raises ConfigError."""
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        raise ConfigError(f"--methods {text}: {written!r} is no value; write e.g. resmaster:stride=0.75") from None


def _changed(
    config: DatasetConfig,
    source: str,
    upscale: Mapping[str, Any],
    low_res: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> DatasetConfig:
    values = config.model_dump(mode="json", exclude_unset=True)  # the method's preset decides fields that are not set
    return parse_config(changed(values, {"upscale": upscale, "low_res": low_res, "quality": quality or {}}), source)
