"""Perceptual distance of two images of the same thing: how much a network's features differ, place by place.

It is the construction of LPIPS (Zhang, Isola, Efros, Shechtman, Wang, CVPR 2018) without its learnt weights, on the
feature maps of the extractor that is passed in. Both images are cut into squares of the network's input size, side by
side and not resized. An image of four times that size gives 16 squares. Then, square by square and layer by layer,

    d = sum over layers l of  mean over positions (y, x) of  | f_l(a)[:, y, x] - f_l(b)[:, y, x] |^2

where f_l(.)[:, y, x], the channels at one position, is scaled to length 1. The image's distance is the mean over its
squares. Activations behind a ReLU are not negative, so a layer adds from 0 to 2.

Invariants:
- Equal images have distance 0, and the distance is symmetric.
- It depends on the two images alone, not on others in a batch.
- Distances by different networks must never be compared.

Detail that is right in kind but wrong in place counts as a difference. So the distance is for pairs with one true
image, not for sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.metrics.crops import crops, tile_boxes

Floats = NDArray[np.float32]

TINY = 1e-10
"""Added to a length before the division by it, so that channels that are all 0 stay 0. LPIPS does the same."""


class LayerExtractor(Protocol):
    """A network that gives the feature maps of its layers."""

    @property
    def input_px(self) -> int:
        """Edge in px of the network's square input. Images of that size are not resized."""

    def layers(self, images: Sequence[Image.Image]) -> list[Floats]:
        """Feature maps [N, C, h, w] of images, in order, layer by layer."""


def perceptual_distance(a: Image.Image, b: Image.Image, extractor: LayerExtractor) -> float:
    """Distance of two images of one size, at least 0, and 0 for equal images. Raises ValueError if the sizes differ."""
    if a.size != b.size:
        raise ValueError(f"images of one size expected, got {a.size} and {b.size} (width, height)")
    boxes = tile_boxes(a.height, a.width, extractor.input_px)
    layers = zip(extractor.layers(crops(a, boxes)), extractor.layers(crops(b, boxes)))
    return float(np.sum([layer_distances(x, y).mean() for x, y in layers]))


def layer_distances(a: Floats, b: Floats) -> NDArray[np.float64]:
    """One layer's part of the distance of N pairs of feature maps [N, C, h, w]: [N]."""
    apart = _unit(a) - _unit(b)
    return np.square(apart).sum(axis=1).mean(axis=(1, 2))


def _unit(maps: Floats) -> NDArray[np.float64]:
    values = maps.astype(np.float64)
    return values / (np.sqrt(np.square(values).sum(axis=1, keepdims=True)) + TINY)
