"""A diffusers pipeline for SDXL that enlarges images by FreeScale (Qiu et al., ICCV 2025).

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="freescale.py", trust_remote_code=True)

Needs the package resmaster-pipeline. All of a call's parameters: `resmaster_stages.library.pipelines.Upscaling`.
"""

from diffusers import StableDiffusionXLPipeline

from resmaster_stages.library.pipelines import Upscaling


class FreeScalePipeline(Upscaling, StableDiffusionXLPipeline):
    """Enlarges an image, or one that SDXL makes from the prompt first."""

    method = "freescale"
