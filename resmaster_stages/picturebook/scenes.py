"""Makes scenes of picturebook's world and draws them as SVG.

A `Scene` is a frozen description of what stands where. `svg(scene, box)` draws it, or any crop of it by another
viewBox. Everything follows from integer seeds, and there is no global random state. Fine detail (bricks, leaves, petal
lines, weave, grass) is sized so that it blurs when a whole scene is 128 px high and is crisp at 512 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from resmaster_stages.picturebook import animals, buildings, craft, plants  # noqa: F401  (they register their kinds)
from resmaster_stages.picturebook.places import GROUND_STOPS, SKY_STOPS, draw_ground, draw_sky, sky_parts
from resmaster_stages.picturebook.svg import gradient, num
from resmaster_stages.picturebook.world import (
    COLOURS,
    GROUNDS,
    HEIGHT,
    KINDS,
    SKIES,
    VERSION,
    Box,
    Drawing,
    Kind,
    Part,
    Scene,
    Thing,
)

__all__ = [
    "COLOURS",
    "GROUNDS",
    "HEIGHT",
    "KINDS",
    "SKIES",
    "VERSION",
    "Box",
    "Drawing",
    "Kind",
    "Part",
    "Scene",
    "Thing",
    "drawing",
    "make_scene",
    "scene_of",
    "sky_parts",
    "svg",
]


def drawing(thing: Thing, night: bool = False) -> Drawing:
    """The drawing of one object. Its randomness comes from the object's own seed."""
    return KINDS[thing.kind].draw(thing, Random(thing.seed), night)


def svg(scene: Scene, box: Box | None = None, width_px: int | None = None, height_px: int | None = None) -> str:
    """The SVG document of `box` (default: the whole scene)."""
    left, top, right, bottom = box or scene.box
    night = scene.sky == "night"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.3f} {top:.3f} {right - left:.3f} {bottom - top:.3f}" '
        f'width="{width_px or right - left}" height="{height_px or bottom - top}" preserveAspectRatio="none"><defs>',
        gradient("sky", SKY_STOPS[scene.sky]),
        gradient("ground", GROUND_STOPS[scene.ground]),
        "</defs>",
        draw_sky(scene),
        draw_ground(scene),
    ]
    out += [drawing(thing, night).svg for thing in scene.things]
    tint = {"night": ("#101a4a", 0.22), "sunset": ("#f08a3c", 0.1), "cloudy": ("#6d7c8c", 0.08)}.get(scene.sky)
    if tint:
        out.append(f'<rect width="{num(scene.width)}" height="512" fill="{tint[0]}" opacity="{tint[1]}"/>')
    return "".join(out) + "</svg>"


def make_scene(seed: int, kinds: tuple[str, ...] | None = None) -> Scene:
    """The scene of a seed: ground, sky and 1 to 3 objects side by side. It is square (60 %) or up to twice as wide.

    kinds: choose the objects among these kinds (default: all).
    """
    rng = Random(seed * 2654435761 + 12345)
    width = HEIGHT if rng.random() < 0.6 else round(HEIGHT * rng.uniform(1.15, 2.0))
    horizon = rng.uniform(0.52, 0.68) * HEIGHT
    names = kinds or tuple(KINDS)
    ground, sky = rng.choice([g for g in GROUNDS if any(g in KINDS[n].grounds for n in names)]), rng.choice(SKIES)
    names = tuple(n for n in names if ground in KINDS[n].grounds)
    most = 3 if width > 1.3 * HEIGHT else rng.choice([1, 2, 2, 3])
    count = rng.randint(1, most) if width <= 1.3 * HEIGHT else rng.randint(2, most)
    picked = [KINDS[rng.choice(names)] for _ in range(count)]
    things = _stand(rng, width, horizon, [(each, None) for each in picked])
    return Scene(seed, float(width), ground, sky, round(horizon, 1), things)


def scene_of(seed: int, width: float, ground: str | None, sky: str | None, wanted: Sequence[tuple[str, str]]) -> Scene:
    """A scene that shows the (kind, colour) pairs `wanted`, at most 3, laid out by `seed`.

    The seed also chooses the ground or the sky if it is None.
    """
    rng = Random(seed * 2654435761 + 54321)
    horizon = rng.uniform(0.52, 0.68) * HEIGHT
    fitting = [g for g in GROUNDS if all(g in KINDS[name].grounds for name, _ in wanted)] or list(GROUNDS)
    chosen_ground, chosen_sky = rng.choice(fitting), rng.choice(SKIES)
    things = _stand(rng, width, horizon, [(KINDS[name], colour) for name, colour in wanted])
    return Scene(seed, float(width), ground or chosen_ground, sky or chosen_sky, round(horizon, 1), things)


def _stand(rng: Random, width: float, horizon: float, wanted: Sequence[tuple[Kind, str | None]]) -> tuple[Thing, ...]:
    """Places objects side by side and returns them back to front.

    An object without a colour gets a colour that no object of its kind has in the scene yet.
    """
    if not wanted:
        return ()
    picked, count = [each for each, _ in wanted], len(wanted)
    # the more objects, the smaller they are; slots share the width in proportion to the objects in them
    shrink = {1: 1.05, 2: 0.9, 3: 0.7}[count]
    sizes = [rng.uniform(*k.sizes) * shrink for k in picked]
    widths = [k.aspect * s for k, s in zip(picked, sizes)]
    need = sum(widths) + 12 * (count + 1)
    if need > width:
        sizes = [s * width / need for s in sizes]
        widths = [v * width / need for v in widths]
    slack = max(0.0, width - sum(widths))
    cuts = sorted(rng.random() for _ in range(count))
    used = {(each.name, colour) for each, colour in wanted if colour}
    things: list[Thing] = []
    cursor = 0.0
    for i, (k, s, v) in enumerate(zip(picked, sizes, widths)):
        x = slack * cuts[i] + cursor + v / 2
        cursor += v
        colour = wanted[i][1]
        if colour is None:
            colour = rng.choice(k.colours)
            while (k.name, colour) in used:
                colour = rng.choice(k.colours)
            used.add((k.name, colour))
        if k.floats:
            y = min(rng.uniform(0.06, 0.22) * HEIGHT + s, horizon + 60)
        else:
            low = max(horizon + 12, s + 10)
            y = rng.uniform(low, max(low, min(HEIGHT - 12, horizon + 130)))
        things.append(Thing(k.name, colour, round(x, 1), round(y, 1), round(s, 1), rng.getrandbits(31)))
    return tuple(sorted(things, key=lambda t: t.y))
