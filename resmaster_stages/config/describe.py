"""Describes the fields of a configuration in words: their types, bounds, choices, defaults and meanings.

Names and values stand in backticks, as in Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from resmaster_stages.config.part import Part

NAMES = {int: "integer", float: "number", bool: "`true` or `false`", str: "text", NoneType: "`null`"}


def plain_text(doc: str | None) -> str:
    """A docstring, its lines joined to paragraphs; lists stay as they are."""
    paragraphs = [part.strip() for part in (doc or "").split("\n\n")]
    return "\n\n".join(part if part.startswith("- ") else " ".join(part.split()) for part in paragraphs)


def part_in(field: FieldInfo) -> type[Part] | None:
    """The part that a field holds, if it does."""
    candidates = (field.annotation, *get_args(field.annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Part)), None)


def kind_of(field: FieldInfo) -> str:
    """Type or choices, with bounds."""
    return _bounded(_type(field.annotation), field.metadata)


def _bounded(kind: str, metadata: Iterable[Any]) -> str:
    """A type with the bounds among `metadata`, before "or null"."""
    bounds = [
        f"{sign} {plain(getattr(each, attribute))}"
        for each in metadata
        for bound, attribute, sign in ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))
        if isinstance(each, bound)
    ]
    null = f" or {NAMES[NoneType]}"
    ending = null if kind.endswith(null) else ""
    return " ".join([kind.removesuffix(ending), *([", ".join(bounds)] if bounds else [])]) + ending


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        kind, field = get_args(annotation)
        return _bounded(_type(kind), field.metadata)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{plain(value)}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(each) for each in get_args(annotation))
    if get_origin(annotation) is dict:
        return "texts by name"
    if get_origin(annotation) is tuple:
        inside = [_type(each) for each in get_args(annotation) if each is not Ellipsis]
        return f"list of {inside[0]}s"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return "keys below"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    return NAMES[annotation]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if isinstance(value, Part) else f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {plain(each)}" for name, each in value.items()) + "}"
    return value if isinstance(value, str) and value else json.dumps(value)
