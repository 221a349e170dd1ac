"""FreeU (Si et al. 2024) by the channel rule of ScaleCrafter, FouriScale and FreeScale.

In the decoder, half of the backbone's channels are amplified and the lowest frequencies of the skip connection are
damped. The strengths are (b1, s1) where the backbone has the UNet's greatest number of channels, and (b2, s2) where it
has the next smaller number. diffusers' `enable_freeu` chooses layers by block instead. On SDXL the two rules differ in
two layers: the first of `up_blocks.1` and the first of `up_blocks.2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor

from resmaster_stages.diffusion.patches import replaced_forward
from resmaster_stages.models.bases.base import network_of


def backbone_channels(unet: Any) -> dict[str, int]:
    """Layer name -> how many of a decoder layer's input channels come from the layer below (the others come over the
    skip connection)."""
    unet = network_of(unet)
    channels, below = {}, unet.mid_block.resnets[-1].out_channels
    for number, block in enumerate(unet.up_blocks):
        for place, resnet in enumerate(block.resnets):
            channels[f"up_blocks.{number}.resnets.{place}"] = below
            below = resnet.out_channels
    return channels


def modulated(plain: Callable[..., Tensor], channels: int, amplify: float, damp: float) -> Callable[..., Tensor]:
    """`plain` (a decoder layer) with FreeU on its input, whose first `channels` are the backbone's and the others the
    skip connection's."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backbone, skip = x[:, :channels], x[:, channels:]  # [N, C, h, w] each
        half = channels // 2
        parts = [backbone[:, :half] * amplify, backbone[:, half:], fourier_filter(skip, threshold=1, scale=damp)]
        return plain(torch.cat(parts, dim=1), *args, **kwargs)

    return forward


@contextmanager
def freeu(unet: Any, b1: float = 1.1, b2: float = 1.2, s1: float = 0.6, s2: float = 0.4) -> Iterator[None]:
    """Within the block, FreeU is on. The defaults are those of the three methods."""
    widths = sorted(set(network_of(unet).config.block_out_channels), reverse=True)
    strengths = dict(zip(widths, [(b1, s1), (b2, s2)]))
    with ExitStack() as stack:
        for name, channels in backbone_channels(unet).items():
            if channels in strengths:
                resnet = network_of(unet).get_submodule(name)
                forward = modulated(resnet.forward, channels, *strengths[channels])
                stack.enter_context(replaced_forward(resnet, forward))
        yield
