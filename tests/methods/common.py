"""What the tests of several methods share."""

from contextlib import contextmanager

import numpy as np
from PIL import Image

from resmaster_stages.config import UpscaleConfig
from resmaster_stages.diffusion.reference import pad_to_multiple, to_tensor, upsample
from resmaster_stages.diffusion.schedule import Step, make_schedule
from resmaster_stages.methods.request import Reference, Request
from resmaster_stages.models.loading import Models
from resmaster_stages.upscale import target_size
from tests.tiny_models import SCHEDULER, tiny, tiny_adapted


def adapted() -> Models:
    return Models.from_pipeline(tiny_adapted())


def plain() -> Models:
    return Models.from_pipeline(tiny())


def picture(width=64, height=64, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def settings(method, **values) -> UpscaleConfig:
    return UpscaleConfig.model_validate({"method": method, "steps": 2, "scale": 2, **values})


def request(models, config, low_res=None, prompt="a cat") -> Request:
    """What `upscale_image` asks a method for."""
    image = low_res or picture()
    height, width = target_size(image.height, image.width, config.scale)
    pixels = pad_to_multiple(upsample(image, height, width), models.latent_factor)
    reference = Reference(models, pixels, config.scale, to_tensor(image))
    return Request(models, config, height, width, (prompt,), (config.negative_prompt,), reference=reference)


def schedule(steps=50) -> tuple[Step, ...]:
    return make_schedule({"_class_name": "EulerDiscreteScheduler", **SCHEDULER}, steps)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@contextmanager
def counted(unet):
    """Shapes of the UNet's calls within the block."""
    shapes, original = [], unet.forward

    def forward(sample, *args, **kwargs):
        shapes.append(tuple(sample.shape))
        return original(sample, *args, **kwargs)

    unet.forward = forward
    try:
        yield shapes
    finally:
        del unet.forward
