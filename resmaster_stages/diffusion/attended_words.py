"""The words of a prompt that an image attends to, place by place: texts for views without a captioner.

The base model predicts the noised image with its prompt at a few noise levels. Its cross-attention says at which places
it looks at which word. A view keeps the words whose places cover enough of it, and they are its text.

From AccDiffusion (Lin et al., ECCV 2024): the maps, averaged over heads, layers and noise levels, of the layers of the
down and up blocks whose tokens are a quarter as many along a side as the latents (32 x 32 on SDXL); a word's mask,
where its map is above its own mean, after a morphological opening; the least share of a view that a mask covers, 0.3;
the kept words in the prompt's order, joined by spaces. Ours: the image need not have been generated, because its
latents are noised anew, always by the same noise, at evenly spaced levels; the finer level where a quarter is fewer
than 8 tokens, because 4 x 4 show nothing on picturebook; whole words instead of pieces of words; punctuation goes with
its word, and its own maps are not read; the text branch alone (the authors also take the unconditional one); cells
beyond the border count as part of a mask that the border cuts; a view that keeps nothing has no text of its own.

Invariants:
- Words that the text encoders do not read have no map and are left out.
- A view that keeps every word that has a map gets the prompt as it is, so with coverage 0 every view does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.composer import attention_map, text_part
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import ClassifierFree, DenoiserCall
from resmaster_stages.diffusion.loop import CanvasNoise, Composition, ViewGroup, always, denoise
from resmaster_stages.diffusion.patches import layers_named, level_size, replaced_forwards
from resmaster_stages.diffusion.reference import to_tensor
from resmaster_stages.diffusion.steppers import make_stepper
from resmaster_stages.diffusion.views import Grid, native_size, whole_canvas
from resmaster_stages.models.bases.base import network_of
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing

LEVEL = 2
"""How many times the tokens of the layers that are looked at have been halved along a side: to a quarter."""
FEWEST_TOKENS = 8
"""The fewest tokens along the native side at which maps show where words are."""
OPENED_PER = 16
"""An opening has one iteration per so many cells of the shorter side."""
NOISE_SEED = 0
"""Of the noise, which is the same for all images."""

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


# ------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Word:
    """A word of a prompt, with the punctuation around it."""

    text: str
    states: range
    """The text states of its letters and digits, by number."""


def words_of(prompt: str, count: Callable[[Sequence[str]], Sequence[int]], tokens: int) -> list[Word]:
    """The words of `prompt` that have text states, in order. Words are what blanks separate.

    count: the number of tokens of each text, marks included (`Base.count`). tokens: how many of them are read, the end
    mark included. The beginning of a text up to a blank has the same tokens in front of any continuation, so the
    tokens of a word follow from the counts before and after it.
    """
    spans = _spans(prompt)[:tokens]  # every word has a token
    if not spans:
        return []
    cores = [_core(prompt, *span) for span in spans]
    counts = count([prompt[:place].lower() for core in cores for place in core])  # the text encoders read small letters
    words = []
    for (start, end), before, after in zip(spans, counts[::2], counts[1::2]):
        states = range(before - 1, after - 1)  # less the end mark
        if states and states[-1] < tokens - 1:
            words.append(Word(prompt[start:end], states))
    return words


def _spans(prompt: str) -> list[tuple[int, int]]:
    """(start, end) of each word. Punctuation that stands alone goes with the word before it, or else after it."""
    spans: list[tuple[int, int]] = []
    for match in re.finditer(r"\S+", prompt):
        if spans and not (_has_letters(prompt, *spans[-1]) and _has_letters(prompt, *match.span())):
            spans[-1] = (spans[-1][0], match.end())
        else:
            spans.append(match.span())
    return spans


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _has_letters(prompt: str, start: int, end: int) -> bool:
    return not all(_is_punctuation(each) or each.isspace() for each in prompt[start:end])


def _core(prompt: str, start: int, end: int) -> tuple[int, int]:
    """(start, end) of a word without the punctuation around it; with it if there is nothing else."""
    places = [place for place in range(start, end) if _has_letters(prompt, place, place + 1)]
    return (places[0], places[-1] + 1) if places else (start, end)


# -------------------------------------------------------------------------------------------------------- maps


def layers(network: Any, native: int) -> dict[str, Any]:
    """The cross-attention layers that are looked at, by name: of the down and up blocks, those whose tokens are a
    quarter of the latents along a side, or of the level that is nearest to this. A transformer has one level.

    native: the native side in latents. Where a quarter of it is fewer than `FEWEST_TOKENS`, the level is a finer one.
    """
    wanted = min(LEVEL, max(0, (native // FEWEST_TOKENS).bit_length() - 1))
    found = dict(layers_named(network, ".attn2"))
    levels = {name: level for name in found if (level := _level(name, network)) is not None}
    nearest = min(levels.values(), key=lambda level: (abs(level - wanted), level))
    return {name: found[name] for name, level in levels.items() if level == nearest}


def _level(name: str, network: Any) -> int | None:
    """How many times the tokens of a layer have been halved. None for the middle of a UNet."""
    block = re.match(r"(down|up|mid)_block", name)
    if block is None:
        return 1  # squares of 2 x 2
    number = re.match(r"\w+\.(\d+)\.", name)
    if block[1] == "mid" or number is None:
        return None
    return int(number[1]) if block[1] == "down" else len(network.up_blocks) - 1 - int(number[1])


class Maps:
    """Sums up the attention of one image to the states of its text.

    height, width: of the image, in latents. native: the model's native side, in latents.
    """

    def __init__(self, height: int, width: int, native: int) -> None:
        self.height, self.width, self.native = height, width, native
        self.sum: Tensor | None = None  # [S, rows, columns]
        self.count = 0

    def _layer(self, attention: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            text = text_part(encoder_hidden_states)
            bias = kwargs.get("attention_mask")
            words = attention_map(attention.to_q(x), attention.to_k(text), attention.heads, bias)  # [1, T, S]
            own = words[0].float().T.unflatten(1, level_size(self.height, self.width, x.shape[1]))
            self.sum = own if self.sum is None else self.sum + own
            self.count += 1
            return plain(x, encoder_hidden_states, *args, **kwargs)

        return forward

    @contextmanager
    def patch(self, denoiser: Any, call: DenoiserCall) -> Iterator[None]:
        """Within the block, the chosen layers of `denoiser` are looked at. What they compute stays as it is."""
        chosen = layers(network_of(denoiser), self.native).items()
        with replaced_forwards(chosen, lambda name, module: self._layer(module, module.forward)):
            yield

    def mean(self) -> Floats:
        """The mean over layers and noise levels: [S, rows, columns]."""
        assert self.sum is not None, "nothing was predicted"
        mean: Floats = (self.sum / self.count).cpu().numpy()
        return mean


def attention_maps(models: Models, image: Image.Image, prompt: str, levels: int) -> Floats:
    """The attention of `image` to the states of `prompt`, over `levels` noise levels: [S, rows, columns].

    The image is looked at in at most the native area. It costs one row of this area per level.
    """
    height, width = native_size(models.geometry, image.height, image.width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    latents = autoencoder.encode(models, to_tensor(image))
    _, channels, rows, columns = latents.shape
    maps = Maps(rows, columns, models.geometry.native)
    canvas = whole_canvas(models.geometry, height, width)
    noise = CanvasNoise([NOISE_SEED], channels, rows, columns, models.device)
    draw = noise()
    conditions = make_conditions(
        models, canvas, [prompt], (), guidance_scale=1.0, sizes=[(height, width, 0, 0, height, width)]
    )
    composition = Composition(
        groups=(ViewGroup(always(Fuser(canvas, "uniform", models.device), conditions), ClassifierFree(1.0)),),
        stepper=make_stepper("ddim_implied"),  # what it makes is not read
        latent_hooks=(lambda z, step: step.noised(latents, draw),),
        patches=(maps.patch,),
    )
    path = models.base.path(levels, Timing(rows * columns))
    denoise(models, composition, path, draw, noise, view_batch=1)
    return maps.mean()


# ------------------------------------------------------------------------------------------------------- views


def mask_of(attention: Floats) -> Bools:
    """Where a word is looked at: [rows, columns] of its map -> above the map's mean, opened."""
    mask: Bools = attention > attention.mean()
    times = min(mask.shape) // OPENED_PER
    if times:
        mask = ~_grown(~mask, times)
        mask = _grown(mask, times)
    return mask


def _grown(mask: Bools, cells: int) -> Bools:
    """A mask, and all that is within `cells` of it in both directions."""
    within = F.max_pool2d(torch.from_numpy(mask).float()[None], 2 * cells + 1, stride=1, padding=cells)
    grown: Bools = within[0].bool().numpy()
    return grown


def covered(mask: Bools, box: tuple[float, float, float, float]) -> float:
    """The share of `box` that `mask` [rows, columns] covers. box: y0, x0, y1, x1 as fractions of the image."""
    y0, x0, y1, x1 = box
    rows, columns = (
        np.diff(np.clip(np.arange(count + 1) / count, low, high)) / (high - low)
        for count, low, high in zip(mask.shape, (y0, x0), (y1, x1))
    )
    return float(rows @ mask @ columns)


def texts_of(prompt: str, words: Sequence[Word], maps: Floats, grid: Grid, coverage: float) -> list[str]:
    """The text of each view of `grid`: the words whose masks cover at least the share `coverage` of it. "" if there
    are none.

    maps: [S, rows, columns], as `attention_maps` makes them.
    """
    masks = [mask_of(maps[word.states.start : word.states.stop].mean(axis=0)) for word in words]
    height = max(y1 for _, _, y1, _ in grid.pixel_boxes)
    width = max(x1 for _, _, _, x1 in grid.pixel_boxes)
    texts = []
    for y0, x0, y1, x1 in grid.pixel_boxes:
        box = (y0 / height, x0 / width, y1 / height, x1 / width)
        kept = [word.text for word, mask in zip(words, masks) if covered(mask, box) >= coverage - 1e-9]
        texts.append(prompt if len(kept) == len(words) else " ".join(kept))
    return texts
