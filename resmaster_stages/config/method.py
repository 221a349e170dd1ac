"""The base class of all upscaling methods' settings, and the table of methods by name.

A method is one file in `resmaster_stages/methods`: a class whose fields are the method's settings. These are all keys
that a configuration may give for the method. `upscale: {method: demofusion, cosine_scale_1: 3}` becomes an instance of
the class registered as `demofusion`.

This module names only the default method. The other methods call `register`, and modules from outside may too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, GetJsonSchemaHandler, ModelWrapValidatorHandler, SerializeAsAny, model_validator
from pydantic_core import CoreSchema

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.part import Later, Part, drop_defaults, known_name
from resmaster_stages.config.wrap import Axes
from resmaster_stages.errors import ConfigError

DEFAULT = "resmaster"
"""The method of a configuration without the key `method`."""

Source = Literal["reference", "captions", "image_prompt", "detail_mask", "control"]
"""What a method may read besides the prompt: the low-res image, a caption per view, an image prompt per view (which
needs an IP-Adapter), a mask of where more detail is drawn, or a control image (which needs a ControlNet)."""

ColourMatch = Literal["none", "mean_std", "wavelet"]
"""How an image gets the colours of its low-res image."""


def OnlyWith(other: str, value: str, default: Any, **kwargs: Any) -> Any:
    """A field that is read only if the field `other` has `value`.

    With another value of `other`, the field may not be set, and a preset's value for the field is dropped.
    """
    return Field(default=default, json_schema_extra={"only_with": [other, value]}, **kwargs)


class Method(Part):
    """Stage 4: low-res image + captions -> high-res image.

    Validation returns an instance of the class of the method that the values name. A concrete method narrows `method`
    to a Literal and is passed to `register`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Name -> fields. `default`: recommended settings, used if no preset is given. `faithful`: the settings that the
    authors published. `exact`: also computes the rows that `default` leaves out (docs/speed.md). A method of several
    papers has their names in the place of `faithful`."""
    base_model: ClassVar[bool] = False
    """Whether the result depends on the base model."""
    reads: ClassVar[tuple[Source, ...]] = ()
    """What the result may depend on. `uses` says whether it does with the current fields."""
    switches: ClassVar[Mapping[str, str]] = {}
    """Short name -> field whose `enabled` it switches, for `resmaster compare` (`resmaster+sg`, `resmaster-etp`)."""
    with_detail_mask: ClassVar[Mapping[str, Any]] = {}
    """For methods that read a detail mask: an example of fields with which the mask is read."""

    version: ClassVar[int] = 1
    """Raised whenever the method makes other images from the same settings, so that old and new ones never mix."""

    method: str
    """Name of the method."""
    preset: str = Field(default="default", json_schema_extra={"operational": True})
    """Values of the fields that are not given: `default`, `faithful` (the settings that the method's authors published)
    or `exact` (computes also what `default` leaves out)."""
    scale: float = Field(default=4.0, ge=1, le=64)
    """Target size divided by low-res size. The target size of generated images must be a multiple of the latent factor
    (8)."""
    colour_match: ColourMatch = Later("none")
    """Gives the finished image the colours of the low-res image. `mean_std`: the mean and the standard deviation of
    each channel, over the whole image. `wavelet`: the colours of all that is wider than about 8 px of the low-res
    image, place by place; finer detail stays. `none`: the method's own colours."""

    @model_validator(mode="wrap")
    @classmethod
    def _expand_preset(cls, values: Any, make: ModelWrapValidatorHandler[Self]) -> Any:
        """Fill in the preset's fields. They count as not set, so they do not stay if method or preset changes."""
        if not isinstance(values, dict):
            return make(values)
        if not cls._concrete():
            return method_class(values.get("method", DEFAULT)).model_validate(values)
        try:
            preset = known_name("preset", values.get("preset", "default"), cls.presets)
        except ValueError as error:
            raise ValueError(f"method {cls.model_fields['method'].default}: {error}") from None
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
        """The JSON schema, with the method's name as title and the names of its presets, as forms need them."""
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
        """Field made by `OnlyWith` -> (other field, value that the other field must have)."""
        extras: dict[str, Any] = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {
            name: extra["only_with"]
            for name, extra in extras.items()
            if isinstance(extra, dict) and "only_with" in extra
        }

    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as JSON-ready values, and the version where it is not the first."""
        return super().identity() | ({"version": self.version} if self.version > 1 else {})

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return what in self.reads

    def require_detail_mask(self, what: str) -> None:
        """Raise ConfigError unless the result depends on a detail mask. `what`: beginning of the message, such as
        "sample x has"."""
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
        """The settings of each enlargement on the way to the target, the last included.

        The scale of each is relative to the image before.
        """
        return (self,)

    @property
    def view_stride(self) -> float:
        """Distance of neighbouring views, as a fraction of the window. Methods without views have a value too, so that
        seams are measured at the same places for all methods."""
        return 0.5

    @property
    def wraps(self) -> Axes:
        """Whether the image continues at the opposite border, along its height and along its width."""
        return False, False

    def weights(self) -> str | None:
        """Name of the exact weights of the method's own network; None if it has no network. Raises ConfigError."""
        return None

    def notes(self, model: ModelConfig) -> Iterator[str]:
        """What a user should know of the method with a base model, although it is no mistake."""
        yield from ()

    def check_files(self) -> None:
        """Raise ConfigError if the files of the method's own network cannot be used, without loading weights."""

    def label(self) -> str:
        """The name of the method in reports."""
        return self.method

    def facts(self) -> dict[str, Any]:
        """Label -> value: the settings as reports show them."""
        return {}

    def networks(self) -> tuple[tuple[str, str, str | None], ...]:
        """(part, model, revision) of each network that makes images and that the method brings itself."""
        return ()


M = TypeVar("M", bound=Method)
_METHODS: dict[str, type[Method]] = {}


def register(method: type[M]) -> type[M]:
    """Register `method` under the default of its field `method`. Raises ValueError."""
    name = method.model_fields["method"].default
    if not isinstance(name, str):
        raise ValueError(f'{method.__name__}: has no name; write method: Literal["my_method"] = "my_method"')
    if _METHODS.get(name, method) is not method:
        raise ValueError(f"{method.__name__}: there is a method {name!r} already; choose another name")
    _METHODS[name] = method
    return method


def methods() -> Mapping[str, type[Method]]:
    """All methods by name: those of `resmaster_stages.methods`, then those registered from outside."""
    import_module("resmaster_stages.methods")  # by name, because that package may not be imported from here
    return _METHODS


class _Alternatives:
    """Writes the methods that are registered at the time of the call into a JSON schema, as `anyOf` for forms."""

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
    return known[known_name("method", name, known)]


def with_method(values: Mapping[str, Any], method: Any) -> dict[str, Any]:
    """Convert `values`, which were set for one method, to values for `method`.

    Kept are fields that both methods have from a common base class. Dropped are a preset that `method` does not have,
    and `OnlyWith` fields whose other field is not set explicitly.
    """
    before = values.get("method", DEFAULT)
    known = methods()
    if method == before:
        return dict(values)
    if not isinstance(method, str) or before not in known or method not in known:
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
    """The class whose definition of the field counts."""
    return next((base for base in method.__mro__ if name in get_annotations(base)), None)
