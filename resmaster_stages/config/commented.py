"""Adds to the text of a configuration every key that it leaves out, as a comment: meaning, present value and kind.

Lines that begin with `##` say what a key means. Lines that begin with one `#` and hold a key can be taken into use by
removing `# `: they have the value that counts without them, so nothing changes until the value is changed.

The comments are made from the fields and their docstrings, so they say what this version does.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.describe import kind_of, part_in, plain_text
from resmaster_stages.config.load import parse_config, type_at
from resmaster_stages.config.part import Part

COLUMNS = 120
_KEY = re.compile(r"^(\w+):")
_SENTENCE = re.compile(r"\. |, e\.g\.|: |\.$")
"""Where the first few words of a meaning end."""
_OBVIOUS = ("text", "text or null", "true or false")
"""Kinds that the value shows."""


def commented(text: str) -> str:
    """A configuration with comments for the keys that it leaves out. text: YAML with one key a line at the top level.
    Raises ConfigError for a text that is no configuration."""
    values = yaml.safe_load(text)
    config = parse_config(values)
    head, blocks = _blocks(text)
    parts = [name for name, field in DatasetConfig.model_fields.items() if part_in(field)]
    scalars = [name for name in DatasetConfig.model_fields if name not in parts]
    first = next((place for place, (name, _) in enumerate(blocks) if name in parts), len(blocks))
    missing = list(_lines(DatasetConfig, config, [name for name in scalars if name not in values], ""))
    made = [*head]
    for place, (name, lines) in enumerate(blocks):
        if place == first:
            made += [*missing, ""]
        made += lines if name in scalars else _filled(name, lines, values[name], config)
    if first == len(blocks):
        made += ["", *missing]
    for name in parts:
        if name not in values:
            made += ["", *_as_comment(DatasetConfig, config, name, "")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(made).rstrip() + "\n")


def _blocks(text: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The lines before the first key, then each top-level key with its lines. What stands above a key belongs to it."""
    blocks: list[tuple[str, list[str]]] = []
    waiting: list[str] = []
    head: list[str] = []
    for line in text.splitlines():
        if key := _KEY.match(line):
            if not blocks:
                head, waiting = waiting, []
            blocks.append((key[1], [*waiting, line]))
            waiting = []
        elif line.startswith(" "):
            blocks[-1][1].extend([*waiting, line])
            waiting = []
        else:
            waiting.append(line)
    return head, blocks


def _filled(name: str, lines: list[str], given: Any, config: DatasetConfig) -> list[str]:
    """The lines of a part, followed by the keys that it leaves out."""
    part = type_at((name,), {name: given})
    assert part is not None
    value = getattr(config, name)
    missing = [key for key in part.model_fields if key not in given and key != "method"]
    return [*lines, *_lines(part, value, missing, "  ")]


def _lines(part: type[Part], value: Any, names: list[str], indent: str) -> Iterator[str]:
    for name in names:
        yield from _as_comment(part, value, name, indent)


def _as_comment(part: type[Part], value: Any, name: str, indent: str) -> Iterator[str]:
    """A key as comments: its meaning, then the key with the value that counts, and the keys of a part within it."""
    field = part.model_fields[name]
    inner, own = part_in(field), getattr(value, name)
    yield from _wrapped(_plain(field.description), f"{indent}## ")
    if inner is None:
        kind = kind_of(field).replace("`", "")
        value_now = _as_yaml(value.model_dump(mode="json")[name])
        yield f"{indent}# {name}: {value_now}{'' if kind in _OBVIOUS else f'  # {kind}'}"
    elif own is None:
        yield f"{indent}# {name}: null"
        keys = (f"{key} ({_SENTENCE.split(_plain(each.description))[0]})" for key, each in inner.model_fields.items())
        yield from _wrapped(f"Its keys: {', '.join(keys)}.", f"{indent}##   ")
    else:
        yield f"{indent}# {name}:"
        for key in type(own).model_fields:
            for line in _as_comment(type(own), own, key, ""):
                yield f"{indent}#   {line if line.startswith('##') else line.removeprefix('# ')}"


def _plain(description: str | None) -> str:
    return plain_text(description).replace("`", "")


def _wrapped(text: str, begin: str) -> Iterator[str]:
    yield from textwrap.wrap(text, COLUMNS - 8, initial_indent=begin, subsequent_indent=begin, break_on_hyphens=False)


def _as_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True).removesuffix("\n...\n").strip()
    )
