"""What holds for all methods."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from resmaster_stages.config.method import methods
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.render import render
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.parts import Models
from tests.checkout import ROOT
from tests.methods.common import DIFFUSION_METHODS, adapted, difference, forwards, request, settings, some_image
from tests.tiny_models import make_adapted_pipeline

CASES = [(method, preset) for method in DIFFUSION_METHODS for preset in methods()[method].presets]


def make(method, preset, **values):
    return upscale_image(
        adapted(), some_image(40, 56), "a cat", config=settings(method, preset=preset, **values), seed=2
    )


def test_methods_do_not_depend_on_what_ran_before():
    first = {case: make(*case).tobytes() for case in CASES}
    again = {case: make(*case).tobytes() for case in reversed(CASES)}
    assert first == again
    assert forwards(adapted().base.denoiser) == {}
    assert len(set(first.values())) >= len(CASES) - 1  # the two presets of c_upscale are one


def test_a_method_draws_the_same_bytes_after_others_and_in_a_process_of_its_own():
    code = (
        "import hashlib; from tests.methods.test_together import make; "
        "print(hashlib.sha256(make('freescale', 'faithful').tobytes()).hexdigest())"
    )
    alone = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for case in CASES:
        if case[0] != "freescale":
            make(*case)
    assert hashlib.sha256(make("freescale", "faithful").tobytes()).hexdigest() == alone.stdout.strip()


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
def test_methods_that_follow_a_image_say_so_where_there_is_none(method):
    asked = request(adapted(), settings(method))
    object.__setattr__(asked, "reference", None)
    if not asked.config.uses("reference"):
        assert len(asked.config.passes(asked)) == 1
        return
    with pytest.raises(ConfigError, match=f"method {method} follows a low-res image"):
        [stage.begin(None, None, None) for stage in asked.config.passes(asked)]


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(method):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_image(adapted(), some_image(), "a", config=settings(method), progress=interrupt)
    assert forwards(adapted().base.denoiser) == {}


@pytest.mark.parametrize(("method", "preset"), CASES)
def test_a_image_does_not_depend_on_its_neighbours_in_the_batch(method, preset):
    config = settings(method, preset=preset, view_batch=7)
    alone = [
        request(adapted(), config, some_image(seed=seed), prompt) for seed, prompt in ((1, "a cat"), (2, "the sky"))
    ]
    first, second = (each.reference for each in alone)
    both = replace(
        alone[0],
        prompts=("a cat", "the sky"),
        negative_prompts=alone[0].negative_prompts * 2,
        reference=replace(
            first,
            pixels=torch.cat([first.pixels, second.pixels]),
            low_res=torch.cat([first.low_res, second.low_res]),
        ),
    )
    together = render(both, [5, 6])
    for image_together, asked, seed in zip(together, alone, (5, 6)):
        (expected,) = render(asked, [seed])
        assert difference(image_together, expected) <= 1
    assert difference(*together) > 0


@pytest.mark.parametrize(("method", "preset"), CASES)
def test_images_are_seen_to_differ_with_the_seed(method, preset):
    a, b = (
        np.asarray(upscale_image(adapted(), some_image(), "a", config=settings(method, preset=preset), seed=s)).astype(
            int
        )
        for s in (0, 1)
    )
    assert np.abs(a - b).sum() > 0


def with_unit_latents():
    """A pipeline whose latents have a standard deviation of about 1, as a trained VAE's have: 0.02 as it is made, so
    that rounding would show in methods that end near the encoded image."""
    pipe = make_adapted_pipeline()
    pipe.vae.register_to_config(scaling_factor=pipe.vae.config.scaling_factor / 0.02)
    return pipe


@pytest.fixture(scope="module")
def full():
    return Models.from_pipeline(with_unit_latents())


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16])
def half(request):
    pipe = with_unit_latents()
    pipe.to(request.param)
    pipe.unet.to(memory_format=torch.channels_last)
    return Models.from_pipeline(pipe)


@pytest.mark.parametrize(("method", "preset"), CASES)
def test_half_precision_draws_nearly_the_same_image(full, half, method, preset):
    usual = {"guidance_last": 7.5} if method == "cascade" else {}  # 30 would multiply every rounding
    config = settings(method, preset=preset, steps=3, **usual)
    whole = upscale_image(full, some_image(), "a cat", config=config)
    mean = np.abs(
        np.asarray(upscale_image(half, some_image(), "a cat", config=config)) - np.asarray(whole, dtype=float)
    )
    assert 0 < mean.mean() < 5
