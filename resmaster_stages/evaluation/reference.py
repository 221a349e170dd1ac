"""The reference of a comparison: features of the user's own images, or of true images of picturebook's prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.keys import digest, image_key
from resmaster_stages.metrics.features import image_features
from resmaster_stages.metrics.repeats import mentions, surplus
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.identity import PACK_MODELS, PICTUREBOOK
from resmaster_stages.planning.checks import check_sizes
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.storage.arrays import Arrays, decode_arrays, encode_arrays
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.images import decode_image
from resmaster_stages.storage.sources import FoundImage, find_images

TRUE_IMAGES = 256
"""The least number of images that are drawn as ground truth. Every prompt is drawn equally often."""


SURPLUS = "surplus"
"""Name, beside the features of a drawn image, of its surplus of counted objects."""


Features = dict[str, Arrays]
"""Key -> view -> features."""


def reference_features(config: DatasetConfig, url: str, cache: Folder) -> dict[str, Arrays]:
    """Key -> view -> features of the images at `url` (a folder or WebDataset tars), kept in the folder `cache`.

    The file in the cache is named by the images' content, the network and the native size. Raises UserError if there
    are no images.
    """
    from resmaster_stages.metrics.features import load_extractor

    extractor, native = load_extractor(config.quality), geometry_of(config.model).native_px
    keys = sorted({image_key(image.data, "") for image in _usable(url)})
    weights = stage_hashes(config.model_copy(update={"name": "any"}))["quality"]
    name = f"reference-{digest([keys, extractor.name, native, weights])[:16]}.features.parquet"
    if cache.exists(name):
        return decode_arrays(cache.read(name), cache.url_of(name))
    found: dict[str, Arrays] = {}
    for image in _usable(url):
        key = image_key(image.data, "")
        if key not in found:
            try:
                found[key] = image_features(extractor, decode_image(image.data, image.source), key, native)
            except SampleError as error:
                raise UserError(f"--reference {url}: {error}; remove or mend it") from None
    cache.write(name, encode_arrays(list(found), list(found.values())))
    return found


def _usable(url: str) -> Iterator[FoundImage]:
    """The images at `url`. Raises UserError for the first that cannot be used."""
    for image in find_images(url):
        if image.problem:
            raise UserError(f"--reference {url}: {image.source}: {image.problem}; remove or mend it")
        yield image


def check_truth(config: DatasetConfig) -> None:
    """Raise ConfigError if picturebook's ground truth cannot be drawn for a dataset."""
    from resmaster_stages.picturebook.truth import check

    if config.images:
        raise ConfigError("--reference picturebook: your own images have no prompts to draw; give a folder of images")
    height, width = target_size(*check_sizes(config), config.upscale.scale)
    check((sample.prompt for sample in draft_samples(config).samples), height, width)


def true_features(config: DatasetConfig, height: int, width: int, cache: Folder) -> tuple[Features, Features]:
    """Features of picturebook's ground truth for a dataset's prompts at a size in px: (the reference, other drawings).

    The reference has every prompt drawn in enough layouts to give `TRUE_IMAGES` images. The other drawings, one per
    prompt, show the score of a perfect method against the reference. Both are kept in the folder `cache`.
    Raises ConfigError like `check_truth`.
    """
    from resmaster_stages.metrics.features import load_extractor
    from resmaster_stages.picturebook.scenes import KINDS
    from resmaster_stages.picturebook.truth import true_image

    samples = draft_samples(config).samples
    extractor, native, counter = (
        load_extractor(config.quality),
        geometry_of(config.model).native_px,
        object_counter(config),
    )
    layouts = -(-TRUE_IMAGES // len(samples))
    weights = stage_hashes(config.model_copy(update={"name": "any"}))["quality"]
    prompts = {sample.key: sample.prompt for sample in samples}
    found: list[Features] = []
    for part, replicas in (("reference", range(layouts)), ("real", range(layouts, layouts + 1))):
        named = digest([prompts, height, width, layouts, extractor.name, native, weights])[:16]
        name = f"{part}-{named}.features.parquet"
        if cache.exists(name):
            found.append(decode_arrays(cache.read(name), cache.url_of(name)))
            continue
        features: Features = {}
        for replica in replicas:
            for key, prompt in prompts.items():
                image = true_image(prompt, height, width, replica)
                own = f"{key}-{replica}"
                features[own] = image_features(extractor, image, own, native)
                if part == "real" and counter is not None:
                    extra = surplus(counter(image), mentions(prompt, KINDS))
                    features[own] = {**features[own], SURPLUS: np.array([extra], np.float16)}
        cache.write(name, encode_arrays(list(features), list(features.values())))
        found.append(features)
    return found[0], found[1]


def object_counter(config: DatasetConfig) -> Callable[[Image.Image], Mapping[str, int]] | None:
    """A function that counts objects with picturebook's captioner, tile by tile. None for other base models, whose
    objects the captioner does not know."""
    if config.model.id not in PACK_MODELS:
        return None
    from resmaster_stages.models.captioner import load_captioner
    from resmaster_stages.picturebook.counting import count_objects

    own = {"source": "model", "model": PICTUREBOOK, "revision": None}
    captioner = load_captioner(config.captions.model_copy(update=own), config.model.device)
    assert captioner is not None
    native = geometry_of(config.model).native_px
    return lambda image: count_objects(image, captioner.caption, native)
