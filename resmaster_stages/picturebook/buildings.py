"""Draws houses and lighthouses."""

from __future__ import annotations

from random import Random

from resmaster_stages.picturebook.svg import circle, num, path, rect, round_rect, shadow
from resmaster_stages.picturebook.world import COLOURS, Drawing, Part, Thing, kind


@kind("house", tuple(COLOURS), (270, 370), 0.95)
def house(t: Thing, rng: Random, night: bool) -> Drawing:
    """A brick house with a tiled roof, two windows with panes, a door with a knob and a chimney."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    w, wall_h = 0.78 * s, 0.56 * s
    left, top = t.x - w / 2, t.y - wall_h
    out = [shadow(t.x, t.y, 0.5 * s)]
    roof_dark, roof_base, roof_light = rng.choice(
        [("#4a2c25", "#6e4234", "#8b5a47"), ("#343a4a", "#4d5568", "#6a738a"), ("#5a2f22", "#84472f", "#a5613f")]
    )
    # chimney
    cx = left + w * rng.choice([0.18, 0.72])
    out.append(path([rect(cx, top - 0.36 * s, 0.1 * s, 0.3 * s)], roof_base))
    out.append(path([rect(cx - 0.012 * s, top - 0.375 * s, 0.124 * s, 0.03 * s)], roof_dark))
    # wall: mortar, then bricks in three shades
    out.append(path([rect(left, top, w, wall_h)], dark))
    brick_h = 0.042 * s
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
                shades[key].append(rect(a, y0, b - a, wall_h / rows - gap))
            x0 += brick_w
    out += [path(shades[base], base), path(shades[light], light, more='opacity="0.75"')]
    out += [path(shades["mid"], base), path(shades["mid"], dark, more='opacity="0.45"')]
    # roof: a triangle with rows of rounded tiles
    apex, eave = top - 0.42 * s, 0.07 * s
    out.append(
        f'<path d="M{num(left - eave)} {num(top + 1)}L{num(t.x)} {num(apex)}L{num(left + w + eave)} {num(top + 1)}z" fill="{roof_dark}"/>'
    )
    tiles: dict[str, list[str]] = {roof_base: [], roof_light: []}
    tile_rows, roof_h = 9, top - apex
    tile_w = 0.06 * s
    for row in range(tile_rows, 0, -1):
        y1 = apex + roof_h * row / tile_rows
        half = (w / 2 + eave) * (row - 0.15) / tile_rows
        count = max(1, round(2 * half / tile_w))
        step = 2 * half / count
        for i in range(count):
            x0 = t.x - half + i * step
            y0 = y1 - roof_h / tile_rows
            d = f"M{num(x0 + 0.6)} {num(y0)}h{num(step - 1.2)}v{num(roof_h / tile_rows * 0.5)}q{num(-step / 2 + 0.6)} {num(roof_h / tile_rows * 0.8)} {num(-step + 1.2)} 0z"
            tiles[rng.choices([roof_base, roof_light], [0.6, 0.4])[0]].append(d)
    out += [path(tiles[roof_base], roof_base), path(tiles[roof_light], roof_light)]
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
        out.append(path([rect(wx - frame, wy - frame, win_w + 2 * frame, win_h + 2 * frame)], "#fbf7ee"))
        out.append(path([rect(wx, wy, win_w, win_h)], glass[0]))
        out.append(
            path(
                [
                    f"M{num(wx)} {num(wy + win_h)}L{num(wx)} {num(wy + win_h * 0.4)}L{num(wx + win_w * 0.6)} {num(wy)}h{num(win_w * 0.4)}z"
                ],
                glass[1],
                more='opacity="0.6"',
            )
        )
        bars = [f"M{num(wx + win_w * f)} {num(wy)}v{num(win_h)}" for f in (1 / 2,)]
        bars += [f"M{num(wx)} {num(wy + win_h * f)}h{num(win_w)}" for f in (1 / 2,)]
        out.append(path(bars, "none", "#fbf7ee", 0.018 * s))
        out.append(path([rect(wx - 0.03 * s, wy + win_h + frame, win_w + 0.06 * s, 0.022 * s)], "#d9cdb8"))
    # door
    dw, dh = 0.18 * s, 0.32 * s
    dx, dy = t.x - dw / 2, t.y - dh
    parts.append(Part("door", (dx, dy, dx + dw, t.y)))
    out.append(
        path(
            [
                f"M{num(dx - 3)} {num(t.y)}v{num(-dh * 0.8)}q0 {num(-dh * 0.25)} {num(dw / 2 + 3)} {num(-dh * 0.25)}q{num(dw / 2 + 3)} 0 {num(dw / 2 + 3)} {num(dh * 0.25)}v{num(dh * 0.8)}z"
            ],
            "#fbf7ee",
        )
    )
    out.append(
        path(
            [
                f"M{num(dx)} {num(t.y)}v{num(-dh * 0.8)}q0 {num(-dh * 0.2)} {num(dw / 2)} {num(-dh * 0.2)}q{num(dw / 2)} 0 {num(dw / 2)} {num(dh * 0.2)}v{num(dh * 0.8)}z"
            ],
            "#5b3522",
        )
    )
    planks = [f"M{num(dx + dw * f)} {num(t.y - 2)}v{num(-dh * 0.85)}" for f in (0.33, 0.67)]
    out.append(path(planks, "none", "#3a1f12", 0.011 * s))
    out.append(f'<circle cx="{num(dx + dw * 0.83)}" cy="{num(t.y - dh * 0.42)}" r="{num(0.018 * s)}" fill="#ffd34d"/>')
    return Drawing("".join(out), (left - eave, apex, left + w + eave, t.y), tuple(parts))


@kind("lighthouse", tuple(COLOURS), (350, 440), 0.5, grounds=("water", "sand", "meadow", "snow"))
def lighthouse(t: Thing, rng: Random, night: bool) -> Drawing:
    """A banded tower of stone blocks on rocks, with a gallery, a lantern with panes and a domed cap."""
    dark, base, light = COLOURS[t.colour]
    s = t.size
    bottom, top = t.y - 0.06 * s, t.y - 0.76 * s
    wide, narrow = 0.15 * s, 0.095 * s
    out = [shadow(t.x, t.y, 0.25 * s)]

    def half(y: float) -> float:
        """Half the width of the tower at a height."""
        return narrow + (wide - narrow) * (y - top) / (bottom - top)

    rocks: dict[str, list[str]] = {"#77716c": [], "#8f8882": [], "#625d5a": []}
    for i in range(9):
        f = (i + 0.5) / 9 * 2 - 1
        r = rng.uniform(0.05, 0.075) * s
        x, y = t.x + f * 0.22 * s, t.y - 0.02 * s - (1 - abs(f)) * 0.035 * s
        rocks[rng.choice(list(rocks))].append(round_rect(x - r, y - r * 0.8, 2 * r, 1.5 * r, 0.6 * r))
    # blocks, in bands of the tower's colour and of white (of grey for a white tower)
    rows, bands = 32, 6
    other = "#9aa2ad" if t.colour == "white" else "#f6f1e7"
    other_light = "#b5bcc6" if t.colour == "white" else "#ffffff"
    out.append(
        path(
            [
                f"M{num(t.x - wide)} {num(bottom)}L{num(t.x - narrow)} {num(top)}H{num(t.x + narrow)}L{num(t.x + wide)} {num(bottom)}z"
            ],
            dark,
        )
    )
    blocks: dict[str, list[str]] = {base: [], light: [], other: [], other_light: []}
    step = (bottom - top) / rows
    for row in range(rows):
        y0 = top + row * step
        h0 = half(y0 + step / 2)
        plain = (row * bands // rows) % 2 == 0
        pair = (base, light) if plain else (other, other_light)
        count = 7
        width = 2 * h0 / count
        x = t.x - h0 - (width / 2 if row % 2 else 0.0)
        while x < t.x + h0 - 0.5:
            a, b = max(x, t.x - h0), min(x + width, t.x + h0)
            blocks[rng.choices(pair, [0.75, 0.25])[0]].append(
                rect(a + 0.35, y0 + 0.4, max(0.3, b - a - 0.7), step - 0.8)
            )
            x += width
    out += [path(d, shade) for shade, d in blocks.items()]
    # a shaded side, two small windows, a door
    out.append(
        path(
            [
                f"M{num(t.x + wide * 0.45)} {num(bottom)}L{num(t.x + narrow * 0.45)} {num(top)}H{num(t.x + narrow)}L{num(t.x + wide)} {num(bottom)}z"
            ],
            "#1b2238",
            more='opacity="0.13"',
        )
    )
    glass = "#ffd76b" if night else "#5d7fa3"
    for f in (0.24, 0.56):
        wy = top + (bottom - top) * f
        out.append(path([round_rect(t.x - 0.026 * s, wy, 0.052 * s, 0.07 * s, 0.024 * s)], "#fbf7ee"))
        out.append(path([round_rect(t.x - 0.018 * s, wy + 0.008 * s, 0.036 * s, 0.054 * s, 0.016 * s)], glass))
    out.append(path([round_rect(t.x - 0.042 * s, bottom - 0.115 * s, 0.084 * s, 0.13 * s, 0.04 * s)], "#4a2f20"))
    out += [path(d, shade) for shade, d in rocks.items()]
    # gallery with a railing
    deck = top - 0.012 * s
    wing = narrow * 1.5
    out.append(path([rect(t.x - wing, deck, 2 * wing, 0.026 * s)], "#3c3f49"))
    rail_y = deck - 0.055 * s
    # lantern: panes, light, cap
    room = narrow * 0.82
    room_top = deck - 0.135 * s
    out.append(path([rect(t.x - room, room_top, 2 * room, deck - room_top)], "#ffe9a0" if night else "#bfe0ee"))
    out.append(path([circle(t.x, (room_top + deck) / 2, room * 0.5)], "#ffd23e"))
    bars = [f"M{num(t.x + room * f)} {num(room_top)}V{num(deck)}" for f in (-1, -0.5, 0, 0.5, 1)]
    bars.append(f"M{num(t.x - room)} {num((room_top + deck) / 2)}h{num(2 * room)}")
    out.append(path(bars, "none", "#3c3f49", 0.009 * s))
    posts = [f"M{num(t.x + wing * f)} {num(rail_y)}V{num(deck)}" for f in (-1, -0.7, -0.4, 0.4, 0.7, 1)]
    posts.append(f"M{num(t.x - wing)} {num(rail_y)}h{num(2 * wing)}")
    out.append(path(posts, "none", "#3c3f49", 0.009 * s))
    cap = room * 1.25
    peak = t.y - s
    out.append(
        path(
            [
                f"M{num(t.x - cap)} {num(room_top)}Q{num(t.x - cap * 0.8)} {num(peak + 0.035 * s)} {num(t.x)} {num(peak + 0.022 * s)}Q{num(t.x + cap * 0.8)} {num(peak + 0.035 * s)} {num(t.x + cap)} {num(room_top)}z"
            ],
            base,
            dark,
            0.008 * s,
        )
    )
    out.append(path([circle(t.x, peak + 0.014 * s, 0.014 * s)], dark))
    parts = (
        Part("tower", (t.x - wide, top, t.x + wide, bottom)),
        Part("lantern", (t.x - wing, peak, t.x + wing, top)),
        Part("rocks", (t.x - 0.24 * s, t.y - 0.1 * s, t.x + 0.24 * s, t.y)),
    )
    return Drawing("".join(out), (t.x - 0.25 * s, peak, t.x + 0.25 * s, t.y), parts)
