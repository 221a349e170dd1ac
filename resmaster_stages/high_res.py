"""Stage 4: makes the high-res image from the low-res image and captions, by the method that the configuration names.

This module does not access storage. Torch is imported when the first image is made.

Invariants:
- There is exactly one Output per sample, in order. An error of one sample becomes its Output's error.
- An image depends on the sample, the configuration and the weights, and not on the worker or the order. The number of
  views per call changes it by rounding, so every Output of a diffusion method says how many there were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.labels import Drawing, label_of
from resmaster_stages.dataset.sample import DESCRIBED, Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.diffusion.views import Grid, distance, patch_grid, target_size, view_grid
from resmaster_stages.errors import SampleError
from resmaster_stages.keys import canonical_json, sample_seed
from resmaster_stages.methods.settings import Diffusion, Enlargement
from resmaster_stages.models.identity import control_identity
from resmaster_stages.progress import Step, emit
from resmaster_stages.storage.images import encode_image
from resmaster_stages.storage.labels import Label


def captions_for_views(grid: Grid, rows: Sequence[dict[str, Any]], prompt: str) -> list[str]:
    """One caption per view: the caption of the nearest box in the captions table, by distance of centres.

    Rows hold half-open boxes y0, x0, y1, x1 in target px. Along an axis that wraps, the distance is that of the shorter
    way. A row without a caption of its own gives `prompt`.
    """
    if not rows:
        raise SampleError("there are no captions for this sample; run the captions stage again (resmaster repair)")
    (height, width), (down, across) = grid.size_px, grid.wraps
    texts = []
    for y0, x0, y1, x1 in grid.pixel_boxes:
        nearest = min(
            rows,
            key=lambda row: (
                distance(row["y0"] + row["y1"], y0 + y1, 2 * height, down) ** 2
                + distance(row["x0"] + row["x1"], x0 + x1, 2 * width, across) ** 2,
                row["y0"],
                row["x0"],
            ),
        )
        texts.append(nearest["caption"] if nearest["status"] in DESCRIBED else prompt)
    return texts


def caption_views(config: DatasetConfig, prompt: str, image: Image.Image, height: int, width: int) -> list[str]:
    """One caption per view of a target of `height` x `width` px, written from `image` by the configured captioner."""
    from resmaster_stages.captions import caption_rows, load_writer
    from resmaster_stages.models.geometry import geometry_of

    geometry = geometry_of(config.model)
    rows = caption_rows(image, prompt, patch_grid(config, geometry, height, width), load_writer(config))
    upscale = config.upscale
    return captions_for_views(view_grid(geometry, height, width, upscale.view_stride, upscale.wraps), rows, prompt)


def _diffused(
    config: DatasetConfig, upscale: Diffusion, sample: Sample, image: Image.Image
) -> tuple[Image.Image, dict[str, Any], int, Drawing]:
    """Make the high-res image with the base model. Returns the image, facts for the sample's JSON, the most views per
    call, and how the image was drawn."""
    from resmaster_stages.diffusion.memory import view_limit
    from resmaster_stages.diffusion.text import truncated
    from resmaster_stages.methods.upscale import upscale_image
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.samplers import sampler_name

    models = load_models(config.model)
    target = target_size(image.height, image.width, upscale.scale)
    whole = view_grid(models.geometry, *target, upscale.view_stride, upscale.wraps)
    views = view_limit(models, upscale.view_batch, whole.window_size, models.branches(upscale.guidance_scale))
    captions = None
    if upscale.uses("captions"):
        size = target_size(image.height, image.width, upscale.way()[0].scale)
        grid = view_grid(models.geometry, *size, upscale.view_stride, upscale.wraps)
        captions = captions_for_views(grid, sample.captions, sample.prompt)
    seed = sample_seed(sample.key, config.seed, "high_res", sample.take)
    negative_prompt = sample.negative_prompt or upscale.negative_prompt
    made = upscale_image(
        models,
        image,
        sample.prompt,
        config=upscale.model_copy(update={"view_batch": views}),
        negative_prompt=negative_prompt,
        captions=captions,
        caption=partial(caption_views, config, sample.prompt),
        detail=sample.detail_mask.open() if sample.detail_mask else None,
        seed=seed,
        progress=lambda done, total: emit(Step(done, total)),
    )
    facts = {
        "prompt_truncated": truncated(models, [sample.prompt])[0],
        "negative_prompt": negative_prompt,
        "seed": seed,
        "model": models.identity,
    }
    if upscale.uses("control"):
        facts["controlnet"] = control_identity(config.model)
    sampler = sampler_name(models.base, upscale.stepper, upscale.steps)
    drawing = Drawing(sampler, upscale.steps, upscale.guidance_scale, seed, negative_prompt)
    return made, facts, views, drawing


def _enlarged(config: DatasetConfig, upscale: Enlargement, image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    """Make the high-res image without the base model. Returns the image and facts for the sample's JSON."""
    from resmaster_stages.methods.upscale import enlarge_image
    from resmaster_stages.models.places import resolve_device, resolve_dtype

    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    made, weights = (
        enlarge_image(image, upscale, device, dtype, lambda done, total: emit(Step(done, total))),
        upscale.weights(),
    )
    return made, {"model": weights} if weights else {}


def _make(config: DatasetConfig, sample: Sample) -> Output:
    """The Output of a sample, whose files are still to be encoded (`Output.finish`)."""
    if sample.low_res is None:
        raise SampleError("there is no low-res image of this sample; run the low_res stage again (resmaster repair)")
    image, upscale = sample.low_res.open(), config.upscale
    if sample.detail_mask:
        upscale.require_detail_mask(f"sample {sample.key} has")
    views = drawing = None
    if isinstance(upscale, Enlargement):
        made, facts = _enlarged(config, upscale, image)
    else:
        assert isinstance(upscale, Diffusion)
        made, facts, views, drawing = _diffused(config, upscale, sample, image)
    weights = facts.get("model") or sample.low_res.meta.get("model", "")  # whose image was enlarged without a model
    label = label_of(config, sample, weights, drawing, upscale.scale)
    finish = partial(_files, config, sample, image.size, made, facts, label)
    return Output(sample.key, batch_size=views, finish=finish)


def _files(
    config: DatasetConfig,
    sample: Sample,
    low_res: tuple[int, int],
    image: Image.Image,
    facts: dict[str, Any],
    label: Label | None,
) -> dict[str, bytes]:
    """The sample's files by extension, in the order of the tar's members. low_res: (width, height) in px. label: what
    the image says of itself."""
    assert sample.low_res is not None
    upscale = config.upscale
    facts = {
        "key": sample.key,
        "prompt": sample.prompt,
        "width": image.width,
        "height": image.height,
        "low_res": {
            "width": low_res[0],
            "height": low_res[1],
            "sha256": hashlib.sha256(sample.low_res.data).hexdigest(),
        },
        "method": upscale.method,
        "upscale": upscale.identity(),
        "stage_version": STAGES["high_res"].version,
        **({"take": sample.take} if sample.take else {}),
        **facts,
    }
    if sample.detail_mask:
        facts["detail_mask"] = {"sha256": hashlib.sha256(sample.detail_mask.data).hexdigest()}
    return {
        config.image_format: encode_image(image, config.image_format, config.image_quality, label),
        "json": canonical_json(facts).encode(),
        "txt": sample.prompt.encode(),
    }


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Run the stage over some samples. Models are loaded at the first sample that needs them."""
    for sample in samples:
        try:
            yield _make(config, sample)
        except SampleError as error:
            yield Output(key=sample.key, error=error)
