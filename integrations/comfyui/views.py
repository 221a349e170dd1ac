"""Nodes about the views of an image: their crops, and a caption for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from resmaster_stages.captions import patches
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.method import Source
from resmaster_stages.diffusion.views import Grid, target_size, view_grid
from resmaster_stages.errors import UserError
from resmaster_stages.high_res import caption_views

from .host import at_work, image_batch, rgb_images
from .loading import MODEL, Loaded, configuration
from .method import METHOD

CAPTIONS = "RESMASTER_CAPTIONS"
IMAGE_PROMPTS = "RESMASTER_IMAGE_PROMPTS"


def views_of(config: DatasetConfig, model: Loaded | None, height: int, width: int, source: Source) -> Grid:
    """The views of the first enlargement of an image of `height` x `width` px. Raises UserError if nothing of the kind
    `source` is read view by view."""
    upscale = config.upscale
    if model is None or not upscale.uses(source):
        raise UserError(
            f"method {upscale.method} reads no {source} as it is set; leave these nodes out, or choose another method"
        )
    target = target_size(height, width, upscale.way()[0].scale)
    return view_grid(model.models.geometry, *target, upscale.view_stride, upscale.wraps)


class CutViews:
    """Cuts the views that a method would draw out of the enlarged image."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Cuts out the views that the method would draw, row by row, from the enlarged image. The views are a list, so "
        "that nodes after this one run once for each view. The order is that of captions and image prompts."
    )
    RETURN_TYPES = ("IMAGE", "INT", "STRING")
    RETURN_NAMES = ("views", "count", "grid")
    OUTPUT_IS_LIST = (True, False, False)
    FUNCTION = "cut"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (MODEL,), "image": ("IMAGE",), "method": (METHOD,)}}

    def cut(self, model: Loaded, image: torch.Tensor, method: Mapping[str, Any]) -> tuple[list[torch.Tensor], int, str]:
        images = rgb_images(image)
        config = configuration(model, method)
        grid = views_of(config, model, images[0].height, images[0].width, "captions")
        with at_work():
            views = [image_batch([view]) for each in images for view in patches(each, grid)]
        size = f"{grid.window_width * grid.unit_px} x {grid.window_height * grid.unit_px} px"
        shape = f"{len(grid)} views of {size} in {len(grid.rows)} rows and {len(grid.cols)} columns"
        return views, len(grid), shape


class Captions:
    """Collects captions of views from other nodes, or reads them from a text."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Collects the captions of an image's views, row by row. A list of texts from other nodes has one caption in "
        "each text. A single text has one caption a line."
    )
    RETURN_TYPES = (CAPTIONS,)
    RETURN_NAMES = ("captions",)
    INPUT_IS_LIST = True
    FUNCTION = "collect"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"captions": ("STRING", {"multiline": True, "default": ""})}}

    def collect(self, captions: Sequence[str]) -> tuple[tuple[str, ...]]:
        texts = list(captions) if len(captions) > 1 else captions[0].splitlines()
        found = tuple(" ".join(text.split()) for text in texts)
        if not any(found):
            raise UserError("captions: there are none; connect a list of texts, or write one caption a line")
        return (found,)


class ImagePrompts:
    """Collects image prompts of views from other nodes."""

    CATEGORY = "ResMaster"
    DESCRIPTION = "Collects the images that the views are shown in place of their own crops, row by row."
    RETURN_TYPES = (IMAGE_PROMPTS,)
    RETURN_NAMES = ("image_prompts",)
    INPUT_IS_LIST = True
    FUNCTION = "collect"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}}

    def collect(self, images: Sequence[torch.Tensor]) -> tuple[tuple[Image.Image, ...]]:
        return (tuple(image for batch in images for image in rgb_images(batch)),)


class CaptionViews:
    """Writes captions of views by a captioner, or by the attention of the base model."""

    CATEGORY = "ResMaster"
    DESCRIPTION = (
        "Writes a caption for each view: `attention` takes the words of the prompt that the image attends to there. A "
        "hub id or a folder is that of a captioner, and `picturebook` that of the embedded model."
    )
    RETURN_TYPES = (CAPTIONS, "STRING")
    RETURN_NAMES = ("captions", "texts")
    OUTPUT_IS_LIST = (False, True)
    FUNCTION = "write"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt = {"multiline": True, "default": "", "tooltip": "The prompt of the whole image."}
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "method": (METHOD,),
                "prompt": ("STRING", prompt),
                "captioner": ("STRING", {"default": "attention"}),
            }
        }

    def write(
        self, model: Loaded, image: torch.Tensor, method: Mapping[str, Any], prompt: str, captioner: str
    ) -> tuple[tuple[str, ...], list[str]]:
        if not model.by_name:
            raise UserError(
                f"captioner: {model.name} has no name that a captioner could load it by, so other nodes must write the "
                "captions; connect these to Captions of Views"
            )
        images = rgb_images(image)
        config = configuration(model, method, captioner=captioner.strip())
        grid = views_of(config, model, images[0].height, images[0].width, "captions")
        with at_work(model.models.device):
            texts = [text for each in images for text in caption_views(config, prompt, each, *grid.size_px)]
        return tuple(texts), texts
