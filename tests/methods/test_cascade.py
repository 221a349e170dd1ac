"""Cascades: the authors' tables of steps, sizes and guidance, what is handed over, and what a size begins with."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.guidance import ByBand, ClassifierFree
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.neighbourhood import neighbourhood
from resmaster_stages.diffusion.steppers import STEPPERS, make_stepper
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.diffusion.wavelets import Bands, inverse, low_band, transform
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.cascade import Cascade, held_by, swapped_in_pixels
from resmaster_stages.methods.render import render
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import even_course
from tests.methods.common import adapted, calls_of, difference, plain, request, schedule, settings, some_image
from tests.tiny_models import SCHEDULER
from tests.tiny_transformers import make_flux

PRESETS = tuple(Cascade.presets)
AUTHORS = tuple(name for name in PRESETS if name != "default")
FIFTY = even_course(50)
SDXL = Geometry(1024, 8)


def cascade(**values) -> Cascade:
    made = settings("cascade", **values)
    assert isinstance(made, Cascade)
    return made


def of(preset, scale, **values):
    return cascade(preset=preset, scale=scale, steps=50, **values)


def edges(config, height=128, width=128):
    """Sizes in px of each canvas, on the way to `height` x `width` latents of SDXL."""
    return [(8 * rows, 8 * cols) for rows, cols in config.canvases(height, width, 1)]


def guidance(config):
    return [round(phase.guidance, 1) for phase in config.phases_of()]


# ---------------------------------------------------------------------------------------------- the authors' tables


def test_rectifiedhr_at_2048_px():
    config = of("rectifiedhr", 2)
    assert edges(config, 256, 256) == [(1024, 1024), (2048, 2048)]
    assert [list(part) for part in config.parts(FIFTY)] == [list(range(30)), list(range(30, 50))]
    assert guidance(config) == [5, 30]


def test_rectifiedhr_at_4096_px():
    """Steps and guidance rise by v(x) = lo + (hi - lo) x^0.5, sizes evenly."""
    config = of("rectifiedhr", 4)
    assert edges(config, 512, 512) == [(1024, 1024), (2560, 2560), (4096, 4096)]
    assert [part.stop for part in config.parts(FIFTY)] == [40, 47, 50]
    assert guidance(config) == [5, 36.8, 50]


def test_rectifiedhr_at_2048_x_4096_px():
    """Three sizes from 768 x 1536 px, and all exponents 1."""
    config = of("rectifiedhr", 8 / 3, leave=0.8, exponent=1, guidance_last=50, guidance_exponent=1)
    assert edges(config, 256, 512) == [(768, 1536), (1408, 2816), (2048, 4096)]
    assert [part.stop for part in config.parts(FIFTY)] == [40, 45, 50]
    assert guidance(config) == [5, 27.5, 50]


def first_with_ratio(t, ratio):
    """FreCaS: the smallest t' with abar_t' <= r abar_t / (1 + (r - 1) abar_t), by diffusers' products."""
    products = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod.double()
    target = ratio * products[t] / (1 + (ratio - 1) * products[t])
    return int((products <= target).nonzero()[0])


def test_frecas_at_2048_px():
    first, last = of("frecas", 2).timesteps()
    assert (first[0], first[-1], len(first)) == (999, 200, 40)
    assert (last[0], last[-1], len(last)) == (343, 0, 10)
    assert last[0] == first_with_ratio(200, 0.5**1.5)
    assert last == tuple(torch.linspace(343, 0, 10).int().tolist())


def test_frecas_at_4096_px():
    config = of("frecas", 4)
    first, middle, last = config.timesteps()
    assert edges(config, 512, 512) == [(1024, 1024), (2048, 2048), (4096, 4096)]
    assert (first[0], first[-1], len(first)) == (999, 400, 30)
    assert (middle[0], middle[-1], len(middle)) == (606, 200, 5)
    assert (last[0], last[-1], len(last)) == (395, 0, 15)
    assert (middle[0], last[0]) == (first_with_ratio(400, 0.25), first_with_ratio(200, 0.25))
    assert guidance(config) == [7.5, 35, 35]
    assert config.guidance_low == 7.5


def test_diffusehigh_finishes_every_size():
    config = of("diffusehigh", 4)
    assert edges(config, 512, 512) == [(k * 1024, k * 1024) for k in (1, 2, 3, 4)]
    assert [len(part) for part in config.parts(FIFTY)] == [50, 15, 15, 15]
    assert schedule()[config.parts(FIFTY)[1].start].t == 281
    assert guidance(config) == [5, 10, 10, 10]
    assert len(edges(of("diffusehigh", 2), 256, 256)) == 2


def test_megafusion_at_2048_px():
    config = of("megafusion", 2)
    assert [len(part) for part in config.parts(FIFTY)] == [40, 10]
    assert guidance(config) == [7, 7]


WHOLE = {1: 1, 4: 5.3, 6.25: 9.9, 9: 16.9, 16: 42.6}
"""Area of a canvas -> evaluations of a native-size view that cost as much on SDXL, attention included."""


@pytest.mark.parametrize(
    ("preset", "rows", "areas", "weighted"),
    [
        ("rectifiedhr", [80, 14, 6], [1, 6.25, 16], 474),
        ("frecas", [60, 10, 30], [1, 4, 16], 1390),
        ("diffusehigh", [100, 30, 30, 30], [1, 4, 9, 16], 2040),
    ],
)
def test_rows_at_4096_px(preset, rows, areas, weighted):
    work = list(of(preset, 4).work(view_grid(SDXL, 4096, 4096, 0.5), FIFTY))
    assert [each.rows for each in work] == rows
    assert [each.area for each in work] == areas
    assert sum(each.rows * WHOLE[each.area] for each in work) == pytest.approx(weighted, rel=0.003)


def test_the_low_res_image_saves_the_first_size():
    grid = view_grid(SDXL, 4096, 4096, 0.5)
    drawn = list(of("rectifiedhr", 4).work(grid, FIFTY))
    given = list(of("rectifiedhr", 4, first="low_res").work(grid, FIFTY))
    assert given == drawn[1:]
    assert [(each.rows, each.area) for each in of("default", 4).work(grid, FIFTY)] == [(30, 6.25), (30, 16)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 2.5, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_scale_has_a_plan(preset, scale, steps):
    config = cascade(preset=preset, scale=scale, steps=steps)
    lengths = config.lengths(even_course(steps))
    assert lengths[-1] >= 1
    assert sum(lengths) >= 1
    for visited in config.timesteps():
        assert all(a > b for a, b in pairwise(visited))
        assert all(0 <= t <= 999 for t in visited)
    assert config.phases_of()[-1].ends == 1
    assert config.phases_of()[-1].scale == scale


# ---------------------------------------------------------------------------------------------------- the hand-over


@pytest.mark.parametrize("stepper", [*STEPPERS, "dpmpp_2m"])
def test_a_size_that_is_left_hands_over_x0(stepper):
    config = cascade(preset="rectifiedhr", scale=2, steps=10)
    first, last = config.passes(request(plain(), config))
    step = first.path[-1]
    z, x0, noise = torch.randn(3, 1, 4, 8, 8)
    torch.testing.assert_close(
        make_stepper(stepper)(z, x0, (z - step.alpha * x0) / step.sigma, step, lambda: noise), x0
    )
    assert len(first.path) + len(last.path) == 10
    assert [each.t for each in (*first.path, *last.path)] == [each.t for each in schedule(10)]
    assert first.path[:-1] == schedule(10)[: len(first.path) - 1]


def test_equal_sizes_that_are_noised_by_their_own_noise_are_direct_inference():
    """With the true z in place of new noise, a path in two parts is the path in one."""
    models = plain()
    config = cascade(first="noise", restart=None, leave=0.6, scale=1.01, steps=10)
    asked = replace(request(models, config), height=64, width=64)
    first, last = config.passes(asked)
    assert [(each.height, each.width) for each in (first, last)] == [(16, 16), (16, 16)]
    draw = CanvasNoise([3], 4, 16, 16, models.device)
    z, composition = first.begin(None, draw, first.path[0])
    cut = len(first.path)
    run = partial(denoise, models, composition, noise=draw, view_batch=1)
    x0, whole, half = run(first.path, z), run(asked.path, z), run(asked.path[:cut], z)
    step = asked.path[cut]
    eps = (half - step.alpha * x0) / step.sigma
    torch.testing.assert_close(last.path[0].noised(x0, eps), half)
    before = asked.path[cut - 1]
    torch.testing.assert_close(before.alpha_next * x0 + before.sigma_next * eps, half)
    assert torch.equal(denoise(models, composition, last.path, half, draw, view_batch=1), whole)


def make(image=None, seed=0, **values):
    return upscale_image(
        adapted(), image or some_image(), "a cat", config=settings(**{"method": "cascade", **values}), seed=seed
    )


def test_one_size_is_direct_inference():
    own = {"steps": 4, "scale": 1}
    assert make(first="noise", **own).tobytes() == make(method="direct", **own).tobytes()
    assert make(preset="megafusion", guidance_scale=5, **own).tobytes() == (
        make(method="direct", guidance_scale=5, **own).tobytes()
    )
    later = {"init": "noised_lr", "start": 0.5}
    assert make(restart=0.5, **own).tobytes() == make(method="direct", **later, **own).tobytes()


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"steps": 10}, [(2, 4, 32, 32)] * 3),
        ({"steps": 10, "scale": 3}, [(2, 4, 32, 32)] * 3 + [(2, 4, 48, 48)] * 3),
        ({"steps": 10, "preset": "rectifiedhr"}, [(2, 4, 16, 16)] * 6 + [(2, 4, 32, 32)] * 4),
        ({"steps": 10, "preset": "frecas"}, [(2, 4, 16, 16)] * 8 + [(2, 4, 32, 32)] * 2),
        ({"steps": 1, "preset": "rectifiedhr"}, [(2, 4, 32, 32)]),
        ({"steps": 10, "guidance_scale": 1.0, "guidance_last": 9.0, "scale": 3, "guidance_exponent": 1},
         [(2, 4, 32, 32)] * 3 + [(2, 4, 48, 48)] * 3),
        ({"steps": 10, "first": "noise", "guidance_scale": 1.0, "guidance_last": 9.0},
         [(1, 4, 16, 16)] * 10 + [(2, 4, 32, 32)] * 3),
    ],
    ids=str,
)  # fmt: skip
def test_unet_calls(values, shapes):
    assert calls_of("cascade", **values) == shapes


@pytest.mark.parametrize("preset", AUTHORS)
def test_the_authors_first_size_is_drawn_and_the_low_res_image_is_not_read(preset):
    assert not cascade(preset=preset).uses("reference")
    assert cascade(preset=preset, first="low_res").uses("reference")
    images = [make(some_image(seed=seed), preset=preset, steps=4) for seed in (1, 2)]
    assert images[0].tobytes() == images[1].tobytes()
    assert difference(*(make(preset=preset, steps=4, seed=seed) for seed in (1, 2))) > 0


def test_the_default_follows_the_low_res_image():
    assert cascade().uses("reference")
    assert make(seed=1).tobytes() == make(seed=1).tobytes()
    assert (
        difference(make(some_image(seed=1), restart=0.9, steps=10), make(some_image(seed=2), restart=0.9, steps=10))
        > 10
    )


ON = {"restart": None, "leave": 0.5}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"first": "noise"}),
        ({}, {"phases": "last"}),
        ({}, {"phases": "doubling"}),
        ({}, {"phases": "every"}),
        ({}, {"leave": 0.75}),
        ({"leave": 0.75}, {"exponent": 0.2}),
        ({}, {"restart": 0.4}),
        ({}, ON),
        (ON, {"gamma": 1.5}),
        ({}, {"middle": 0.2}),
        ({}, {"guidance_last": 20.0}),
        ({"guidance_last": 20.0}, {"guidance_exponent": 0.0}),
        ({}, {"guidance_low": 2.0}),
        ({"guidance_low": 2.0}, {"bands": "sizes"}),
        ({}, {"enlarge": "nearest"}),
        ({}, {"sharpen": 1.0}),
        ({}, {"swap": "latents"}),
        ({}, {"swap": "pixels"}),
        ({"swap": "pixels"}, {"swap_until": 1.0}),
        ({}, {"neighbourhood": False}),
        ({}, {"micro_conditioning": "native"}),
    ],
    ids=str,
)
def test_every_knob_has_an_effect(base, change):
    base = {"steps": 10, "scale": 4, **base}
    assert np.abs(np.asarray(make(**base)).astype(int) - np.asarray(make(**{**base, **change}))).sum() > 0


def test_attention_is_limited_on_large_canvases_alone():
    def limited(models, height, width, **values):
        config = cascade(scale=4, steps=10, **values)
        *_, last = config.passes(replace(request(models, config), height=height, width=width))
        _, composition = last.begin(
            torch.zeros(1, models.base.latent_channels, 8, 8),
            CanvasNoise([0], 4, last.height, last.width, models.device),
            last.path[0],
        )
        return any(getattr(patch, "func", None) is neighbourhood for patch in composition.patches)

    assert limited(plain(), 160, 160)
    assert not limited(plain(), 160, 156)
    assert not limited(plain(), 256, 256, neighbourhood=False)
    assert limited(plain(), 128, 128, neighbourhood=True)


def test_permuting_samples_permutes_images():
    models = plain()
    config = cascade(preset="diffusehigh", scale=2, steps=4, first="low_res", guidance_low=2.0)
    one, other = (request(models, config, some_image(seed=seed), prompt=text) for seed, text in ((1, "a"), (2, "b")))

    def both(first, second, seeds):
        pixels, low = (
            torch.cat([getattr(each.reference, name) for each in (first, second)]) for name in ("pixels", "low_res")
        )
        prompts = first.prompts + second.prompts
        reference = replace(first.reference, pixels=pixels, low_res=low)
        return render(replace(first, prompts=prompts, negative_prompts=("", ""), reference=reference), seeds)

    ab, ba = both(one, other, [5, 6]), both(other, one, [6, 5])
    assert difference(ab[0], ba[1]) <= 1
    assert difference(ab[1], ba[0]) <= 1
    assert difference(ab[0], ab[1]) > 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"restart": None}, "set restart, such as 0.7"),
        ({"leave": 0.5}, r"restart \(0.7\) must be less than leave \(0.5\)"),
        ({"gamma": 1.0}, "gamma is set, but is read only with restart: null"),
        ({"leave": [0.5, 1.5]}, "less than or equal to 1"),
        ({"guidance_last": 0.5}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        cascade(**values)


# ------------------------------------------------------------------------------------------------- bands and swaps


class Text:
    """A family's rule that is not plain guidance: it keeps the norm of the text's prediction."""

    @staticmethod
    def guide(unconditional, conditional, scale):
        guided = unconditional + scale * (conditional - unconditional)
        return guided * conditional.norm() / guided.norm()


def test_guidance_by_band_is_each_band_s_guidance_added_up():
    """FreCaS: eps = [u + g_h (c - u)]_high + [u + g_l (c - u)]_low, the low part by the size before."""
    low, u, c = partial(held_by, size=(8, 8)), *torch.randn(2, 3, 4, 16, 16)
    rule, step = ByBand(35.0, low=7.5, split=low), schedule()[0]
    high, weak = u + 35 * (c - u), u + 7.5 * (c - u)
    torch.testing.assert_close(rule.combine((u, c), step), (high - low(high)) + low(weak), atol=1e-4, rtol=1e-5)
    assert torch.equal(held_by(u, (16, 16)), u)


@pytest.mark.parametrize("mix", [ClassifierFree(1).mix, Text.guide])
@pytest.mark.parametrize("wavelet", ["sym4", "db4"])
def test_equal_scales_are_classifier_free_guidance(mix, wavelet):
    u, c = torch.randn(2, 3, 4, 16, 16)
    rule = ByBand(4.0, 1.0, mix, 4.0, partial(low_band, wavelet=wavelet))
    step = schedule()[0]
    assert torch.equal(rule.combine((u, c), step), ClassifierFree(4.0, 1.0, mix).combine((u, c), step))


def test_hiwaves_low_band_is_the_text_alone():
    u, c = torch.randn(2, 1, 4, 16, 16)
    rule = ByBand(7.5, low=1.0, split=partial(low_band, wavelet="sym4"))
    guided = rule.combine((u, c), schedule()[0])
    strong = transform(u + 7.5 * (c - u), "sym4")
    expected = inverse(Bands(transform(c, "sym4").ll, strong.lh, strong.hl, strong.hh, (16, 16)), "sym4")
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_branches_of_guidance_by_band():
    first, late = schedule()[0], schedule()[40]
    assert len(ByBand(1.0, low=1.0).branches(first)) == 1
    assert len(ByBand(1.0, low=2.0).branches(first)) == 2
    assert len(ByBand(2.0, low=1.0).branches(first)) == 2
    assert [len(ByBand(2.0, 0.8, low=1.0).branches(step)) for step in (first, late)] == [2, 1]
    alone = torch.randn(1, 4, 8, 8)
    assert torch.equal(ByBand(2.0, 0.8, low=1.0).combine((alone,), late), alone)


def test_the_low_band_of_the_enlarged_image_takes_the_place_of_x0s(monkeypatch):
    """DiffuseHigh: LL of the image, the other bands of the decoded x0, by an ideal autoencoder."""
    monkeypatch.setattr(autoencoder, "decode", lambda models, latents: 2 * latents)
    monkeypatch.setattr(autoencoder, "encode", lambda models, pixels: pixels / 2)
    x0, image = torch.randn(2, 1, 3, 20, 13)
    own = transform(2 * x0, "db4")
    expected = inverse(Bands(transform(image, "db4").ll, own.lh, own.hl, own.hh, own.size), "db4") / 2
    swapped = swapped_in_pixels(plain(), x0, image, partial(low_band, wavelet="db4"))
    torch.testing.assert_close(swapped, expected, atol=1e-5, rtol=1e-5)


def test_five_of_fifteen_steps_are_swapped(monkeypatch):
    swaps = []

    def swapped(models, x0, image, low):
        swaps.append(x0.shape)
        return x0

    monkeypatch.setattr("resmaster_stages.methods.cascade.swapped_in_pixels", swapped)
    make(preset="diffusehigh", scale=2, steps=50)
    assert swaps == [(1, 4, 32, 32)] * 5


# ---------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_draw_cascades(preset):
    models = Models.from_pipeline(make_flux())
    values = {"preset": preset, "scale": 2, "steps": 6, "guidance_scale": 2.0, "guidance_low": None}
    image = upscale_image(models, some_image(), "a cat", config=settings("cascade", **values))
    assert image.size == (128, 128)


def test_models_without_an_unconditional_branch_have_no_bands_and_transformers_no_neighbourhoods():
    models = Models.from_pipeline(make_flux())
    with pytest.raises(ConfigError, match=r"upscale.guidance_low: has no effect on .* set it to null"):
        upscale_image(models, some_image(), "a cat", config=settings("cascade", guidance_scale=2.0, guidance_low=1.0))
    with pytest.raises(ConfigError, match=r"upscale.neighbourhood: needs attention"):
        upscale_image(models, some_image(), "a cat", config=settings("cascade", guidance_scale=2.0, neighbourhood=True))
