from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resmaster_stages.diffusion.frequency import box, gaussian_blur
from resmaster_stages.diffusion.irregular_views import (
    InterleavedViews,
    ScatteredViews,
    Shuffled,
    clamped,
    jitter_reach,
    jittered,
    shuffle_order,
)
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.reference_guidance import low_residual, match_moments, noise_gone, skip_residual
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.demofusion import DemoFusion, dilated_input, nearest_captions
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
    [
        {"cosine_scale_1": 1.0},
        {"cosine_scale_2": 3.0},
        {"cosine_scale_3": 9.0},
        {"sigma": 3.0},
        {"jitter": "zeros"},
        {"skip": "low"},
        {"shuffle": "channels"},
        {"shuffle": "positions"},
    ],
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


# ------------------------------------------------------------------------------- shuffled views (AccDiffusion)


def orders(views, size, *seeds):
    return torch.stack([shuffle_order(views, size, torch.Generator().manual_seed(seed), "cpu") for seed in seeds])


@given(st.integers(3, 20), st.integers(3, 20), st.integers(1, 4), st.sampled_from([1, 3]))
@examples(max_examples=25, deadline=None)
def test_cut_then_fuse_with_shuffle_is_the_identity(height, width, factor, channels):
    plain, canvas = InterleavedViews(height, width, factor), torch.randn(2, 3, height, width)
    size = (-(-height // factor), -(-width // factor))
    views = Shuffled(plain, orders(factor**2, (channels, *size), 1, 2))
    cut = views.cut(canvas)
    assert torch.equal(views.fuse(cut), canvas)
    straight = plain.cut(canvas)
    assert cut.shape == straight.shape
    for sample in (slice(0, factor**2), slice(factor**2, None)):  # at each cell the same values, none of a neighbour's
        assert torch.equal(cut[sample].sort(0).values, straight[sample].sort(0).values)
    if factor == 1:
        assert torch.equal(cut, straight)


def test_a_prediction_goes_back_to_where_its_cell_came_from():
    plain, canvas = InterleavedViews(8, 12, 2), torch.randn(1, 4, 8, 12)
    order = orders(4, (4, 4, 6), 3)
    views = Shuffled(plain, order)
    straight, cut = plain.cut(canvas), views.cut(canvas)
    for view, channel, row, col in ((0, 0, 0, 0), (3, 2, 1, 5), (2, 3, 3, 0)):
        assert cut[view, channel, row, col] == straight[order[0, view, channel, row, col], channel, row, col]
    torch.testing.assert_close(views.fuse(cut**2 + 1), canvas**2 + 1)
    assert (views.fuse(cut + torch.arange(4.0).view(4, 1, 1, 1)) - canvas).std() > 0.5


def test_every_position_and_channel_has_an_order_of_its_own_or_channels_share_one():
    order = orders(9, (4, 8, 8), 1)[0]
    assert torch.equal(order.sort(0).values, torch.arange(9).view(9, 1, 1, 1).expand(9, 4, 8, 8))
    assert len({tuple(each.tolist()) for each in order.flatten(1).T}) > 200
    plain, canvas = InterleavedViews(24, 24, 3), torch.arange(2.0).view(1, 2, 1, 1) * 1000 + torch.randn(1, 1, 24, 24)
    together = Shuffled(plain, orders(9, (1, 8, 8), 1)).cut(canvas)
    torch.testing.assert_close(together[:, 1] - together[:, 0], torch.full((9, 8, 8), 1000.0))
    apart = Shuffled(plain, orders(9, (2, 8, 8), 1)).cut(canvas)
    assert (apart[:, 1] - apart[:, 0]).std() > 0.5


def test_shuffling_is_drawn_anew_at_every_step_and_changes_nothing_where_there_is_one_view():
    ours, config = adapted(), settings("demofusion", steps=3, shuffle="channels", **STILL)
    asked = request(ours, config)
    (only,) = config.passes(asked)
    noise = CanvasNoise([5], 4, 32, 32, ours.device)
    _, composition = only.begin(None, noise, schedule(3)[0])
    canvas = torch.randn(1, 4, 32, 32)
    first, second = (composition.groups[1].at(step)[0].cut(canvas) for step in schedule(3)[:2])
    assert not torch.equal(first, second)
    one = {"scale": 1, "refine": True, "steps": 3}
    assert make(**one).tobytes() == make(**one, shuffle="channels").tobytes()


# ------------------------------------------------------------------------------------ low frequencies (FAM Diffusion)


def test_a_box_keeps_the_waves_within_it_and_drops_the_others():
    place = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    wave = {k: torch.cos(torch.pi * k * place) for k in (0, 3, 7, 8, 20)}

    def of(down, across):
        return (wave[down][:, None] * wave[across])[None, None]

    for down, across in ((0, 0), (3, 7), (7, 0)):
        torch.testing.assert_close(box(of(down, across), 0.25), of(down, across))
    for down, across in ((8, 0), (3, 20), (20, 20)):
        assert box(of(down, across), 0.25).abs().max() < 1e-9
    x = torch.randn(2, 3, 20, 32)
    torch.testing.assert_close(box(x, 1.0), x)
    torch.testing.assert_close(box(box(x, 0.3), 0.3), box(x, 0.3))
    torch.testing.assert_close(box(x, 0.0), x.mean((2, 3), keepdim=True).expand_as(x))


def test_with_all_frequencies_it_is_the_skip_residual():
    x0, noise, z = torch.randn(3, 1, 4, 16, 16)
    everything = low_residual(x0, noise, cutoff=float("inf"), weight=lambda step: step.cosine**3)
    for step in schedule()[::7]:
        assert torch.equal(everything(z, step), skip_residual(x0, noise, 3.0)(z, step))


def test_the_band_and_the_weight_grow_as_noise_goes():
    x0, noise, z = torch.randn(3, 1, 4, 16, 16)
    for step in schedule()[::9]:
        gone = 1 - step.t / 1000
        assert noise_gone(step) == pytest.approx(gone)
        pulled = low_residual(x0, noise)(z, step)
        torch.testing.assert_close(pulled, z + gone * box(step.noised(x0, noise) - z, 0.5 * gone), atol=1e-5, rtol=0)
        assert box(pulled - z, 0.5 * gone).allclose(pulled - z, atol=1e-5)


# ----------------------------------------------------------------------------------------- captions of local views


def test_a_window_has_the_caption_of_the_nearest_view_of_the_final_image():
    final = Grid(64, 48, 16, 8)
    assert nearest_captions(final, [[box_[:2] for box_ in final.boxes]] * 2, final) == list(range(2 * len(final)))
    phase = Grid(32, 24, 16, 8)
    windows = [(0, 0), (8, 4), (16, 8)]
    centres = [((y + 8) / 32, (x + 8) / 24) for y, x in windows]

    def nearest(centre):
        places = [((y + 8) / 64, (x + 8) / 48) for y, x, _, _ in final.boxes]
        return min(range(len(places)), key=lambda i: sum(abs(a - b) for a, b in zip(places[i], centre)))

    assert nearest_captions(phase, [windows], final) == [nearest(each) for each in centres]
    beyond = nearest_captions(final, [[(-2, -2), (50, 34)]], final)
    assert beyond == [0, len(final) - 1], "windows beyond the border have a caption too"


def captioned(**values):
    texts = [chr(97 + number) * 3 for number in range(9)]
    config = settings("demofusion", text_prompt={"enabled": True}, **values)
    return upscale_image(adapted(), some_image(), "a cat", config=config, captions=texts, seed=3)


def test_captions_are_read_where_they_are_switched_on():
    assert not settings("demofusion").uses("captions")
    assert settings("demofusion", preset="accdiffusion").uses("captions")
    prompts = upscale_image(
        adapted(),
        some_image(),
        "a cat",
        config=settings("demofusion", text_prompt={"enabled": True}),
        captions=["a cat"] * 9,
        seed=3,
    )
    assert difference(prompts, make()) <= 1
    assert difference(captioned(), prompts) > 0
    assert difference(captioned(jitter="off", phases="last"), captioned(phases="last")) > 0
    assert captioned(scale=2, micro_conditioning="native").size == (128, 128)


# ------------------------------------------------------------------------------------------------------------ settings


def test_what_older_datasets_do_not_have_stays_out_of_their_identity():
    values = {"skip": "all", "shuffle": "none", "text_prompt": {"enabled": False}}
    assert settings("demofusion", **values).identity() == settings("demofusion").identity()
    assert not settings("demofusion").identity().keys() & values.keys()
    assert make(**values).tobytes() == make().tobytes()
    assert {"skip", "shuffle"} <= settings("demofusion", skip="low", shuffle="channels").identity().keys()


def test_the_preset_of_accdiffusion_is_the_authors_with_shuffled_views_and_captions():
    ours, authors = (DemoFusion(preset=preset) for preset in ("accdiffusion", "faithful"))
    assert (ours.shuffle, ours.text_prompt.enabled) == ("channels", True)
    assert authors.model_copy(update={"shuffle": "channels", "text_prompt": ours.text_prompt}) == ours.model_copy(
        update={"preset": "faithful"}
    )
