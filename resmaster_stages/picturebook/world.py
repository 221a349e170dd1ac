"""The elements of picturebook's world: colours, places, objects, and the registry of kinds of objects.

To add a kind of object, write one function that returns a `Drawing`, decorate it with `@kind` and import its module in
`scenes.py`. Every scene is 512 units high and 512 to 1024 units wide, and y points down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HEIGHT = 512.0
VERSION = 2
"""Version of the world. A pack belongs to the version on whose images it was trained."""
GROUNDS = ("meadow", "sand", "snow", "road", "water")
LAND = ("meadow", "sand", "snow", "road")
SKIES = ("day", "sunset", "night", "cloudy")
# colour -> (dark, base, light)
COLOURS: dict[str, tuple[str, str, str]] = {
    "red": ("#a32630", "#d8434a", "#f0777a"),
    "blue": ("#2456a6", "#3d7fd9", "#7fb2f0"),
    "yellow": ("#d19a12", "#f4c42f", "#fbe07c"),
    "green": ("#2b7a45", "#45a85b", "#86cf8c"),
    "purple": ("#5f3a9e", "#8a5bc9", "#b795e3"),
    "white": ("#c9c7c4", "#f1eee8", "#ffffff"),
    "orange": ("#b95512", "#ec8426", "#f8b36d"),
    "pink": ("#c24f86", "#ee8cb4", "#f9c6da"),
}

Box = tuple[float, float, float, float]  # left, top, right, bottom in scene units, half-open


@dataclass(frozen=True)
class Part:
    """A named region of an object, used by captions. `name` is a key of `captions.PART_WORDS`."""

    name: str
    box: Box


@dataclass(frozen=True)
class Drawing:
    """The result of a kind's drawing function: SVG markup, the object's box and its parts, in scene units."""

    svg: str
    box: Box
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Thing:
    """One object. `x` is its centre, `y` its base (ground contact or lowest point), `size` its height."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """A whole scene. `things` are in drawing order (back to front)."""

    seed: int
    width: float
    ground: str
    sky: str
    horizon: float
    things: tuple[Thing, ...]

    @property
    def box(self) -> Box:
        return (0.0, 0.0, self.width, HEIGHT)


@dataclass(frozen=True)
class Kind:
    """A registered kind of object.

    It has allowed colours, (least, greatest) sizes, an aspect (width / height), a drawing function, whether it floats
    in the air, and the grounds on which it may stand.
    """

    name: str
    colours: tuple[str, ...]
    sizes: tuple[float, float]
    aspect: float
    draw: Callable[[Thing, Random, bool], Drawing]
    floats: bool
    grounds: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    colours: tuple[str, ...],
    sizes: tuple[float, float],
    aspect: float,
    floats: bool = False,
    grounds: tuple[str, ...] = LAND,
) -> Callable[[Callable[[Thing, Random, bool], Drawing]], Callable[[Thing, Random, bool], Drawing]]:
    """Register a drawing function `(thing, rng, night) -> Drawing` under `name`."""

    def register(draw: Callable[[Thing, Random, bool], Drawing]) -> Callable[[Thing, Random, bool], Drawing]:
        KINDS[name] = Kind(name, colours, sizes, aspect, draw, floats, grounds)
        return draw

    return register
