"""Guidance with a scale of its own for low frequencies, on every method that offers it."""

import pytest

from resmaster_stages.config.method import Method, methods
from resmaster_stages.diffusion.guidance import ByBand, ClassifierFree
from resmaster_stages.methods.settings import GuidedByBand, LateGuidance
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Asked, Sampling, require_sampling
from resmaster_stages.models.parts import Models
from tests.methods.common import adapted, difference, plain, settings, some_image
from tests.tiny_models import counted
from tests.tiny_qwen_image import make_qwen_image

BANDED = tuple(name for name, each in methods().items() if issubclass(each, GuidedByBand))
LATE = tuple(name for name, each in methods().items() if issubclass(each, LateGuidance))


def make(method, **values):
    return upscale_image(adapted(), some_image(), "a cat", config=settings(method, steps=3, guidance_scale=4, **values))


def test_most_methods_have_it():
    assert {"direct", "multidiffusion", "resmaster", "demofusion", "freescale", "c_upscale", "cascade"} <= set(BANDED)


@pytest.mark.parametrize("method", BANDED)
def test_equal_scales_are_the_bytes_without_it_and_other_scales_change_the_image(method):
    before = make(method)
    assert make(method, guidance_low=None).tobytes() == before.tobytes()
    assert make(method, guidance_low=4.0).tobytes() == before.tobytes()
    assert difference(make(method, guidance_low=1.0), before) > 0


@pytest.mark.parametrize("method", BANDED)
def test_it_is_identity_only_where_it_is_used(method):
    assert "guidance_low" not in settings(method).identity()
    assert settings(method, guidance_low=1.0).identity()["guidance_low"] == 1.0


@pytest.mark.parametrize("method", LATE)
def test_guidance_ends_as_without_it(method):
    calls = []
    for values in ({}, {"guidance_low": 1.0}):
        models = adapted()
        with counted(models.base.denoiser) as shapes:
            config = settings(method, steps=10, guidance_stop=0.8, **values)
            upscale_image(models, some_image(), "a cat", config=config)
        calls.append(shapes)
    assert calls[0] == calls[1]
    assert len({shape[0] for shape in calls[0]}) > 1


@pytest.mark.parametrize("low", [1.0, 5.0])
def test_without_guidance_there_is_one_branch(low):
    models = plain()
    with counted(models.base.denoiser) as shapes:
        config = settings("direct", guidance_scale=1, guidance_low=low)
        upscale_image(models, some_image(), "a cat", config=config)
    assert {shape[0] for shape in shapes} == {1}
    rule = config.guided_by_band(models, 1.0)
    assert type(rule) is ClassifierFree


def test_the_family_s_own_rule_is_that_of_both_bands():
    """Qwen-Image rescales guided predictions: each band is taken from a rescaled one."""
    models = Models.from_pipeline(make_qwen_image())
    config = settings("direct", guidance_scale=4, guidance_low=1.0)
    rule = config.guided_by_band(models, 4.0)
    assert isinstance(rule, ByBand)
    assert rule.mix == models.base.guide
    own = {"steps": 2, "guidance_scale": 4, "scale": 1}
    image = upscale_image(models, some_image(), "a cat", config=settings("direct", guidance_low=1.0, **own))
    assert difference(image, upscale_image(models, some_image(), "a cat", config=settings("direct", **own))) > 0


@pytest.mark.parametrize(
    ("kind", "values", "refused"),
    [
        ("cfg", {"guidance_low": 1.0, "guidance_last": 9.0}, None),
        ("embedded", {"guidance_low": 1.0}, "guidance_low"),
        ("embedded", {"guidance_last": 9.0}, None),
        ("none", {"guidance_last": 9.0}, "guidance_last"),
        ("none", {}, None),
    ],
)
def test_models_without_an_unconditional_branch_refuse_it(kind, values, refused):
    config = Method.model_validate({"method": "cascade", "guidance_scale": 1.0, **values})
    asked = config.asked()
    assert isinstance(asked, Asked)
    if refused is None:
        require_sampling(Sampling(kind), asked, "m")
        return
    with pytest.raises(Exception, match=f"upscale.{refused}: has no effect on m.* set it to null"):
        require_sampling(Sampling(kind), asked, "m")
