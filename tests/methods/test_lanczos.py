"""Plain enlargement: the image and nothing else, without loading any network."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from resmaster_stages import high_res
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.agreement import agreement
from resmaster_stages.models import enlarger, identity, load
from resmaster_stages.models.identity import Weights
from resmaster_stages.storage.images import encode_image
from tests.methods.common import difference, some_image
from tests.methods.common import lanczos as enlarge


def config_of(**values):
    return parse_config({"name": "d", "upscale": {"method": "lanczos", **values}, "image_format": "png"})


def test_the_same_size_and_plain_colour_are_kept():
    assert enlarge(some_image(30, 20), 20, 30).tobytes() == some_image(30, 20).tobytes()
    plain = Image.new("RGB", (5, 4), (17, 200, 90))
    assert enlarge(plain, 37, 51).getcolors() == [(37 * 51, (17, 200, 90))]


def test_a_single_pixel_becomes_the_windowed_sinc():
    """Across the middle of a pixel at an odd factor: sinc(x) sinc(x / 3), x the distance in pixels of the small
    image."""
    small = np.zeros((13, 13, 3), np.uint8)
    small[:, 6] = 200
    row = np.asarray(enlarge(Image.fromarray(small), 13 * 5, 13 * 5))[32, :, 0]
    x = (np.arange(13 * 5) - 32) / 5
    inside = np.abs(x) < 1  # the lobes beyond it are partly negative, and pixels are not
    expected = 200 * np.sinc(x) * np.sinc(x / 3)
    assert np.abs(row[inside] - expected[inside]).max() < 3
    assert row[np.abs(x) > 3].max() == 0


def test_what_is_averaged_down_again_is_the_low_res_image():
    assert agreement(enlarge(some_image(), 256, 256), some_image())[0] > 45


def test_a_dataset_needs_no_network_and_its_identity_names_none(monkeypatch):
    for module, name in ((load, "load_pipeline"), (enlarger, "load_enlarger")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("a network was loaded"))
    low_res = EncodedImage(encode_image(some_image(40, 24), "png"), "png", {})
    sample = Sample("k", 0, "a cat", "", 24, 40, 0, low_res=low_res)
    with counting() as cost:
        (output,) = high_res.process(config_of(scale=2.5), [sample])
    assert cost.calls == 0
    files = output.finished().files
    facts = json.loads(files["json"])
    assert (facts["width"], facts["height"], facts["method"]) == (100, 60, "lanczos")
    assert facts["upscale"] == {"method": "lanczos", "scale": 2.5}
    assert identity.weights_of(config_of()).upscaler is None

    def hashed(**values):
        return hashes_of(config_of(**values), Weights("m"))["high_res"]

    assert hashed(scale=3) != hashed()
    assert difference(enlarge(some_image(40, 24), 60, 100), Image.open(io.BytesIO(files["png"]))) == 0


def test_what_it_does_not_read_is_refused():
    for values in ({"via": (2.0,)}, {"tile": 64}, {"steps": 7}):
        with pytest.raises(ConfigError, match=r"method lanczos knows: method, preset, scale, colour_match$"):
            config_of(**values)
