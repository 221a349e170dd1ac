"""Draws the sky and the ground of a scene. Detail is sized so that it blurs at 128 px and is crisp at 512 px."""

from __future__ import annotations

import math
from random import Random

from resmaster_stages.picturebook.svg import circle, num, path, round_rect
from resmaster_stages.picturebook.world import HEIGHT, Part, Scene

SKY_STOPS = {
    "day": [(0.0, "#4f9fe3"), (0.6, "#93c9f2"), (1.0, "#d6edf9")],
    "sunset": [(0.0, "#5b4a8f"), (0.35, "#d0607d"), (0.7, "#f59a5b"), (1.0, "#fdd58a")],
    "night": [(0.0, "#0d1330"), (0.6, "#1f2b5c"), (1.0, "#3c4a85")],
    "cloudy": [(0.0, "#8d9bab"), (0.6, "#b3bec9"), (1.0, "#d5dbe0")],
}
GROUND_STOPS = {
    "meadow": [(0.0, "#93c763"), (1.0, "#4d9440")],
    "sand": [(0.0, "#f0dba2"), (1.0, "#dcb56d")],
    "snow": [(0.0, "#f7fbff"), (1.0, "#d7e4f2")],
    "road": [(0.0, "#7d7a7c"), (1.0, "#504d53")],
    "water": [(0.0, "#7fc3d8"), (1.0, "#1f6f9c")],
}
_HILLS = {"meadow": "#6faa68", "sand": "#d9b878", "snow": "#c9d9ea", "road": "#7c9a72", "water": "#6f9a86"}


def _cloud(x: float, y: float, w: float, rng: Random, fill: str, shade: str) -> str:
    bumps, lower = [], []
    count = rng.randint(4, 6)
    for i in range(count):
        f = (i + 0.5) / count
        r = w * (0.13 + 0.12 * math.sin(math.pi * f)) * rng.uniform(0.9, 1.15)
        bumps.append(circle(x + (f - 0.5) * w * 0.8, y - r * 0.45, r))
        lower.append(circle(x + (f - 0.5) * w * 0.8, y - r * 0.45 + w * 0.035, r))
    return path(lower, shade) + path(bumps, fill)


def sky_parts(scene: Scene) -> tuple[Part, ...]:
    """The region of the sun or the moon, if there is one."""
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


def draw_sky(scene: Scene) -> str:
    rng = Random(scene.seed ^ 0x51A)
    w, horizon = scene.width, scene.horizon
    out = [f'<rect width="{num(w)}" height="{num(horizon + 30)}" fill="url(#sky)"/>']
    for part in sky_parts(scene):
        x, y, r = (part.box[0] + part.box[2]) / 2, (part.box[1] + part.box[3]) / 2, (part.box[2] - part.box[0]) / 2
        glow = {"day": "#fff3b8", "sunset": "#ffd36e", "night": "#8fa0e0"}[scene.sky]
        for k, alpha in ((2.6, 0.12), (1.9, 0.16), (1.4, 0.22)):
            out.append(f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(r * k)}" fill="{glow}" opacity="{alpha}"/>')
        body = {"day": "#fff0a0", "sunset": "#ffe9a3", "night": "#f4f0d8"}[scene.sky]
        out.append(f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(r)}" fill="{body}"/>')
        if scene.sky == "night":
            craters = [
                circle(x + dx * r, y + dy * r, rr * r)
                for dx, dy, rr in ((-0.3, -0.2, 0.2), (0.3, 0.25, 0.26), (0.15, -0.5, 0.13))
            ]
            out.append(path(craters, "#d9d3b2"))
        if scene.sky == "day":
            rays = [
                f"M{num(x + 1.25 * r * math.cos(a))} {num(y + 1.25 * r * math.sin(a))}L{num(x + 1.6 * r * math.cos(a))} {num(y + 1.6 * r * math.sin(a))}"
                for a in (i * math.pi / 6 for i in range(12))
            ]
            out.append(path(rays, "none", "#fff0a0", 2.4))
    if scene.sky == "night":
        stars, small = [], []
        for _ in range(int(34 * w / HEIGHT)):
            x, y = rng.uniform(0, w), rng.uniform(0, horizon * 0.92)
            r = rng.uniform(4.0, 8.0)
            if rng.random() < 0.45:
                stars.append(
                    f"M{num(x)} {num(y - r)}Q{num(x)} {num(y)} {num(x + r)} {num(y)}Q{num(x)} {num(y)} {num(x)} {num(y + r)}Q{num(x)} {num(y)} {num(x - r)} {num(y)}Q{num(x)} {num(y)} {num(x)} {num(y - r)}z"
                )
            else:
                small.append(circle(x, y, 1.8))
        out += [path(stars, "#fff7cf"), path(small, "#e8ecff")]
    if scene.sky == "sunset":
        for _ in range(int(7 * w / HEIGHT)):
            x, y, length = rng.uniform(-40, w), rng.uniform(0.1, 0.75) * horizon, rng.uniform(70, 190)
            out.append(
                f'<ellipse cx="{num(x + length / 2)}" cy="{num(y)}" rx="{num(length / 2)}" ry="{num(rng.uniform(3, 7))}" fill="{rng.choice(["#ffc6a0", "#f7a08f", "#ffdcae"])}" opacity="0.65"/>'
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


def draw_ground(scene: Scene) -> str:
    rng = Random(scene.seed ^ 0x6B0)
    w, horizon = scene.width, scene.horizon
    out = []
    # far hills
    d = [f"M0 {num(horizon + 6)}"]
    x, step = 0.0, 130.0
    while x < w:
        d.append(f"q{num(step / 2)} {num(-rng.uniform(14, 52))} {num(step)} 0")
        x += step
    d.append(f"V{num(horizon + 30)}H0z")
    out.append(path(d, _HILLS[scene.ground], more='opacity="0.75"'))
    out.append(f'<rect y="{num(horizon)}" width="{num(w)}" height="{num(HEIGHT - horizon)}" fill="url(#ground)"/>')
    depth = HEIGHT - horizon

    def at() -> tuple[float, float, float]:
        """A random place and its scale: 0 at the horizon, 1 at the bottom."""
        f = rng.random() ** 0.75
        return rng.uniform(-5, w + 5), horizon + f * depth, 0.25 + 0.75 * f

    if scene.ground == "meadow":
        blades: dict[str, list[str]] = {"#37792f": [], "#a5d66f": [], "#5fa347": []}
        for _ in range(int(420 * w / HEIGHT)):
            x, y, k = at()
            shade = rng.choice(list(blades))
            blades[shade].append(
                f"M{num(x)} {num(y)}q{num(rng.uniform(-2, 2) * k)} {num(-9 * k)} {num(rng.uniform(-8, 8) * k)} {num(-19 * k)}"
            )
        out += [path(d, "none", shade, 2.3) for shade, d in blades.items()]
        blossoms = [circle(x, y, 3.4 * k) for x, y, k in (at() for _ in range(int(26 * w / HEIGHT)))]
        out.append(path(blossoms, "#fff4d6"))
    elif scene.ground == "sand":
        ripples, hollows = [], []
        for _ in range(int(44 * w / HEIGHT)):
            x, y, k = at()
            a = 11 * k
            wave = f"q{num(14 * k)} {num(-a)} {num(28 * k)} 0t{num(28 * k)} 0t{num(28 * k)} 0"
            ripples.append(f"M{num(x)} {num(y)}{wave}")
            hollows.append(f"M{num(x)} {num(y + 4 * k)}{wave}")
        out += [path(ripples, "none", "#bd9050", 2.8), path(hollows, "none", "#faedc4", 2.4)]
        pebbles: dict[str, list[str]] = {"#a98a63": [], "#c9b08a": [], "#8d8078": []}
        for _ in range(int(40 * w / HEIGHT)):
            x, y, k = at()
            pebbles[rng.choice(list(pebbles))].append(round_rect(x, y, rng.uniform(8, 15) * k, 7 * k, 7 * k))
        out += [path(d, shade) for shade, d in pebbles.items()]
    elif scene.ground == "water":
        crests: dict[str, list[str]] = {"#e8f8fb": [], "#14587f": [], "#a9dbe8": []}
        for _ in range(int(130 * w / HEIGHT)):
            x, y, k = at()
            a = 9 * k
            arc = f"q{num(9 * k)} {num(a)} {num(18 * k)} 0"
            crests[rng.choice(list(crests))].append(f"M{num(x)} {num(y)}{arc * rng.choice([2, 3])}")
        out += [path(d, "none", shade, 2.6) for shade, d in crests.items()]
        foam = [circle(x, y, 2.6 * k) for x, y, k in (at() for _ in range(int(40 * w / HEIGHT)))]
        out.append(path(foam, "#f4fcff"))
    elif scene.ground == "snow":
        drifts, edges = [], []
        for _ in range(int(22 * w / HEIGHT)):
            x, y, k = at()
            length = rng.uniform(50, 110) * k
            drifts.append(f"M{num(x)} {num(y)}q{num(length / 2)} {num(-12 * k)} {num(length)} 0z")
            edges.append(f"M{num(x)} {num(y)}q{num(length / 2)} {num(7 * k)} {num(length)} 0")
        out += [path(drifts, "#ffffff"), path(edges, "none", "#a3bcd8", 2.8)]
        sparkle = [circle(x, y, rng.uniform(1.5, 2.8)) for x, y, _ in (at() for _ in range(int(80 * w / HEIGHT)))]
        out.append(path(sparkle, "#a9c1dc"))
        flakes = []
        for _ in range(int(40 * w / HEIGHT)):
            x, y, k = at()
            r = 5 * k
            flakes.append(f"M{num(x - r)} {num(y)}h{num(2 * r)}M{num(x)} {num(y - r)}v{num(2 * r)}")
        out.append(path(flakes, "none", "#ffffff", 1.1))
    else:
        stones: dict[str, list[str]] = {"#a09b98": [], "#8c8789": [], "#b5aea6": []}
        y, row = horizon + 3, 0
        while y < HEIGHT + 4:
            f = (y - horizon) / depth
            h = 9 + 17 * f
            x = -rng.uniform(0, 2 * h)
            while x < w:
                width = h * rng.uniform(1.5, 2.2)
                stones[rng.choice(list(stones))].append(round_rect(x, y, width - 3, h - 3, h * 0.33))
                x += width
            y += h
            row += 1
        out += [path(d, shade) for shade, d in stones.items()]
    return "".join(out)
