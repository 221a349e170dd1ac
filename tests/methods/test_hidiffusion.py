from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resmaster_stages.config.load import parse_config
from resmaster_stages.diffusion.convolutions import PLAIN, changed_layers
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.guidance import TEXT, DenoiserCall
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.diffusion.resolution_aware import (
    MOVES,
    STRIDED,
    draw_moves,
    pool,
    pooled,
    quartered,
    quarters,
    restore,
    sizes_forwarded,
    whole,
)
from resmaster_stages.diffusion.scale_fusion import attend
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.hidiffusion import LEVELS, Plan, depth_of, make_plan, self_attentions
from resmaster_stages.methods.render import render
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import notes_of
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.methods.common import adapted, difference, forwards, request, schedule, sdxl_shaped, settings, some_image
from tests.tiny_models import make_pipeline, make_stable_diffusion

DOWN = "down_blocks.1.downsamplers.0.conv"


def a_call(index=0):
    return DenoiserCall(schedule()[index], (TEXT,))


def run_unet(unet, height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, height, width, generator=generator)
    return unet(x, torch.tensor(500), torch.randn(2, 3, 8, generator=generator), return_dict=False)[0]


def three_levels() -> Models:
    """A tiny SDXL with the blocks of SDXL, so with self-attention at three levels."""
    pipe = make_pipeline()
    torch.manual_seed(0)
    known = {name: pipe.unet.config[name] for name in ("addition_embed_type", "addition_time_embed_dim")}
    pipe.unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=pipe.unet.config.cross_attention_dim,
        projection_class_embeddings_input_dim=pipe.unet.config.projection_class_embeddings_input_dim,
        norm_num_groups=4,
        use_linear_projection=True,
        **known,
    )
    pipe.unet.eval().requires_grad_(False)
    return Models.from_pipeline(pipe)


# ------------------------------------------------------------------------------------------------------------ layers


@given(st.integers(1, 21), st.integers(1, 21))
@examples(max_examples=25, deadline=None)
def test_a_strided_convolution_takes_every_fourth_output_of_the_dilated_one(height, width):
    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, height, width)
    every = F.conv2d(x, conv.weight, conv.bias, 1, 2, 2)
    torch.testing.assert_close(STRIDED(conv, x), every[:, :, ::4, ::4])
    constant = torch.ones(1, 3, 32, 32)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(STRIDED(conv, constant)[inside], conv(constant)[..., 2:-2:2, 2:-2:2])


@given(st.integers(1, 21), st.integers(1, 21))
@examples(max_examples=25, deadline=None)
def test_constants_survive_pooling_and_restoring(height, width):
    constant = torch.full((1, 2, height, width), 1.7)
    small = pool(constant)
    assert small.shape[2:] == (-(-height // 2), -(-width // 2))
    torch.testing.assert_close(restore(small, (height, width)), constant)


@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(0, MOVES - 1), min_size=2, max_size=2))
@examples(max_examples=25, deadline=None)
def test_quarters_are_put_together_again(height, width, moves):
    size, tokens = (2 * height, 2 * width), torch.randn(2, 4 * height * width, 3)
    parts = quarters(tokens, size, moves)
    assert parts.shape == (8, height * width, 3)
    assert torch.equal(whole(parts, size, moves), tokens)


def test_each_quarter_attends_to_itself_and_rolled_canvases_wrap_around():
    size, x = (16, 24), torch.randn(2, 16 * 24, 8)
    canvas = x.unflatten(1, size).roll((-2 * 3, -3 * 3), (1, 2))  # three eighths of each half side
    expected = torch.empty_like(canvas)
    for rows in (slice(0, 8), slice(8, 16)):
        for cols in (slice(0, 12), slice(12, 24)):
            part = canvas[:, rows, cols].flatten(1, 2)
            expected[:, rows, cols] = attend(part, part, part, 2).unflatten(1, (8, 12))
    expected = expected.roll((2 * 3, 3 * 3), (1, 2)).flatten(1, 2)
    parts = quarters(x, size, [3, 3])
    torch.testing.assert_close(whole(attend(parts, parts, parts, 2), size, [3, 3]), expected)


def test_moves_are_each_sample_s_own_for_every_step_and_layer():
    def moves(*seeds):
        return draw_moves([torch.Generator().manual_seed(seed) for seed in seeds], 50, 10)

    both = moves(1, 2)
    assert both == [*moves(1), *moves(2)]
    assert both[0] != both[1]
    drawn = torch.tensor(both)
    assert drawn.shape == (2, 50, 10)
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}
    assert len({tuple(step) for step in both[0]}) > 40, "layers are drawn apart, and steps too"


# --------------------------------------------------------------------------------------------------- the whole UNet


def sizes_seen(unet, names, height=32, width=32):
    """Heights and widths of what the layers `names` read."""
    seen = {}
    handles = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, tuple(args[0].shape[-2:]))
        )
        for name in names
    ]
    output = run_unet(unet, height, width)
    for handle in handles:
        handle.remove()
    assert output.shape[2:] == (height, width)
    return [seen[name] for name in names]


PLACES = (
    "down_blocks.1.resnets.1",
    "mid_block.resnets.0",
    "up_blocks.1.resnets.1",
    "up_blocks.1.resnets.2",
    "up_blocks.2.resnets.0",
)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 20), (34, 54)])
def test_deep_features_are_those_of_a_smaller_canvas(height, width):
    unet = sdxl_shaped()

    def sides(factor):
        return -(-height // factor), -(-width // factor)

    assert sizes_seen(unet, PLACES, height, width) == [sides(each) for each in (2, 4, 2, 2, 1)]
    rule = {DOWN: lambda index, branch: STRIDED if index < 8 else PLAIN}
    for index, expected in ((7, (2, 8, 2, 2, 1)), (8, (4, 8, 4, 2, 1)), (20, (2, 4, 2, 2, 1))):
        call = a_call(index)
        with (
            sizes_forwarded(unet),
            changed_layers(unet, call, rule),
            pooled(unet, call, 1, range(8, 20)),
        ):
            assert sizes_seen(unet, PLACES, height, width) == [sides(each) for each in expected]


def test_where_nothing_acts_it_is_the_plain_unet_and_failures_leave_no_trace():
    unet = sdxl_shaped()
    base, before = run_unet(unet), unet.num_upsamplers
    names = self_attentions(unet, 1)
    assert len(names) == 5  # ten in SDXL, whose transformers have two blocks here
    rule = {DOWN: lambda index, branch: STRIDED if index < 8 else PLAIN}
    call = a_call(49)
    with sizes_forwarded(unet), changed_layers(unet, call, rule), pooled(unet, call, 1, range(8, 20)):
        assert torch.equal(run_unet(unet), base)
    moves = draw_moves([torch.Generator().manual_seed(0)], 50, len(names))
    with quartered(unet, call, names, (32, 32), moves):
        assert (run_unet(unet) - base).abs().max() > 1e-3
    odd = run_unet(unet, 30, 32)
    with quartered(unet, call, names, (30, 32), moves):
        assert torch.equal(run_unet(unet, 30, 32), odd), "15 rows have no quarters"
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        sizes_forwarded(unet),
        changed_layers(unet, call, rule),
        pooled(unet, call, 1, range(50)),
        quartered(unet, call, names, (32, 32), moves),
    ):
        raise RuntimeError("interrupted")
    assert forwards(unet) == {}
    assert unet.num_upsamplers == before
    assert torch.equal(run_unet(unet), base)


@pytest.mark.slow
def test_the_work_of_sdxl_is_what_the_page_says():
    """In rows of a native view and one branch: by SDXL's rule 3.4 a step at 2x instead of 5.3, and 13.8 at 4x instead
    of 42.6; by Turbo's 3.0 at 2x."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    names = self_attentions(unet, 1)
    assert len(names) == 10
    moves = [[[0] * 10] * 50]

    def flops(side, index, plan):
        call, inputs = a_call(index), (torch.empty(1, 4, side, side), 5, torch.empty(1, 77, 2048))
        x, t, text = (each.to("meta") if isinstance(each, torch.Tensor) else each for each in inputs)
        rule = {DOWN: lambda index, branch: STRIDED if index in plan.strided else PLAIN}
        with torch.no_grad(), sizes_forwarded(unet), FlopCounterMode(display=False) as counter:
            if side == 128:
                unet(x, t, text)
            else:
                with (
                    changed_layers(unet, call, rule),
                    pooled(unet, call, 1, plan.pooled),
                    quartered(unet, call, names, (side, side), moves),
                ):
                    unet(x, t, text)
        return counter.get_total_flops()

    native = flops(128, 0, Plan())
    for preset, scale, at, expected, mean in (
        ("faithful", 2, (0, 8, 20), (1.97, 1.47, 4.55), 3.40),
        ("faithful", 4, (0, 15, 35), (5.20, 7.78, 30.4), 13.8),
        ("default", 2, (0, 10, 25), (1.47, 1.47, 4.55), 3.01),
    ):
        plan = make_plan((scale, scale), 50, settings("hidiffusion", preset=preset))
        rows = [flops(128 * scale, index, plan) / native for index in at]
        assert rows == pytest.approx(expected, rel=0.005)
        lasting = (at[1], at[2] - at[1], 50 - at[2])
        assert sum(count * each for count, each in zip(lasting, rows)) / 50 == pytest.approx(mean, rel=0.005)


# ------------------------------------------------------------------------------------------------------- the method


FAITHFUL = {"preset": "faithful"}


@pytest.mark.parametrize(
    ("scales", "steps", "whose", "expected"),
    [
        ((2, 2), 50, "sdxl", (range(8), range(8, 20))),
        ((2, 4), 50, "sdxl", (range(8), range(8, 20))),
        ((3.9, 9), 20, "sdxl", (range(3), range(3, 8))),
        ((4, 4), 50, "sdxl", (range(15), range(35))),
        ((1, 1), 50, "sdxl", (range(0), range(0))),
        ((2, 2), 4, "sdxl", (range(0), range(1))),
        ((2, 2), 50, "sd1", (range(20), range(0))),
        ((4, 4), 50, "sd2", (range(35), range(15))),
        ((2, 2), 4, "sd1", (range(1), range(0))),
    ],
)
def test_the_authors_durations(scales, steps, whose, expected):
    plan = make_plan(scales, steps, settings("hidiffusion", **FAITHFUL), whose)
    assert (plan.strided, plan.pooled) == expected


@pytest.mark.parametrize("scales", [(2, 2), (4, 4)])
def test_the_default_takes_the_rule_of_sdxl_turbo_for_models_like_sdxl(scales):
    own = settings("hidiffusion")
    assert make_plan(scales, 50, own) == Plan(range(0), range(25))
    assert make_plan(scales, 1, own) == Plan(range(0), range(0))
    for whose in ("sd1", "sd2"):
        assert make_plan(scales, 50, own, whose) == make_plan(scales, 50, settings("hidiffusion", **FAITHFUL), whose)


def test_durations_can_be_set():
    own = settings("hidiffusion", strided_until=0.3, pooled_until=0.6)
    assert make_plan((2, 2), 20, own) == Plan(range(6), range(6, 12))
    assert make_plan((4, 4), 20, own) == Plan(range(6), range(12))
    assert not make_plan((2, 2), 20, settings("hidiffusion", strided_until=0.5, pooled_until=0.5)).pooled


@pytest.mark.parametrize("preset", ["default", "faithful"])
@pytest.mark.parametrize("models", [adapted, three_levels], ids=["two levels", "three levels"])
def test_at_the_native_size_it_is_direct(preset, models):
    config = settings("hidiffusion", preset=preset, scale=1, steps=3)
    ours = models()
    made = upscale_image(ours, some_image(), "a cat", config=config, seed=4)
    direct = settings("direct", scale=1, steps=3, stepper=config.stepper)
    assert made.tobytes() == upscale_image(ours, some_image(), "a cat", config=direct, seed=4).tobytes()
    larger = settings("hidiffusion", preset=preset, scale=2, steps=3)
    direct = settings("direct", scale=2, steps=3, stepper=config.stepper)
    assert difference(*(upscale_image(ours, some_image(), "a cat", config=each) for each in (larger, direct))) > 0


@pytest.mark.parametrize(
    "change", [{"windows": False}, {"rule": "sdxl"}, {"strided_until": 0.5}, {"pooled_until": 1.0}]
)
def test_every_knob_has_an_effect(change):
    ours, base = three_levels(), {"scale": 2, "steps": 10}
    plain, changed = (
        upscale_image(ours, some_image(), "a cat", config=settings("hidiffusion", **base, **each))
        for each in ({}, change)
    )
    assert difference(plain, changed) > 0


def test_samples_roll_by_their_own_draws_whatever_the_batch():
    ours, config = three_levels(), settings("hidiffusion", steps=3, view_batch=7)
    one, two = (request(ours, config, some_image(seed=seed)) for seed in (1, 2))
    both = replace(
        one,
        prompts=one.prompts * 2,
        negative_prompts=one.negative_prompts * 2,
        reference=replace(
            one.reference,
            pixels=torch.cat([one.reference.pixels, two.reference.pixels]),
            low_res=torch.cat([one.reference.low_res, two.reference.low_res]),
        ),
    )
    alone = [render(each, [seed])[0] for each, seed in ((one, 5), (two, 6))]
    assert all(difference(a, b) <= 1 for a, b in zip(render(both, [5, 6]), alone))
    assert all(difference(a, b) <= 1 for a, b in zip(render(both, [6, 5]), reversed(alone)))
    in_turn = replace(both, config=settings("hidiffusion", steps=3, view_batch=1))
    assert all(difference(a, b) <= 1 for a, b in zip(render(in_turn, [5, 6]), alone))


def test_stable_diffusion_has_lists_of_its_own():
    models = Models.from_pipeline(make_stable_diffusion())
    unet, asked = models.base.denoiser, request(models, settings("hidiffusion", steps=10))
    levels = LEVELS[models.base.layers]
    assert depth_of(unet, "sd1") == 4
    assert self_attentions(unet, 4 + levels.windows) == tuple(
        f"{place}.transformer_blocks.0.attn1"
        for place in (
            "down_blocks.0.attentions.0",
            "down_blocks.0.attentions.1",
            "up_blocks.3.attentions.0",
            "up_blocks.3.attentions.1",
            "up_blocks.3.attentions.2",
        )
    )
    (only,) = asked.config.passes(asked)
    noise = CanvasNoise([0], 4, *asked.canvas_size, models.device)
    _, composition = only.begin(None, noise, asked.path[0])
    assert len(composition.patches) == 3
    for patch in composition.patches:
        with patch(unet, a_call()):
            changed = set(forwards(unet))
        assert changed in (set(), {"down_blocks.0.downsamplers.0.conv"}, set(self_attentions(unet, 0)))
    large = settings("hidiffusion", steps=10, scale=4)
    assert upscale_image(models, some_image(40, 32), "a cat", config=large).size == (160, 128)
    with pooled(unet, a_call(), 4 + levels.pooled, range(9)):
        assert set(forwards(unet)) == {"down_blocks.1.attentions.0", "up_blocks.2.attentions.1"}


def test_a_unet_without_these_blocks_is_refused_in_one_line():
    models = adapted()
    shallow = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    models = replace(models, base=replace(models.base, denoiser=shallow))
    asked = request(models, settings("hidiffusion"))
    (only,) = asked.config.passes(asked)
    with pytest.raises(ConfigError, match="has 1 down blocks, and 2 are needed; use an SDXL or Stable Diffusion"):
        only.begin(None, CanvasNoise([0], 4, *asked.canvas_size, models.device), asked.path[0])


def test_scales_that_are_too_large_are_told_of_at_planning():
    def notes(scale):
        return list(notes_of(parse_config({"name": "d", "upscale": {"method": "hidiffusion", "scale": scale}})))

    assert notes(2) == []
    (line,) = notes(4)
    assert "hidiffusion is good up to 2x" in line


def test_rows_are_those_of_direct():
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    for scale in (2, 4):
        ours = high_res_work(settings("hidiffusion", scale=scale, steps=50), *sizes)
        assert ours == (UnetWork(50 * 2, scale**2),)
