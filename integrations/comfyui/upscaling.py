"""Nodes that make images, and one that measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig, QualityConfig
from resmaster_stages.config.part import GREATEST_INTEGER
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import UserError
from resmaster_stages.library import generate, upscale_as_configured
from resmaster_stages.metrics.flags import flags
from resmaster_stages.metrics.metric import Pair
from resmaster_stages.models.faults import device_faults
from resmaster_stages.quality import measure as row_of

from .host import Watch, at_work, image_batch, of_each, pil_masks, rgb_images
from .loading import MODEL, Loaded, configuration
from .method import METHOD
from .views import CAPTIONS, views_of
from .written import WIDGET, settings_in

SEED = ("INT", {"default": 0, "min": 0, "max": GREATEST_INTEGER, "control_after_generate": True})
PROMPT = ("STRING", {"multiline": True, "default": ""})


def decoded(model: Loaded, latent: Mapping[str, torch.Tensor]) -> list[Image.Image]:
    """The images of ComfyUI's latents, which are a VAE's own, without the scale of the base model's latents."""
    samples, channels = latent["samples"], model.models.base.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise UserError(
            f"latent: a tensor of shape {list(samples.shape)} does not fit {model.name}, whose latents have {channels} "
            "channels; decode it with its own VAE, and connect the image"
        )
    canvas = model.models.base.to_canvas(samples.to(model.models.device, torch.float32, copy=True))
    with device_faults("decode the latent with VAE Decode (Tiled), and connect the image"):
        return [to_image(each) for each in autoencoder.decode(model.models, canvas)]


class Generate:
    """Makes an image from a prompt."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Makes an image from a prompt, of the model's native size unless the settings say otherwise."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": (MODEL,), "prompt": PROMPT, "seed": SEED},
            "optional": {"settings": WIDGET},
        }

    def make(self, model: Loaded, prompt: str, seed: int, settings: str = "") -> tuple[torch.Tensor]:
        values = settings_in(settings)
        with at_work(model.models.device):
            return (image_batch(generate([prompt], model=model.models, seed=seed, **values)),)


class Upscale:
    """Upscales images."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Upscales an image, or a latent. Of a batch, the first image has the seed, the next one the seed + 1. Captions "
        "and image prompts are given for each view, row by row, as Cut Views orders them."
    )
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "upscale"
    TIPS: ClassVar[dict[str, str]] = {
        "negative_prompt": "Empty: as the method and the model recommend.",
        "model": "Not needed by methods without a base model, such as lanczos.",
        "latent": "In place of an image. The model's own VAE decodes it.",
        "method": "None: the default method, four times as large.",
        "captions": "A caption for each view. None: every view gets the prompt, with picturebook its own captions.",
        "detail": "White: where more detail is drawn anew (method freescale).",
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {
            "negative_prompt": "STRING",
            "model": MODEL,
            "image": "IMAGE",
            "latent": "LATENT",
            "method": METHOD,
            "captions": CAPTIONS,
            "detail": "MASK",
        }
        text = {"negative_prompt": {"multiline": True, "default": ""}}
        optional = {
            name: (kind, {"tooltip": cls.TIPS.get(name, ""), **text.get(name, {})}) for name, kind in kinds.items()
        }
        return {"required": {"prompt": PROMPT, "seed": SEED}, "optional": optional}

    def upscale(
        self,
        prompt: str,
        seed: int,
        negative_prompt: str = "",
        model: Loaded | None = None,
        method: Mapping[str, Any] | None = None,
        **images: Any,
    ) -> tuple[torch.Tensor]:
        values = dict(method or {})
        if negative_prompt.strip():
            values["negative_prompt"] = negative_prompt
        config = configuration(model, values, seed, "auto" if model is None or model.by_name else "prompt")
        with at_work(model.models.device if model else None):
            sources = self._sources(model, images.get("image"), images.get("latent"))
            watch = Watch(len(sources))
            captions = self._captions(config, model, sources, images.get("captions"))
            masks = images.get("detail")
            details = [[None]] * len(sources) if masks is None else of_each(pil_masks(masks), len(sources), "detail")
            made = [
                upscale_as_configured(
                    config.model_copy(update={"seed": (seed + number) % (GREATEST_INTEGER + 1)}),
                    source,
                    prompt,
                    models=model.models if model else None,
                    captions=captions[number],
                    detail=details[number][0],
                    progress=watch.of(number),
                )
                for number, source in enumerate(sources)
            ]
        return (image_batch(made),)

    def _sources(
        self, model: Loaded | None, image: torch.Tensor | None, latent: Mapping[str, torch.Tensor] | None
    ) -> list[Image.Image]:
        """The images that are upscaled. Raises UserError unless there is an image or a latent, and not both."""
        if (image is None) == (latent is None):
            raise UserError("connect either an image or a latent to Upscale")
        if image is not None:
            return rgb_images(image)
        if model is None:
            raise UserError("latent: a latent needs a model that decodes it; connect one to `model`, or an image")
        assert latent is not None
        return decoded(model, latent)

    def _captions(
        self,
        config: DatasetConfig,
        model: Loaded | None,
        sources: Sequence[Image.Image],
        captions: Sequence[str] | None,
    ) -> list[Sequence[str] | None]:
        """The captions of each image. Raises UserError for a wrong number."""
        if captions is None:
            return [None] * len(sources)
        if model is None:
            raise UserError(f"captions: method {config.upscale.method} reads none; leave them out")
        grid = views_of(config, model, sources[0].height, sources[0].width, "captions")
        return of_each(captions, len(sources), "captions", len(grid))


class Measure:
    """Measures an image and its enlargement."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Measures how well an enlargement agrees with its image, and flags what may be wrong with it."
    RETURN_TYPES = ("STRING", "STRING", "FLOAT")
    RETURN_NAMES = ("metrics", "flags", "agreement_psnr")
    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": (MODEL,), "low_res": ("IMAGE",), "high_res": ("IMAGE",)},
            "optional": {"prompt": PROMPT},
        }

    def measure(
        self, model: Loaded, low_res: torch.Tensor, high_res: torch.Tensor, prompt: str = ""
    ) -> tuple[str, str, float]:
        low, high = rgb_images(low_res)[0], rgb_images(high_res)[0]
        grid = view_grid(model.models.geometry, high.height, high.width, 0.5)
        row = row_of(Pair(low, high, grid.pixel_boxes, prompt, None))
        lines = [f"{name}: {value:.4g}" for name, value in row.items() if isinstance(value, (int, float))]
        return "\n".join(lines), "\n".join(flags(row, QualityConfig())), float(row["agreement_psnr"])
