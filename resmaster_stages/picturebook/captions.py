"""Writes captions for whole scenes and crops, and reads (object, colour) pairs back from sentences.

The vocabulary is small and fixed (`vocabulary`). Every sentence has at most 50 words. The caption of a crop names only
what its box shows. This module does not use pixels or models.
"""

from __future__ import annotations

import re
from random import Random

from resmaster_stages.picturebook.scenes import (
    COLOURS,
    GROUNDS,
    HEIGHT,
    KINDS,
    SKIES,
    Box,
    Drawing,
    Scene,
    Thing,
    drawing,
    sky_parts,
)

PART_WORDS: dict[str, tuple[str, ...]] = {
    "roof": ("roof tiles", "a tiled roof"),
    "wall": ("bricks", "a brick wall"),
    "window": ("a window with panes", "window panes"),
    "door": ("a wooden door", "a door with a knob"),
    "crown": ("leaves", "leaves with veins"),
    "trunk": ("a trunk with bark", "bark"),
    "envelope": ("stripes and seams", "stripes"),
    "basket": ("a woven basket",),
    "ropes": ("ropes",),
    "petals": ("petals with fine lines", "petals"),
    "seeds": ("seeds", "a disk of seeds"),
    "stem": ("a green stem", "a stem with two leaves"),
    "tower": ("stone blocks", "a tower of stone blocks"),
    "lantern": ("a lantern with a railing", "a railing"),
    "rocks": ("rocks",),
    "sail": ("a sail with seams", "sails"),
    "hull": ("wooden planks", "a hull of planks"),
    "rigging": ("rigging",),
    "face": ("a face with whiskers", "whiskers"),
    "fur": ("soft fur", "fur"),
    "tail": ("a ringed tail",),
    "wing": ("feathers", "a wing with feathers"),
    "head": ("a beak", "a small head with a beak"),
    "sun": ("the sun",),
    "moon": ("the moon",),
}
# words by which the evaluation recognises textures
TEXTURES = (
    "brick",
    "tile",
    "pane",
    "leaves",
    "bark",
    "stripes",
    "woven",
    "petals",
    "seeds",
    "stone",
    "planks",
    "sail",
    "whiskers",
    "fur",
    "feathers",
    "waves",
    "grass",
    "ripples",
    "snow",
    "cobbles",
    "stars",
    "clouds",
)
_GROUND_WHOLE: dict[str, tuple[str, ...]] = {
    "meadow": ("on a green meadow", "on the grass", "in a meadow"),
    "sand": ("on the sand", "on a sandy beach"),
    "snow": ("in the snow", "on a snowy field"),
    "road": ("on a cobbled road", "on the cobbles"),
    "water": ("on the water", "on a blue lake"),
}
_SKY_WHOLE: dict[str, tuple[str, ...]] = {
    "day": ("under a blue sky", "on a sunny day"),
    "sunset": ("at sunset", "under an orange sunset sky"),
    "night": ("at night", "under a starry night sky"),
    "cloudy": ("under a cloudy sky", "on a cloudy day"),
}
_GROUND_CLOSE: dict[str, tuple[str, ...]] = {
    "meadow": ("grass blades", "blades of grass"),
    "sand": ("sand ripples and pebbles", "sand with ripples"),
    "snow": ("sparkling snow", "snow drifts"),
    "road": ("cobbles", "grey cobbles"),
    "water": ("water with waves", "waves"),
}
_SKY_CLOSE: dict[str, tuple[str, ...]] = {
    "day": ("blue sky",),
    "sunset": ("an orange sunset sky", "sunset sky"),
    "night": ("a night sky with stars", "stars at night"),
    "cloudy": ("a grey sky with clouds", "clouds"),
}
_WHOLE_PREFIX = ("", "", "a picture of ", "a scene with ")
CLOSE_PREFIXES = ("close-up of ", "close-up of ", "a detail of ", "a close view of ")
_NUMBERS = {1: "a", 2: "two", 3: "three"}


def _noun(colour: str, kind: str, rng: Random, brick: bool = True) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    if kind == "balloon":
        return f"{article} {colour} {rng.choice(['balloon', 'hot-air balloon'])}"
    if kind == "house" and brick and rng.random() < 0.3:
        return f"{article} {colour} brick house"
    return f"{article} {colour} {kind}"


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _share(box: Box, within: Box) -> float:
    """The share (0 to 1) of the area of `box` that lies within `within`."""
    w = min(box[2], within[2]) - max(box[0], within[0])
    h = min(box[3], within[3]) - max(box[1], within[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(0.0, w) * max(0.0, h) / area if w > 0 and h > 0 else 0.0


def visible(scene: Scene, box: Box) -> list[tuple[Thing, Drawing, float]]:
    """The objects that `box` shows, from left to right: (object, its drawing, share of the object inside the box).

    An object counts if a quarter of it is inside the box, or if it fills a tenth of the box.
    """
    seen = []
    for thing in sorted(scene.things, key=lambda t: t.x):
        drawn = drawing(thing)
        share = _share(drawn.box, box)
        if share >= 0.25 or _share(box, drawn.box) >= 0.1:
            seen.append((thing, drawn, share))
    return seen


def pairs_in(scene: Scene, box: Box | None = None) -> frozenset[tuple[str, str]]:
    """The (kind, colour) pairs that `box` (default: the whole scene) shows."""
    return frozenset((thing.kind, thing.colour) for thing, _, _ in visible(scene, box or scene.box))


PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) (?:brick |hot-air )?({'|'.join(KINDS)})s?\b")


def pairs(sentence: str) -> frozenset[tuple[str, str]]:
    """The (kind, colour) pairs that a sentence names."""
    return frozenset(ordered_pairs(sentence))


def ordered_pairs(sentence: str) -> tuple[tuple[str, str], ...]:
    """The (kind, colour) pairs that a sentence names, in the order of the sentence, each once."""
    found = PAIR.findall(sentence.lower().replace(" - ", "-"))
    return tuple(dict.fromkeys((kind, colour) for colour, kind in found))


def place(sentence: str) -> tuple[str | None, str | None]:
    """(ground, sky) that a sentence about a whole scene names. None for one that it does not name."""
    text = sentence.lower()
    ground, sky = (
        next((name for name, phrases in table.items() if any(phrase in text for phrase in phrases)), None)
        for table in (_GROUND_WHOLE, _SKY_WHOLE)
    )
    return ground, sky


def textures(sentence: str) -> frozenset[str]:
    """The texture words (`TEXTURES`) that a sentence uses."""
    return frozenset(word for word in TEXTURES if word in sentence.lower())


SUBJECTS = (*KINDS, *GROUNDS, *SKIES)


def subject(scene: Scene, box: Box | None = None) -> str:
    """The main subject of `box` (default: the whole scene), one of `SUBJECTS`.

    It is the kind of the object that covers most of the box. Without objects it is the ground or the sky, whichever
    covers more.
    """
    box = box or scene.box
    seen = visible(scene, box)
    if seen:
        return max(seen, key=lambda item: _share(box, item[1].box))[0].kind
    return scene.ground if (box[1] + box[3]) / 2 > scene.horizon else scene.sky


def is_whole(scene: Scene, box: Box) -> bool:
    """Whether a box counts as a view of the whole scene: it has about the full height of the scene."""
    return box[3] - box[1] > 0.85 * HEIGHT


def caption(scene: Scene, box: Box | None = None, rng: Random | None = None) -> str:
    """A sentence for the whole scene (no box, or a box of full height), or for the part that a crop box shows.

    `rng` chooses the phrasing. By default the phrasing depends on the scene's seed only.
    """
    rng = rng or Random(scene.seed)
    box = box or scene.box
    seen = visible(scene, box)
    if is_whole(scene, box):
        return _whole(scene, seen, rng)
    return _close(scene, box, seen, rng)


def _whole(scene: Scene, seen: list[tuple[Thing, Drawing, float]], rng: Random) -> str:
    ground, sky = rng.choice(_GROUND_WHOLE[scene.ground]), rng.choice(_SKY_WHOLE[scene.sky])
    if not seen:
        return f"{rng.choice(_WHOLE_PREFIX)}an empty place {ground} {sky}"
    items = _join([_noun(thing.colour, thing.kind, rng) for thing, _, _ in seen])
    if rng.random() < 0.12:
        return f"{sky}, {items} {ground}"
    return f"{rng.choice(_WHOLE_PREFIX)}{items} {ground} {sky}"


def _close(scene: Scene, box: Box, seen: list[tuple[Thing, Drawing, float]], rng: Random) -> str:
    phrases: list[str] = []
    # the object that fills most of the box comes first
    for thing, drawn, share in sorted(seen, key=lambda item: -_share(box, item[1].box)):
        details: list[str] = []
        for part in drawn.parts:
            if _share(part.box, box) >= 0.4 or _share(box, part.box) >= 0.15:
                word = rng.choice(PART_WORDS[part.name])
                if word not in details and not (part.name == "window" and any("pane" in d for d in details)):
                    details.append(word)
        limit = 3 if len(seen) == 1 else 2 if len(phrases) < 2 else 1
        details = details[:limit] if rng.random() < 0.7 else rng.sample(details, min(limit, len(details)))
        noun = _noun(thing.colour, thing.kind, rng, brick=False)
        if not details:
            phrases.append(f"part of {noun}")
        elif share >= 0.6:
            phrases.append(f"{noun} with {_join(details)}")
        else:
            phrases.append(f"{_join(details)} of {noun}")
    sky_share = max(0.0, min(box[3], scene.horizon) - box[1]) / (box[3] - box[1])
    around = []
    if sky_share > 0.15:
        sky = rng.choice(_SKY_CLOSE[scene.sky])
        lights = [PART_WORDS[p.name][0] for p in sky_parts(scene) if _share(p.box, box) > 0.5]
        around.append(f"{sky} with {lights[0]}" if lights and "with" not in sky else sky)
    if sky_share < 0.85:
        around.append(rng.choice(_GROUND_CLOSE[scene.ground]))
    prefix = rng.choice(CLOSE_PREFIXES)
    if not phrases:
        return f"{prefix}{_join(around)}"
    if not around:
        return f"{prefix}{', and '.join(phrases)}"
    return f"{prefix}{', and '.join(phrases)}, {rng.choice(['before', 'around it'])} {_join(around)}"


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that captions can contain, sorted."""
    texts: list[str] = [*COLOURS, *KINDS, *(k + "s" for k in KINDS), *GROUNDS, *SKIES, *_WHOLE_PREFIX, *CLOSE_PREFIXES]
    texts += [
        *_NUMBERS.values(),
        "an hot-air brick and of part with before around it an empty place , . the without no",
    ]
    texts += ["left right above below next to small big large old new photo painting drawing blurry sharp detailed"]
    for table in (PART_WORDS, _GROUND_WHOLE, _SKY_WHOLE, _GROUND_CLOSE, _SKY_CLOSE):
        for phrases in table.values():
            texts += phrases
    return tuple(sorted({word for text in texts for word in re.findall(r"[a-z]+|[^a-z\s]", text)}))
