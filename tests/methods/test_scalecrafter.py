import math
from functools import partial

import pytest
import torch
from diffusers.utils.torch_utils import apply_freeu
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resmaster_flows.watch.progress import notes
from resmaster_stages.diffusion.convolutions import PLAIN, Dilated, Dispersed, changed_layers, dilated
from resmaster_stages.diffusion.freeu import backbone_channels, freeu, modulated
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.patches import chosen_layers
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.scalecrafter import WEAK, NoiseDamped, layer_rules, make_plan, moderate, strong
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.parts import Models
from resmaster_stages.progress import listening
from tests.methods.common import (
    adapted,
    calls_of,
    difference,
    forwards,
    schedule,
    sdxl_shaped,
    settings,
    some_image,
)
from tests.tiny_models import make_stable_diffusion


def published(*places):
    """Names of the convolutions at places given as the authors' lists give them, without the `conv` numbers."""
    return {f"{place}.{conv}" for place in places for conv in ("conv1", "conv2")}


UP0 = published(*(f"up_blocks.0.resnets.{i}" for i in range(3)))
UP1 = published(*(f"up_blocks.1.resnets.{i}" for i in range(3)))
UP2 = published(*(f"up_blocks.2.resnets.{i}" for i in range(3)))
MID = published(*(f"mid_block.resnets.{i}" for i in range(2)))
DOWN2 = published(*(f"down_blocks.2.resnets.{i}" for i in range(2)))
UP0_OUT, UP1_OUT = {"up_blocks.0.upsamplers.0.conv"}, {"up_blocks.1.upsamplers.0.conv"}


@pytest.mark.parametrize(
    ("height", "width", "until", "damped", "progressive", "expected"),
    [
        (2048, 2048, 30, 0, False, {2: UP0 | UP0_OUT | MID}),
        (2560, 2560, 30, 0, False, {2.5: UP0 | UP0_OUT | MID}),
        (4096, 2048, 35, 35, True, {3: DOWN2 | UP1 | UP1_OUT, 4: MID | UP0 | UP0_OUT, 2: UP2}),
        (4096, 4096, 35, 35, True, {4: DOWN2 | MID | UP0 | UP0_OUT, 3: UP1 | UP1_OUT, 2: UP2}),
    ],
)
def test_on_sdxl_the_layers_are_the_published_ones(height, width, until, damped, progressive, expected):
    own = settings("scalecrafter", preset="faithful")
    plan = make_plan(height / 1024, width / 1024, 50, own)
    assert (plan.until, plan.damped_until, plan.progressive) == (until, damped, progressive)
    layers = chosen_layers(sdxl_shaped(), plan.strong, "scalecrafter")
    assert layers == {name: factor for factor, names in expected.items() for name in names}
    weak = chosen_layers(sdxl_shaped(), plan.weak, "scalecrafter")
    assert weak == dict.fromkeys(UP0 | UP0_OUT | MID, 2.0)


def places(*names: str) -> set[str]:
    """Names of all convolutions of blocks, e.g. `down 2`, or of their resnets or samplers alone, e.g. `up 1
    resnets`."""
    found = set()
    for name in names:
        kind, number, *part = name.split()
        block = f"{kind}_blocks.{number}" if kind != "mid" else "mid_block"
        count = 3 if kind == "up" else 2
        if not part or part == ["resnets"]:
            found |= published(*(f"{block}.resnets.{i}" for i in range(count)))
        if not part or part == ["sampler"]:
            found.add(f"{block}.{kind}samplers.0.conv")
    return found


SD1_1280 = {
    2.0: ("down 1 sampler", "down 2 resnets", "up 1 resnets", "up 2"),
    2.5: ("down 2 sampler", "down 3 resnets", "up 0", "up 1 sampler", "mid 0 resnets"),
}
SD1_2048 = {
    2: ("down 0", "up 3 resnets"),
    3: ("down 1", "up 2"),
    4: ("down 2", "down 3 resnets", "up 0", "up 1", "mid 0 resnets"),
}
SD2_2048 = {
    2: ("up 3 resnets",),
    3: ("down 2 resnets", "up 2"),
    4: ("down 2 sampler", "down 3 resnets", "up 0", "up 1", "mid 0 resnets"),
}


@pytest.mark.parametrize(
    ("whose", "px", "until", "damped", "progressive", "expected", "weak"),
    [
        ("sd1", 1024, 30, 0, False, {2: ("down 3 resnets", "up 0", "mid 0 resnets")}, None),
        ("sd1", 1280, 35, 0, False, SD1_1280, None),
        ("sd1", 2048, 35, 35, True, SD1_2048, {4: SD1_2048[4]}),
        ("sd2", 2048, 37, 37, True, SD2_2048, {3: SD2_2048[3], 4: SD2_2048[4]}),
    ],
)
def test_on_stable_diffusion_the_layers_are_the_published_ones(whose, px, until, damped, progressive, expected, weak):
    pipe = make_stable_diffusion("v_prediction" if whose == "sd2" else "epsilon")
    unet = pipe.unet
    unet.register_to_config(cross_attention_dim={"sd1": 768, "sd2": 1024}[whose])
    assert Models.from_pipeline(pipe).base.layers == whose
    plan = make_plan(px / 512, px / 512, 50, settings("scalecrafter", preset="faithful"), whose)
    assert (plan.until, plan.damped_until, plan.progressive) == (until, damped, progressive)
    for found, wanted in ((plan.strong, expected), (plan.weak, weak)):
        if wanted is not None:
            layers = {name: factor for factor, names in wanted.items() for name in places(*names)}
            assert chosen_layers(unet, found, "scalecrafter") == layers


def test_dispersed_layers_are_the_published_ones_and_their_kernels_are_made_once():
    own = settings("scalecrafter", dispersed=True)
    unet, plan = sdxl_shaped(), make_plan(4, 4, 50, own)
    rules = layer_rules(unet, plan)
    first = {name: rule(0, TEXT) for name, rule in rules.items()}
    spread = {name for name, layer in first.items() if isinstance(layer, Dispersed)}
    assert spread == DOWN2 | MID | UP0 | UP0_OUT
    for name in spread:
        later, off = (rules[name](index, TEXT) for index in (20, 35))
        assert later.weight is first[name].weight
        assert (first[name].factor, later.factor, off) == (4, 2, PLAIN)
    call = DenoiserCall(schedule()[0], (TEXT,))
    base = run_unet(unet, 1)
    with changed_layers(unet, call, rules):
        dispersed_output = run_unet(unet, 1)
    plain_rules = layer_rules(unet, make_plan(4, 4, 50, settings("scalecrafter")))
    with changed_layers(unet, call, plain_rules):
        assert (run_unet(unet, 1) - dispersed_output).abs().max() > 1e-4
    assert torch.equal(run_unet(unet, 1), base)


def test_the_default_dilates_the_deepest_down_block_at_2x_and_nothing_at_1x():
    own = settings("scalecrafter")
    assert chosen_layers(sdxl_shaped(), make_plan(2, 2, 50, own).strong, "x").keys() >= DOWN2
    assert not make_plan(1, 1, 50, own).strong
    with pytest.raises(ConfigError, match="none of its layers"):
        chosen_layers(sdxl_shaped(), {"down_blocks.3.resnets": 2.0}, "x")


def test_the_dilation_falls_to_two_and_then_off():
    plan = make_plan(4, 4, 50, settings("scalecrafter"))
    factors = [plan.dilation(4, index) for index in range(50)]
    assert factors[:9] == [4] * 9
    assert factors[9:18] == [3] * 9
    assert factors[18:35] == [2] * 17
    assert factors[35:] == [1] * 15
    steady = make_plan(2.5, 2.5, 50, settings("scalecrafter"))
    assert [steady.dilation(2.5, index) for index in (0, 29, 30)] == [2.5, 2.5, 1]


def dilated_by_interleaving(conv: torch.nn.Conv2d, x: torch.Tensor, factor: int) -> torch.Tensor:
    """Dilation for stride 1, as a dense convolution of `factor` x `factor` interleaved samples of `x`."""
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -width % factor, 0, -height % factor))
    cells = padded.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # [N, C, h, k, w, k]
    dense = cells.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)  # [k * k * N, C, h, w]
    y = torch.nn.functional.conv2d(dense, conv.weight, conv.bias, 1, 1, 1, conv.groups)
    y = y.unflatten(0, (factor, factor, len(x))).permute(2, 3, 4, 0, 5, 1)  # [N, C', h, k, w, k]
    return y.flatten(4, 5).flatten(2, 3)[..., :height, :width]


@given(st.integers(1, 17), st.integers(1, 17), st.integers(1, 5))
@examples(max_examples=30)
def test_whole_dilation_is_a_dense_convolution_of_interleaved_samples(height, width, factor):
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, height, width)
    torch.testing.assert_close(dilated(conv, x, factor), dilated_by_interleaving(conv, x, factor), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 2.5, 4.0])
def test_dilation_keeps_sizes_and_one_is_the_plain_layer(stride, factor):
    conv, x = torch.nn.Conv2d(3, 5, 3, stride=stride, padding=1), torch.randn(2, 3, 17, 24)
    y = Dilated(factor)(conv, x)
    assert y.shape == conv(x).shape
    assert torch.equal(y, conv(x)) == (factor == 1)


def test_a_dilated_layer_sees_an_enlarged_pattern_as_the_plain_one_sees_the_small():
    """Nearest enlargement by 2 and dilation by 2 commute; by 2.5, roughly, for a smooth pattern."""
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    small = torch.nn.functional.interpolate(torch.randn(1, 1, 4, 4), size=(24, 24), mode="bicubic")
    for factor, tolerance in ((2.0, 1e-5), (2.5, 0.1)):
        mode = {"mode": "nearest"} if factor == 2 else {"mode": "bilinear", "align_corners": False}
        large = torch.nn.functional.interpolate(small, scale_factor=factor, **mode)
        expected = torch.nn.functional.interpolate(conv(small), scale_factor=factor, **mode)
        middle = (..., slice(10, -10), slice(10, -10))
        torch.testing.assert_close(
            Dilated(factor)(conv, large)[middle], expected[middle], atol=tolerance, rtol=tolerance
        )


def bilinear(length: int, size: int) -> torch.Tensor:
    """The matrix [size, length] of bilinear interpolation from `length` to `size` cells over the same line."""
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for row in range(size):
        place = min(max((row + 0.5) * length / size - 0.5, 0), length - 1)
        below = min(int(place), length - 2)
        matrix[row, below] += 1 - (place - below)
        matrix[row, below + 1] += place - below
    return matrix


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return bilinear(x.shape[-2], height) @ x @ bilinear(x.shape[-1], width).T


def redilated(weight: torch.Tensor, x: torch.Tensor, factor: float, stride: int = 1) -> torch.Tensor:
    """The authors' rule: sides become round(side * whole / factor), taps lie `whole` cells apart, and the output
    becomes the size of the plain one."""
    whole, reach = math.ceil(factor), weight.shape[-1] // 2
    wide = resized(x, *(round(side * whole / factor) for side in x.shape[-2:]))
    y = torch.nn.functional.conv2d(wide, weight, None, stride, reach * whole, whole)
    return resized(y, *(side // stride for side in x.shape[-2:]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(36, 36, 2.5), (44, 44, 2.5), (40, 40, 1.5), (80, 80, 1.5), (40, 40, 2.25), (80, 80, 2.25), (80, 64, 2.5)],
)
def test_dilation_by_no_whole_number_is_the_authors_rule(height, width, factor, stride):
    conv = torch.nn.Conv2d(2, 3, 3, stride=stride, padding=1, bias=False).double()
    x = torch.randn(1, 2, height, width, dtype=torch.float64)
    expected = redilated(conv.weight, x, factor, stride)
    torch.testing.assert_close(Dilated(factor)(conv, x), expected, atol=1e-10, rtol=0)
    kernel = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(
        Dispersed(2 * factor, kernel)(conv, x), redilated(kernel, x, factor, stride), atol=1e-10, rtol=0
    )


def test_on_an_odd_side_a_strided_layer_keeps_the_size_of_the_plain_one():
    """The authors' code would give 16 cells."""
    conv, x = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(1, 2, 33, 33)
    assert Dilated(2.5)(conv, x).shape[-2:] == conv(x).shape[-2:] == (17, 17)
    plain = torch.nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    torch.testing.assert_close(
        Dilated(2.5)(plain, x.double()), redilated(plain.weight, x.double(), 2.5), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("factor", [1.25, 1.5, 2.25, 2.5, 3.2])
@pytest.mark.parametrize("side", [33, 36, 40, 44, 80])
def test_features_do_not_drift(side, factor):
    """A layer whose kernel is its middle tap alone gives a slope back, but for the borders."""
    conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data.zero_()[..., 1, 1] = 1
    slope = torch.arange(float(side)).expand(1, 1, side, side)
    seen = Dilated(factor)(conv, slope)
    torch.testing.assert_close(seen[..., 2:-2], slope[..., 2:-2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_dilation_by_a_whole_number_resizes_nothing(factor):
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 33, 44)
    assert torch.equal(Dilated(float(factor))(conv, x), dilated(conv, x, factor))
    kernel = torch.randn(5, 3, 5, 5)
    plain = torch.nn.functional.conv2d(x, kernel, conv.bias, 1, 2 * factor, factor)
    assert torch.equal(Dispersed(2.0 * factor, kernel)(conv, x), plain)


def run_unet(unet, rows=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 32, 32, generator=generator).repeat(rows, 1, 1, 1)
    text = torch.randn(1, 3, 8, generator=generator).repeat(rows, 1, 1)
    return unet(x, torch.tensor(500), text, return_dict=False)[0]


def test_patches_are_undone_after_exceptions_and_nest():
    unet, call = sdxl_shaped(), DenoiserCall(schedule()[0], (TEXT,))
    base = run_unet(unet, 1)
    rules = {name: lambda index, branch: Dilated(2.0) for name in chosen_layers(unet, moderate(2, True), "x")}
    patch = partial(changed_layers, unet, call, rules)
    with patch():
        once = run_unet(unet, 1)
        with pytest.raises(KeyboardInterrupt), freeu(unet), patch():  # noqa: PT012
            assert (run_unet(unet, 1) - once).abs().max() > 1e-4
            raise KeyboardInterrupt
        assert torch.equal(run_unet(unet, 1), once)
    assert (once - base).abs().max() > 1e-4
    assert torch.equal(run_unet(unet, 1), base)
    assert forwards(unet) == {}


def test_branches_are_computed_as_their_rules_say():
    """Strong, strong and weak rows of one call are what three calls with one rule each give; step 35 is plain again."""
    unet, call = sdxl_shaped(), DenoiserCall(schedule()[0], (NEGATIVE, TEXT, WEAK))
    rules = layer_rules(unet, make_plan(4, 4, 50, settings("scalecrafter")))
    base = run_unet(unet, 2)
    with changed_layers(unet, call, rules):
        together = run_unet(unet, 3)
        call.branches = (TEXT,)
        text = run_unet(unet, 1)
        call.branches = (WEAK,)
        weak = run_unet(unet, 1)
        call.step, call.branches = schedule()[35], (NEGATIVE, TEXT)
        assert torch.equal(run_unet(unet, 2), base)
    torch.testing.assert_close(together, torch.cat([text, text, weak]), atol=1e-5, rtol=1e-4)
    assert (text - weak).abs().max() > 1e-4
    weak_only = {name: lambda index, branch: Dilated(2.0) for name in chosen_layers(unet, moderate(2, False), "x")}
    with changed_layers(unet, call, weak_only):
        torch.testing.assert_close(run_unet(unet, 1), weak, atol=1e-5, rtol=1e-4)


def test_noise_damped_guidance_takes_the_weak_unconditional_prediction():
    rule, steps = NoiseDamped(5.0, 35), schedule()
    assert rule.branches(steps[34]) == (NEGATIVE, TEXT, WEAK)
    assert rule.branches(steps[35]) == (NEGATIVE, TEXT)
    negative, text, weak = torch.randn(3, 2, 4, 8, 8)
    torch.testing.assert_close(rule.combine([negative, text, weak], steps[0]), weak + 5 * (text - negative))
    torch.testing.assert_close(rule.combine([negative, text], steps[40]), negative + 5 * (text - negative))
    assert NoiseDamped(1.0, 35).branches(steps[0]) == (TEXT,)


def test_freeu_differs_from_diffusers_in_the_two_layers_of_the_channel_rule():
    unet = sdxl_shaped()
    channels = backbone_channels(unet)
    assert channels["up_blocks.1.resnets.0"] == 32  # amplified by b1 here, by b2 in diffusers
    assert channels["up_blocks.2.resnets.0"] == 16  # amplified by b2 here, not at all in diffusers
    assert channels["up_blocks.2.resnets.1"] == 8
    base = run_unet(unet, 1)
    with freeu(unet, 1.0, 1.0, 1.0, 1.0):
        torch.testing.assert_close(run_unet(unet, 1), base, atol=1e-5, rtol=1e-4)
    values = {"b1": 1.4, "b2": 1.2, "s1": 0.3, "s2": 0.6}
    backbone, skip = torch.randn(2, 1, 6, 16, 16)
    for number, (amplify, damp) in enumerate([(1.4, 0.3), (1.2, 0.6)]):
        seen = modulated(lambda x: x, 6, amplify, damp)(torch.cat([backbone, skip], dim=1))
        theirs = torch.cat(apply_freeu(number, backbone.clone(), skip, **values), dim=1)
        torch.testing.assert_close(seen, theirs)
    with freeu(unet):
        assert (run_unet(unet, 1) - base).abs().max() > 1e-4
        assert set(forwards(unet)) == {f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(3)} | {
            "up_blocks.2.resnets.0"
        }
    assert forwards(unet) == {}


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"scale": 2, "steps": 3}, [(2, 4, 32, 32)] * 3),
        ({"scale": 4, "steps": 4}, [(3, 4, 64, 64)] * 3 + [(2, 4, 64, 64)]),
        ({"scale": 2, "steps": 3, "damped_until": 0.4}, [(3, 4, 32, 32)] + [(2, 4, 32, 32)] * 2),
        ({"scale": 4, "steps": 2, "guidance_scale": 1}, [(1, 4, 64, 64)] * 2),
    ],
)
def test_unet_calls(values, shapes):
    assert calls_of("scalecrafter", **values) == shapes


def make(**values):
    return upscale_image(adapted(), some_image(), "a cat", config=settings(**{"method": "scalecrafter", **values}))


def test_without_dilation_it_is_direct_inference():
    direct = make(method="direct", stepper="ddim_ancestral", guidance_scale=5)
    assert make(dilate_until=0).tobytes() == direct.tobytes()
    assert difference(make(), direct) > 0
    assert (
        make(scale=1).tobytes() == make(scale=1, method="direct", stepper="ddim_ancestral", guidance_scale=5).tobytes()
    )


@pytest.mark.parametrize(
    "change", [{"down": False}, {"freeu": True}, {"progressive": True}, {"damped_until": 1.0}, {"dispersed": True}]
)
def test_every_knob_has_an_effect(change):
    scale = 2.5
    assert difference(make(scale=scale), make(scale=scale, **change)) > 0


def test_a_run_with_freeu_on_another_model_says_so_once():
    said = []
    with listening(notes(said.append)):
        make()
        assert not said
        make(freeu=True)
        make(freeu=True)
    (line,) = said
    assert line.startswith("upscale.freeu: the strengths of FreeU were chosen for SDXL, and ")


def test_large_canvases_scale_every_group():
    assert strong(8, 8)["mid_block.resnets"] == 8
    assert strong(8, 8)["up_blocks.2.resnets"] == 4
    assert Dilated(1) == PLAIN
