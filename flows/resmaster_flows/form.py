"""The form of a build: what its fields take, and the configuration that they make.

A configuration is named (a shipped one, a file, the dataset of an earlier build) or given whole. The other fields
change it. A field that is left as it is changes nothing.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import WithJsonSchema

from resmaster_flows.home import EXAMPLES
from resmaster_stages.config.changes import changed
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import MAX_BYTES, parse_config, values_in
from resmaster_stages.config.method import DEFAULT, method_class, methods
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.errors import ConfigError, UserError, did_you_mean
from resmaster_stages.planning.prompt_files import SUFFIXES
from resmaster_stages.storage.filesystem import open_file

AS_CONFIGURED = "as configured"
"""The choice that changes nothing."""
ROOT = "RESMASTER_ROOT"
"""Environment variable of runs: where datasets go if neither the form nor the configuration says so."""
FILES = (".yaml", ".yml", ".json")

if TYPE_CHECKING:
    MethodName = PresetName = str
else:  # choices of the form
    MethodName = Literal[(AS_CONFIGURED, *methods())]
    PresetName = Literal[
        tuple(dict.fromkeys([AS_CONFIGURED, *(name for each in methods().values() for name in each.presets)]))
    ]

Source = Annotated[
    DatasetConfig | dict[str, Any] | str,
    WithJsonSchema(
        {"anyOf": [{"type": "string", "title": "name, file or URL"}, {"type": "object", "title": "whole (JSON)"}]}
    ),
]
"""A configuration: the name of a shipped one, the path or URL of a file or dataset, or the whole of it."""


def configuration(config: Source, fields: Mapping[str, Any], advanced: str = "") -> DatasetConfig:
    """The configuration that the fields of the form make.

    fields: `name`, `root`, `input`, `model`, `method`, `preset`, `scale`, `limit` and `price`; empty text, 0 and
    `AS_CONFIGURED` change nothing. advanced: YAML, changed last.

    Raises ConfigError, with a line for each mistake, and UserError if a file or dataset cannot be read.
    """
    if isinstance(config, DatasetConfig) and not advanced and not any(map(_given, fields.values())):
        return config
    values, source = _written(config)
    values = _filled_in(values, {name: value for name, value in fields.items() if _given(value)})
    values = changed(values, _overrides(advanced))
    values["root"] = _root(values.get("root"))
    return parse_config(values, source)


def run_name(parameters: Mapping[str, Any]) -> str:
    """The name of the dataset that a build's parameters name, as far as they tell without reading anything."""
    config = parameters.get("config", "")
    if isinstance(config, DatasetConfig):
        own = config.name
    elif isinstance(config, Mapping):
        own = str(config.get("name", ""))
    else:
        own = _short(str(config))
    return str(parameters.get("name") or own or "a dataset")


def _short(place: str) -> str:
    return Path(place.removesuffix(f"/{layout.CONFIG}").rstrip("/")).name.removesuffix(".yaml").removesuffix(".yml")


def _given(value: Any) -> bool:
    return value not in (None, "", 0, AS_CONFIGURED)


def _written(config: Source) -> tuple[dict[str, Any], str]:
    """The values of a configuration, and what messages call it."""
    if isinstance(config, DatasetConfig):
        return config.model_dump(mode="json", exclude_unset=True), "configuration"
    if isinstance(config, Mapping):
        return dict(config), "configuration"
    if not isinstance(config, str):
        raise ConfigError(f"config: is {config!r}; give a name, a file, a URL, or a mapping of keys to values")
    place = config.strip()
    if not place:
        return {}, "form"
    if "/" not in place and not place.endswith(FILES):
        known = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
        if place not in known:
            raise ConfigError(
                f"config: no shipped configuration {place!r}{did_you_mean(place, known)}; known: {', '.join(known)}; "
                "or give the path or URL of a file, or of a dataset"
            )
        place = str(EXAMPLES / f"{place}.yaml")
    if place.endswith(FILES) and posixpath.basename(place) != layout.CONFIG:
        return _file(place), place
    dataset = open_dataset(place.removesuffix(layout.CONFIG))
    return dataset.config.model_dump(mode="json"), dataset.url


def _file(place: str) -> dict[str, Any]:
    """The values in a file at a path or URL, with paths beside it made whole."""
    folder, name = open_file(os.path.expanduser(place))
    try:
        data = folder.read(name)
    except FileNotFoundError:
        raise ConfigError(f"config: {place}: no such file; the worker of the build must reach it") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"config: {place}: has more than {MAX_BYTES:,} bytes; a configuration is a short YAML file")
    try:
        values = values_in(data.decode("utf-8-sig"), place)
    except UnicodeDecodeError:
        raise ConfigError(f"config: {place}: not a text file; a configuration is YAML in UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {place}: holds no keys and values")
    for key in ("prompts", "images"):
        value = values.get(key)
        if isinstance(value, str) and value and "://" not in value:
            own = os.path.expanduser(value)
            beside = str((Path(folder.path) / own).resolve()) if folder.local else folder.url_of(value)
            values[key] = own if os.path.isabs(own) else beside
    return values


def _filled_in(values: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the first fields of the form."""
    if "input" in fields:
        place = str(fields["input"])
        if "://" not in place and not os.path.isabs(os.path.expanduser(place)):
            raise ConfigError(f"input: {place} is relative to nothing here; give a whole path, or a URL")
        key = "prompts" if place.lower().endswith(SUFFIXES) else "images"
        values = {**{name: value for name, value in values.items() if name not in ("prompts", "images")}, key: place}
    changes = {name: fields[name] for name in ("name", "root", "limit") if name in fields}
    if "price" in fields:
        changes["dispatch"] = {"price": fields["price"]}
    if "model" in fields:
        values = {**values, "model": _other_model(values.get("model"), fields["model"])}
    return _with_method(changed(values, changes), fields)


def _other_model(model: Any, name: Any) -> Any:
    """The part `model` for another model. A commit and a variant belong to the model that they were given for."""
    kept = dict(model) if isinstance(model, Mapping) else {}
    if kept.get("id") != name:
        kept = {key: value for key, value in kept.items() if key not in ("revision", "variant")}
    return {**kept, "id": name}


def _with_method(values: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values with another method, preset or scale. A preset replaces what the configuration says of the settings
    that presets of the method have."""
    chosen = {name: fields[name] for name in ("method", "preset", "scale") if name in fields}
    if not chosen:
        return values
    if "method" in chosen or "preset" in chosen:
        values = changed(values, {"upscale": {key: chosen[key] for key in ("method",) if key in chosen}})
    upscale = values.get("upscale")
    if "preset" in chosen and isinstance(upscale, Mapping):
        try:
            presets = method_class(upscale.get("method", DEFAULT)).presets
        except ValueError as error:
            raise ConfigError(f"method: {error}") from None
        set_by_presets = {name for preset in presets.values() for name in preset}
        values = {**values, "upscale": {key: value for key, value in upscale.items() if key not in set_by_presets}}
    return changed(values, {"upscale": chosen})


def _overrides(advanced: Any) -> dict[str, Any]:
    values = values_in(advanced, "advanced") if isinstance(advanced, str) else advanced
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("advanced: write keys and values of a configuration, e.g. low_res: {steps: 30}")
    return values


def _root(root: Any) -> Any:
    """Where datasets go. A relative root would be relative to a folder of the worker's, so the deployed root counts."""
    if isinstance(root, str) and ("://" in root or os.path.isabs(os.path.expanduser(root))):
        return root
    if root is not None and not isinstance(root, str):
        return root
    if own := os.environ.get(ROOT):
        return own
    raise UserError(
        f"root: {root or DatasetConfig.model_fields['root'].default} is relative to nothing here; give a whole path or "
        f"s3://bucket/prefix, or deploy with {ROOT}"
    )
