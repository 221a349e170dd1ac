"""The world of the picturebook: a scene grammar and its SVG.

A `Scene` is a frozen description (what stands where); `svg(scene, box)` draws it, for any crop, since a crop is only
another viewBox. Everything follows from integer seeds; there is no global random state. Fine detail (bricks, leaves,
petal lines, weave, grass) is sized so that it blurs when a whole scene is 128 px high and is crisp at 512 px.

Knows nothing about pixels, sentences or models. To add a kind of object, write one function that returns a `Drawing`
and decorate it with `@kind`. Scene units: every scene is 512 units high and 512 to 1024 wide; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HEIGHT = 512.0
GROUNDS = ("meadow", "sand", "snow", "road")
SKIES = ("day", "sunset", "night", "cloudy")
# colour -> (dark, base, light)
COLOURS: dict[str, tuple[str, str, str]] = {
    "red": ("#a32630", "#d8434a", "#f0777a"),
    "blue": ("#2456a6", "#3d7fd9", "#7fb2f0"),
    "yellow": ("#d19a12", "#f4c42f", "#fbe07c"),
    "green": ("#2b7a45", "#45a85b", "#86cf8c"),
    "purple": ("#5f3a9e", "#8a5bc9", "#b795e3"),
    "white": ("#c9c7c4", "#f1eee8", "#ffffff"),
}

Box = tuple[float, float, float, float]  # left, top, right, bottom in scene units, half-open


@dataclass(frozen=True)
class Part:
    """A named region of an object, for captions. `name` is a key of `captions.PART_WORDS`."""

    name: str
    box: Box


@dataclass(frozen=True)
class Drawing:
    """What a kind's function returns: SVG markup, the object's box and its parts, in scene units."""

    svg: str
    box: Box
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Thing:
    """One object: `x` is its centre, `y` its base (ground contact or lowest point), `size` its height."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """A whole scene; `things` are in drawing order (back to front)."""

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
    """A registered kind: allowed colours, (least, greatest) size, whether it floats, width / height, how to draw it."""

    name: str
    colours: tuple[str, ...]
    sizes: tuple[float, float]
    floats: bool
    aspect: float
    draw: Callable[[Thing, Random, bool], Drawing]


KINDS: dict[str, Kind] = {}


def kind(
    name: str, colours: tuple[str, ...], sizes: tuple[float, float], aspect: float, floats: bool = False
) -> Callable[[Callable[[Thing, Random, bool], Drawing]], Callable[[Thing, Random, bool], Drawing]]:
    """Register a drawing function `(thing, rng, night) -> Drawing` under `name`."""

    def register(draw: Callable[[Thing, Random, bool], Drawing]) -> Callable[[Thing, Random, bool], Drawing]:
        KINDS[name] = Kind(name, colours, sizes, floats, aspect, draw)
        return draw

    return register


# --- SVG building blocks ------------------------------------------------------------------------------------------


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _path(d: list[str], fill: str = "none", stroke: str = "", width: float = 0.0, more: str = "") -> str:
    if not d:
        return ""
    line = f' stroke="{stroke}" stroke-width="{width:.2f}" stroke-linecap="round"' if stroke else ""
    return f'<path d="{"".join(d)}" fill="{fill}"{line} {more}/>'


def _rect(x: float, y: float, w: float, h: float) -> str:
    return f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z"


def _round_rect(x: float, y: float, w: float, h: float, r: float) -> str:
    r = min(r, w / 2, h / 2)
    return (
        f"M{_n(x + r)} {_n(y)}h{_n(w - 2 * r)}q{_n(r)} 0 {_n(r)} {_n(r)}v{_n(h - 2 * r)}q0 {_n(r)} {_n(-r)} {_n(r)}"
        f"h{_n(2 * r - w)}q{_n(-r)} 0 {_n(-r)} {_n(-r)}v{_n(2 * r - h)}q0 {_n(-r)} {_n(r)} {_n(-r)}z"
    )


def _circle(x: float, y: float, r: float) -> str:
    return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0z"


def _leaf(x: float, y: float, length: float, angle: float, fat: float) -> tuple[str, str]:
    """A pointed leaf from (x, y) along `angle` (radians) and its vein, as two path strings."""
    c, s = math.cos(angle), math.sin(angle)
    tip_x, tip_y = x + length * c, y + length * s
    mid_x, mid_y = x + 0.45 * length * c, y + 0.45 * length * s
    off_x, off_y = -s * length * fat, c * length * fat
    outline = (
        f"M{_n(x)} {_n(y)}Q{_n(mid_x + off_x)} {_n(mid_y + off_y)} {_n(tip_x)} {_n(tip_y)}"
        f"Q{_n(mid_x - off_x)} {_n(mid_y - off_y)} {_n(x)} {_n(y)}z"
    )
    return outline, f"M{_n(x)} {_n(y)}L{_n(x + 0.85 * length * c)} {_n(y + 0.85 * length * s)}"


def _gradient(name: str, stops: list[tuple[float, str]], horizontal: bool = False) -> str:
    end = 'x2="1" y2="0"' if horizontal else 'x2="0" y2="1"'
    inner = "".join(f'<stop offset="{o}" stop-color="{c}"/>' for o, c in stops)
    return f'<linearGradient id="{name}" x1="0" y1="0" {end}>{inner}</linearGradient>'


def _radial(name: str, stops: list[tuple[float, str, float]], cx: float = 0.5, cy: float = 0.5) -> str:
    inner = "".join(f'<stop offset="{o}" stop-color="{c}" stop-opacity="{a}"/>' for o, c, a in stops)
    return f'<radialGradient id="{name}" cx="{cx}" cy="{cy}" r="0.5">{inner}</radialGradient>'


def _shadow(x: float, y: float, rx: float) -> str:
    return f'<ellipse cx="{_n(x)}" cy="{_n(y)}" rx="{_n(rx)}" ry="{_n(rx * 0.13)}" fill="#1b2238" opacity="0.22"/>'


# --- kinds --------------------------------------------------------------------------------------------------------


@kind("house", ("red", "blue", "yellow", "green", "purple", "white"), (150, 250), 0.95)
def house(t: Thing, rng: Random, night: bool) -> Drawing:
    """A brick house with a tiled roof, two windows with panes, a door with a knob and a chimney."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    w, wall_h = 0.78 * s, 0.56 * s
    left, top = t.x - w / 2, t.y - wall_h
    out = [_shadow(t.x, t.y, 0.5 * s)]
    roof_dark, roof_base, roof_light = rng.choice(
        [("#4a2c25", "#6e4234", "#8b5a47"), ("#343a4a", "#4d5568", "#6a738a"), ("#5a2f22", "#84472f", "#a5613f")]
    )
    # chimney
    cx = left + w * rng.choice([0.18, 0.72])
    out.append(_path([_rect(cx, top - 0.36 * s, 0.1 * s, 0.3 * s)], roof_base))
    out.append(_path([_rect(cx - 0.012 * s, top - 0.375 * s, 0.124 * s, 0.03 * s)], roof_dark))
    # wall: mortar, then bricks in three shades
    out.append(_path([_rect(left, top, w, wall_h)], dark))
    brick_h = 0.062 * s
    brick_w = 2.1 * brick_h
    gap = 0.16 * brick_h
    shades: dict[str, list[str]] = {base: [], light: [], "mid": []}
    rows = round(wall_h / brick_h)
    for row in range(rows):
        y0 = top + row * wall_h / rows
        x0 = left - (brick_w / 2 if row % 2 else 0.0)
        while x0 < left + w:
            a, b = max(x0, left), min(x0 + brick_w - gap, left + w)
            if b - a > gap:
                key = rng.choices([base, light, "mid"], [0.62, 0.18, 0.2])[0]
                shades[key].append(_rect(a, y0, b - a, wall_h / rows - gap))
            x0 += brick_w
    out += [_path(shades[base], base), _path(shades[light], light, more='opacity="0.75"')]
    out += [_path(shades["mid"], base), _path(shades["mid"], dark, more='opacity="0.45"')]
    # roof: a triangle with rows of rounded tiles
    apex, eave = top - 0.42 * s, 0.07 * s
    out.append(
        f'<path d="M{_n(left - eave)} {_n(top + 1)}L{_n(t.x)} {_n(apex)}L{_n(left + w + eave)} {_n(top + 1)}z" fill="{roof_dark}"/>'
    )
    tiles: dict[str, list[str]] = {roof_base: [], roof_light: []}
    tile_rows, roof_h = 6, top - apex
    tile_w = 0.088 * s
    for row in range(tile_rows, 0, -1):
        y1 = apex + roof_h * row / tile_rows
        half = (w / 2 + eave) * (row - 0.15) / tile_rows
        count = max(1, round(2 * half / tile_w))
        step = 2 * half / count
        for i in range(count):
            x0 = t.x - half + i * step
            y0 = y1 - roof_h / tile_rows
            d = f"M{_n(x0 + 0.6)} {_n(y0)}h{_n(step - 1.2)}v{_n(roof_h / tile_rows * 0.5)}q{_n(-step / 2 + 0.6)} {_n(roof_h / tile_rows * 0.8)} {_n(-step + 1.2)} 0z"
            tiles[rng.choices([roof_base, roof_light], [0.6, 0.4])[0]].append(d)
    out += [_path(tiles[roof_base], roof_base), _path(tiles[roof_light], roof_light)]
    # windows
    parts = [
        Part("roof", (left - eave, apex, left + w + eave, top)),
        Part("wall", (left, top, left + w, t.y)),
    ]
    glass = ("#ffd76b", "#ffefb0") if night else ("#9fd0ea", "#d8eef8")
    win_w, win_h = 0.19 * s, 0.2 * s
    for fx in (0.2, 0.8):
        wx, wy = left + w * fx - win_w / 2, top + 0.11 * s
        parts.append(Part("window", (wx, wy, wx + win_w, wy + win_h)))
        frame = 0.018 * s
        out.append(_path([_rect(wx - frame, wy - frame, win_w + 2 * frame, win_h + 2 * frame)], "#fbf7ee"))
        out.append(_path([_rect(wx, wy, win_w, win_h)], glass[0]))
        out.append(
            _path(
                [
                    f"M{_n(wx)} {_n(wy + win_h)}L{_n(wx)} {_n(wy + win_h * 0.4)}L{_n(wx + win_w * 0.6)} {_n(wy)}h{_n(win_w * 0.4)}z"
                ],
                glass[1],
                more='opacity="0.6"',
            )
        )
        bars = [f"M{_n(wx + win_w * f)} {_n(wy)}v{_n(win_h)}" for f in (1 / 2,)]
        bars += [f"M{_n(wx)} {_n(wy + win_h * f)}h{_n(win_w)}" for f in (1 / 2,)]
        out.append(_path(bars, "none", "#fbf7ee", 0.018 * s))
        out.append(_path([_rect(wx - 0.03 * s, wy + win_h + frame, win_w + 0.06 * s, 0.022 * s)], "#d9cdb8"))
    # door
    dw, dh = 0.18 * s, 0.32 * s
    dx, dy = t.x - dw / 2, t.y - dh
    parts.append(Part("door", (dx, dy, dx + dw, t.y)))
    out.append(
        _path(
            [
                f"M{_n(dx - 3)} {_n(t.y)}v{_n(-dh * 0.8)}q0 {_n(-dh * 0.25)} {_n(dw / 2 + 3)} {_n(-dh * 0.25)}q{_n(dw / 2 + 3)} 0 {_n(dw / 2 + 3)} {_n(dh * 0.25)}v{_n(dh * 0.8)}z"
            ],
            "#fbf7ee",
        )
    )
    out.append(
        _path(
            [
                f"M{_n(dx)} {_n(t.y)}v{_n(-dh * 0.8)}q0 {_n(-dh * 0.2)} {_n(dw / 2)} {_n(-dh * 0.2)}q{_n(dw / 2)} 0 {_n(dw / 2)} {_n(dh * 0.2)}v{_n(dh * 0.8)}z"
            ],
            "#5b3522",
        )
    )
    planks = [f"M{_n(dx + dw * f)} {_n(t.y - 2)}v{_n(-dh * 0.85)}" for f in (0.33, 0.67)]
    out.append(_path(planks, "none", "#3a1f12", 0.011 * s))
    out.append(f'<circle cx="{_n(dx + dw * 0.83)}" cy="{_n(t.y - dh * 0.42)}" r="{_n(0.018 * s)}" fill="#ffd34d"/>')
    return Drawing("".join(out), (left - eave, apex, left + w + eave, t.y), tuple(parts))


@kind("tree", ("green", "red", "yellow", "purple", "white"), (170, 270), 0.72)
def tree(t: Thing, rng: Random, night: bool) -> Drawing:
    """A tree whose crown is made of single leaves with veins over a trunk with bark lines."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    rx, ry = 0.33 * s * rng.uniform(0.9, 1.1), 0.34 * s
    cx, cy = t.x, t.y - s + ry
    out = [_shadow(t.x, t.y, 0.26 * s)]
    tw = 0.05 * s
    out.append(
        f'<path d="M{_n(t.x - tw * 1.5)} {_n(t.y)}Q{_n(t.x - tw * 0.7)} {_n(t.y - 0.08 * s)} {_n(t.x - tw * 0.7)} {_n(cy + 0.1 * s)}'
        f'L{_n(t.x + tw * 0.7)} {_n(cy + 0.1 * s)}Q{_n(t.x + tw * 0.7)} {_n(t.y - 0.08 * s)} {_n(t.x + tw * 1.5)} {_n(t.y)}z" fill="#7a5036"/>'
    )
    bark = []
    for _ in range(9):
        bx, by = t.x + rng.uniform(-0.65, 0.65) * tw, t.y - rng.uniform(0.02, 0.38) * s
        bark.append(f"M{_n(bx)} {_n(by)}q{_n(rng.uniform(-2, 2))} {_n(-0.02 * s)} 0 {_n(-0.06 * s)}")
    out.append(_path(bark, "none", "#4d2d1c", 0.013 * s))
    for side in (-1, 1):
        out.append(
            _path(
                [
                    f"M{_n(t.x)} {_n(t.y - 0.3 * s)}q{_n(side * 0.02 * s)} {_n(-0.06 * s)} {_n(side * 0.14 * s)} {_n(-0.13 * s)}"
                ],
                "none",
                "#7a5036",
                0.03 * s,
            )
        )
    # crown: a soft dark body, then leaves from the outside in, darker below, lighter above
    out.append(f'<ellipse cx="{_n(cx)}" cy="{_n(cy)}" rx="{_n(rx * 0.86)}" ry="{_n(ry * 0.86)}" fill="{dark}"/>')
    layers: list[dict[str, list[str]]] = [{dark: [], base: [], light: []} for _ in range(2)]
    veins: list[list[str]] = [[], []]
    for layer, count in ((0, 62), (1, 70)):
        for _ in range(count):
            a = rng.uniform(0, 2 * math.pi)
            r = math.sqrt(rng.random()) * (1.0 if layer == 0 else 0.9)
            px, py = cx + rx * r * math.cos(a), cy + ry * r * math.sin(a)
            up = (cy - py) / ry + 0.35 * (cx - px) / rx + rng.gauss(0, 0.4)
            shade = light if up > 0.55 else base if up > -0.55 else dark
            length = s * rng.uniform(0.105, 0.135)
            outline, vein = _leaf(px, py, length, a + rng.uniform(-1.1, 1.1), 0.62)
            layers[layer][shade].append(outline)
            veins[layer].append(vein)
    for layer in (0, 1):
        for shade in (dark, base, light):
            out.append(_path(layers[layer][shade], shade, dark, 0.008 * s))
        out.append(_path(veins[layer], "none", dark, 0.008 * s))
    crown = (cx - rx * 1.05, cy - ry * 1.05, cx + rx * 1.05, cy + ry * 1.05)
    parts = (Part("crown", crown), Part("trunk", (t.x - tw * 1.3, cy + ry * 0.9, t.x + tw * 1.3, t.y)))
    return Drawing("".join(out), (crown[0], crown[1], crown[2], t.y), parts)


@kind("balloon", ("red", "blue", "yellow", "green", "purple", "white"), (150, 240), 0.68, floats=True)
def balloon(t: Thing, rng: Random, night: bool) -> Drawing:
    """A hot-air balloon: gores with seams and a band, ropes and a woven basket."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    r = 0.34 * s
    cx, cy = t.x, t.y - s + r
    neck = cy + 1.28 * r
    nw = 0.22 * r
    accent = "#f7e6b8" if t.colour in ("white", "red", "blue", "purple", "green") else "#fff6da"
    if t.colour == "white":
        accent = "#d8d4cc"

    def edge(f: float) -> str:
        """The meridian at horizontal fraction f in -1..1."""
        return f"C{_n(cx + 1.30 * r * f)} {_n(cy - r)} {_n(cx + 1.42 * r * f)} {_n(cy + 0.35 * r)} {_n(cx + nw * f)} {_n(neck)}"

    def gore(a: float, b: float) -> str:
        back = (
            f"C{_n(cx + 1.42 * r * a)} {_n(cy + 0.35 * r)} {_n(cx + 1.30 * r * a)} {_n(cy - r)} {_n(cx)} {_n(cy - r)}"
        )
        return f"M{_n(cx)} {_n(cy - r)}{edge(b)}L{_n(cx + nw * a)} {_n(neck)}{back}z"

    out = []
    cuts = [math.sin(math.pi * (i / 8 - 0.5)) for i in range(9)]
    for i in range(8):
        fill = accent if i in (2, 5) else (light if i == 3 else dark if i in (0, 7) else base)
        out.append(_path([gore(cuts[i], cuts[i + 1])], fill))
    # fine seams between and inside the gores, a chequered band
    seams = [f"M{_n(cx)} {_n(cy - r)}{edge(math.sin(math.pi * (i / 8 - 0.5)))}" for i in range(1, 8)]
    out.append(_path(seams, "none", dark, 0.009 * s))
    rings = []
    for k in range(1, 6):
        yy = cy - 0.95 * r + k * 0.36 * r
        half = (
            1.02 * r * math.sqrt(max(0.0, 1 - ((yy - cy) / (1.04 * r)) ** 2))
            if yy < cy
            else r * (1.0 - 0.62 * ((yy - cy) / (1.28 * r)) ** 1.6)
        )
        rings.append(f"M{_n(cx - half)} {_n(yy)}Q{_n(cx)} {_n(yy + 0.1 * r)} {_n(cx + half)} {_n(yy)}")
    out.append(_path(rings, "none", dark, 0.008 * s, 'opacity="0.8"'))
    out.append(
        f'<ellipse cx="{_n(cx - 0.38 * r)}" cy="{_n(cy - 0.35 * r)}" rx="{_n(0.2 * r)}" ry="{_n(0.38 * r)}" fill="#ffffff" opacity="0.25"/>'
    )
    # skirt, ropes, basket with weave
    bw, bh = 0.17 * s, 0.12 * s
    by = t.y - bh
    ropes = [
        f"M{_n(cx + nw * f)} {_n(neck)}L{_n(cx + bw / 2 * g)} {_n(by)}"
        for f, g in ((-1, -1), (-0.4, -0.35), (0.4, 0.35), (1, 1))
    ]
    out.append(_path(ropes, "none", "#5a4330", 0.011 * s))
    out.append(_path([_round_rect(cx - nw, neck - 0.012 * s, 2 * nw, 0.03 * s, 2)], dark))
    out.append(_path([_round_rect(cx - bw / 2, by, bw, bh, 0.02 * s)], "#8a5a2f"))
    weave: dict[str, list[str]] = {"#c08a4d": [], "#a8733b": []}
    nx, ny = 5, 4
    for i in range(nx):
        for j in range(ny):
            if (i + j) % 2 == 0:
                shade = rng.choice(["#c08a4d", "#a8733b"])
                weave[shade].append(
                    _round_rect(
                        cx - bw / 2 + bw * (i + 0.05) / nx,
                        by + bh * (j + 0.15) / ny,
                        bw / nx * 1.5 if i < nx - 1 else bw / nx * 0.9,
                        bh / ny * 0.7,
                        1,
                    )
                )
    out += [_path(d, shade) for shade, d in weave.items()]
    out.append(_path([_round_rect(cx - bw * 0.56, by - 0.012 * s, bw * 1.12, 0.028 * s, 3)], "#6b4323"))
    parts = (
        Part("envelope", (cx - r * 1.02, cy - r, cx + r * 1.02, neck)),
        Part("basket", (cx - bw / 2, by - 0.02 * s, cx + bw / 2, t.y)),
        Part("ropes", (cx - nw, neck, cx + nw, by)),
    )
    return Drawing("".join(out), (cx - r * 1.02, cy - r, cx + r * 1.02, t.y), parts)


@kind("flower", ("red", "blue", "yellow", "purple", "white"), (150, 250), 0.6)
def flower(t: Thing, rng: Random, night: bool) -> Drawing:
    """A big flower: petals with fine lines, a disk of seed dots, a stem with two veined leaves."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    r = 0.3 * s
    cx, cy = t.x + rng.uniform(-0.03, 0.03) * s, t.y - s + r
    out = [_shadow(t.x, t.y, 0.14 * s)]
    out.append(
        _path(
            [f"M{_n(t.x)} {_n(t.y)}Q{_n(2 * t.x - cx)} {_n((t.y + cy) / 2)} {_n(cx)} {_n(cy)}"],
            "none",
            "#3f8f45",
            0.035 * s,
        )
    )
    for side in (-1, 1):
        angle = -math.pi / 2 + side * 0.95
        outline, vein = _leaf(t.x, t.y - rng.uniform(0.03, 0.14) * s, 0.27 * s, angle, 0.34)
        out.append(_path([outline], "#4fa552", "#2f7838", 0.006 * s))
        out.append(_path([vein], "none", "#2f7838", 0.008 * s))
    count = rng.choice([8, 9, 10])
    turn = rng.uniform(0, 1)
    for layer in (0, 1):
        outlines, lines = [], []
        for i in range(count):
            a = 2 * math.pi * (i + turn + 0.5 * layer) / count
            length = r * (1.0 if layer == 0 else 0.84)
            ca, sa = math.cos(a), math.sin(a)
            fat = length * math.pi / count * 0.95
            tip = (cx + length * ca, cy + length * sa)
            mid = (cx + 0.68 * length * ca, cy + 0.68 * length * sa)
            ox, oy = -sa * fat, ca * fat
            outlines.append(
                f"M{_n(cx)} {_n(cy)}Q{_n(mid[0] + ox * 1.5 - 0.2 * length * ca)} {_n(mid[1] + oy * 1.5 - 0.2 * length * sa)} {_n(mid[0] + ox * 0.8 + 0.12 * length * ca)} {_n(mid[1] + oy * 0.8 + 0.12 * length * sa)}"
                f"Q{_n(tip[0] + ox * 0.3)} {_n(tip[1] + oy * 0.3)} {_n(tip[0])} {_n(tip[1])}Q{_n(tip[0] - ox * 0.3)} {_n(tip[1] - oy * 0.3)} {_n(mid[0] - ox * 0.8 + 0.12 * length * ca)} {_n(mid[1] - oy * 0.8 + 0.12 * length * sa)}"
                f"Q{_n(mid[0] - ox * 1.5 - 0.2 * length * ca)} {_n(mid[1] - oy * 1.5 - 0.2 * length * sa)} {_n(cx)} {_n(cy)}z"
            )
            for k in (-0.4, 0.4):
                lines.append(
                    f"M{_n(cx + 0.35 * length * ca + ox * k * 0.5)} {_n(cy + 0.35 * length * sa + oy * k * 0.5)}L{_n(cx + (0.86 - 0.1 * abs(k)) * length * ca + ox * k)} {_n(cy + (0.86 - 0.1 * abs(k)) * length * sa + oy * k)}"
                )
        out.append(_path(outlines, base if layer == 0 else light, dark, 0.009 * s))
        out.append(_path(lines, "none", dark if layer == 0 else base, 0.009 * s))
    disk = "#7a4a1e" if t.colour in ("yellow", "white") else "#e0a526"
    dot = "#f2c14e" if t.colour in ("yellow", "white") else "#7a4a1e"
    out.append(f'<circle cx="{_n(cx)}" cy="{_n(cy)}" r="{_n(0.32 * r)}" fill="{disk}"/>')
    seeds = []
    for i in range(26):
        rr, a = 0.3 * r * math.sqrt((i + 0.5) / 26), i * 2.39996
        seeds.append(_circle(cx + rr * math.cos(a), cy + rr * math.sin(a), 0.0105 * s))
    out.append(_path(seeds, dot))
    parts = (
        Part("petals", (cx - r, cy - r, cx + r, cy + r)),
        Part("seeds", (cx - 0.32 * r, cy - 0.32 * r, cx + 0.32 * r, cy + 0.32 * r)),
        Part("stem", (t.x - 0.2 * s, cy + r, t.x + 0.2 * s, t.y)),
    )
    return Drawing("".join(out), (cx - r, cy - r, cx + r, t.y), parts)


# --- sky and ground -----------------------------------------------------------------------------------------------

_SKY_STOPS = {
    "day": [(0.0, "#4f9fe3"), (0.6, "#93c9f2"), (1.0, "#d6edf9")],
    "sunset": [(0.0, "#5b4a8f"), (0.35, "#d0607d"), (0.7, "#f59a5b"), (1.0, "#fdd58a")],
    "night": [(0.0, "#0d1330"), (0.6, "#1f2b5c"), (1.0, "#3c4a85")],
    "cloudy": [(0.0, "#8d9bab"), (0.6, "#b3bec9"), (1.0, "#d5dbe0")],
}
_GROUND_STOPS = {
    "meadow": [(0.0, "#93c763"), (1.0, "#4d9440")],
    "sand": [(0.0, "#f0dba2"), (1.0, "#dcb56d")],
    "snow": [(0.0, "#f7fbff"), (1.0, "#d7e4f2")],
    "road": [(0.0, "#7d7a7c"), (1.0, "#504d53")],
}
_HILLS = {"meadow": "#6faa68", "sand": "#d9b878", "snow": "#c9d9ea", "road": "#7c9a72"}


def _cloud(x: float, y: float, w: float, rng: Random, fill: str, shade: str) -> str:
    bumps, lower = [], []
    count = rng.randint(4, 6)
    for i in range(count):
        f = (i + 0.5) / count
        r = w * (0.13 + 0.12 * math.sin(math.pi * f)) * rng.uniform(0.9, 1.15)
        bumps.append(_circle(x + (f - 0.5) * w * 0.8, y - r * 0.45, r))
        lower.append(_circle(x + (f - 0.5) * w * 0.8, y - r * 0.45 + w * 0.035, r))
    return _path(lower, shade) + _path(bumps, fill)


def sky_parts(scene: Scene) -> tuple[Part, ...]:
    """Where the sun or moon is, if any."""
    rng = Random(scene.seed ^ 0x5C7)
    fx, fy = rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.24)
    if scene.sky == "cloudy":
        return ()
    x = fx * scene.width
    if scene.sky == "sunset":
        r, y = 46.0, scene.horizon - 0.06 * HEIGHT
    else:
        r, y = (27.0 if scene.sky == "day" else 24.0), fy * HEIGHT
    return (Part("moon" if scene.sky == "night" else "sun", (x - r, y - r, x + r, y + r)),)


def _sky(scene: Scene) -> str:
    rng = Random(scene.seed ^ 0x51A)
    w, horizon = scene.width, scene.horizon
    out = [f'<rect width="{_n(w)}" height="{_n(horizon + 30)}" fill="url(#sky)"/>']
    for part in sky_parts(scene):
        x, y, r = (part.box[0] + part.box[2]) / 2, (part.box[1] + part.box[3]) / 2, (part.box[2] - part.box[0]) / 2
        glow = {"day": "#fff3b8", "sunset": "#ffd36e", "night": "#8fa0e0"}[scene.sky]
        for k, alpha in ((2.6, 0.12), (1.9, 0.16), (1.4, 0.22)):
            out.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r * k)}" fill="{glow}" opacity="{alpha}"/>')
        body = {"day": "#fff0a0", "sunset": "#ffe9a3", "night": "#f4f0d8"}[scene.sky]
        out.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" fill="{body}"/>')
        if scene.sky == "night":
            craters = [
                _circle(x + dx * r, y + dy * r, rr * r)
                for dx, dy, rr in ((-0.3, -0.2, 0.2), (0.3, 0.25, 0.26), (0.15, -0.5, 0.13))
            ]
            out.append(_path(craters, "#d9d3b2"))
        if scene.sky == "day":
            rays = [
                f"M{_n(x + 1.25 * r * math.cos(a))} {_n(y + 1.25 * r * math.sin(a))}L{_n(x + 1.6 * r * math.cos(a))} {_n(y + 1.6 * r * math.sin(a))}"
                for a in (i * math.pi / 6 for i in range(12))
            ]
            out.append(_path(rays, "none", "#fff0a0", 2.4))
    if scene.sky == "night":
        stars, small = [], []
        for _ in range(int(34 * w / HEIGHT)):
            x, y = rng.uniform(0, w), rng.uniform(0, horizon * 0.92)
            r = rng.uniform(4.0, 8.0)
            if rng.random() < 0.45:
                stars.append(
                    f"M{_n(x)} {_n(y - r)}Q{_n(x)} {_n(y)} {_n(x + r)} {_n(y)}Q{_n(x)} {_n(y)} {_n(x)} {_n(y + r)}Q{_n(x)} {_n(y)} {_n(x - r)} {_n(y)}Q{_n(x)} {_n(y)} {_n(x)} {_n(y - r)}z"
                )
            else:
                small.append(_circle(x, y, 1.8))
        out += [_path(stars, "#fff7cf"), _path(small, "#e8ecff")]
    if scene.sky == "sunset":
        for _ in range(int(7 * w / HEIGHT)):
            x, y, length = rng.uniform(-40, w), rng.uniform(0.1, 0.75) * horizon, rng.uniform(70, 190)
            out.append(
                f'<ellipse cx="{_n(x + length / 2)}" cy="{_n(y)}" rx="{_n(length / 2)}" ry="{_n(rng.uniform(3, 7))}" fill="{rng.choice(["#ffc6a0", "#f7a08f", "#ffdcae"])}" opacity="0.65"/>'
            )
    if scene.sky == "day":
        for _ in range(rng.randint(1, 3)):
            out.append(
                _cloud(
                    rng.uniform(0, w), rng.uniform(0.12, 0.6) * horizon, rng.uniform(60, 110), rng, "#ffffff", "#cfe3f3"
                )
            )
    if scene.sky == "cloudy":
        for _ in range(int(7 * w / HEIGHT)):
            out.append(
                _cloud(
                    rng.uniform(0, w),
                    rng.uniform(0.08, 0.85) * horizon,
                    rng.uniform(110, 200),
                    rng,
                    rng.choice(["#e4e9ed", "#d3dae1", "#f0f3f5"]),
                    "#a3afbb",
                )
            )
    return "".join(out)


def _ground(scene: Scene) -> str:
    rng = Random(scene.seed ^ 0x6B0)
    w, horizon = scene.width, scene.horizon
    out = []
    # far hills
    d = [f"M0 {_n(horizon + 6)}"]
    x, step = 0.0, 130.0
    while x < w:
        d.append(f"q{_n(step / 2)} {_n(-rng.uniform(14, 52))} {_n(step)} 0")
        x += step
    d.append(f"V{_n(horizon + 30)}H0z")
    out.append(_path(d, _HILLS[scene.ground], more='opacity="0.75"'))
    out.append(f'<rect y="{_n(horizon)}" width="{_n(w)}" height="{_n(HEIGHT - horizon)}" fill="url(#ground)"/>')
    depth = HEIGHT - horizon

    def at() -> tuple[float, float, float]:
        """A random place and its scale: 0 at the horizon, 1 at the bottom."""
        f = rng.random() ** 0.75
        return rng.uniform(-5, w + 5), horizon + f * depth, 0.25 + 0.75 * f

    if scene.ground == "meadow":
        blades: dict[str, list[str]] = {"#37792f": [], "#a5d66f": [], "#5fa347": []}
        for _ in range(int(300 * w / HEIGHT)):
            x, y, k = at()
            shade = rng.choice(list(blades))
            blades[shade].append(
                f"M{_n(x)} {_n(y)}q{_n(rng.uniform(-2, 2) * k)} {_n(-11 * k)} {_n(rng.uniform(-9, 9) * k)} {_n(-23 * k)}"
            )
        out += [_path(d, "none", shade, 2.9) for shade, d in blades.items()]
        blossoms = [_circle(x, y, 3.4 * k) for x, y, k in (at() for _ in range(int(26 * w / HEIGHT)))]
        out.append(_path(blossoms, "#fff4d6"))
    elif scene.ground == "sand":
        ripples, hollows = [], []
        for _ in range(int(44 * w / HEIGHT)):
            x, y, k = at()
            a = 11 * k
            wave = f"q{_n(14 * k)} {_n(-a)} {_n(28 * k)} 0t{_n(28 * k)} 0t{_n(28 * k)} 0"
            ripples.append(f"M{_n(x)} {_n(y)}{wave}")
            hollows.append(f"M{_n(x)} {_n(y + 4 * k)}{wave}")
        out += [_path(ripples, "none", "#bd9050", 2.8), _path(hollows, "none", "#faedc4", 2.4)]
        pebbles: dict[str, list[str]] = {"#a98a63": [], "#c9b08a": [], "#8d8078": []}
        for _ in range(int(40 * w / HEIGHT)):
            x, y, k = at()
            pebbles[rng.choice(list(pebbles))].append(_round_rect(x, y, rng.uniform(8, 15) * k, 7 * k, 7 * k))
        out += [_path(d, shade) for shade, d in pebbles.items()]
    elif scene.ground == "snow":
        drifts, edges = [], []
        for _ in range(int(22 * w / HEIGHT)):
            x, y, k = at()
            length = rng.uniform(50, 110) * k
            drifts.append(f"M{_n(x)} {_n(y)}q{_n(length / 2)} {_n(-12 * k)} {_n(length)} 0z")
            edges.append(f"M{_n(x)} {_n(y)}q{_n(length / 2)} {_n(7 * k)} {_n(length)} 0")
        out += [_path(drifts, "#ffffff"), _path(edges, "none", "#a3bcd8", 2.8)]
        sparkle = [_circle(x, y, rng.uniform(1.5, 2.8)) for x, y, _ in (at() for _ in range(int(80 * w / HEIGHT)))]
        out.append(_path(sparkle, "#a9c1dc"))
        flakes = []
        for _ in range(int(40 * w / HEIGHT)):
            x, y, k = at()
            r = 5 * k
            flakes.append(f"M{_n(x - r)} {_n(y)}h{_n(2 * r)}M{_n(x)} {_n(y - r)}v{_n(2 * r)}")
        out.append(_path(flakes, "none", "#ffffff", 1.1))
    else:
        stones: dict[str, list[str]] = {"#a09b98": [], "#8c8789": [], "#b5aea6": []}
        y, row = horizon + 3, 0
        while y < HEIGHT + 4:
            f = (y - horizon) / depth
            h = 11 + 22 * f
            x = -rng.uniform(0, 2 * h)
            while x < w:
                width = h * rng.uniform(1.5, 2.2)
                stones[rng.choice(list(stones))].append(_round_rect(x, y, width - 3, h - 3, h * 0.33))
                x += width
            y += h
            row += 1
        out += [_path(d, shade) for shade, d in stones.items()]
    return "".join(out)


# --- scenes -------------------------------------------------------------------------------------------------------


def drawing(thing: Thing, night: bool = False) -> Drawing:
    """The drawing of one object; its randomness comes from the object's own seed."""
    return KINDS[thing.kind].draw(thing, Random(thing.seed), night)


def svg(scene: Scene, box: Box | None = None, width_px: int | None = None, height_px: int | None = None) -> str:
    """The SVG document of `box` (default: the whole scene)."""
    left, top, right, bottom = box or scene.box
    night = scene.sky == "night"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.3f} {top:.3f} {right - left:.3f} {bottom - top:.3f}" '
        f'width="{width_px or right - left}" height="{height_px or bottom - top}" preserveAspectRatio="none"><defs>',
        _gradient("sky", _SKY_STOPS[scene.sky]),
        _gradient("ground", _GROUND_STOPS[scene.ground]),
        "</defs>",
        _sky(scene),
        _ground(scene),
    ]
    out += [drawing(thing, night).svg for thing in scene.things]
    tint = {"night": ("#101a4a", 0.22), "sunset": ("#f08a3c", 0.1), "cloudy": ("#6d7c8c", 0.08)}.get(scene.sky)
    if tint:
        out.append(f'<rect width="{_n(scene.width)}" height="512" fill="{tint[0]}" opacity="{tint[1]}"/>')
    return "".join(out) + "</svg>"


def make_scene(seed: int, kinds: tuple[str, ...] | None = None) -> Scene:
    """The scene of a seed: ground, sky, 1 to 3 objects side by side, square (60 %) or up to twice as wide."""
    rng = Random(seed * 2654435761 + 12345)
    width = HEIGHT if rng.random() < 0.6 else round(HEIGHT * rng.uniform(1.15, 2.0))
    horizon = rng.uniform(0.52, 0.68) * HEIGHT
    ground, sky = rng.choice(GROUNDS), rng.choice(SKIES)
    names = kinds or tuple(KINDS)
    most = 3 if width > 1.3 * HEIGHT else rng.choice([1, 2, 2, 3])
    count = rng.randint(1, most) if width <= 1.3 * HEIGHT else rng.randint(2, most)
    picked = [KINDS[rng.choice(names)] for _ in range(count)]
    # more objects, smaller objects; slots share the width in proportion to what stands in them
    shrink = {1: 1.15, 2: 0.95, 3: 0.78}[count] * (1.1 if width > 1.3 * HEIGHT else 1.0)
    sizes = [rng.uniform(*k.sizes) * shrink for k in picked]
    widths = [k.aspect * s for k, s in zip(picked, sizes)]
    need = sum(widths) + 12 * (count + 1)
    if need > width:
        sizes = [s * width / need for s in sizes]
        widths = [v * width / need for v in widths]
    slack = max(0.0, width - sum(widths))
    cuts = sorted(rng.random() for _ in range(count))
    used: set[tuple[str, str]] = set()
    things = []
    cursor = 0.0
    for i, (k, s, v) in enumerate(zip(picked, sizes, widths)):
        x = slack * cuts[i] + cursor + v / 2
        cursor += v
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
    things.sort(key=lambda t: t.y)
    return Scene(seed, float(width), ground, sky, round(horizon, 1), tuple(things))
