"""The base class of all parts of a configuration: frozen, strict, and aware of which fields change a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)

from resmaster_stages.errors import did_you_mean
from resmaster_stages.redaction import holds_credentials

UNFIT = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a file's name nor UTF-8 text can hold."""
LONGEST_SHOWN = 60
"""Maximum number of characters of a wrong name that a message repeats."""


def Operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how fast or where a result is computed, but not the result. `identity()` leaves it out."""
    return Field(default=default, json_schema_extra={"operational": True}, **kwargs)


def known_name(what: str, name: Any, known: Collection[str]) -> str:
    """`name`, if it is one of the known names of a `what`. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"unknown {what}: give one of: {', '.join(known)}")
    if name not in known:
        word = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."
        raise ValueError(f"unknown {what} {word!r}; known: {', '.join(known)}{did_you_mean(word, known)}")
    return name


def drop_defaults(properties: dict[str, Any], presets: Iterable[Mapping[str, Any]]) -> None:
    """Remove from a JSON schema the defaults of fields that some preset sets. Forms send defaults along as values, and
    such a value would override the preset."""
    for name in {name for preset in presets for name in preset}:
        properties[name].pop("default", None)


def offer_preset(presets: Mapping[str, Mapping[str, Any]], text: str) -> Callable[[dict[str, Any]], None]:
    """Return a function that adds the key `preset` to a part's JSON schema, for forms. The key is no field of the part,
    because it is expanded before validation."""

    def add(schema: dict[str, Any]) -> None:
        drop_defaults(schema["properties"], presets.values())
        schema["properties"]["preset"] = {
            "type": "string",
            "enum": list(presets),
            "title": "Preset",
            "description": text,
        }

    return add


class Part(BaseModel):
    """Base of all parts: frozen, without unknown keys. The docstrings of fields become their descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        if isinstance(value, str) and holds_credentials(value):
            raise ValueError(
                "holds a user, password, signature or token, which would be kept with the dataset; leave it out and "
                "set the environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, OPENAI_API_KEY, HF_TOKEN)"
            )
        if isinstance(value, str) and UNFIT.search(value):
            raise ValueError("holds a character that no file can hold (NUL, or half of a surrogate pair); leave it out")
        return value

    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as JSON-ready values."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                continue
            value = getattr(self, name)
            values[name] = value.identity() if isinstance(value, Part) else value
        return values
