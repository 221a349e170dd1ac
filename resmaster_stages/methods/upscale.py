"""Upscales one image by the method that the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from resmaster_stages.config.method import Method
from resmaster_stages.config.wrap import wrap_of
from resmaster_stages.diffusion import colour_match
from resmaster_stages.diffusion.canvas import OnStep
from resmaster_stages.diffusion.loop import Seed
from resmaster_stages.diffusion.memory import preflight
from resmaster_stages.diffusion.reference import pad_to_multiple, to_mask, to_tensor, upsample
from resmaster_stages.diffusion.views import OTHER_SIZE, target_size, view_grid, why_not_wrapping
from resmaster_stages.errors import ConfigError
from resmaster_stages.keys import digest
from resmaster_stages.methods.render import Drawn, draw, good, visible
from resmaster_stages.methods.request import Reference, Request
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.settings import Diffusion, Enlargement, unsuited_freeu
from resmaster_stages.models.bases.base import require_sampling
from resmaster_stages.models.parts import Models
from resmaster_stages.progress import Note, emit

Caption = Callable[[Image.Image, int, int], Sequence[str]]
"""(image, height and width in px that it will be enlarged to) -> a caption per view, as `upscale_image` takes them."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is upscaled, and what is known of it."""

    image: Image.Image
    prompt: str = ""
    negative_prompt: str | None = None
    """None: the configuration's."""
    captions: Sequence[str] | None = None
    """One per view, row-major, as `views.view_grid` counts the views. None: every view has `prompt`."""
    caption: Caption | None = None
    """Writes the captions of later passes (`config.via`). None: every view has `prompt` there."""
    detail: Image.Image | None = None
    """A mask of any size, for methods that read one (freescale). Where it is white, more detail is drawn anew."""
    image_prompts: Sequence[Image.Image] | None = None
    """An image per view, in the order of `captions`. None, and in later passes: each view's crop of the enlarged
    image."""
    latents: Tensor | None = None  # [1, C, h, w]
    """The image's latents as the denoiser has them, if they are known. They are then not encoded again."""


@dataclass(frozen=True, eq=False)
class Upscaled:
    """An upscaled image as it was drawn."""

    drawn: Drawn
    low_res: Image.Image
    config: Diffusion

    def image(self) -> Image.Image:
        """8-bit RGB, with the colours that the settings ask for. Raises SampleError if nothing can be seen on it."""
        image = visible(good(self.drawn.pixels()[0]))
        return _with_colours_of(self.low_res, image, self.config)


def upscale_image(
    models: Models,
    image: Image.Image,
    prompt: str,
    *,
    config: Method | None = None,
    negative_prompt: str | None = None,
    captions: Sequence[str] | None = None,
    caption: Caption | None = None,
    detail: Image.Image | None = None,
    seed: Seed = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Upscale `image` (of any size) to `config.scale` times its size. The result is RGB of exactly that size.

    models: from `models.load.load_models`, or `Models.from_pipeline` for a pipeline of your own.
    negative_prompt, captions, caption, detail: as in `Subject`.
    progress: called with (steps done, steps in all) of each pass.

    Raises what `upscaled` raises, and SampleError (the model produced nothing that can be seen).
    """
    config = config or ResMaster()
    if detail is not None:
        config.require_detail_mask("there is")
    if isinstance(config, Enlargement):
        return enlarge_image(image, config, models.device, models.dtype, progress)
    assert isinstance(config, Diffusion)
    subject = Subject(image, prompt, negative_prompt, captions, caption, detail)
    on_step = None if progress is None else telling(progress)
    return upscaled(models, subject, config, seed, on_step).image()


def telling(progress: Callable[[int, int], None]) -> OnStep:
    """Calls `progress` with (steps done, steps in all)."""
    return lambda canvas: progress(canvas.step + 1, canvas.steps)


def upscaled(
    models: Models, subject: Subject, config: Diffusion, seed: Seed = 0, on_step: OnStep | None = None
) -> Upscaled:
    """`subject` at `config.scale` times its size, as it was drawn: what the caller asks of it is decoded then.

    If `on_step` interrupts the drawing, the image is what the last step predicted, enlarged to the size asked for.

    Raises ConfigError (wrong number of captions, a mask that is not read, image prompts without an IP-Adapter, a
    scheduler that does not fit, sampling that the model cannot use, a size that cannot wrap, too little memory) and
    SampleError (an intermediate image of `config.via` shows nothing).
    """
    if subject.detail is not None:
        config.require_detail_mask("there is")
    require_sampling(models.base.sampling, config.asked(), models.identity)
    for line in unsuited_freeu(config, models.base.family, models.geometry, models.identity):
        emit(Note(line))
    if subject.negative_prompt is None:
        subject = replace(subject, negative_prompt=config.negative_prompt)
    image, latest, done = subject.image, subject, None
    for number, (scale, own) in enumerate(zip((*config.via, config.scale), config.way())):
        height, width = target_size(image.height, image.width, scale)
        if done is not None:
            made, caption = done.image(), subject.caption
            captions = caption(made, height, width) if caption and own.uses("captions") else None
            latest = replace(subject, image=made, captions=captions, image_prompts=None, latents=None)
        own_seed = seed if number == 0 or not isinstance(seed, int) else int(digest([seed, number])[:15], 16)
        done = Upscaled(_one_pass(models, latest, own, (height, width), own_seed, on_step), image, own)
        if done.drawn.interrupted:
            size = target_size(image.height, image.width, config.scale)
            return replace(done, drawn=replace(done.drawn, size=size))
    assert done is not None
    return done


def _one_pass(
    models: Models, subject: Subject, config: Diffusion, size: tuple[int, int], seed: Seed, on_step: OnStep | None
) -> Drawn:
    """The subject upscaled to `size` (height, width) px in one go."""
    height, width = size
    if reason := why_not_wrapping(models.geometry, height, width, config.wraps):
        raise ConfigError(f"upscale.wrap: {wrap_of(config.wraps)}: {reason}; {OTHER_SIZE}")
    grid, captions = view_grid(models.geometry, height, width, config.view_stride, config.wraps), subject.captions
    if captions is not None and len(captions) != len(grid):
        raise ConfigError(
            f"captions: {len(captions)} given for {len(grid)} views ({grid.name}); give one per view, or none"
        )
    shown = subject.image_prompts
    if shown is not None and len(shown) != len(grid):
        raise ConfigError(f"image_prompts: {len(shown)} given for {len(grid)} views ({grid.name}); give one per view")
    pixels = pad_to_multiple(upsample(subject.image, height, width, config.wraps), models.geometry.step_px)
    low_res = to_tensor(subject.image)
    request = Request(
        models=models,
        config=config,
        height=height,
        width=width,
        prompts=(subject.prompt,),
        negative_prompts=(subject.negative_prompt or "",),
        captions=(tuple(captions),) if captions is not None and config.uses("captions") else None,
        image_prompts=None if shown is None else tuple(to_tensor(each) for each in shown),
        reference=Reference(models, pixels, config.scale, low_res, config.wraps, subject.latents),
        detail=None if subject.detail is None else to_mask(subject.detail),
    )
    for line in preflight(models, config.view_batch, grid, models.branches(config.guidance_scale)):
        emit(Note(line))
    return draw(request, [seed], on_step)


def enlarge_image(
    image: Image.Image,
    config: Enlargement,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """`upscale_image` for a method without base model. `progress` is called with (parts done, parts in all)."""
    size = target_size(image.height, image.width, config.scale)
    return _with_colours_of(image, config.enlarge(image, *size, device, dtype, progress), config)


def _with_colours_of(low_res: Image.Image, made: Image.Image, config: Method) -> Image.Image:
    """`made`, with the colours of `low_res` if the settings ask for it."""
    return colour_match.colour_matched(made, low_res, config.colour_match, config.wraps)
