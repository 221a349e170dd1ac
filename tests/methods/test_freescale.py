from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from resmaster_stages.diffusion.frequency import gaussian_blur
from resmaster_stages.diffusion.guidance import TEXT, DenoiserCall
from resmaster_stages.diffusion.reference import to_mask
from resmaster_stages.diffusion.reference_guidance import skip_residual
from resmaster_stages.diffusion.scale_fusion import (
    Fusion,
    Windows,
    attend,
    blur_features,
    interleaved,
    scale_fusion,
    windowed,
)
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.freescale import detail_control, layer_rules
from resmaster_stages.methods.upscale import upscale_image
from tests.methods.common import (
    adapted,
    calls_of,
    difference,
    forwards,
    plain,
    request,
    schedule,
    sdxl_shaped,
    settings,
    some_image,
)


def windows(height=32, width=32, window=16, jitter="off", seed=0):
    return Windows(height, width, window, jitter, [torch.Generator().manual_seed(seed)])


def a_call(index=0):
    return DenoiserCall(schedule()[index], (TEXT,))


def run_unet(unet, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, size, size, generator=generator)
    return unet(x, torch.tensor(500), torch.randn(2, 3, 8, generator=generator), return_dict=False)[0]


def test_on_sdxl_nine_convolutions_are_dilated_until_step_35():
    rules = layer_rules(sdxl_shaped(), 4, 35)
    assert set(rules) == {
        "down_blocks.1.downsamplers.0.conv",
        *(f"{place}.resnets.{i}.conv{c}" for place in ("down_blocks.2", "mid_block") for i in range(2) for c in (1, 2)),
    }
    for rule in rules.values():
        assert (rule(34, TEXT).factor, rule(35, TEXT).factor) == (4, 1)
    assert layer_rules(sdxl_shaped(), 1, 35) == {}


def test_levels_are_told_by_their_tokens():
    grids = windows(37, 20)
    assert (grids.grid(37 * 20).height, grids.grid(37 * 20).window, grids.grid(37 * 20).stride) == (37, 16, 8)
    assert (grids.grid(19 * 10).height, grids.grid(19 * 10).window) == (19, 8)
    assert (grids.grid(10 * 5).width, grids.grid(10 * 5).stride) == (5, 2)
    with pytest.raises(ValueError, match="no level"):
        grids.grid(7)


@pytest.mark.parametrize("jitter", ["off", "clamped"])
def test_batched_windows_equal_a_loop_over_them(jitter):
    query, key, value = torch.randn(3, 2, 16 * 24, 8)
    views = windows(16, 24, 8, jitter).views(16 * 24, 2, a_call(), query.device)
    total, count = torch.zeros(2, 16, 24, 8), torch.zeros(16, 24, 1)
    grids = [each.unflatten(1, (16, 24)) for each in (query, key, value)]
    for y, x in views.origins[0]:
        box = (slice(None), slice(y, y + 8), slice(x, x + 8))
        total[box] += attend(*(each[box].flatten(1, 2) for each in grids), 2).unflatten(1, (8, 8))
        count[box[1:]] += 1
    torch.testing.assert_close(windowed(query, key, value, 2, views), (total / count).flatten(1, 2))


def test_one_window_without_jitter_is_plain_attention():
    unet = sdxl_shaped()
    base = run_unet(unet)
    with scale_fusion(unet, a_call(), Fusion(windows(window=32), 1)):
        assert torch.equal(run_unet(unet), base)
    query, key, value = torch.randn(3, 2, 16 * 16, 8)
    views = windows(16, 16, 16).views(256, 2, a_call(), query.device)
    torch.testing.assert_close(windowed(query, key, value, 2, views), attend(query, key, value, 2))


@pytest.mark.parametrize(("size", "every"), [((8, 12), (2, 3)), ((9, 7), (2, 2)), ((4, 5), (1, 2)), ((2, 6), (3, 3))])
def test_the_fast_form_attends_among_every_nth_token(size, every):
    """Each token to those at distances of a multiple of n along both axes, also where a side is no multiple of n."""
    query, key, value = torch.randn(3, 2, size[0] * size[1], 4)
    fast = interleaved(query, key, value, 1, size, every)
    y, x = (each.flatten() for each in torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
    seen = ((y[:, None] - y) % every[0] == 0) & ((x[:, None] - x) % every[1] == 0)
    scores = (query @ key.transpose(1, 2) / 2).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(fast, scores.softmax(dim=-1) @ value, atol=1e-5, rtol=1e-4)


def test_with_every_token_the_fast_form_is_attention_to_the_canvas():
    query, key, value = torch.randn(3, 2, 6 * 4, 8)
    assert torch.equal(interleaved(query, key, value, 2, (6, 4), (1, 1)), attend(query, key, value, 2))


def test_the_fast_form_takes_its_detail_from_every_nth_token():
    unet = sdxl_shaped()
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 16 * 16, 16)
    query, key, value = (project(x) for project in (layer.to_q, layer.to_k, layer.to_v))
    whole = layer.to_out[0](interleaved(query, key, value, layer.heads, (16, 16), (2, 2)))
    views = windows().views(256, 1, a_call(), x.device)
    local = layer.to_out[0](windowed(query, key, value, layer.heads, views))
    with scale_fusion(unet, a_call(), Fusion(windows(), 1, every=(2, 2))):
        fast = layer(x)
    coarse = gaussian_blur((local - whole).transpose(1, 2).unflatten(2, (16, 16)), 1, 1.0).flatten(2).transpose(1, 2)
    torch.testing.assert_close(fast, whole + coarse, atol=1e-5, rtol=1e-4)
    with scale_fusion(unet, a_call(), Fusion(windows(), 1)):
        assert (layer(x) - fast).abs().max() > 1e-4


def test_the_fused_layer_is_the_plain_one_where_local_and_global_agree():
    """With equal keys everywhere attention is the mean of values; of constant values, the same in and out of
    windows."""
    unet = sdxl_shaped()
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    x = torch.ones(2, 16 * 16, 16)
    expected = layer(x)
    with scale_fusion(unet, a_call(), Fusion(windows(), 1)):
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
        noisy = torch.randn(2, 16 * 16, 16)
        fused = layer(noisy)
    whole = layer(noisy)
    assert (fused - whole).abs().max() > 1e-4
    # blur(global) + detail(global) = global: the fused layer's own detail is the global one's.
    with scale_fusion(unet, a_call(), Fusion(windows(), 0)):
        local = layer(noisy)
    blurred = torch.nn.functional.conv2d(
        (local - whole).transpose(1, 2).unflatten(2, (16, 16)),
        (lambda k: torch.outer(k, k) / k.sum() ** 2)(torch.tensor([np.exp(-0.5), 1.0, np.exp(-0.5)]).float()).expand(
            16, 1, 3, 3
        ),
        padding=1,
        groups=16,
    )
    torch.testing.assert_close(fused - whole, blurred.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_the_authors_kernel_blurs_features_too():
    tokens = torch.zeros(1, 3, 9)
    tokens[0, 1, 4] = 1
    blurred = blur_features(tokens, 1)
    assert blurred[0, 1, 3] == blurred[0, 1, 5] > 0.2
    assert blurred[0, 0].abs().max() == 0
    assert blurred.sum() == pytest.approx(1)


def test_places_are_new_at_every_step_and_the_same_for_all_layers_of_a_level():
    moving = windows(jitter="zeros")
    first = moving.views(32 * 32, 1, a_call(), torch.device("cpu")).origins[0]
    assert moving.views(32 * 32, 3, a_call(), torch.device("cpu")).origins == [first] * 3
    assert moving.views(32 * 32, 1, a_call(1), torch.device("cpu")).origins[0] != first


def test_fusion_is_undone_after_exceptions():
    unet = sdxl_shaped()
    base = run_unet(unet)
    with pytest.raises(RuntimeError, match="boom"), scale_fusion(unet, a_call(), Fusion(windows(jitter="zeros"), 1)):  # noqa: PT012
        assert (run_unet(unet) - base).abs().max() > 1e-5
        raise RuntimeError("boom")
    assert torch.equal(run_unet(unet), base)
    assert forwards(unet) == {}


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"steps": 10}, [(2, 4, 32, 32)] * 7),
        ({"scale": 4, "steps": 2}, [(2, 4, 32, 32)] * 2 + [(2, 4, 64, 64)] * 2),
        ({"scale": 4, "steps": 2, "phases": "last", "start": 0.5}, [(2, 4, 64, 64)]),
        ({"preset": "faithful", "steps": 2}, [(2, 4, 32, 32)] * 2),
        ({"scale": 1, "steps": 2}, [(2, 4, 16, 16)] * 2),
    ],
)
def test_unet_calls(values, shapes):
    assert calls_of("freescale", **values) == shapes


@pytest.mark.parametrize("fusion", [False, True, "fast", "neighbourhood"])
def test_at_the_native_size_no_fusion_changes_attention(fusion):
    whole = make(scale=1, fusion=False)
    assert make(scale=1, fusion=fusion).tobytes() == whole.tobytes()


@pytest.mark.parametrize("fusion", ["fast", "neighbourhood"])
@pytest.mark.parametrize("size", [(72, 40), (40, 112)])
def test_other_attention_takes_canvases_of_any_shape(fusion, size):
    ours = plain()
    config = settings("freescale", fusion=fusion, scale=2.5)
    result = upscale_image(ours, some_image(*size), "a cat", config=config)
    assert result.size == (size[0] * 2.5, size[1] * 2.5)
    assert forwards(ours.base.denoiser) == {}


def test_a_jittered_neighbourhood_moves_its_tiles():
    near = {"fusion": "neighbourhood", "steps": 3}
    assert make(**near, jitter="zeros").tobytes() == make(**near).tobytes()
    assert difference(make(**near, jitter="off"), make(**near)) > 0


def test_booleans_mean_what_they_meant():
    """Words are no booleans, and datasets that exist keep their identity."""
    identities = [settings("freescale", fusion=value).identity()["fusion"] for value in (True, False)]
    assert identities == [True, False]
    assert settings("freescale").identity() == settings("freescale", fusion=True).identity()
    with pytest.raises(ValueError, match="fusion"):
        settings("freescale", fusion="slow")


def make(image=None, seed=0, **values):
    return upscale_image(
        adapted(), image or some_image(), "a cat", config=settings(**{"method": "freescale", **values}), seed=seed
    )


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.5},
        {"dilate_until": 0.0},
        {"fusion": False},
        {"fusion": "fast"},
        {"fusion": "neighbourhood"},
        {"blur": "features"},
        {"jitter": "zeros"},
        {"freeu": True},
    ],
)
def test_every_knob_has_an_effect(change):
    assert np.abs(np.asarray(make(steps=3)).astype(int) - np.asarray(make(steps=3, **change))).sum() > 0


def test_a_seed_decides_the_image_and_the_reference_is_followed():
    assert make(seed=1).tobytes() == make(seed=1).tobytes()
    assert difference(make(seed=1), make(seed=2)) > 0
    held = {"alpha": 0.0}  # every latent is the noised reference
    assert difference(make(some_image(seed=1), **held), make(some_image(seed=2), **held)) > 10


def test_without_its_parts_it_is_direct_inference_from_the_noised_reference():
    bare = {"fusion": False, "dilate_until": 0.0, "alpha": 1e9, "start": 0.0}
    ours = make(scale=1, **bare)
    assert difference(ours, make(scale=1, method="direct", init="noised_lr")) <= 1


def test_detail_control_by_region_mixes_two_exponents():
    config = settings("freescale", alpha=3.0, alpha_elsewhere=0.5)
    asked = request(plain(), config)
    assert detail_control(asked, config, 32, 32) == 3.0
    half = Image.new("L", (8, 8))
    half.paste(255, (4, 0, 8, 8))
    exponents = detail_control(replace(asked, detail=to_mask(half)), config, 32, 32)
    assert exponents.shape == (1, 1, 32, 32)
    assert exponents[..., :12].eq(0.5).all()
    assert exponents[..., 20:].eq(3).all()
    x0, noise, z = torch.randn(3, 1, 4, 32, 32)
    pulled = skip_residual(x0, noise, exponents)(z, schedule()[20])
    for part, exponent in ((slice(0, 12), 0.5), (slice(20, 32), 3.0)):
        expected = skip_residual(x0, noise, exponent)(z, schedule()[20])
        torch.testing.assert_close(pulled[..., part], expected[..., part])


def test_a_white_mask_is_no_mask_and_a_black_one_is_the_other_exponent():
    def make(detail=None, **values):
        config = settings("freescale", steps=3, scale=2.5, start=0.0, **values)
        return upscale_image(plain(), some_image(40, 24), "a cat", config=config, detail=detail)

    both = {"alpha": 3.0, "alpha_elsewhere": 0.5}
    assert difference(make(Image.new("L", (3, 3), "white"), **both), make(alpha=3.0)) <= 1
    assert difference(make(Image.new("L", (3, 3), "black"), **both), make(alpha=0.5)) <= 1
    assert difference(make(alpha=0.5), make(alpha=3.0)) > 5
    with pytest.raises(ConfigError, match="detail mask"):
        make(Image.new("L", (3, 3)))
