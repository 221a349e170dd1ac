"""A diffusers pipeline for SDXL that enlarges images by cascades of whole canvases.

Presets: rectifiedhr, frecas, diffusehigh and megafusion.

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="cascade.py", trust_remote_code=True)

Needs the package resmaster-pipeline. All of a call's parameters: `resmaster_stages.library.pipelines.Upscaling`.
"""

from diffusers import StableDiffusionXLPipeline

from resmaster_stages.library.pipelines import Upscaling


class CascadePipeline(Upscaling, StableDiffusionXLPipeline):
    """Enlarges an image, or one that SDXL makes from the prompt first."""

    method = "cascade"
