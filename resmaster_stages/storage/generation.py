"""Reads the prompts and the seed that programs for image generation leave in image files.

Read are the text that A1111 writes (PNG, and EXIF in JPEG, WebP, AVIF and JPEG XL; many programs write the same), the
graph that ComfyUI writes (PNG, and EXIF in WebP), and the JSON of InvokeAI, SwarmUI and Fooocus (PNG).

All of it is untrusted. Texts of more than `MAX_TEXT_CHARACTERS` are not read, JSON is only looked up, a graph is
followed for a limited number of steps, and damaged metadata counts as none. Prompts are returned as they are: whoever
plans decides whether they can be used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

from PIL import Image

from resmaster_stages.errors import SampleError
from resmaster_stages.storage.images import open_header

MAX_TEXT_CHARACTERS = 2**20
"""Longer texts in an image file are not read."""
LONGEST_SEED = 2**64
MOST_SAMPLERS, MOST_STEPS = 20, 1_000
"""How many samplers of a graph are looked at, and how many nodes for each text."""

_EXIF_IFD, _USER_COMMENT, _MAKE, _MODEL = 0x8769, 0x9286, 0x010F, 0x0110
_MARKS = (b"UNICODE\0", b"ASCII\0\0\0", bytes(8))
"""What says how a UserComment is written. Some programs leave it out."""
_SETTINGS = re.compile(r"(?:^|\n)Steps: \d+(?:,|\n|$)")
_NEGATIVE = re.compile(r"(?:^|\n)Negative prompt:")
_SEED = re.compile(r"\bSeed: (\d{1,20})\b")
_TEXTS = ("text", "text_g", "t5xxl", "clip_l", "text_l", "prompt", "string", "value")
"""Inputs of ComfyUI's nodes that hold a text, or lead to the node that does."""
_THROUGH = ("conditioning", "conditioning_1", "conditioning_to", "base_conditioning")
"""Inputs that lead on from a node that changes or mixes conditions."""


@dataclass(frozen=True)
class Generation:
    """What an image file says of its making."""

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None


def read_generation(data: bytes) -> Generation | None:
    """What an image file says of the prompt that it was made from. None if it says nothing that is understood."""
    try:
        with open_header(data, "image") as image:
            return next((found for found in _found_in(image) if found.prompt.strip()), None)
    except SampleError:  # whoever decodes the image will say what is wrong
        return None


def _found_in(image: Image.Image) -> Iterator[Generation]:
    """What an image says, the first choice first."""
    texts = {name: text for name, text in image.info.items() if _is_short(text)}
    exif = image.getexif()
    for text in (texts.get("parameters"), *_spellings(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT))):
        if text and (found := _of_a1111(text) or _of_json(text)):
            yield found
    for text in (texts.get("prompt"), *map(exif.get, (_MAKE, _MODEL))):
        if _is_short(text) and (found := _of_comfyui(re.sub("^[Pp]rompt:", "", text))):
            yield found
    if found := _of_json(texts.get("invokeai_metadata", "")):
        yield found


def _is_short(text: Any) -> TypeGuard[str]:
    return isinstance(text, str) and len(text) <= MAX_TEXT_CHARACTERS


def _spellings(comment: Any) -> Iterator[str]:
    """The texts that the bytes of a UserComment may mean. Its mark does not tell the order of the bytes."""
    if not isinstance(comment, bytes) or len(comment) > 2 * MAX_TEXT_CHARACTERS:
        return
    codes = ("utf-16-be", "utf-16-le") if comment.startswith(b"UNICODE\0") else ("utf-8",)
    for code in codes:
        yield (comment[8:] if comment.startswith(_MARKS) else comment).decode(code, "replace")


def _of_a1111(text: str) -> Generation | None:
    """The prompts and the seed in a text as A1111 writes it. The settings are what tells it from other texts."""
    settings = list(_SETTINGS.finditer(text))
    if not settings:
        return None
    above, below = text[: settings[-1].start()], text[settings[-1].start() :]
    prompt, negative = above, ""
    if mark := _NEGATIVE.search(above):
        prompt, negative = above[: mark.start()], above[mark.end() :]
    seed = _SEED.search(below)
    return Generation(prompt.strip(), negative.strip(), _seed(int(seed[1])) if seed else None)


def _json_object(text: str) -> Mapping[str, Any]:
    """The object in a JSON text; {} if there is none."""
    try:
        values = json.loads(text) if text.lstrip().startswith("{") else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _of_json(text: str) -> Generation | None:
    """The prompts and the seed in the flat JSON of InvokeAI, SwarmUI and Fooocus."""
    values = _json_object(text)
    inner = values.get("sui_image_params")
    values = inner if isinstance(inner, dict) else values
    prompts = [values.get(name) for name in ("positive_prompt", "prompt")]
    negative = [values.get(name) for name in ("negative_prompt", "negativeprompt")]
    prompt = next((each for each in prompts if isinstance(each, str)), None)
    if prompt is None:
        return None
    return Generation(prompt, next((each for each in negative if isinstance(each, str)), ""), _seed(values.get("seed")))


def _seed(value: Any) -> int | None:
    """A value, if it can be a seed. Fooocus writes it as a text."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value):
        value = int(value)
    return value if type(value) is int and 0 <= value < LONGEST_SEED else None


def _of_comfyui(text: str) -> Generation | None:
    """The prompts and the seed of the first sampler with a prompt in the graph that ComfyUI writes (`prompt`)."""
    graph = _Graph(_json_object(text))
    for inputs, guider, noise in islice(graph.samplers(), MOST_SAMPLERS):
        for each in (inputs, guider):
            if prompt := graph.text(each.get("positive", guider.get("conditioning")), "positive"):
                seed = next((graph.seed(own[name]) for own in (inputs, noise) for name in _SEEDS if name in own), None)
                return Generation(prompt, graph.text(each.get("negative"), "negative"), seed)
    return None


_SEEDS = ("seed", "noise_seed", "value")


class _Graph:
    """The nodes of a workflow of ComfyUI. A link to a node is a list of the node's name and the number of an output."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self._nodes = nodes

    def samplers(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
        """The inputs of each node that samples, of its guider and of its noise. Newer samplers are several nodes: the
        prompts are at the guider, and the seed is at the noise."""
        for name in self._nodes:
            inputs = self.inputs([name])
            guider, noise = self.inputs(inputs.get("guider")), self.inputs(inputs.get("noise"))
            if ("positive" in inputs or guider) and ("seed" in inputs or "noise_seed" in inputs or noise):
                yield inputs, guider, noise

    def inputs(self, link: Any) -> Mapping[str, Any]:
        """The inputs of the node that a link leads to; {} if it leads nowhere."""
        name = link[0] if isinstance(link, list) and link else None
        node = self._nodes.get(str(name)) if isinstance(name, str | int) else None
        inputs = node.get("inputs") if isinstance(node, dict) else None
        return inputs if isinstance(inputs, dict) else {}

    def text(self, link: Any, side: str) -> str:
        """The text at the beginning of the way that ends in a link; "" if none is found. side: which way to take where
        both prompts pass through a node."""
        for inputs in self._before(link, (*_TEXTS, *_THROUGH, side)):
            texts = (inputs[name] for name in _TEXTS if isinstance(inputs.get(name), str))
            if found := next((text for text in texts if text.strip()), None):
                return found
        return ""

    def seed(self, value: Any) -> int | None:
        """A seed that is written into an input, or into the node to which the input is linked."""
        values = [value, *(inputs[name] for inputs in self._before(value, _SEEDS) for name in _SEEDS if name in inputs)]
        return next((seed for seed in map(_seed, values) if seed is not None), None)

    def _before(self, link: Any, names: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
        """The inputs of the nodes on the ways that end in a link, the nearest first, along the inputs `names`."""
        waiting, seen = [link], set[str]()
        while waiting and len(seen) < MOST_STEPS:
            inputs = self.inputs(link := waiting.pop(0))
            if inputs and str(link[0]) not in seen:
                seen.add(str(link[0]))
                yield inputs
                waiting += [inputs[name] for name in names if isinstance(inputs.get(name), list)]
