"""Reads a configuration from a file or a mapping. All its mistakes are one ConfigError, with a line for each."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.method import DEFAULT, Method, method_class
from resmaster_stages.config.part import LONGEST_SHOWN, UNFIT, Part
from resmaster_stages.errors import ConfigError, did_you_mean
from resmaster_stages.redaction import one_line, printable, shortened

MAX_BYTES = 2**20
"""Maximum size of a configuration file."""
MAX_VALUES = 100_000
"""Maximum number of values in a configuration file, aliases written out."""
MOST_TOLD = 30
"""Maximum number of mistakes that are told at once."""
LONGEST_TOLD = 1_000
"""Maximum number of characters of what is told of one mistake."""


def _mistakes(error: ValidationError, values: dict[str, Any], source: str, lines: Lines) -> list[str]:
    """All mistakes in a configuration, one line each, in the order of the file."""
    found = []
    mistakes = sorted(error.errors(include_url=False), key=lambda each: lines.of(each["loc"]) or 0)
    for mistake in mistakes[:MOST_TOLD]:
        place = mistake["loc"]
        number = lines.of(place)
        line = "" if number is None else f"line {number}: "
        found.append(f"{source}: {line}{shortened(_told(mistake['type'], place, mistake, values), LONGEST_TOLD)}")
    if len(mistakes) > MOST_TOLD:
        found.append(f"{source}: and {len(mistakes) - MOST_TOLD:,} more mistakes; mend these first")
    return list(dict.fromkeys(found))


def _told(kind: str, place: tuple[Any, ...], mistake: Any, values: dict[str, Any]) -> str:
    """What is wrong with the value at `place`, in words."""
    where = printable(".".join(str(part)[:LONGEST_SHOWN] for part in place)) or "the file"
    if kind == "extra_forbidden":
        part = type_at(place[:-1], values)
        names = list(part.model_fields) if part else []
        known = ", ".join(names)
        here = (
            f"method {part.model_fields['method'].default} knows" if part and issubclass(part, Method) else "known here"
        )
        return f"unknown key {where!r}{did_you_mean(place[-1], names)}" + (f"; {here}: {known}" if known else "")
    message = mistake["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        message += did_you_mean(mistake["input"], re.findall(r"'([^']*)'", mistake["ctx"]["expected"]))
    return f"{where}: {message}"


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


def parse_config(values: Any, source: str = "configuration", lines: Lines | None = None) -> DatasetConfig:
    """Convert `values` (a mapping) to a configuration. Raises ConfigError with a line for each key at fault.

    lines: the lines of the keys in the file, if known.
    """
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {found}")
    lines = lines or Lines(None)
    twice = [f"{source}: {shortened(text, LONGEST_TOLD)}" for text in lines.twice[:MOST_TOLD]]
    try:
        config = DatasetConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*twice, *_mistakes(error, values, source, lines)) from None
    if twice:
        raise ConfigError(*twice)
    return config


def _text_of(path: Path) -> str:
    """The content of a configuration file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; resmaster init writes one to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the configuration file inside it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a configuration is YAML in UTF-8") from None
    except ValueError as error:  # NUL in the name
        raise ConfigError(f"{path}: cannot be read ({error}); check the path") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_BYTES:,} bytes; a configuration is a short YAML file")
    return text


def values_in(text: str, source: str) -> Any:
    """The values in the text of a configuration, unchecked. Raises ConfigError, whose message begins with `source`."""
    return _from_yaml(source, text)[0]


def _from_yaml(path: Path | str, text: str) -> tuple[Any, yaml.Node | None]:
    """The values in a YAML text, and the node that they were made from. Raises ConfigError."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if _expanded(node, {}) > MAX_VALUES:
            raise ConfigError(f"{path}: its aliases stand for more than {MAX_VALUES:,} values; write them out")
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{path}: not valid YAML{place}: {one_line(problem)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as error:  # a number or date that Python cannot hold, a wrong tag
        raise ConfigError(f"{path}: not valid YAML: a value cannot be read ({one_line(error)})") from None


def _expanded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The number of values that a node stands for, its aliases written out. Too many if a node holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # what an alias to a node inside itself stands for has no end
        inner = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_expanded(each, known) for each in inner)
    return known[id(node)]


class Lines:
    """The lines of the keys in a YAML file, counted from 1."""

    def __init__(self, node: yaml.Node | None, overridden: Collection[str] = ()) -> None:
        """overridden: top-level keys whose values are not those of the file."""
        self._root = node
        self._overridden = overridden
        self._pairs: dict[int, dict[str, tuple[yaml.Node, yaml.Node]]] = {}
        self.twice: list[str] = []
        """What is to be said of keys that are given twice."""
        self._look_for_twins(node, set())

    def of(self, place: tuple[Any, ...]) -> int | None:
        """The line of the key at a path such as ("upscale", "scale"), or of the nearest key above it."""
        line, node = None, self._root
        if place and place[0] in self._overridden:
            return None
        for name in place:
            found = self._pairs_of(node).get(str(name))
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line

    def _pairs_of(self, node: yaml.Node | None) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key -> (its node, the node of its value) in a mapping, of which there may be a hundred thousand."""
        if not isinstance(node, yaml.MappingNode):
            return {}
        if id(node) not in self._pairs:
            scalars = (pair for pair in node.value if isinstance(pair[0], yaml.ScalarNode))
            self._pairs[id(node)] = {pair[0].value: pair for pair in scalars}
        return self._pairs[id(node)]

    def _look_for_twins(self, node: yaml.Node | None, seen: set[int]) -> None:
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            return
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            for each in node.value:
                self._look_for_twins(each, seen)
            return
        first: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in first:
                    self.twice.append(f"line {line}: {key.value!r} is given twice, first at line {first[key.value]}")
                first.setdefault(key.value, line)
            self._look_for_twins(value, seen)


def load_config(path: str | Path, **overrides: Any) -> DatasetConfig:
    """Read a YAML (or JSON) configuration file. Relative paths in its `prompts` and `images` are relative to the
    file, and `~` is the home folder.

    Overrides replace top-level keys. Overrides that are None are ignored. Their paths are relative to the current
    folder.
    """
    path = Path(path)
    values, node = _from_yaml(path, _text_of(path))
    given = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(values, dict):
        for key in ("prompts", "images"):
            value = values.get(key)
            if isinstance(value, str) and value and "://" not in value and not UNFIT.search(value):
                own = os.path.expanduser(value)
                values[key] = own if os.path.isabs(own) else str((path.parent / own).resolve())
        if "images" in given:
            values.pop("prompts", None)
        if "prompts" in given:
            values.pop("images", None)
        values |= given
    return parse_config(values, str(path), Lines(node, given))
