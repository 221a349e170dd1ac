"""ResMaster."""
from diffusers import StableDiffusionXLPipeline

from resmaster_stages.pipelines import Upscaling


class ResMasterPipeline(Upscaling, StableDiffusionXLPipeline):
    method = "resmaster"
