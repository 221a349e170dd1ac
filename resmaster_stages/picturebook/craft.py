"""Draws balloons and boats."""

from __future__ import annotations

import math
from random import Random

from resmaster_stages.picturebook.svg import circle, num, path, rect, round_rect, shadow
from resmaster_stages.picturebook.world import COLOURS, GROUNDS, Drawing, Part, Thing, kind


@kind("balloon", tuple(COLOURS), (250, 340), 0.68, floats=True, grounds=GROUNDS)
def balloon(t: Thing, rng: Random, night: bool) -> Drawing:
    """A hot-air balloon: gores with seams and a band, ropes and a woven basket."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    r = 0.34 * s
    cx, cy = t.x, t.y - s + r
    neck = cy + 1.28 * r
    nw = 0.22 * r
    accent = "#fff6da" if t.colour == "yellow" else "#f7e6b8"
    if t.colour == "white":
        accent = "#d8d4cc"

    def edge(f: float) -> str:
        """The meridian at horizontal fraction f in -1..1."""
        return f"C{num(cx + 1.30 * r * f)} {num(cy - r)} {num(cx + 1.42 * r * f)} {num(cy + 0.35 * r)} {num(cx + nw * f)} {num(neck)}"

    def gore(a: float, b: float) -> str:
        back = f"C{num(cx + 1.42 * r * a)} {num(cy + 0.35 * r)} {num(cx + 1.30 * r * a)} {num(cy - r)} {num(cx)} {num(cy - r)}"
        return f"M{num(cx)} {num(cy - r)}{edge(b)}L{num(cx + nw * a)} {num(neck)}{back}z"

    out = []
    cuts = [math.sin(math.pi * (i / 8 - 0.5)) for i in range(9)]
    for i in range(8):
        fill = accent if i in (2, 5) else (light if i == 3 else dark if i in (0, 7) else base)
        out.append(path([gore(cuts[i], cuts[i + 1])], fill))
    # fine seams between and inside the gores, a chequered band
    seams = [f"M{num(cx)} {num(cy - r)}{edge(math.sin(math.pi * (i / 8 - 0.5)))}" for i in range(1, 8)]
    out.append(path(seams, "none", dark, 0.009 * s))
    rings = []
    for k in range(1, 9):
        yy = cy - 0.95 * r + k * 0.23 * r
        half = (
            1.02 * r * math.sqrt(max(0.0, 1 - ((yy - cy) / (1.04 * r)) ** 2))
            if yy < cy
            else r * (1.0 - 0.62 * ((yy - cy) / (1.28 * r)) ** 1.6)
        )
        rings.append(f"M{num(cx - half)} {num(yy)}Q{num(cx)} {num(yy + 0.1 * r)} {num(cx + half)} {num(yy)}")
    out.append(path(rings, "none", dark, 0.008 * s, 'opacity="0.8"'))
    out.append(
        f'<ellipse cx="{num(cx - 0.38 * r)}" cy="{num(cy - 0.35 * r)}" rx="{num(0.2 * r)}" ry="{num(0.38 * r)}" fill="#ffffff" opacity="0.25"/>'
    )
    # skirt, ropes, basket with weave
    bw, bh = 0.17 * s, 0.12 * s
    by = t.y - bh
    ropes = [
        f"M{num(cx + nw * f)} {num(neck)}L{num(cx + bw / 2 * g)} {num(by)}"
        for f, g in ((-1, -1), (-0.4, -0.35), (0.4, 0.35), (1, 1))
    ]
    out.append(path(ropes, "none", "#5a4330", 0.011 * s))
    out.append(path([round_rect(cx - nw, neck - 0.012 * s, 2 * nw, 0.03 * s, 2)], dark))
    out.append(path([round_rect(cx - bw / 2, by, bw, bh, 0.02 * s)], "#8a5a2f"))
    weave: dict[str, list[str]] = {"#c08a4d": [], "#a8733b": []}
    nx, ny = 7, 6
    for i in range(nx):
        for j in range(ny):
            if (i + j) % 2 == 0:
                shade = rng.choice(["#c08a4d", "#a8733b"])
                weave[shade].append(
                    round_rect(
                        cx - bw / 2 + bw * (i + 0.05) / nx,
                        by + bh * (j + 0.15) / ny,
                        bw / nx * 1.5 if i < nx - 1 else bw / nx * 0.9,
                        bh / ny * 0.7,
                        1,
                    )
                )
    out += [path(d, shade) for shade, d in weave.items()]
    out.append(path([round_rect(cx - bw * 0.56, by - 0.012 * s, bw * 1.12, 0.028 * s, 3)], "#6b4323"))
    parts = (
        Part("envelope", (cx - r * 1.02, cy - r, cx + r * 1.02, neck)),
        Part("basket", (cx - bw / 2, by - 0.02 * s, cx + bw / 2, t.y)),
        Part("ropes", (cx - nw, neck, cx + nw, by)),
    )
    return Drawing("".join(out), (cx - r * 1.02, cy - r, cx + r * 1.02, t.y), parts)


@kind("boat", tuple(COLOURS), (270, 370), 0.95, grounds=("water", "sand"))
def boat(t: Thing, rng: Random, night: bool) -> Drawing:
    """A sailing boat: a hull of planks with nails, a mast, two sails with seams and patches, rigging and a pennant."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    facing = rng.choice([-1, 1])
    half, hull = 0.45 * s, 0.2 * s
    deck, foot = t.y - hull, t.y - hull - 0.035 * s
    top = t.y - s

    def at(f: float) -> float:
        """x at a fraction of the half length, bow at 1."""
        return t.x + facing * half * f

    out = [shadow(t.x, t.y, 0.4 * s)]
    # rigging first: it runs behind the sails
    lines = [f"M{num(t.x)} {num(top + 0.04 * s)}L{num(at(f))} {num(deck)}" for f in (1.0, -0.97)]
    shrouds = [f"M{num(t.x)} {num(top + 0.2 * s)}L{num(at(f))} {num(deck)}" for f in (-0.3, 0.3)]
    rungs = []
    for i in range(1, 12):
        y = top + 0.2 * s + (deck - top - 0.2 * s) * i / 12
        rungs.append(f"M{num(at(-0.3 * i / 12))} {num(y)}L{num(at(0.3 * i / 12))} {num(y)}")
    out.append(path(lines + shrouds, "none", "#4c3a2c", 0.01 * s))
    out.append(path(rungs, "none", "#4c3a2c", 0.007 * s))
    out.append(path([rect(t.x - 0.014 * s, top, 0.028 * s, deck - top)], "#7a5a3a"))
    # a pennant
    out.append(
        path(
            [
                f"M{num(t.x)} {num(top)}l{num(-facing * 0.13 * s)} {num(0.03 * s)}l{num(facing * 0.13 * s)} {num(0.035 * s)}z"
            ],
            base,
        )
    )
    # main sail behind the mast, jib before it; both cream with seams in the boat's colour
    for side, reach, head in ((-1, 0.86, 0.06), (1, 0.72, 0.16)):
        x0, y0 = t.x + facing * side * 0.025 * s, top + head * s
        x1 = at(side * reach)
        out.append(
            f'<path d="M{num(x0)} {num(y0)}Q{num(x0 + (x1 - x0) * 0.72)} {num(y0 + (foot - y0) * 0.4)} {num(x1)} {num(foot)}'
            f'Q{num((x0 + x1) / 2)} {num(foot + 0.035 * s)} {num(x0)} {num(foot - 0.01 * s)}z" fill="{"#f6ecd2" if side < 0 else "#fffaf0"}" stroke="#b9a57c" stroke-width="{0.008 * s:.2f}"/>'
        )
        seams = []
        for i in range(1, 10):
            f = i / 10
            y = y0 + (foot - y0) * f
            edge = x0 + (x1 - x0) * (1.44 * f * (1 - f) * 0.55 + f * f * 1.0 + 0.08 * f * (1 - f))
            seams.append(f"M{num(x0)} {num(y)}Q{num((x0 + edge) / 2)} {num(y + 0.018 * s)} {num(edge)} {num(y)}")
        out.append(path(seams, "none", base, 0.011 * s))
    # hull: planks, a rail, nails
    outline = (
        f"M{num(at(-0.98))} {num(deck)}L{num(at(1.06))} {num(deck - 0.03 * s)}Q{num(at(0.95))} {num(t.y - 0.03 * s)} {num(at(0.6))} {num(t.y)}"
        f"L{num(at(-0.7))} {num(t.y)}Q{num(at(-0.95))} {num(t.y - 0.04 * s)} {num(at(-0.98))} {num(deck)}z"
    )
    out.append(path([outline], base, dark, 0.014 * s))
    planks, joints, nails = [], [], []
    for i in range(1, 6):
        y = deck + hull * i / 6
        a, b = -0.96 + 0.047 * i, 1.02 - 0.073 * i
        planks.append(f"M{num(at(a))} {num(y)}L{num(at(b))} {num(y - 0.02 * s * (1 - i / 6))}")
    for i in range(6):
        y0, y1 = deck + hull * i / 6, deck + hull * (i + 1) / 6
        for f in (-0.62, -0.25, 0.12, 0.48):
            x = at(f + (0.16 if i % 2 else 0.0))
            joints.append(f"M{num(x)} {num(y0)}V{num(y1)}")
            nails += [circle(x + d * 0.016 * s, (y0 + y1) / 2, 0.0055 * s) for d in (-1, 1)]
    out.append(path(planks, "none", dark, 0.011 * s))
    out.append(path(joints, "none", dark, 0.008 * s))
    out.append(path(nails, light))
    out.append(
        path([f"M{num(at(-1.0))} {num(deck)}L{num(at(1.08))} {num(deck - 0.03 * s)}"], "none", "#fbf3df", 0.024 * s)
    )
    left, right = sorted((at(-1.0), at(1.08)))
    parts = (
        Part("sail", (min(at(-0.86), t.x), top + 0.1 * s, max(at(-0.86), t.x), foot)),
        Part("hull", (left, deck, right, t.y)),
        Part("rigging", (t.x - 0.3 * half, top + 0.2 * s, t.x + 0.3 * half, foot)),
    )
    return Drawing("".join(out), (left, top, right, t.y), parts)
