import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from resmaster_stages.diffusion.buckets import base_size, buckets
from resmaster_stages.diffusion.convolutions import changed_layers, dilated
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.low_pass import Filtered, filter_matrix, mask, shared_attention
from resmaster_stages.methods.fouriscale import DETAIL, DetailGuidance, layer_rules, make_plan
from resmaster_stages.methods.upscale import upscale_image
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

OWN = settings("fouriscale")
CPU = torch.device("cpu")


def test_there_are_forty_buckets_of_about_native_area():
    sizes = buckets(1024)
    assert len(set(sizes)) == 40
    assert all(0.85 < h * w / 1024**2 <= 1.05 for h, w in sizes)
    assert {(w, h) for h, w in sizes} >= {(1024, 1024), (1152, 896), (2048, 512)}


@pytest.mark.parametrize(
    ("height", "width", "native", "expected"),
    [
        (2048, 2048, 1024, ((1024, 1024), 2)),
        (4096, 4096, 1024, ((1024, 1024), 4)),
        (1024, 1024, 1024, ((1024, 1024), 1)),
        (1536, 2688, 1024, ((768, 1344), 2)),
        (512, 512, 128, ((128, 128), 4)),
    ],
)
def test_the_base_is_the_bucket_that_the_canvas_is_a_multiple_of(height, width, native, expected):
    assert base_size(height, width, native) == expected


def authors_base(height: int, width: int) -> tuple[int, int] | None:
    """What the authors' program chooses for SDXL, walking its list from the widest to the highest bucket."""
    best, least = None, float("inf")
    for size in sorted(buckets(1024), key=lambda size: size[0] / size[1]):
        counts = [math.ceil(side / own) for side, own in zip((height, width), size)]
        padding = sum(count * own - side for count, own, side in zip(counts, size, (height, width)))
        if counts[0] == counts[1] and padding < least:
            best, least = size, padding
    return best


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (2048, 3072, ((832, 1152), 3)),
        (2048, 2048, ((1024, 1024), 2)),
        (2560, 2560, ((896, 1088), 3)),
        (3072, 3072, ((1024, 1024), 3)),
        (4096, 4096, ((1024, 1024), 4)),
        (4096, 2048, ((1408, 704), 3)),
        (2048, 4096, ((704, 1408), 3)),
        (2160, 3840, ((768, 1280), 3)),
    ],
)
def test_the_base_is_that_of_the_authors_program(height, width, expected):
    assert base_size(height, width, 1024) == expected
    assert authors_base(height, width) == expected[0]
    assert base_size(height // 8, width // 8, 128) == ((expected[0][0] // 8, expected[0][1] // 8), expected[1])


def test_of_1681_sizes_the_authors_program_has_no_base_for_87_and_ours_is_theirs_for_all_others():
    sides = range(1024, 6145, 128)
    theirs = {(height, width): authors_base(height, width) for height in sides for width in sides}
    assert len(theirs) == 1681
    assert sum(base is None for base in theirs.values()) == 87
    for (height, width), base in theirs.items():
        ours, factor = base_size(height, width, 1024)
        assert base in (ours, None), (height, width)
        assert ours[0] * factor >= height
        assert ours[1] * factor >= width


@given(st.integers(8, 400), st.integers(8, 400))
@examples(max_examples=30)
def test_every_canvas_has_a_base_that_covers_it(height, width):
    (rows, cols), factor = base_size(height, width, 64)
    assert rows * factor >= height
    assert cols * factor >= width


@pytest.mark.parametrize("factor", [2, 4])
def test_the_masks_are_those_of_the_paper(factor):
    strong, weak = mask(64, factor, False, 0.6), mask(64, factor, True, 0.6)
    cut, half = 32 // factor, 32
    assert strong.shape == (half + 1,)
    for values in (strong, weak):
        assert values[: cut + 2].eq(1).all()
        assert values[cut + 2 :].lt(1).all()
        assert (values[1:] <= values[:-1]).all()
    assert strong[cut + 3] == pytest.approx(1 - 0.4 * 2 / 8)
    assert strong[min(cut + 10, half)] == pytest.approx(0.6)
    ramp = half * (factor - 1) // factor
    assert weak[cut + 3] == pytest.approx(1 - 0.4 * 2 / ramp)
    assert weak[-1] == pytest.approx(0.6 + 0.4 * 2 / ramp)  # the last index short of the end of the line
    assert mask(64, 1, True, 0.6).eq(1).all()


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("weak", [False, True])
def test_the_matrix_is_the_filter_on_the_spectrum(length, weak):
    x = torch.randn(5, length, dtype=torch.float64)
    matrix = filter_matrix(length, 2.5, weak, 0.3, CPU, torch.float64)
    gains = mask(length, 2.5, weak, 0.3)
    expected = torch.fft.irfft(torch.fft.rfft(x) * gains, n=length)
    torch.testing.assert_close(x @ matrix.T, expected)
    torch.testing.assert_close(matrix.sum(1), torch.ones(length, dtype=torch.float64))


def test_a_filtered_layer_is_dilation_of_low_passed_features():
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 16, 24)
    gains = torch.outer(
        mask(16, 2, False, 0.6)[[*range(9), *range(7, 0, -1)]], mask(24, 2, False, 0.6)[[*range(13), *range(11, 0, -1)]]
    )
    filtered = torch.fft.ifft2(torch.fft.fft2(x) * gains).real.float()
    layer = Filtered(2.0, 2, False, 0.6, (1.0, 1.0))
    torch.testing.assert_close(layer(conv, x), dilated(conv, filtered, 2), atol=1e-5, rtol=1e-4)
    padded = Filtered(2.0, 2, False, 0.6, (1.25, 1.0))(conv, x)
    assert padded.shape == (2, 5, 16, 24)
    assert (padded - layer(conv, x)).abs().max() > 1e-3


def test_on_sdxl_21_convolutions_are_filtered_and_one_is_dilated_only():
    rules = layer_rules(sdxl_shaped(), make_plan(2048, 2048, 1024, 50, OWN), (1, 1), 0.6)
    kinds = {name: type(rule(0, TEXT)).__name__ for name, rule in rules.items()}
    filtered = {name for name, kind in kinds.items() if kind == "Filtered"}
    assert filtered == {
        f"{place}.resnets.{i}.conv{c}"
        for place, count in (("down_blocks.2", 2), ("mid_block", 2), ("up_blocks.0", 3), ("up_blocks.1", 3))
        for i in range(count)
        for c in (1, 2)
    }
    assert len(filtered) == 20
    assert {name for name, kind in kinds.items() if kind == "Dilated"} == {"up_blocks.0.upsamplers.0.conv"}


def test_dilation_is_full_then_falls_then_is_off():
    plan = make_plan(4096, 4096, 1024, 50, OWN)
    factors = [plan.dilation(index) for index in range(50)]
    assert factors[:20] == [4.0] * 20
    assert factors[20] == 4.0
    assert factors[25] == pytest.approx(3.0)
    assert factors[34] == pytest.approx(1.2)
    assert factors[35:] == [1.0] * 15
    rules = layer_rules(sdxl_shaped(), plan, (1, 1), 0.6)
    text, detail = (rules["mid_block.resnets.0.conv1"](0, branch) for branch in (TEXT, DETAIL))
    assert (text.dilation, text.weak) == (4, False)
    assert (detail.dilation, detail.weak) == (3, True)


def run_unet(unet, rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 32, 32, generator=generator)
    return unet(x, torch.tensor(500), torch.randn(rows, 3, 8, generator=generator), return_dict=False)[0]


def test_shared_attention_touches_the_detail_branch_alone():
    unet, call = sdxl_shaped(), DenoiserCall(schedule()[0], (NEGATIVE, TEXT, DETAIL))
    base = run_unet(unet, 3)
    with shared_attention(unet, call, DETAIL):
        shared = run_unet(unet, 3)
        call.branches = (NEGATIVE, TEXT)
        torch.testing.assert_close(run_unet(unet, 2), run_unet(sdxl_shaped(), 2))
    torch.testing.assert_close(shared[:2], base[:2])
    assert (shared[2] - base[2]).abs().max() > 1e-4
    with pytest.raises(RuntimeError, match="boom"), shared_attention(unet, call, DETAIL):
        raise RuntimeError("boom")
    assert forwards(unet) == {}


def test_after_the_schedule_the_network_is_the_plain_one():
    unet, call = sdxl_shaped(), DenoiserCall(schedule()[35], (NEGATIVE, TEXT))
    base = run_unet(unet, 2)
    rules = layer_rules(unet, make_plan(2048, 2048, 1024, 50, OWN), (1.0, 1.0), 0.6)
    with changed_layers(unet, call, rules), shared_attention(unet, call, DETAIL):
        assert torch.equal(run_unet(unet, 2), base)
        call.step = schedule()[34]
        assert (run_unet(unet, 2) - base).abs().max() > 1e-4


def test_guidance_goes_to_the_detail_branch_and_may_be_amplified():
    rule, steps = DetailGuidance(5.0, 35, 2.4, 20), schedule()
    assert rule.branches(steps[34]) == (NEGATIVE, TEXT, DETAIL)
    assert rule.branches(steps[35]) == (NEGATIVE, TEXT)
    negative, text, detail = torch.randn(3, 2, 4, 8, 8)
    torch.testing.assert_close(rule.combine([negative, text, detail], steps[19]), negative + 12 * (detail - negative))
    torch.testing.assert_close(rule.combine([negative, text, detail], steps[20]), negative + 5 * (detail - negative))
    torch.testing.assert_close(rule.combine([negative, text], steps[40]), negative + 5 * (text - negative))
    assert DetailGuidance(1.0, 35).branches(steps[0]) == (TEXT,)


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"scale": 2, "steps": 10}, [(3, 4, 32, 32)] * 7 + [(2, 4, 32, 32)] * 3),
        ({"scale": 2, "steps": 2, "guidance_scale": 1}, [(1, 4, 32, 32)] * 2),
        ({"scale": 1, "steps": 2}, [(2, 4, 16, 16)] * 2),
    ],
)
def test_unet_calls(values, shapes):
    assert calls_of("fouriscale", **values) == shapes


def make(**values):
    return upscale_image(adapted(), some_image(), "a cat", config=settings(**{"method": "fouriscale", **values}))


@pytest.mark.parametrize(
    "change", [{"floor": 0.0}, {"freeu": True}, {"amplification": 2.4}, {"until": 0.5}, {"full_until": 0.0}]
)
def test_every_knob_has_an_effect(change):
    assert difference(make(steps=4), make(steps=4, **change)) > 0


def test_at_native_size_it_is_direct_inference():
    direct = make(scale=1, method="direct", stepper="ddim_ancestral", guidance_scale=5)
    assert make(scale=1).tobytes() == direct.tobytes()


def test_with_half_precision_the_filter_keeps_its_gains():
    matrix = filter_matrix(64, 2.0, False, 0.6, CPU, torch.float16).float()
    torch.testing.assert_close(matrix.sum(1), torch.ones(64), atol=2e-3, rtol=0)
