"""Stage 2: makes the low-res image of each sample, from its prompt or from the user's own image.

This module reads single images by their source, and does no other storage access. Torch is imported when an image is
generated.

Invariants:
- There is exactly one Output per sample, in order. An error of one sample becomes its Output's error.
- Images are generated in fixed slots of `batch_size` samples. A failing sample keeps its place in the slot, so the
  bytes of its neighbours do not change.
- Low-res images are stored without loss. The sample's detail mask, if any, is stored beside the image.
- The image of a prompt does not depend on its detail mask, because users draw the mask for an existing image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.image_format import lossless_format
from resmaster_stages.dataset.labels import Drawing, label_of
from resmaster_stages.dataset.plan import unmasked_key
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import SampleError
from resmaster_stages.keys import canonical_json, image_key, masked_key, sample_seed
from resmaster_stages.storage.credentials import embedded_credentials
from resmaster_stages.storage.generation import read_generation
from resmaster_stages.storage.images import decode_image, encode_image
from resmaster_stages.storage.labels import Label
from resmaster_stages.storage.masks import read_mask, read_mask_beside
from resmaster_stages.storage.sources import MASK_EXTENSION, read_image


def _check_unchanged(sample: Sample, key: str, mask: bytes) -> None:
    """Raise SampleError unless the base `key` together with `mask` gives the key that the sample was planned with."""
    if masked_key(key, mask) != sample.key:
        raise SampleError(f"{sample.source}: changed since it was planned; run the same command again to plan it anew")


def _mask_of_prompt(sample: Sample) -> bytes | None:
    if sample.source is None:
        return None
    mask = read_mask(sample.source)
    _check_unchanged(sample, unmasked_key(sample), mask)
    return mask


def _files(
    config: DatasetConfig,
    sample: Sample,
    image: Image.Image,
    facts: dict[str, Any],
    mask: bytes | None,
    label: Label | None = None,
) -> dict[str, bytes]:
    """The sample's files by extension, in the order of the tar's members. mask: content of the user's mask file. label:
    what the image says of itself."""
    beside = {}
    if mask is not None:
        grey = decode_image(mask, f"the detail mask of {sample.source}").convert("L")
        beside = {MASK_EXTENSION: encode_image(grey, "png")}
        source = {"source_sha256": hashlib.sha256(mask).hexdigest()}
        facts = {**facts, "detail_mask": {"width": grey.width, "height": grey.height, **source}}
    facts = {
        "key": sample.key,
        "prompt": sample.prompt,
        "width": image.width,
        "height": image.height,
        "stage_version": STAGES["low_res"].version,
        **({"take": sample.take} if sample.take else {}),
        **facts,
    }
    image_format = lossless_format(config.image_format)
    return {
        image_format: encode_image(image, image_format, 100, label),
        "json": canonical_json(facts).encode(),
        "txt": sample.prompt.encode(),
        **beside,
    }


def _files_of_prompt(
    config: DatasetConfig, sample: Sample, image: Image.Image, facts: dict[str, Any], sampler: str
) -> dict[str, bytes]:
    own = config.low_res
    drawing = Drawing(sampler, own.steps, own.guidance_scale, facts["seed"], facts["negative_prompt"])
    label = label_of(config, sample, facts["model"], drawing)
    return _files(config, sample, image, facts, _mask_of_prompt(sample), label)


def _said_by(data: bytes) -> dict[str, Any]:
    """What is kept of what the user's image file says: its seed, and that it has content credentials."""
    said: dict[str, Any] = {}
    generation = read_generation(data)
    if generation is not None and generation.seed is not None:
        said["seed"] = generation.seed
    if credentials := embedded_credentials(data):
        said["credentials"] = {
            "standard": "C2PA",
            "bytes": len(credentials),
            "sha256": hashlib.sha256(credentials).hexdigest(),
        }
    return said


def _from_image(config: DatasetConfig, sample: Sample) -> Output:
    assert sample.source is not None
    try:
        data = read_image(sample.source)
        key = image_key(data, sample.prompt, sample.replica)
        mask = None
        if key != sample.key:
            try:
                mask = read_mask_beside(sample.source)
            except SampleError as error:
                if not isinstance(error.__cause__, (FileNotFoundError, KeyError)):
                    raise
                raise SampleError(
                    f"{sample.source}: changed since it was planned, or its detail mask is gone; run the same command "
                    "again to plan it anew"
                ) from error
            _check_unchanged(sample, key, mask)
        image = decode_image(data, sample.source)
        digest = hashlib.sha256(data).hexdigest()
        facts: dict[str, Any] = {"negative_prompt": sample.negative_prompt, "source_sha256": digest}
        if config.image_metadata != "none" and (said := _said_by(data)):
            facts["source_metadata"] = said
        return Output(key=sample.key, finish=partial(_files, config, sample, image, facts, mask))
    except SampleError as error:
        return Output(key=sample.key, error=error)


def _from_prompts(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The Outputs of one slot. The samples go through the model `batch_size` at a time."""
    from resmaster_stages.diffusion.text import truncated
    from resmaster_stages.methods.generate import generate, low_res_stepper
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.samplers import sampler_name

    models = load_models(config.model.base)
    low_res = config.low_res
    sampler = sampler_name(models.base, low_res_stepper(models), low_res.steps)
    negative_prompts = [sample.negative_prompt or low_res.negative_prompt for sample in samples]
    seeds = [sample_seed(unmasked_key(sample), config.seed, "low_res", sample.take) for sample in samples]
    results: dict[int, Image.Image | SampleError] = {}
    for size in dict.fromkeys((sample.height, sample.width) for sample in samples):
        places = [i for i, sample in enumerate(samples) if (sample.height, sample.width) == size]
        images = generate(
            models,
            [samples[i].prompt for i in places],
            [negative_prompts[i] for i in places],
            [seeds[i] for i in places],
            *size,
            low_res.steps,
            low_res.guidance_scale,
            low_res.batch_size,
            low_res.wrap,
        )
        results |= dict(zip(places, images))
    for i, sample in enumerate(samples):
        result = results[i]
        if isinstance(result, SampleError):
            yield Output(key=sample.key, error=result)
            continue
        facts = {
            "negative_prompt": negative_prompts[i],
            "prompt_truncated": truncated(models, [sample.prompt])[0],
            "seed": seeds[i],
            "model": models.identity,
            "low_res": low_res.identity(),
        }
        yield Output(key=sample.key, finish=partial(_files_of_prompt, config, sample, result, facts, sampler))


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Run the stage over a slot of samples, all from prompts or all from the user's own images."""
    if config.images:
        return (_from_image(config, sample) for sample in samples)
    return _from_prompts(config, samples)
