"""A diffusers pipeline for SDXL that enlarges images by DemoFusion (Du et al., CVPR 2024).

With preset="accdiffusion", it is AccDiffusion (ECCV 2024).

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="demofusion.py", trust_remote_code=True)

Needs the package resmaster-pipeline. All of a call's parameters: `resmaster_stages.library.pipelines.Upscaling`.
"""

from diffusers import StableDiffusionXLPipeline

from resmaster_stages.library.pipelines import Upscaling


class DemoFusionPipeline(Upscaling, StableDiffusionXLPipeline):
    """Enlarges an image, or one that SDXL makes from the prompt first."""

    method = "demofusion"
