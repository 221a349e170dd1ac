"""MultiDiffusion against the implementation that diffusers ships, which steps every view and then averages them."""

import pytest
import torch
from diffusers import StableDiffusionPanoramaPipeline

from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.models.parts import Models
from tests.methods.common import request, settings, some_image
from tests.tiny_models import counted, make_stable_diffusion

GUIDANCE = 7.5
PLAIN = {
    "steps": 5,
    "scale": 1.75,
    "stepper": "ddim_implied",
    "guidance_scale": GUIDANCE,
    "negative_prompt": "",
    "fuse": "uniform",
}


def panorama(pipe, boxes):
    """diffusers' pipeline with our views instead of its own, which take the VAE to be 8 times smaller than the
    image."""

    class Panorama(StableDiffusionPanoramaPipeline):
        def get_views(self, *args, **kwargs):
            return [(y0, y1, x0, x1) for y0, x0, y1, x1 in boxes]

    made = Panorama(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.unet,
        pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_canvas_is_that_of_diffusers_with_fewer_calls(prediction):
    pipe = make_stable_diffusion(prediction)
    models = Models.from_pipeline(pipe)
    asked = request(models, settings("multidiffusion", **PLAIN))
    noise = CanvasNoise([3], 4, 28, 28, models.device)
    start = noise()
    boxes = asked.views().boxes
    with counted(models.base.denoiser) as calls:
        ours = denoise(
            models,
            asked.config.compose(asked),
            asked.path,
            start.clone(),
            noise,
            view_batch=16,
        )
    assert len(calls) == 5, "all views of a step in one call"
    with counted(models.base.denoiser) as calls:
        theirs = panorama(pipe, boxes)(
            "a cat",
            height=some_image().height * 7 // 4,
            width=some_image().width * 7 // 4,
            num_inference_steps=5,
            guidance_scale=GUIDANCE,
            latents=start.clone(),
            output_type="latent",
        ).images
    assert len(calls) == 5 * len(boxes) == 45
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
