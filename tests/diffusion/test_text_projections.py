"""Keys and values of the text, once per image."""

from collections import Counter

import pytest
import torch

from resmaster_stages.diffusion import loop
from resmaster_stages.diffusion.guidance import DenoiserCall
from resmaster_stages.diffusion.text import TextEmbeddings
from resmaster_stages.diffusion.text_projections import text_projected_once
from resmaster_stages.methods.upscale import upscale_image
from tests.methods.common import adapted, difference, forwards, settings, some_image

METHODS = ["resmaster", "multidiffusion", "c_upscale", "demofusion", "direct"]
CAPTIONS = ["a cat", "b"] + ["c"] * 7


def draw(method, **values):
    captions = CAPTIONS if method in ("resmaster", "c_upscale") else None
    config = settings(method, **{"steps": 5, "view_batch": 4, **values})
    return upscale_image(adapted(), some_image(), "a cat", config=config, captions=captions, seed=4)


def projected(method, **values):
    """Layer -> how often it projected a text, and how many distinct prompts in all."""
    calls, prompts = Counter(), Counter()
    hooks = []

    def count(name, plain):
        def forward(x):
            calls[name] += 1
            prompts[name] += len(x)
            return plain(x)

        return forward

    for name, module in adapted().base.denoiser.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            hooks.append(module)
            module.forward = count(name, module.forward)
    try:
        draw(method, **values)
    finally:
        for module in hooks:
            del module.forward
    return calls, prompts


@pytest.mark.parametrize("values", [{}, {"shift": "every_step"}, {"guidance_stop": 0.5}], ids=str)
def test_every_distinct_prompt_is_projected_once_per_image_and_layer(values):
    calls, prompts = projected("resmaster", **values)
    assert set(calls.values()) == {2}  # the captions, and the negative prompt; not 5 steps x 3 calls
    assert set(prompts.values()) == {4}  # "a cat", "b", "c" and the negative prompt; not 18 rows a step
    assert forwards(adapted().base.denoiser) == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_image_is_the_same_up_to_rounding(method, monkeypatch):
    once = draw(method)
    monkeypatch.setattr(loop, "text_projected_once", lambda unet, call: loop.ExitStack())
    plain = draw(method)
    assert difference(once, plain) <= 1


def test_prompts_of_one_image_do_not_reach_the_next():
    first = draw("resmaster").tobytes()
    upscale_image(adapted(), some_image(seed=1), "a dog", config=settings("resmaster"), captions=["x"] * 9)
    assert draw("resmaster").tobytes() == first


def test_whatever_is_not_the_batchs_text_is_projected_as_ever():
    unet, call = adapted().base.denoiser, DenoiserCall()
    (layer, *_) = [module for name, module in unet.named_modules() if name.endswith(".attn2.to_k")]
    prompts = torch.randn(3, 77, layer.in_features)
    index = torch.tensor([2, 0, 2])
    other = torch.randn(3, 77, layer.in_features)
    with torch.inference_mode():
        plain = layer(other), layer(prompts)
        with text_projected_once(unet, call):
            call.texts = [(TextEmbeddings(prompts, prompts[:, 0], index), index)]
            call.states = prompts[index]
            torch.testing.assert_close(layer(call.states), plain[1][index])
            torch.testing.assert_close(layer(other), plain[0])
