"""The base class of all parts of a configuration: frozen, strict, and aware of which fields change a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema

from resmaster_stages.errors import did_you_mean
from resmaster_stages.redaction import holds_credentials

UNFIT = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a file's name nor UTF-8 text can hold."""
LONGEST_SHOWN = 60
"""Maximum number of characters of a wrong name that a message repeats."""
LONGEST_TEXT = 10_000
"""Maximum number of characters of any text."""
LONGEST_PATH_PART = 255
"""Maximum number of bytes between two slashes of a path, as file systems have it."""
LONGEST_PATH, LONGEST_URL = 3_500, 700
"""Maximum number of bytes of a path (Linux takes 4,095) and of a URL (S3 takes 1,024), so that names inside fit too."""
GREATEST_INTEGER = 2**64 - 1
"""What torch takes as a seed, and most readers of JSON as a number."""


def Operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how fast or where a result is computed, but not the result. `identity()` leaves it out."""
    return Field(default=default, json_schema_extra={"operational": True}, **kwargs)


def Later(default: Any, **kwargs: Any) -> Any:
    """A field that older datasets do not have. `identity()` leaves it out at its default, so they keep theirs."""
    return Field(default=default, json_schema_extra={"later": True}, **kwargs)


def OfPublication(default: Any, **kwargs: Any) -> Any:
    """A field that only publishing reads. `identity()` leaves it out, because no stage's result depends on it."""
    return Field(default=default, json_schema_extra={"publication": True}, **kwargs)


def LaterOn(default: Any, before: Any, **kwargs: Any) -> Any:
    """A field that older datasets do not have, and whose default would change them: they have the value `before`.

    A dataset keeps the value that it was made with until a configuration names another. Only for fields of the whole
    configuration (`DatasetConfig`).
    """
    return Field(default=default, json_schema_extra={"before": before}, **kwargs)


def known_name(what: str, name: Any, known: Collection[str]) -> str:
    """`name`, if it is one of the known names of a `what`. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"unknown {what}: give one of: {', '.join(known)}")
    if name not in known:
        word = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."
        raise ValueError(f"unknown {what} {word!r}{did_you_mean(word, known)}; known: {', '.join(known)}")
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


def check_length(value: str) -> None:
    """Raise ValueError if a path, URL or name of a model is longer than any can be."""
    longest = LONGEST_URL if "://" in value else LONGEST_PATH
    if (size := len(value.encode())) > longest:
        raise ValueError(f"has {size:,} bytes; use at most {longest:,}")
    if (size := max(len(part.encode()) for part in value.split("/"))) > LONGEST_PATH_PART:
        raise ValueError(f"has a part of {size} bytes between two slashes; use at most {LONGEST_PATH_PART}")


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

    places: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file, a folder, a URL or a model. They cannot be empty."""
    further_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that a configuration may give, and that are no fields, because they are expanded before validation."""

    @field_validator("*")
    @classmethod
    def _storable(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            cls._check_text(value)
            if info.field_name in cls.places:
                if not value.strip():
                    raise ValueError("cannot be empty; give a name, or leave the key out")
                check_length(value)
        elif isinstance(value, int) and abs(value) > GREATEST_INTEGER:
            raise ValueError("has more than 64 bits; give a smaller number")
        return value

    @staticmethod
    def _check_text(value: str) -> None:
        if len(value) > LONGEST_TEXT:
            raise ValueError(f"has {len(value):,} characters; use at most {LONGEST_TEXT:,}")
        if holds_credentials(value):
            raise ValueError(
                "holds a user, password, signature or token, which would be kept with the dataset; leave it out and "
                "set the environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, OPENAI_API_KEY, HF_TOKEN)"
            )
        if UNFIT.search(value):
            raise ValueError("holds a character that no file can hold (NUL, or half of a surrogate pair); leave it out")

    @classmethod
    def before(cls) -> dict[str, Any]:
        """Field made by `LaterOn` -> its value in datasets from before the field."""
        marks = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name: extra["before"] for name, extra in marks.items() if isinstance(extra, dict) and "before" in extra}

    def keeping(self, stored: Self) -> Self:
        """This configuration of a dataset that has `stored`: fields made by `LaterOn` stay unless they are set."""
        kept = {name: getattr(stored, name) for name in self.before() if name not in self.model_fields_set}
        return self.model_copy(update=kept)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The JSON schema, without the defaults of fields made by `LaterOn`: forms send defaults along as values."""
        made = handler(schema)
        inner = handler.resolve_ref_schema(made)
        for name in cls.before():
            inner["properties"][name].pop("default", None)
        return made

    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as JSON-ready values."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            value = getattr(self, name)
            marks = extra if isinstance(extra, dict) else {}
            if marks.get("operational") or marks.get("publication") or (marks.get("later") and value == field.default):
                continue
            values[name] = value.identity() if isinstance(value, Part) else value
        return values

    def publication(self) -> dict[str, Any]:
        """The fields that only publishing reads, as JSON-ready values, without those at their defaults."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("publication")
            and getattr(self, name) != field.default
        }
