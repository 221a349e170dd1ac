from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resmaster_stages.diffusion.frequency import gaussian_blur
from resmaster_stages.diffusion.irregular_views import InterleavedViews, ScatteredViews, clamped, jitter_reach, jittered
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.reference_guidance import match_moments, skip_residual
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.demofusion import dilated_input
from resmaster_stages.methods.passes import phase_scales
from resmaster_stages.methods.upscale import upscale_image
from tests.methods.common import adapted, difference, request, schedule, settings, some_image
from tests.tiny_models import counted

STILL = {"jitter": "off", "start": 0.0}


def make(method="demofusion", seed=3, image=None, **values):
    return upscale_image(adapted(), image or some_image(), "a cat", config=settings(method, **values), seed=seed)


@given(st.integers(3, 40), st.integers(3, 40), st.integers(1, 5))
@examples(max_examples=25)
def test_interleaving_is_a_bijection_of_native_views(height, width, factor):
    views, canvas = InterleavedViews(height, width, factor), torch.randn(2, 3, height, width)
    cut = views.cut(canvas)
    assert cut.shape == (2 * factor**2, 3, -(-height // factor), -(-width // factor))
    assert torch.equal(views.fuse(cut), canvas)
    if height % factor == width % factor == 0:
        assert torch.equal(cut[factor**2 + 1 if factor > 1 else 1], canvas[1, :, ::factor, (1 % factor) :: factor])


@given(st.integers(8, 50), st.integers(8, 50), st.integers(4, 20), st.integers(0, 99), st.booleans())
@examples(max_examples=40)
def test_shifted_windows_cover_the_canvas_and_fuse_to_it(height, width, window, seed, clamp):
    grid = Grid(height, width, window, max(1, window // 2))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    origins = [jittered(grid, generator) for generator in generators]
    reach = jitter_reach(grid)
    for (y, x), (y0, x0, _, _) in zip(origins[0], grid.boxes):
        assert abs(y - y0) <= reach
        assert abs(x - x0) <= reach
    if clamp:
        origins = [clamped(grid, each) for each in origins]
        assert all(0 <= y <= height - grid.window_height for each in origins for y, _ in each)
    views, canvas = ScatteredViews(grid, origins, "uniform"), torch.randn(2, 4, height, width)
    cut = views.cut(canvas)
    assert cut.shape == (2 * len(grid), 4, grid.window_height, grid.window_width)
    torch.testing.assert_close(views.fuse(cut), canvas)


def test_windows_beyond_the_border_see_zeros_and_an_axis_with_one_window_stays():
    grid = Grid(16, 32, 16, 8)
    views = ScatteredViews(grid, [[(0, -2), (0, 8), (0, 18)]], "uniform")
    cut = views.cut(torch.ones(1, 1, 16, 32))
    assert cut[0, 0, :, :2].abs().max() == 0
    assert cut[0, 0, :, 2:].min() == 1
    places = [jittered(grid, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert all(y == 0 for each in places for y, _ in each)
    assert {each[0][1] for each in places} == {-2, -1, 0}
    assert {each[1][1] for each in places} == {6, 7, 8, 9, 10}


def test_the_skip_residual_starts_at_the_noised_reference_and_lets_go():
    steps, x0, noise, z = schedule(), *torch.randn(3, 1, 4, 8, 8)
    pull = skip_residual(x0, noise, 3.0)
    at_start = steps[0].noised(x0, noise)
    assert (pull(z, steps[0]) - at_start).abs().max() < 0.02  # cosine ** 3 is 0.997 at t = 981
    torch.testing.assert_close(pull(z, steps[-1]), z, atol=1e-6, rtol=0)
    weight = 0.626**3
    torch.testing.assert_close(
        pull(z, steps[20]), (1 - weight) * z + weight * steps[20].noised(x0, noise), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(skip_residual(x0, noise, 0.0)(z, steps[7]), steps[7].noised(x0, noise))


def test_the_anchor_restores_mean_and_deviation_of_each_sample():
    like, z = torch.randn(2, 4, 8, 8) * 3 + 1, torch.randn(2, 4, 24, 16)
    anchored = match_moments(z, like)
    torch.testing.assert_close(anchored.mean((1, 2, 3)), like.mean((1, 2, 3)))
    torch.testing.assert_close(anchored.std((1, 2, 3)), like.std((1, 2, 3)))
    assert torch.corrcoef(torch.stack([anchored[0].flatten(), z[0].flatten()]))[0, 1] > 0.9999


def test_the_blur_before_dilated_views_keeps_moments_and_fades():
    z = torch.randn(1, 4, 32, 32)
    blur = dilated_input(4, settings("demofusion"))
    first, last = blur(z, schedule()[0]), blur(z, schedule()[-1])
    torch.testing.assert_close(first.std(), z.std())
    assert (first - z).abs().mean() > 0.3
    torch.testing.assert_close(last, z)
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 1, 9, 9), 2, 1.0)[0, 0, 4, 4], torch.tensor(1.0))
    assert torch.equal(dilated_input(1, settings("demofusion"))(z, schedule()[0]), z)


@pytest.mark.parametrize(
    ("scale", "phases", "refine", "expected"),
    [
        (4.0, "every", False, (2, 3, 4)),
        (4.0, "doubling", False, (2, 4)),
        (8.0, "doubling", True, (1, 2, 4, 8)),
        (4.0, "last", False, (4,)),
        (4.0, "halfway", False, (2.5, 4)),
        (2.5, "halfway", False, (1.75, 2.5)),
        (2.4, "halfway", False, (2.4,)),
        (2.3, "every", False, (2.3,)),
        (2.6, "every", False, (2, 2.6)),
        (1.0, "every", True, (1,)),
    ],
)
def test_phases(scale, phases, refine, expected):
    assert phase_scales(scale, phases, refine) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"start": 0.0}, [(18, 4, 16, 16), (8, 4, 16, 16)] * 2),
        ({"refine": True}, [(2, 4, 16, 16)] * 4 + [(18, 4, 16, 16), (8, 4, 16, 16)] * 2),
        (
            {"scale": 3, "view_batch": 25, "steps": 1},
            [(18, 4, 16, 16), (8, 4, 16, 16), (50, 4, 16, 16), (18, 4, 16, 16)],
        ),
        ({"start": 0.5}, [(18, 4, 16, 16), (8, 4, 16, 16)]),
        ({"guidance_scale": 1, "steps": 1}, [(9, 4, 16, 16), (4, 4, 16, 16)]),
        ({"preset": "faithful"}, [(18, 4, 16, 16), (8, 4, 16, 16)] * 2),
    ],
)
def test_unet_calls(values, expected):
    ours, heard = adapted(), []
    with counted(ours.base.denoiser) as shapes:
        upscale_image(
            ours, some_image(), "a", config=settings("demofusion", **values), progress=lambda *each: heard.append(each)
        )
    assert shapes == expected
    assert heard[-1] == (len(heard), len(heard))


def test_without_dilated_views_it_is_multidiffusion_with_the_skip_residual():
    ours = adapted()
    config = settings("demofusion", steps=3, cosine_scale_2=1e9, **STILL)
    asked = request(ours, config)
    (stage,) = config.passes(asked)
    noise = CanvasNoise([5], 4, 32, 32, ours.device)
    z, composition = stage.begin(None, noise, schedule(3)[0])
    expected = replace(settings("multidiffusion", steps=3).compose(asked), latent_hooks=composition.latent_hooks)
    results = [denoise(ours, c, schedule(3), z, noise, view_batch=16) for c in (composition, expected)]
    torch.testing.assert_close(*results)
    without = replace(expected, latent_hooks=())
    assert (denoise(ours, without, schedule(3), z, noise, view_batch=16) - results[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    "change",
    [{"cosine_scale_1": 1.0}, {"cosine_scale_2": 3.0}, {"cosine_scale_3": 9.0}, {"sigma": 3.0}, {"jitter": "zeros"}],
)
def test_every_knob_has_an_effect(change):
    base = {"start": 0.0}
    assert (
        difference(
            make(steps=3, **base),
            make(steps=3, **base, **change),
        )
        > 0
    )


def test_a_seed_decides_the_image_whatever_the_batch_and_the_reference_is_followed():
    one = make(seed=1, view_batch=4)
    assert one.tobytes() == make(seed=1, view_batch=4).tobytes()
    assert difference(one, make(seed=1, view_batch=16)) <= 1
    assert difference(one, make(seed=2, view_batch=4)) > 0
    held = {"cosine_scale_1": 0.0, "start": 0.0}  # every latent is the noised reference: the last step starts from it
    a, b = (make(**held, image=some_image(seed=s)) for s in (1, 2))
    assert difference(a, b) > 10
