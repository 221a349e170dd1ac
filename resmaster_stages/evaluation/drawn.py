"""Draws low-res images instead of generating them, for `resmaster compare --low-res drawn`.

Each drawing is the scene of a prompt at the low-res size. Its true enlargement is known: the same scene, drawn at the
target size. The drawings and their prompts are in one tar beside the comparison. Their datasets are built like any
dataset of the user's own images.

Invariants:
- The scenes differ from those of `--reference picturebook`.
- The same prompts and size give the same tar, which is drawn once.
"""

from __future__ import annotations

import io
import tarfile

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.keys import digest
from resmaster_stages.picturebook.truth import true_image
from resmaster_stages.planning.checks import check_sizes
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.images import encode_image

DRAWN = "drawn"
"""The value of `--low-res`."""

REPLICA = -1
"""The `replica` of these drawings for `truth.true_image`. Those of reference drawings count from 0."""


def renamed(config: DatasetConfig) -> DatasetConfig:
    """A comparison's configuration with another name, because its datasets share no sample with those of generated
    images.

    Raises ConfigError for a configuration whose images cannot be drawn.
    """
    if config.images:
        raise ConfigError("--low-res drawn: your own images are there already; leave one of the two out")
    if config.replicas != 1:
        raise ConfigError("--low-res drawn: draws one scene per prompt; set replicas: 1")
    return config.model_copy(update={"name": f"{config.name}-{DRAWN}"})


def with_drawings(config: DatasetConfig, folder: Folder) -> DatasetConfig:
    """The configuration of a prompts dataset, changed to use drawings of its prompts at its low-res size as own images.

    The drawings are written to `folder`. Raises ConfigError for prompts that are not in picturebook's language, or that
    have detail masks.
    """
    samples = draft_samples(config).samples
    if masked := [sample for sample in samples if sample.source is not None]:
        raise ConfigError(f"--low-res drawn: {masked[0].source}: a drawing has no detail mask; leave the column out")
    height, width = check_sizes(config)
    prompts = [sample.prompt for sample in samples]
    name = f"drawn-{height}x{width}-{digest(prompts)[:16]}.tar"
    if not folder.exists(name):
        folder.write(name, _tar(prompts, height, width))
    return config.model_copy(update={"prompts": None, "images": folder.url_of(name)})


def true_enlargement(prompt: str, height_px: int, width_px: int) -> Image.Image:
    """The scene of a drawn low-res image, at the target size."""
    return true_image(prompt, height_px, width_px, REPLICA)


def _tar(prompts: list[str], height: int, width: int) -> bytes:
    """The drawings as a WebDataset tar of {number}.png and {number}.txt."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, prompt in enumerate(prompts):
            drawing = encode_image(true_image(prompt, height, width, REPLICA), "png")
            for extension, data in (("png", drawing), ("txt", prompt.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
