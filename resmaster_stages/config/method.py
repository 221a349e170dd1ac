"""The base of all upscaling methods as a user writes them, and the table of methods by name.

A method is one file in `resmaster_stages/methods`: a class with the method's settings as fields, which are all the keys
that a configuration may give for it. `upscale: {method: demofusion, cosine_scale_1: 3}` is read as the class of that
name.

Knows no method by name but the default one: the table is filled by `register`, which anybody may call.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, GetJsonSchemaHandler, ModelWrapValidatorHandler, SerializeAsAny, model_validator
from pydantic_core import CoreSchema

from resmaster_stages.config.part import Part, drop_defaults
from resmaster_stages.errors import ConfigError

DEFAULT = "resmaster"
"""The method of a configuration that names none."""

Source = Literal["reference", "captions", "image_prompt", "detail_mask"]
"""What a method may read beside the prompt: the low-res image, a caption per view, an image prompt per view (which
needs an IP-Adapter), and a mask of where more detail is drawn."""


def OnlyWith(other: str, value: str, default: Any, **kwargs: Any) -> Any:
    """A field that is read only where the field `other` has `value`. It may not be set elsewhere, and a preset's value
    of it goes where the user gave `other` another value."""
    return Field(default=default, json_schema_extra={"only_with": [other, value]}, **kwargs)


class Method(Part):
    """Stage 4: low-res image + captions -> high-res image.

    Validates to the class of the method that the values name. A concrete method narrows `method` to a Literal and is
    given to `register`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Name -> fields. `default`: what we recommend, and what an absent preset means. `faithful`: the authors' published
    settings. `exact`: every row is computed that `default` leaves out (docs/speed.md)."""
    base_model: ClassVar[bool] = False
    """Whether the result depends on the base model."""
    reads: ClassVar[tuple[Source, ...]] = ()
    """What the result may depend on; `uses` says whether it does as the fields are set."""
    switches: ClassVar[Mapping[str, str]] = {}
    """Short name -> a field whose `enabled` it switches, for `resmaster compare` (`resmaster+sg`, `resmaster-etp`)."""
    with_detail_mask: ClassVar[Mapping[str, Any]] = {}
    """Of methods that read a detail mask: an example of fields with which they do."""

    method: str
    """Name of the method."""
    preset: str = Field(default="default", json_schema_extra={"operational": True})
    """Where fields that are not given come from: default, faithful (what the method's authors published) or exact (the
    work that the default leaves out is done)."""
    scale: float = Field(default=4.0, ge=1, le=64)
    """Target size over low-res size. Generated images must come out at a multiple of the latent factor (8)."""

    @model_validator(mode="wrap")
    @classmethod
    def _expand_preset(cls, values: Any, make: ModelWrapValidatorHandler[Self]) -> Any:
        """The preset's fields count as not set, so that they go where the method or the preset changes."""
        if not isinstance(values, dict):
            return make(values)
        if not cls._concrete():
            return method_class(values.get("method", DEFAULT)).model_validate(values)
        preset = values.get("preset", "default")
        if not isinstance(preset, str) or preset not in cls.presets:
            name = cls.model_fields["method"].default
            raise ValueError(f"method {name}: unknown preset {preset!r}; known: {', '.join(cls.presets)}")
        ties = cls._ties()
        chosen = {
            name: value
            for name, value in cls.presets[preset].items()
            if name not in ties or values.get(ties[name][0], ties[name][1]) == ties[name][1]
        }
        parts = {
            name: {**value, **values[name]}
            for name, value in chosen.items()
            if isinstance(value, dict) and isinstance(values.get(name), dict)
        }
        made = make({**chosen, **values, **parts})
        made.__pydantic_fields_set__.difference_update(chosen.keys() - values.keys())
        return made

    @model_validator(mode="after")
    def _check_ties(self) -> Self:
        for name, (other, value) in self._ties().items():
            if getattr(self, other) != value and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set, but is read only with {other}: {value}; set that too, or drop {name}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the method's name as title, for forms, and the names of its presets."""
        made = handler(schema)
        inner = handler.resolve_ref_schema(made)
        if cls._concrete():
            inner["title"] = cls.model_fields["method"].default
            inner["properties"]["method"]["description"] = "Name of the method."
            inner["properties"]["preset"]["enum"] = list(cls.presets)
            drop_defaults(inner["properties"], cls.presets.values())
        return made

    @classmethod
    def _concrete(cls) -> bool:
        return not cls.model_fields["method"].is_required()

    @classmethod
    def _ties(cls) -> dict[str, tuple[str, str]]:
        """Field -> the field and its value beside which alone the first is read."""
        extras: dict[str, Any] = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {
            name: extra["only_with"]
            for name, extra in extras.items()
            if isinstance(extra, dict) and "only_with" in extra
        }

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return what in self.reads

    def require_detail_mask(self, what: str) -> None:
        """Raises ConfigError, saying `what` brings a detail mask, unless the result depends on it."""
        if self.uses("detail_mask"):
            return
        readers = {name: each.with_detail_mask for name, each in methods().items() if "detail_mask" in each.reads}
        examples = [
            "upscale: {" + ", ".join(f"{key}: {value}" for key, value in {"method": name, **fields}.items()) + "}"
            for name, fields in readers.items()
        ]
        raise ConfigError(
            f"{what} a detail mask, which only method {' or '.join(readers)} reads; set {' or '.join(examples)}, "
            "or leave the mask out"
        )

    def way(self) -> tuple[Self, ...]:
        """The finished images on the way, the last one included: each one's scale is that over the one before."""
        return (self,)

    @property
    def view_stride(self) -> float:
        """Distance of neighbouring views, as a fraction of the window. Methods without views are looked at as if they
        had some: seams are measured at the same places for all."""
        return 0.5

    def weights(self) -> str | None:
        """Name of the exact weights of the method's own network; None where it has none. Raises ConfigError."""
        return None

    def label(self) -> str:
        """The method as reports name it."""
        return self.method

    def facts(self) -> dict[str, Any]:
        """What reports say of the settings."""
        return {}


M = TypeVar("M", bound=Method)
_METHODS: dict[str, type[Method]] = {}


def register(method: type[M]) -> type[M]:
    """Make `method` known under the name that is the default of its field `method`. Raises ValueError."""
    name = method.model_fields["method"].default
    if not isinstance(name, str):
        raise ValueError(f'{method.__name__}: has no name; write method: Literal["my_method"] = "my_method"')
    if _METHODS.get(name, method) is not method:
        raise ValueError(f"{method.__name__}: there is a method {name!r} already; choose another name")
    _METHODS[name] = method
    return method


def methods() -> Mapping[str, type[Method]]:
    """All methods by name: those of `resmaster_stages.methods`, then those that were registered from outside."""
    import_module("resmaster_stages.methods")  # by name: that room stands above this one
    return _METHODS


class _Alternatives:
    """Writes the methods that there are, when it is asked, into a JSON schema; in place, where forms look for
    alternatives."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        default_first = sorted(methods().values(), key=lambda method: method is not methods()[DEFAULT])
        return {
            "anyOf": [
                each.__get_pydantic_json_schema__(each.__pydantic_core_schema__, handler) for each in default_first
            ]
        }


AnyMethod = Annotated[SerializeAsAny[Method], _Alternatives()]
"""The type of a field that holds any method."""


def method_class(name: Any) -> type[Method]:
    """The method called `name`. Raises ValueError."""
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return known[name]


def with_method(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What was set for one method, for another one: what both read in common (fields of a base class of both), without
    a preset that the other has not, and without what is read only beside a value that a preset gave."""
    before = values.get("method", DEFAULT)
    known = methods()
    if method == before:
        return dict(values)
    if before not in known or method not in known:
        return {**values, "method": method}
    one, other = known[before], known[method]
    kept = {
        name: value
        for name, value in values.items()
        if name in other.model_fields and _defined_in(one, name) is _defined_in(other, name)
    }
    for name, (beside, _) in one._ties().items():
        if beside not in values:
            kept.pop(name, None)
    if kept.get("preset") not in other.presets:
        kept.pop("preset", None)
    return {**kept, "method": method}


def _defined_in(method: type[Method], name: str) -> type | None:
    """The lowest class that has the field."""
    return next((base for base in reversed(method.__mro__) if name in get_annotations(base)), None)
