"""What the tests of several methods share."""

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.diffusion.reference import pad_to_multiple, to_tensor, upsample
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.methods.lanczos import Lanczos
from resmaster_stages.methods.request import Reference, Request
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Step, make_schedule
from tests.tiny_models import SCHEDULER, counted, tiny, tiny_adapted


def adapted() -> Models:
    return Models.from_pipeline(tiny_adapted())


def plain() -> Models:
    return Models.from_pipeline(tiny())


def some_image(width=64, height=64, seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


DIFFUSION_METHODS = tuple(name for name, each in methods().items() if each.base_model)
"""Methods that denoise with the base model."""


def settings(method, **values) -> Method:
    """`values` of `method`, at 2x in few steps where it has any."""
    return Method.model_validate({**with_method({"steps": 2, "scale": 2}, method), **values})


def lanczos(image, height, width) -> Image.Image:
    return Lanczos().enlarge(image, height, width, torch.device("cpu"), torch.float32)


def request(models, config, low_res=None, prompt="a cat") -> Request:
    """What `upscale_image` asks a method for."""
    image = low_res or some_image()
    height, width = target_size(image.height, image.width, config.scale)
    pixels = pad_to_multiple(upsample(image, height, width), models.geometry.step_px)
    reference = Reference(models, pixels, config.scale, to_tensor(image))
    return Request(models, config, height, width, (prompt,), (config.negative_prompt,), reference=reference)


def schedule(steps=50) -> tuple[Step, ...]:
    return make_schedule({"_class_name": "EulerDiscreteScheduler", **SCHEDULER}, steps)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def sdxl_shaped(channels=(8, 16, 32)) -> UNet2DConditionModel:
    """A UNet with the blocks of SDXL, so with its module names, but narrow and shallow in its transformers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    return unet.eval().requires_grad_(False)


def forwards(unet) -> dict:
    """The forward that each module carries itself, by name: what patches put there."""
    return {name: module.__dict__["forward"] for name, module in unet.named_modules() if "forward" in module.__dict__}


def calls_of(method, **values) -> list[tuple[int, ...]]:
    """Shapes of the UNet's inputs, call by call, for an image by `method`. Everything that was replaced is restored."""
    ours = plain()
    with counted(ours.base.denoiser) as calls:
        upscale_image(ours, some_image(), "a cat", config=settings(method, **values))
    assert forwards(ours.base.denoiser) == {}
    return calls
