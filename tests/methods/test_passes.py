"""What all methods share beyond one pass: images finished on the way, later starts, any size."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resmaster_stages import captions as captions_stage
from resmaster_stages import high_res
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import captioner, geometry, load
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights
from resmaster_stages.storage.images import encode_image
from tests.methods.common import DIFFUSION_METHODS, adapted, difference, request, settings, some_image
from tests.tiny_models import counted

SINGLE = ("direct", "multidiffusion", "resmaster", "scalecrafter", "fouriscale", "hidiffusion")


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
@given(width=st.integers(1, 30), height=st.integers(1, 30), scale=st.sampled_from([1.0, 1.3, 2.0, 3.1]))
@examples(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_size_and_shape_is_served(method, width, height, scale):
    """Multiples of the latent factor (4) as the low-res stage makes them, from 1:30 to 30:1."""
    image = some_image(4 * width, 4 * height)
    result = upscale_image(adapted(), image, "a cat", config=settings(method, steps=1, scale=scale))
    assert result.size == (round(4 * width * scale), round(4 * height * scale))


def test_each_finished_image_is_the_next_one_s_low_res_image():
    config = settings("multidiffusion", scale=5, via=[2.0])
    first = upscale_image(adapted(), some_image(24, 16), "a cat", config=settings("multidiffusion", scale=2))
    seen = []

    def caption(image, height, width):
        seen.append((image.tobytes(), height, width))
        return ["a dog"] * 99

    result = upscale_image(adapted(), some_image(24, 16), "a cat", config=config, caption=caption)
    assert result.size == (120, 80)
    assert seen == []  # this method reads no captions
    again = settings("resmaster", scale=5, via=[2.0], image_prompt={"enabled": False})
    with pytest.raises(ConfigError, match="99 given"):
        upscale_image(adapted(), some_image(24, 16), "a cat", config=again, caption=caption)
    plain = settings("resmaster", scale=2, image_prompt={"enabled": False})
    expected = upscale_image(adapted(), some_image(24, 16), "a cat", config=plain)
    assert seen == [(expected.tobytes(), 80, 120)]
    assert first.size == (48, 32)


def test_the_structure_of_a_later_pass_comes_from_the_image_before():
    """With a cutoff far beyond Nyquist all of x0 is the reference: the second pass returns the enlarged first
    image."""
    all_of_it = {"structure": {"cutoff": 1000.0}, "image_prompt": {"enabled": False}}
    first = upscale_image(adapted(), some_image(), "a", config=settings("resmaster", scale=2, **all_of_it))
    second = upscale_image(adapted(), first, "a", config=settings("resmaster", scale=1.5, **all_of_it))
    both = upscale_image(adapted(), some_image(), "a", config=settings("resmaster", scale=3, via=[2], **all_of_it))
    assert difference(both, second) <= 1


def test_a_dataset_captions_every_pass_anew(monkeypatch):
    looked_at = []

    class Names:
        name, revision = "names", ""

        def caption(self, images):
            looked_at.append([image.size for image in images])
            return ["a cat"] * len(images)

    monkeypatch.setattr(load, "load_models", lambda config: adapted())
    for module in (captions_stage, captioner):
        monkeypatch.setattr(module, "load_captioner", lambda config, device: Names())
        monkeypatch.setattr(module, "token_counter", lambda model: lambda text: len(text.split()))
    for module in (captions_stage, geometry):
        monkeypatch.setattr(module, "geometry_of", lambda model: Geometry(64, 4))
    values = {"method": "resmaster", "steps": 1, "scale": 4, "via": [2], "image_prompt": {"enabled": False}}
    config = parse_config({"name": "d", "upscale": values, "image_format": "png"})
    low_res = EncodedImage(encode_image(some_image(), "png"), "png", {})
    sample = Sample("k", 0, "a cat", "", 64, 64, 0, low_res=low_res)
    (rows,) = captions_stage.process(config, [sample])
    assert len(rows.rows) == 9  # the views of the first pass
    (output,) = high_res.process(
        config, [Sample("k", 0, "a cat", "", 64, 64, 0, low_res=low_res, captions=tuple(rows.rows))]
    )
    output = output.finished()
    assert output.error is None
    assert json.loads(output.files["json"])["width"] == 256
    assert sum(map(len, looked_at)) == 9 + 49


def test_images_on_the_way_are_identity():
    assert ResMaster(via=(2.0,)).identity()["via"] == (2.0,)

    def hashed(stage, **values):
        return hashes_of(parse_config({"name": "d", "upscale": values}), Weights("m", "c"))[stage]

    assert hashed("high_res") != hashed("high_res", via=[2])
    assert hashed("captions", via=[2]) == hashed("captions", scale=2)
    assert hashed("captions", via=[2]) != hashed("captions")


@pytest.mark.parametrize(
    "values", [{"via": [4.0]}, {"via": [1.0]}, {"via": [3.0, 2.0]}, {"method": "super_resolution", "via": [2.0]}]
)
def test_ways_that_do_not_rise_are_refused(values):
    with pytest.raises(ValueError, match="via"):
        Method.model_validate({"scale": 4, **values})


@pytest.mark.parametrize("method", SINGLE)
def test_a_later_start_leaves_out_steps_and_keeps_closer_to_the_image(method):
    models, image = adapted(), some_image()
    asked = request(models, settings(method), image)
    held = to_image(autoencoder.decode(models, asked.required_reference().latents)[0])  # what the VAE makes of it

    def make(start):
        with counted(models.base.denoiser) as shapes:
            config = settings(method, steps=10, guidance_scale=1, init="noised_lr", start=start)
            result = upscale_image(models, image, "a cat", config=config)
        return np.abs(np.asarray(result, dtype=float) - np.asarray(held)).mean(), len(shapes)

    (whole, calls), (late, few) = make(0.0), make(0.9)
    assert few == calls / 10
    assert late < 0.8 * whole


@pytest.mark.parametrize(
    ("values", "advice"),
    [({"start": 0.5, "init": "noise"}, "noised_lr"), ({"start": 0.5, "method": "direct"}, "noised_lr")],
)
def test_a_start_that_would_not_be_read_is_refused(values, advice):
    with pytest.raises(ValueError, match=advice):
        Method.model_validate(values)
