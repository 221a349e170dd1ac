"""Draws cats and birds."""

from __future__ import annotations

import math
from random import Random

from resmaster_stages.picturebook.svg import circle, num, path, shadow
from resmaster_stages.picturebook.world import COLOURS, GROUNDS, Drawing, Part, Thing, kind

_INK = "#2b2430"


@kind("cat", tuple(COLOURS), (260, 350), 0.72)
def cat(t: Thing, rng: Random, night: bool) -> Drawing:
    """A sitting cat seen from the front: a furry body, a striped tail, ears, slit eyes and whiskers."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    side = rng.choice([-1, 1])
    head_y, head_r = t.y - 0.7 * s, 0.19 * s
    out = [shadow(t.x, t.y, 0.3 * s)]
    # tail with rings
    tail = [
        (t.x + side * 0.16 * s, t.y - 0.05 * s),
        (t.x + side * 0.42 * s, t.y - 0.02 * s),
        (t.x + side * 0.36 * s, t.y - 0.3 * s),
        (t.x + side * 0.31 * s, t.y - 0.44 * s),
    ]
    curve = "M{} {}C{} {} {} {} {} {}".format(*(num(v) for point in tail for v in point))
    out.append(path([curve], "none", dark, 0.095 * s))
    out.append(path([curve], "none", base, 0.075 * s))
    rings = []
    for i in range(3, 10):
        f = i / 10
        x, y = (
            sum(c * p[k] for c, p in zip(((1 - f) ** 3, 3 * f * (1 - f) ** 2, 3 * f * f * (1 - f), f**3), tail))
            for k in (0, 1)
        )
        rings.append(f"M{num(x - 0.03 * s)} {num(y - 0.012 * s)}q{num(0.03 * s)} {num(0.028 * s)} {num(0.06 * s)} 0")
    out.append(path(rings, "none", dark, 0.014 * s))
    # body: a pear, a light chest, two paws
    out.append(
        f'<path d="M{num(t.x - 0.12 * s)} {num(head_y + 0.1 * s)}C{num(t.x - 0.34 * s)} {num(t.y - 0.32 * s)} {num(t.x - 0.3 * s)} {num(t.y)} {num(t.x - 0.2 * s)} {num(t.y)}'
        f'H{num(t.x + 0.2 * s)}C{num(t.x + 0.3 * s)} {num(t.y)} {num(t.x + 0.34 * s)} {num(t.y - 0.32 * s)} {num(t.x + 0.12 * s)} {num(head_y + 0.1 * s)}z" fill="{base}" stroke="{dark}" stroke-width="{0.012 * s:.2f}"/>'
    )
    out.append(
        f'<ellipse cx="{num(t.x)}" cy="{num(t.y - 0.28 * s)}" rx="{num(0.11 * s)}" ry="{num(0.19 * s)}" fill="{light}"/>'
    )
    fur: dict[str, list[str]] = {dark: [], light: [], base: []}
    for _ in range(170):
        a, r = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
        x, y = t.x + 0.235 * s * r * math.cos(a), t.y - 0.24 * s + 0.22 * s * r * math.sin(a)
        chest = abs(x - t.x) < 0.1 * s and y < t.y - 0.1 * s
        shade = rng.choice([base, dark]) if chest else rng.choice([dark, light])
        fur[shade].append(
            f"M{num(x)} {num(y)}q{num(rng.uniform(-0.012, 0.012) * s)} {num(0.02 * s)} {num((x - t.x) * 0.05)} {num(0.034 * s)}"
        )
    out += [path(d, "none", shade, 0.007 * s) for shade, d in fur.items()]
    for f in (-1, 1):
        px = t.x + f * 0.095 * s
        out.append(
            f'<ellipse cx="{num(px)}" cy="{num(t.y - 0.03 * s)}" rx="{num(0.075 * s)}" ry="{num(0.036 * s)}" fill="{light}" stroke="{dark}" stroke-width="{0.01 * s:.2f}"/>'
        )
        toes = [f"M{num(px + k * 0.022 * s)} {num(t.y - 0.045 * s)}v{num(0.03 * s)}" for k in (-1, 0, 1)]
        out.append(path(toes, "none", dark, 0.008 * s))
    # ears, head
    for f in (-1, 1):
        out.append(
            path(
                [
                    f"M{num(t.x + f * 0.17 * s)} {num(head_y - 0.06 * s)}L{num(t.x + f * 0.19 * s)} {num(t.y - s)}L{num(t.x + f * 0.03 * s)} {num(head_y - 0.16 * s)}z"
                ],
                base,
                dark,
                0.012 * s,
            )
        )
        out.append(
            path(
                [
                    f"M{num(t.x + f * 0.155 * s)} {num(head_y - 0.1 * s)}L{num(t.x + f * 0.172 * s)} {num(t.y - 0.955 * s)}L{num(t.x + f * 0.075 * s)} {num(head_y - 0.155 * s)}z"
                ],
                "#f0a5a5",
            )
        )
    out.append(
        f'<ellipse cx="{num(t.x)}" cy="{num(head_y)}" rx="{num(head_r * 1.1)}" ry="{num(head_r)}" fill="{base}" stroke="{dark}" stroke-width="{0.012 * s:.2f}"/>'
    )
    brows = [
        f"M{num(t.x + k * 0.04 * s)} {num(head_y - 0.175 * s)}l{num(k * -0.008 * s)} {num(0.065 * s)}"
        for k in (-1, 0, 1)
    ]
    brows += [
        f"M{num(t.x + f * 0.2 * s)} {num(head_y + k * 0.04 * s)}l{num(-f * 0.055 * s)} {num(0.008 * s)}"
        for f in (-1, 1)
        for k in (0, 1)
    ]
    out.append(path(brows, "none", dark, 0.016 * s))
    out.append(
        f'<ellipse cx="{num(t.x)}" cy="{num(head_y + 0.085 * s)}" rx="{num(0.09 * s)}" ry="{num(0.062 * s)}" fill="{light}"/>'
    )
    iris = rng.choice(["#e9d84a", "#8fd16a", "#7cc4ea"])
    for f in (-1, 1):
        ex, ey = t.x + f * 0.085 * s, head_y - 0.01 * s
        out.append(path([circle(ex, ey, 0.046 * s)], iris, _INK, 0.008 * s))
        out.append(
            f'<ellipse cx="{num(ex)}" cy="{num(ey)}" rx="{num(0.014 * s)}" ry="{num(0.038 * s)}" fill="{_INK}"/>'
        )
        out.append(path([circle(ex + 0.012 * s, ey - 0.015 * s, 0.008 * s)], "#ffffff"))
    ny = head_y + 0.06 * s
    out.append(
        path([f"M{num(t.x - 0.022 * s)} {num(ny)}h{num(0.044 * s)}l{num(-0.022 * s)} {num(0.024 * s)}z"], "#d8707c")
    )
    mouth = [
        f"M{num(t.x)} {num(ny + 0.024 * s)}q{num(f * 0.012 * s)} {num(0.04 * s)} {num(f * 0.05 * s)} {num(0.022 * s)}"
        for f in (-1, 1)
    ]
    out.append(path(mouth, "none", _INK, 0.008 * s))
    whiskers = [
        f"M{num(t.x + f * 0.06 * s)} {num(ny + 0.03 * s + k * 0.016 * s)}q{num(f * 0.1 * s)} {num(k * 0.012 * s)} {num(f * 0.22 * s)} {num(k * 0.05 * s)}"
        for f in (-1, 1)
        for k in (-1, 0, 1)
    ]
    out.append(
        path(whiskers, "none", _INK if t.colour in ("white", "yellow", "pink", "orange") else "#fffdf5", 0.006 * s)
    )
    tail_left, tail_right = sorted((t.x + side * 0.24 * s, t.x + side * 0.42 * s))
    parts = (
        Part("face", (t.x - head_r * 1.1, head_y - head_r, t.x + head_r * 1.1, head_y + head_r)),
        Part("fur", (t.x - 0.24 * s, head_y + 0.19 * s, t.x + 0.24 * s, t.y)),
        Part("tail", (tail_left, t.y - 0.48 * s, tail_right, t.y)),
    )
    left, right = min(t.x - 0.27 * s, tail_left), max(t.x + 0.27 * s, tail_right)
    return Drawing("".join(out), (left, t.y - s, right, t.y), parts)


@kind("bird", tuple(COLOURS), (180, 240), 1.5, floats=True, grounds=GROUNDS)
def bird(t: Thing, rng: Random, night: bool) -> Drawing:
    """A bird in flight, seen from the side: rows of feathers with shafts on a raised wing, a fan tail, beak and eye."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    side = rng.choice([-1, 1])
    body_y = t.y - 0.24 * s
    out = []

    def x(f: float) -> float:
        """Scene x of a place in body heights, the head at +0.55."""
        return t.x + side * f * s

    def feather(fx: float, fy: float, length: float, angle: float, fat: float, fill: str) -> str:
        """A rounded feather with a shaft and barbs."""
        c, n = side * math.cos(angle), -math.sin(angle)
        tip_x, tip_y = fx + length * c, fy + length * n
        ox, oy = -n * length * fat, c * length * fat
        outline = (
            f"M{num(fx)} {num(fy)}C{num(fx + 0.4 * length * c + ox)} {num(fy + 0.4 * length * n + oy)} {num(tip_x + 0.8 * ox)} {num(tip_y + 0.8 * oy)} {num(tip_x)} {num(tip_y)}"
            f"C{num(tip_x - 0.8 * ox)} {num(tip_y - 0.8 * oy)} {num(fx + 0.4 * length * c - ox)} {num(fy + 0.4 * length * n - oy)} {num(fx)} {num(fy)}z"
        )
        shaft = [f"M{num(fx)} {num(fy)}L{num(fx + 0.93 * length * c)} {num(fy + 0.93 * length * n)}"]
        for k in (0.4, 0.51, 0.62, 0.73, 0.84):
            for b in (-1, 1):
                shaft.append(
                    f"M{num(fx + (k - 0.1) * length * c)} {num(fy + (k - 0.1) * length * n)}L{num(fx + k * length * c + b * 0.6 * ox)} {num(fy + k * length * n + b * 0.6 * oy)}"
                )
        return path([outline], fill, dark, 0.012 * s) + path(shaft, "none", dark, 0.009 * s)

    # far wing, tail, body, near wing
    for i in range(5):
        out.append(
            feather(x(-0.02 + 0.07 * i), body_y - 0.1 * s, (0.5 - 0.04 * i) * s, 1.2 + 0.17 * i - 0.35, 0.16, dark)
        )
    for i in range(5):
        out.append(feather(x(-0.32), body_y, 0.42 * s, math.pi + (i - 2) * 0.17 - 0.08, 0.17, base if i % 2 else light))
    out.append(
        f'<path d="M{num(x(-0.42))} {num(body_y)}Q{num(x(-0.1))} {num(body_y - 0.24 * s)} {num(x(0.32))} {num(body_y - 0.2 * s)}'
        f'Q{num(x(0.46))} {num(body_y + 0.02 * s)} {num(x(0.2))} {num(body_y + 0.16 * s)}Q{num(x(-0.12))} {num(body_y + 0.26 * s)} {num(x(-0.42))} {num(body_y)}z" fill="{base}" stroke="{dark}" stroke-width="{0.016 * s:.2f}"/>'
    )
    out.append(
        f'<ellipse cx="{num(x(0.1))}" cy="{num(body_y + 0.1 * s)}" rx="{num(0.2 * s)}" ry="{num(0.09 * s)}" fill="{light}"/>'
    )
    scales = []
    for row in range(3):
        for i in range(5 - row):
            scales.append(
                f"M{num(x(-0.06 + 0.075 * i + 0.03 * row))} {num(body_y + (0.04 + 0.05 * row) * s)}q{num(side * 0.03 * s)} {num(0.045 * s)} {num(side * 0.06 * s)} 0"
            )
    out.append(path(scales, "none", dark, 0.01 * s))
    head_x, head_y, head_r = x(0.4), body_y - 0.14 * s, 0.155 * s
    out.append(path([circle(head_x, head_y, head_r)], base, dark, 0.014 * s))
    beak_x = head_x + side * head_r * 0.85
    out.append(
        path(
            [
                f"M{num(beak_x)} {num(head_y - 0.055 * s)}L{num(beak_x + side * 0.17 * s)} {num(head_y + 0.02 * s)}L{num(beak_x)} {num(head_y + 0.065 * s)}z"
            ],
            "#e5851c",
        )
    )
    out.append(
        path(
            [f"M{num(beak_x)} {num(head_y + 0.015 * s)}L{num(beak_x + side * 0.16 * s)} {num(head_y + 0.02 * s)}"],
            "none",
            "#8c4a08",
            0.009 * s,
        )
    )
    out.append(path([circle(head_x + side * 0.05 * s, head_y - 0.03 * s, 0.042 * s)], "#ffffff", dark, 0.006 * s))
    out.append(path([circle(head_x + side * 0.06 * s, head_y - 0.03 * s, 0.022 * s)], _INK))
    for i in range(7):
        out.append(
            feather(
                x(-0.2 + 0.06 * i),
                body_y - 0.02 * s,
                (0.74 - 0.045 * i) * s,
                2.35 - 0.12 * i,
                0.13,
                base if i % 2 else light,
            )
        )
    for i in range(5):
        out.append(
            feather(x(-0.14 + 0.07 * i), body_y - 0.01 * s, 0.3 * s, 2.3 - 0.12 * i, 0.2, light if i % 2 else base)
        )
    left, right = sorted((x(-0.72), x(0.72)))
    wing_left, wing_right = sorted((x(-0.7), x(0.2)))
    parts = (
        Part("wing", (wing_left, t.y - s, wing_right, body_y)),
        Part("head", (head_x - head_r * 1.2, head_y - head_r * 1.2, head_x + head_r * 1.2, head_y + head_r * 1.2)),
    )
    return Drawing("".join(out), (left, t.y - s, right, t.y), parts)
