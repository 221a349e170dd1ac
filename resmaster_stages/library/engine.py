"""How single images are drawn for the library: a configuration and an image go in, the form asked for comes out.

It imports torch, so that the other modules of the library need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.autoencoder import decode
from resmaster_stages.diffusion.loop import Seed
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.high_res import caption_views
from resmaster_stages.library.callbacks import Watch
from resmaster_stages.library.images import OutputType, converted
from resmaster_stages.library.models import load
from resmaster_stages.methods.render import Drawn, good, tried, visible
from resmaster_stages.methods.settings import Diffusion, Enlargement
from resmaster_stages.methods.upscale import Subject, enlarge_image, upscaled
from resmaster_stages.models.parts import Models
from resmaster_stages.models.places import resolve_device, resolve_dtype


@dataclass(frozen=True)
class Wish:
    """What a caller asks for beside the configuration."""

    output_type: OutputType = "pil"
    seed: Seed = 0
    watch: Watch = field(default_factory=Watch)


def upscale_one(config: DatasetConfig, subject: Subject, models: Models | None, wish: Wish) -> Any:
    """The subject, upscaled by `config.upscale`, in the form that was asked for. Raises UserError and SampleError."""
    method = config.upscale
    if subject.captions is not None and not method.uses("captions"):
        raise ConfigError(f"captions: method {method.method} reads none as it is set; leave them out")
    if subject.image_prompts is not None and not method.uses("image_prompt"):
        raise ConfigError(
            f"image_prompts: method {method.method} reads none as it is set; leave them out, or load an image adapter "
            "with the model"
        )
    if subject.detail is not None:
        method.require_detail_mask("there is")
    if wish.output_type == "latent" and (not method.base_model or method.colour_match != "none"):
        what = "colour_match changes" if method.base_model else f"method {method.method} draws"
        raise ConfigError(f'output_type: {what} pixels, and no latents; give "pil", "np" or "pt"')
    if isinstance(method, Enlargement):
        device = models.device if models else resolve_device(config.model.device)
        dtype = resolve_dtype(config.model.dtype, device)
        made = enlarge_image(subject.image, method, device, dtype, wish.watch.progress)
        return converted(made, wish.output_type)
    assert isinstance(method, Diffusion)
    models = models or load(config.model)
    asked = method.uses("captions") and config.captions.source != "prompt"
    caption = partial(caption_views, config, subject.prompt) if asked else None
    if subject.captions is None and caption:
        size = target_size(subject.image.height, subject.image.width, method.way()[0].scale)
        subject = replace(subject, captions=caption(subject.image, *size))
    done = upscaled(models, replace(subject, caption=caption), method, wish.seed, wish.watch.on_step)
    if method.colour_match != "none":
        return converted(done.image(), wish.output_type)
    return good(forms(done.drawn, wish.output_type)[0])


def forms(drawn: Drawn, output_type: OutputType) -> list[Any | SampleError]:
    """Each image of a batch in the form that was asked for, or a SampleError in its place."""
    form = (lambda latents: latents.clone()) if output_type == "latent" else partial(_form, output_type=output_type)
    return [tried(form, each) for each in (drawn.latents() if output_type == "latent" else drawn.pixels())]


def _form(pixels: Tensor, output_type: OutputType) -> Any:
    """[3, H, W] in about [-1, 1] in the form that was asked for. Raises SampleError if nothing can be seen on it."""
    image = visible(pixels)
    if output_type == "pil":
        return image
    values = (pixels.clamp(-1, 1) * 127.5 + 127.5) / 255  # not rounded to 8 bits
    return values if output_type == "pt" else values.permute(1, 2, 0).cpu().numpy().copy()


def subject_of_latents(models: Models, latents: Any, wraps: Axes) -> Subject:
    """The image that latents stand for, with its latents. wraps: as for `autoencoder.decode`.

    Raises UserError for latents that the model cannot have.
    """
    channels, multiple = models.base.latent_channels, models.geometry.multiple
    if isinstance(latents, Tensor) and latents.ndim == 4 and len(latents) == 1:
        latents = latents[0]
    shape = [*latents.shape] if isinstance(latents, Tensor) else type(latents).__name__
    if not isinstance(latents, Tensor) or latents.ndim != 3 or len(latents) != channels:
        raise UserError(
            f"latents: {shape}; give a tensor [{channels}, h, w] of this model, or a list of these (packed latents of "
            "a transformer must be unpacked first)"
        )
    if any(side < 1 or side % multiple for side in latents.shape[1:]):
        raise UserError(f"latents: {shape}: the sides must be multiples of {multiple}; crop or pad them")
    z = latents[None].to(models.device, torch.float32)
    if not torch.isfinite(z).all():
        raise UserError("latents: some are NaN or infinite; give latents of a finished image")
    return Subject(to_image(decode(models, z, wraps)[0]), latents=z)


def seeds_of(seed: int, generator: Generator | Sequence[Generator] | None, plain: list[int]) -> list[Seed]:
    """What the noise of each image is drawn from: `plain`, one seed per image, or the generators. Raises UserError."""
    if generator is None:
        return list(plain)
    if seed:
        raise UserError("there are a seed and a generator; give one of them, as both say what the noise is")
    several: list[Seed] = list(generator) if isinstance(generator, Sequence) else [generator] * len(plain)
    if not all(isinstance(each, torch.Generator) for each in several):
        raise UserError("generator: give a torch.Generator, or one per image")
    if len(several) != len(plain):
        raise UserError(f"generator: {len(several)} generators for {len(plain)} images; give one, or one per image")
    return several
