"""Draws trees and flowers."""

from __future__ import annotations

import math
from random import Random

from resmaster_stages.picturebook.svg import circle, leaf, num, path, shadow
from resmaster_stages.picturebook.world import COLOURS, Drawing, Part, Thing, kind


@kind("tree", ("green", "red", "yellow", "purple", "white", "orange", "pink"), (300, 400), 0.72)
def tree(t: Thing, rng: Random, night: bool) -> Drawing:
    """A tree whose crown is made of single leaves with veins over a trunk with bark lines."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    rx, ry = 0.33 * s * rng.uniform(0.9, 1.1), 0.34 * s
    cx, cy = t.x, t.y - s + ry
    out = [shadow(t.x, t.y, 0.26 * s)]
    tw = 0.05 * s
    out.append(
        f'<path d="M{num(t.x - tw * 1.5)} {num(t.y)}Q{num(t.x - tw * 0.7)} {num(t.y - 0.08 * s)} {num(t.x - tw * 0.7)} {num(cy + 0.1 * s)}'
        f'L{num(t.x + tw * 0.7)} {num(cy + 0.1 * s)}Q{num(t.x + tw * 0.7)} {num(t.y - 0.08 * s)} {num(t.x + tw * 1.5)} {num(t.y)}z" fill="#7a5036"/>'
    )
    bark = []
    for _ in range(16):
        bx, by = t.x + rng.uniform(-0.65, 0.65) * tw, t.y - rng.uniform(0.02, 0.38) * s
        bark.append(f"M{num(bx)} {num(by)}q{num(rng.uniform(-2, 2))} {num(-0.02 * s)} 0 {num(-0.06 * s)}")
    out.append(path(bark, "none", "#4d2d1c", 0.013 * s))
    for side in (-1, 1):
        out.append(
            path(
                [
                    f"M{num(t.x)} {num(t.y - 0.3 * s)}q{num(side * 0.02 * s)} {num(-0.06 * s)} {num(side * 0.14 * s)} {num(-0.13 * s)}"
                ],
                "none",
                "#7a5036",
                0.03 * s,
            )
        )
    # crown: a soft dark body, then leaves from the outside in, darker below, lighter above
    out.append(f'<ellipse cx="{num(cx)}" cy="{num(cy)}" rx="{num(rx * 0.86)}" ry="{num(ry * 0.86)}" fill="{dark}"/>')
    layers: list[dict[str, list[str]]] = [{dark: [], base: [], light: []} for _ in range(2)]
    veins: list[list[str]] = [[], []]
    for layer, count in ((0, 120), (1, 140)):
        for _ in range(count):
            a = rng.uniform(0, 2 * math.pi)
            r = math.sqrt(rng.random()) * (1.0 if layer == 0 else 0.9)
            px, py = cx + rx * r * math.cos(a), cy + ry * r * math.sin(a)
            up = (cy - py) / ry + 0.35 * (cx - px) / rx + rng.gauss(0, 0.4)
            shade = light if up > 0.55 else base if up > -0.55 else dark
            length = s * rng.uniform(0.078, 0.1)
            outline, vein = leaf(px, py, length, a + rng.uniform(-1.1, 1.1), 0.62)
            layers[layer][shade].append(outline)
            veins[layer].append(vein)
    for layer in (0, 1):
        for shade in (dark, base, light):
            out.append(path(layers[layer][shade], shade, dark, 0.008 * s))
        out.append(path(veins[layer], "none", dark, 0.008 * s))
    crown = (cx - rx * 1.05, cy - ry * 1.05, cx + rx * 1.05, cy + ry * 1.05)
    parts = (Part("crown", crown), Part("trunk", (t.x - tw * 1.3, cy + ry * 0.9, t.x + tw * 1.3, t.y)))
    return Drawing("".join(out), (crown[0], crown[1], crown[2], t.y), parts)


@kind("flower", ("red", "blue", "yellow", "purple", "white", "orange", "pink"), (260, 370), 0.6)
def flower(t: Thing, rng: Random, night: bool) -> Drawing:
    """A big flower: petals with fine lines, a disk of seed dots, a stem with two veined leaves."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    r = 0.3 * s
    cx, cy = t.x + rng.uniform(-0.03, 0.03) * s, t.y - s + r
    out = [shadow(t.x, t.y, 0.14 * s)]
    out.append(
        path(
            [f"M{num(t.x)} {num(t.y)}Q{num(2 * t.x - cx)} {num((t.y + cy) / 2)} {num(cx)} {num(cy)}"],
            "none",
            "#3f8f45",
            0.035 * s,
        )
    )
    for side in (-1, 1):
        angle = -math.pi / 2 + side * 0.95
        outline, vein = leaf(t.x, t.y - rng.uniform(0.03, 0.14) * s, 0.27 * s, angle, 0.34)
        out.append(path([outline], "#4fa552", "#2f7838", 0.006 * s))
        out.append(path([vein], "none", "#2f7838", 0.008 * s))
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
                f"M{num(cx)} {num(cy)}Q{num(mid[0] + ox * 1.5 - 0.2 * length * ca)} {num(mid[1] + oy * 1.5 - 0.2 * length * sa)} {num(mid[0] + ox * 0.8 + 0.12 * length * ca)} {num(mid[1] + oy * 0.8 + 0.12 * length * sa)}"
                f"Q{num(tip[0] + ox * 0.3)} {num(tip[1] + oy * 0.3)} {num(tip[0])} {num(tip[1])}Q{num(tip[0] - ox * 0.3)} {num(tip[1] - oy * 0.3)} {num(mid[0] - ox * 0.8 + 0.12 * length * ca)} {num(mid[1] - oy * 0.8 + 0.12 * length * sa)}"
                f"Q{num(mid[0] - ox * 1.5 - 0.2 * length * ca)} {num(mid[1] - oy * 1.5 - 0.2 * length * sa)} {num(cx)} {num(cy)}z"
            )
            for k in (-0.55, 0.0, 0.55):
                lines.append(
                    f"M{num(cx + 0.35 * length * ca + ox * k * 0.5)} {num(cy + 0.35 * length * sa + oy * k * 0.5)}L{num(cx + (0.86 - 0.1 * abs(k)) * length * ca + ox * k)} {num(cy + (0.86 - 0.1 * abs(k)) * length * sa + oy * k)}"
                )
        out.append(path(outlines, base if layer == 0 else light, dark, 0.009 * s))
        out.append(path(lines, "none", dark if layer == 0 else base, 0.009 * s))
    disk = "#7a4a1e" if t.colour in ("yellow", "white") else "#e0a526"
    dot = "#f2c14e" if t.colour in ("yellow", "white") else "#7a4a1e"
    out.append(f'<circle cx="{num(cx)}" cy="{num(cy)}" r="{num(0.32 * r)}" fill="{disk}"/>')
    seeds = []
    for i in range(44):
        rr, a = 0.3 * r * math.sqrt((i + 0.5) / 44), i * 2.39996
        seeds.append(circle(cx + rr * math.cos(a), cy + rr * math.sin(a), 0.0085 * s))
    out.append(path(seeds, dot))
    parts = (
        Part("petals", (cx - r, cy - r, cx + r, cy + r)),
        Part("seeds", (cx - 0.32 * r, cy - 0.32 * r, cx + 0.32 * r, cy + 0.32 * r)),
        Part("stem", (t.x - 0.2 * s, cy + r, t.x + 0.2 * s, t.y)),
    )
    return Drawing("".join(out), (cx - r, cy - r, cx + r, t.y), parts)
