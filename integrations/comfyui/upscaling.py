"""Nodes that make images, and one that measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from resmaster_stages.config.dataset import DatasetConfig, QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Source
from resmaster_stages.config.part import GREATEST_INTEGER
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import UserError
from resmaster_stages.library.drawing import generate
from resmaster_stages.library.engine import Wish, subject_of_latents, upscale_one
from resmaster_stages.methods.upscale import Subject
from resmaster_stages.metrics.flags import flags
from resmaster_stages.metrics.metric import Pair
from resmaster_stages.models.faults import device_faults
from resmaster_stages.quality import measure as row_of

from .host import Bar, at_work, image_batch, of_each, pil_masks, rgb_images
from .loading import MODEL, Loaded, configuration
from .method import METHOD
from .views import CAPTIONS, IMAGE_PROMPTS, views_of
from .written import WIDGET, settings_in

SEED = ("INT", {"default": 0, "min": 0, "max": GREATEST_INTEGER, "control_after_generate": True})
PROMPT = ("STRING", {"multiline": True, "default": ""})


def of_latent(model: Loaded, latent: Mapping[str, torch.Tensor], wraps: Axes) -> list[Subject]:
    """The images of ComfyUI's latents, which are a VAE's own, without the scale of the base model's latents.

    wraps: whether the images continue at the opposite border, along their height and along their width.
    """
    samples, base = latent["samples"], model.models.base
    if samples.ndim != 4 or samples.shape[1] != base.latent_channels:
        raise UserError(
            f"latent: a tensor of shape {list(samples.shape)} does not fit {model.name}, whose latents have "
            f"{base.latent_channels} channels; decode it with its own VAE, and connect the image"
        )
    canvas = base.to_canvas(samples.to(model.models.device, torch.float32, copy=True))
    with device_faults("decode the latent with VAE Decode (Tiled), and connect the image"):
        return [subject_of_latents(model.models, each, wraps) for each in canvas]


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
        parse_config({"name": "single", "low_res": values}, "ResMaster")
        after_step = Bar(1).of(0).on_step
        assert after_step is not None
        with at_work(model.models.device):
            made = generate(
                prompt,
                model=model.models,
                seed=seed,
                output_type="np",
                callback_on_step_end=lambda canvas, *step: after_step(canvas),
                **values,
            )
        return (image_batch(made),)


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

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        negative = {"multiline": True, "default": "", "tooltip": "Empty: as the method and the model recommend."}
        linked = {
            "model": (MODEL, "Not needed by methods without a base model, such as lanczos."),
            "image": ("IMAGE", "Transparent images lie on white."),
            "latent": ("LATENT", "In place of an image. The model's own VAE decodes it."),
            "method": (METHOD, "None: the default method, four times as large."),
            "captions": (CAPTIONS, "None: every view gets the prompt, with picturebook its own captions."),
            "image_prompts": (IMAGE_PROMPTS, "None: every view is shown its own crop, if the model has an adapter."),
            "detail": ("MASK", "Where more detail is drawn anew (method freescale with `alpha_elsewhere`)."),
        }
        optional = {name: (kind, {"tooltip": tip}) for name, (kind, tip) in linked.items()}
        return {
            "required": {"prompt": PROMPT, "seed": SEED},
            "optional": {"negative_prompt": ("STRING", negative), **optional},
        }

    def upscale(
        self,
        prompt: str,
        seed: int,
        negative_prompt: str = "",
        model: Loaded | None = None,
        method: Mapping[str, Any] | None = None,
        **linked: Any,
    ) -> tuple[torch.Tensor]:
        values = dict(method or {})
        if negative_prompt.strip():
            values["negative_prompt"] = negative_prompt
        config = configuration(model, values, "auto" if model is None or model.by_name else "prompt")
        models = model.models if model else None
        with at_work(models.device if models else None):
            subjects = self._subjects(config, model, prompt, linked)
            bar = Bar(len(subjects))
            seeds = [(seed + number) % (GREATEST_INTEGER + 1) for number in range(len(subjects))]
            wishes = [Wish("np", each, bar.of(number)) for number, each in enumerate(seeds)]
            made = [upscale_one(config, subject, models, wish) for subject, wish in zip(subjects, wishes)]
        return (image_batch(made),)

    def _subjects(
        self, config: DatasetConfig, model: Loaded | None, prompt: str, linked: Mapping[str, Any]
    ) -> list[Subject]:
        """The images that are upscaled, with what is known of each. Raises UserError."""
        image, latent = linked.get("image"), linked.get("latent")
        if (image is None) == (latent is None):
            raise UserError("connect either an image or a latent to Upscale")
        if image is not None:
            subjects = [Subject(each) for each in rgb_images(image)]
        elif model is None:
            raise UserError("latent: a latent needs a model that decodes it; connect one to `model`, or an image")
        else:
            assert latent is not None
            subjects = of_latent(model, latent, config.upscale.wraps)
        known: list[dict[str, Any]] = [{"prompt": prompt} for _ in subjects]
        size = subjects[0].image.height, subjects[0].image.width
        sources: tuple[tuple[str, Source], ...] = (("captions", "captions"), ("image_prompts", "image_prompt"))
        for name, source in sources:
            if (given := linked.get(name)) is not None:
                views = len(views_of(config, model, *size, source))
                for about, each in zip(known, of_each(given, len(subjects), name, views)):
                    about[name] = each
        if (masks := linked.get("detail")) is not None:
            for about, (mask,) in zip(known, of_each(pil_masks(masks), len(subjects), "detail")):
                about["detail"] = mask
        return [replace(subject, **about) for subject, about in zip(subjects, known)]


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
