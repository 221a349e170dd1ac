"""Low-res images that are drawn instead of generated: each prompt's scene at the low-res size, whose true enlargement
is known.

For `resmaster compare --low-res drawn`. The drawings are own images with their prompts, in one tar beside the
comparison, and their datasets are built as any dataset of own images is. The truth of one of them is the same scene,
drawn at the target size.

Invariants:
- The scenes are other ones than those of `--reference picturebook`.
- The same prompts and size are the same tar, drawn once.
"""

from __future__ import annotations

import io
import tarfile

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.keys import digest
from resmaster_stages.picturebook.truth import true_image
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.planning.preview import check_sizes
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.images import encode_image

DRAWN = "drawn"
"""As `--low-res` names it."""

REPLICA = -1
"""Of `truth.true_image`: reference drawings count from 0."""


def renamed(config: DatasetConfig) -> DatasetConfig:
    """A comparison's configuration under a name of its own, for its datasets share no sample with those of generated
    images.

    Raises ConfigError for what cannot be drawn.
    """
    if config.images:
        raise ConfigError("--low-res drawn: your own images are there already; leave one of the two out")
    if config.replicas != 1:
        raise ConfigError("--low-res drawn: draws one scene per prompt; set replicas: 1")
    return config.model_copy(update={"name": f"{config.name}-{DRAWN}"})


def with_drawings(config: DatasetConfig, folder: Folder) -> DatasetConfig:
    """A prompts dataset as one of own images: its prompts' scenes at its low-res size, which are drawn into `folder`.

    Raises ConfigError for prompts that are no picturebook's, or that bring detail masks.
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
    """WebDataset: {number}.png and {number}.txt."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, prompt in enumerate(prompts):
            drawing = encode_image(true_image(prompt, height, width, REPLICA), "png")
            for extension, data in (("png", drawing), ("txt", prompt.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
