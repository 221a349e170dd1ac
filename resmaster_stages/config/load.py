"""Reads a configuration from a file or a mapping. A mistake is a ConfigError: one line that names the key at fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.method import DEFAULT, Method, method_class
from resmaster_stages.config.part import Part
from resmaster_stages.errors import ConfigError


def _explain(error: ValidationError, values: dict[str, Any], source: str) -> str:
    """The first mistake in a configuration, as one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        part = type_at(first["loc"][:-1], values)
        known = ", ".join(part.model_fields) if part else ""
        here = (
            f"method {part.model_fields['method'].default} knows" if part and issubclass(part, Method) else "known here"
        )
        return f"{source}: unknown key {where!r}" + (f"; {here}: {known}" if known else "")
    message = first["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    return f"{source}: {where}: {message}" + (f" (and {more} more)" if more else "")


def type_at(location: tuple[Any, ...], values: Any) -> type[Part] | None:
    """The class of the part of configuration `values` at a path such as ("upscale", "structure"), or None."""
    part: type[Part] = DatasetConfig
    for name in location:
        field = part.model_fields.get(str(name))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Part)]
        if not found:
            return None
        part, values = found[0], values.get(name, {})
        if part is Method:
            part = method_class(values.get("method", DEFAULT))
    return part


def parse_config(values: Any, source: str = "configuration") -> DatasetConfig:
    """Convert `values` (a mapping) to a configuration. Raises ConfigError with one line that names the key at fault."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {type(values).__name__}")
    try:
        return DatasetConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, values, source)) from None


def load_config(path: str | Path, **overrides: Any) -> DatasetConfig:
    """Read a YAML (or JSON) configuration file. Relative paths in its `prompts` and `images` are relative to the
    file, and `~` is the home folder.

    Overrides replace top-level keys. Overrides that are None are ignored. Their paths are relative to the current
    folder.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; resmaster init writes one to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the configuration file inside it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a configuration is YAML in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{place}: {getattr(error, 'problem', error)}") from None
    if isinstance(values, dict):
        for key in ("prompts", "images"):
            value = values.get(key)
            if isinstance(value, str) and value and "://" not in value:
                own = os.path.expanduser(value)
                values[key] = own if os.path.isabs(own) else str((path.parent / own).resolve())
        given = {key: value for key, value in overrides.items() if value is not None}
        if "images" in given:
            values.pop("prompts", None)
        if "prompts" in given:
            values.pop("images", None)
        values |= given
    return parse_config(values, str(path))
