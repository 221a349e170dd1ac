"""FLUX.1-dev and Z-Image-Turbo of full size with random weights, made on the device in bfloat16.

The VAE is of full size too, in float32, as beside every transformer in bfloat16. There is no text encoder: texts are
random states of the shape that the transformer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.models import SHRINK
from benchmarks.methods import random_vae
from resmaster_stages.models.bases import flux, z_image
from resmaster_stages.models.bases.base import Base, Geometry, Rows, Texts
from resmaster_stages.models.bases.transformer_files import Facts, Kind
from resmaster_stages.models.flow import SCHEDULER
from resmaster_stages.models.parts import Models

DTYPE = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Shape:
    """A published model, as far as speed and memory depend on it."""

    name: str
    kind: Kind
    network: Callable[..., Any]
    full: dict[str, Any]
    toy: dict[str, Any]
    states: tuple[int, int]
    """Text tokens, and their width."""
    toy_width: int
    scheduler: dict[str, Any]
    pooled: int = 0
    masked: bool = False
    """Whether texts have a length of their own."""


FLUX = Shape(
    name="FLUX.1-dev",
    kind=flux.KIND,
    network=FluxTransformer2DModel,
    full={"guidance_embeds": True},
    toy={
        "guidance_embeds": True,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
    states=(512, 4096),
    toy_width=32,
    pooled=768,
    scheduler={"use_dynamic_shifting": True, "shift": 3.0},
)
Z_IMAGE = Shape(
    name="Z-Image-Turbo",
    kind=z_image.KIND,
    network=ZImageTransformer2DModel,
    full={},
    toy={
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    },
    states=(128, 2560),
    toy_width=32,
    masked=True,
    scheduler={"shift": 3.0},
)
SHAPES = (FLUX, Z_IMAGE)


class RandomTexts:
    """A base model whose texts are random states."""

    def __init__(self, base: Base, shape: Shape, toy: bool) -> None:
        self._base = base
        self._masked = shape.masked
        self._states = (shape.states[0], shape.toy_width) if toy else shape.states
        self._pooled = min(shape.pooled, shape.toy_width) if toy else shape.pooled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """Random states, the same for each prompt."""
        count, (length, width) = len(prompts), self._states
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, length, width, generator=generator).expand(count, -1, -1).to(device, DTYPE)
        pooled = torch.randn(1, self._pooled, generator=generator).expand(count, -1).to(device, DTYPE)
        return Texts(states, pooled, states.new_ones(count, length, dtype=torch.bool) if self._masked else None)


@contextmanager
def _directly(device: torch.device) -> Iterator[None]:
    """Within the block, modules are made on `device` in bfloat16, and never exist in another format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def network(shape: Shape, device: torch.device, toy: bool) -> Any:
    """The transformer."""
    torch.manual_seed(0)
    with _directly(device):
        made = shape.network(**(shape.toy if toy else shape.full))
    return made.eval().requires_grad_(False)


def whole(shape: Shape, device: torch.device, toy: bool) -> Models:
    """The transformer, its VAE and random texts."""
    transformer, shrink = network(shape, device, toy), SHRINK if toy else 1
    with torch.device(device):
        vae = random_vae(
            shrink,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    vae.eval().requires_grad_(False)
    facts = Facts(
        name=shape.name,
        index={},
        transformer=dict(transformer.config),
        vae=dict(vae.config),
        scheduler={"_class_name": SCHEDULER, **shape.scheduler},
    )
    pipe = SimpleNamespace(transformer=transformer, vae=vae, tokenizer=SimpleNamespace(chat_template=""))
    base = RandomTexts(shape.kind.base(pipe, facts, Geometry(1024 // shrink, 8, 2)), shape, toy)
    return Models(base=base, device=device, dtype=DTYPE)


def forward(models: Models, views: int) -> Callable[[], Any]:
    """A call of the denoiser with `views` native views, as the engine makes it."""
    base, device, native = models.base, models.device, models.geometry.native
    texts = base.encode([""] * views, negative=False, device=device)
    rows = Rows(
        states=texts.states,
        mask=texts.mask,
        pooled=texts.pooled,
        guidance_scale=base.sampling.guidance_scale,
        sizes=torch.zeros(views, 6, device=device),
        lengths=() if texts.mask is None else (texts.states.shape[1],) * views,
    )
    sample = torch.randn(views, base.latent_channels, native, native, device=device, dtype=DTYPE)
    time, arguments = torch.tensor(600.0, device=device), base.arguments(rows)

    def call() -> Tensor:
        with torch.inference_mode():
            return base.denoiser(sample, time, return_dict=False, **arguments)[0]

    return call


@cache
def operations_per_view(shape: Shape, toy: bool) -> int:
    """Floating-point operations of one native view through the transformer, counted without computing them."""
    call = forward(whole(shape, torch.device("meta"), toy), 1)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
