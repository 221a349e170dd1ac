"""SVG building blocks: path strings, outlines and gradients."""

from __future__ import annotations

import math


def num(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def path(d: list[str], fill: str = "none", stroke: str = "", width: float = 0.0, more: str = "") -> str:
    if not d:
        return ""
    line = f' stroke="{stroke}" stroke-width="{width:.2f}" stroke-linecap="round"' if stroke else ""
    return f'<path d="{"".join(d)}" fill="{fill}"{line} {more}/>'


def rect(x: float, y: float, w: float, h: float) -> str:
    return f"M{num(x)} {num(y)}h{num(w)}v{num(h)}h{num(-w)}z"


def round_rect(x: float, y: float, w: float, h: float, r: float) -> str:
    r = min(r, w / 2, h / 2)
    return (
        f"M{num(x + r)} {num(y)}h{num(w - 2 * r)}q{num(r)} 0 {num(r)} {num(r)}v{num(h - 2 * r)}q0 {num(r)} {num(-r)} {num(r)}"
        f"h{num(2 * r - w)}q{num(-r)} 0 {num(-r)} {num(-r)}v{num(2 * r - h)}q0 {num(-r)} {num(r)} {num(-r)}z"
    )


def circle(x: float, y: float, r: float) -> str:
    return f"M{num(x - r)} {num(y)}a{num(r)} {num(r)} 0 1 0 {num(2 * r)} 0a{num(r)} {num(r)} 0 1 0 {num(-2 * r)} 0z"


def leaf(x: float, y: float, length: float, angle: float, fat: float) -> tuple[str, str]:
    """A pointed leaf from (x, y) along `angle` (radians) and its vein, as two path strings."""
    c, s = math.cos(angle), math.sin(angle)
    tip_x, tip_y = x + length * c, y + length * s
    mid_x, mid_y = x + 0.45 * length * c, y + 0.45 * length * s
    off_x, off_y = -s * length * fat, c * length * fat
    outline = (
        f"M{num(x)} {num(y)}Q{num(mid_x + off_x)} {num(mid_y + off_y)} {num(tip_x)} {num(tip_y)}"
        f"Q{num(mid_x - off_x)} {num(mid_y - off_y)} {num(x)} {num(y)}z"
    )
    return outline, f"M{num(x)} {num(y)}L{num(x + 0.85 * length * c)} {num(y + 0.85 * length * s)}"


def gradient(name: str, stops: list[tuple[float, str]], horizontal: bool = False) -> str:
    end = 'x2="1" y2="0"' if horizontal else 'x2="0" y2="1"'
    inner = "".join(f'<stop offset="{o}" stop-color="{c}"/>' for o, c in stops)
    return f'<linearGradient id="{name}" x1="0" y1="0" {end}>{inner}</linearGradient>'


def shadow(x: float, y: float, rx: float) -> str:
    return f'<ellipse cx="{num(x)}" cy="{num(y)}" rx="{num(rx)}" ry="{num(rx * 0.13)}" fill="#1b2238" opacity="0.22"/>'
