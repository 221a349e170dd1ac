"""Upscales one image by the method that the configuration names: the library's `upscale_image`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from resmaster_stages.config.method import Method
from resmaster_stages.config.wrap import wrap_of
from resmaster_stages.diffusion.views import OTHER_SIZE, target_size, view_grid, why_not_wrapping
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.keys import digest
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.settings import Diffusion, Enlargement, unsuited_freeu
from resmaster_stages.models.bases.base import require_sampling
from resmaster_stages.progress import Note, emit

if TYPE_CHECKING:
    import torch

    from resmaster_stages.models.parts import Models


Caption = Callable[[Image.Image, int, int], Sequence[str]]
"""(image, height and width in px that it will be enlarged to) -> a caption per view, as `upscale_image` takes them."""


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
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Upscale `image` (of any size) to `config.scale` times its size. The result is RGB of exactly that size.

    models: from `models.load.load_models`, or `Models.from_pipeline` for a pipeline of your own.
    negative_prompt: None means the configuration's.
    captions: one per view, row-major, as `views.view_grid` counts the views. None: every view has `prompt`.
    caption: writes the captions of later passes (`config.via`). None: every view has `prompt` there.
    detail: a mask of any size, for methods that read one (freescale). Where it is white, more detail is drawn anew.
    progress: called with (steps done, steps in all) of each pass.

    Raises ConfigError (wrong number of captions, a mask that is not read, image prompts without an IP-Adapter, a
    scheduler that does not fit, sampling that the model cannot use, a size that cannot wrap, too little memory) and
    SampleError (the model produced nothing that can be seen).
    """
    config = config or ResMaster()
    if detail is not None:
        config.require_detail_mask("there is")
    if isinstance(config, Enlargement):
        return enlarge_image(image, config, models.device, models.dtype, progress)
    assert isinstance(config, Diffusion)
    require_sampling(models.base.sampling, config.asked(), models.identity)
    for line in unsuited_freeu(config, models.base.family, models.geometry, models.identity):
        emit(Note(line))
    negative_prompt = config.negative_prompt if negative_prompt is None else negative_prompt
    latest = image
    for number, (scale, own) in enumerate(zip((*config.via, config.scale), config.way())):
        height, width = target_size(image.height, image.width, scale)
        if number:
            captions = caption(latest, height, width) if caption and own.uses("captions") else None
        draw = seed if number == 0 else int(digest([seed, number])[:15], 16)
        latest = _one_pass(
            models, latest, height, width, prompt, negative_prompt, captions, detail, own, draw, progress
        )
        latest = _with_colours_of(image, latest, own)
    return latest


def _one_pass(
    models: Models,
    image: Image.Image,
    height: int,
    width: int,
    prompt: str,
    negative_prompt: str,
    captions: Sequence[str] | None,
    detail: Image.Image | None,
    config: Diffusion,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Image.Image:
    """`image` upscaled to `height` x `width` px in one go."""
    from resmaster_stages.diffusion.memory import preflight
    from resmaster_stages.diffusion.reference import pad_to_multiple, to_mask, to_tensor, upsample
    from resmaster_stages.methods.render import render
    from resmaster_stages.methods.request import Reference, Request

    if reason := why_not_wrapping(models.geometry, height, width, config.wraps):
        raise ConfigError(f"upscale.wrap: {wrap_of(config.wraps)}: {reason}; {OTHER_SIZE}")
    grid = view_grid(models.geometry, height, width, config.view_stride, config.wraps)
    if captions is not None and len(captions) != len(grid):
        raise ConfigError(
            f"captions: {len(captions)} given for {len(grid)} views ({grid.name}); give one per view, or none"
        )
    pixels = pad_to_multiple(upsample(image, height, width, config.wraps), models.geometry.step_px)
    request = Request(
        models=models,
        config=config,
        height=height,
        width=width,
        prompts=(prompt,),
        negative_prompts=(negative_prompt,),
        captions=(tuple(captions),) if captions is not None and config.uses("captions") else None,
        reference=Reference(models, pixels, config.scale, to_tensor(image), config.wraps),
        detail=None if detail is None else to_mask(detail),
    )
    for line in preflight(models, config.view_batch, grid, models.branches(config.guidance_scale)):
        emit(Note(line))
    (result,) = render(request, [seed], progress)
    if isinstance(result, SampleError):
        raise result
    return result


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
    from resmaster_stages.diffusion.colour_match import colour_matched

    return colour_matched(made, low_res, config.colour_match, config.wraps)
