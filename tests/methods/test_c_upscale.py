import pytest
import torch

from resmaster_stages.diffusion.composer import Composer, attention_map, sampled
from resmaster_stages.diffusion.frequency import swap_weights
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.scale_fusion import attend
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.schedule import even_course
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

OFF = {"structure": {"enabled": False}, "text_prompt": {"enabled": False}}


def a_call():
    return DenoiserCall(schedule()[0], (NEGATIVE, TEXT))


def composer(share=0.5, height=32, width=32, small=(16, 16)):
    grid = Grid(height, width, 16, 8)
    return Composer(grid, small, share, torch.device("cpu"))


def test_the_map_of_one_head_gives_the_attention():
    query, key, value = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    words = attention_map(query, key, 1)
    assert words.shape == (2, 6, 5)
    torch.testing.assert_close(words @ value, attend(query, key, value, 1))
    torch.testing.assert_close(attention_map(query, key, 4).sum(-1), torch.ones(2, 6))


def test_a_view_of_the_whole_image_reads_the_image_s_own_map():
    maps = torch.rand(1, 7, 8, 8).softmax(dim=1)
    one = Composer(Grid(16, 16, 16, 16), (16, 16), 0.5, torch.device("cpu"))
    words = sampled(maps, one.places(64))
    torch.testing.assert_close(words, maps.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_views_read_their_own_part_of_the_map_enlarged_by_the_scale():
    """The first word is at the left of the image, the second at the right."""
    ramp = ((torch.arange(16) + 0.5) / 16).expand(16, 16)
    maps = torch.stack([1 - ramp, ramp])[None]  # [1, 2, 16, 16]
    views = composer()
    assert len(views.grid) == 9
    words = sampled(maps.expand(9, -1, -1, -1), views.places(16 * 16)).unflatten(1, (16, 16))  # [9, 16, 16, 2]
    torch.testing.assert_close(words.sum(-1), torch.ones(9, 16, 16))
    expected = (8 + torch.arange(16) + 0.5) / 32  # the middle view begins at 8 of 32
    torch.testing.assert_close(words[4, 5, :, 1], expected, atol=4e-3, rtol=0)  # bicubic
    assert words[0, ..., 1].mean() < 0.3
    assert words[2, ..., 1].mean() > 0.7


def text(seed=0, rows=1):
    return torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed)).repeat(rows, 1, 1)


def run(unet, x, states):
    return unet(x, torch.tensor(500), states, return_dict=False)[0]


def captured(unet, views, states):
    views.call.branches = (TEXT,)
    with views.capturing():
        run(unet, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), states)
    views.call.branches = (NEGATIVE, TEXT)


def test_only_text_rows_are_composed_and_by_their_share():
    unet, x = sdxl_shaped(), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    states = torch.cat([text(1), text(2)])
    base = run(unet, x, states)
    for share, changed in ((0.0, False), (0.5, True), (1.0, True)):
        views = composer(share)
        with views.patch(unet, a_call()):
            captured(unet, views, text(4))
            views.call.items = torch.tensor([4])
            out = run(unet, x, states)
            views.call.items = torch.tensor([0])
            corner = run(unet, x, states)
        torch.testing.assert_close(out[0], base[0])
        assert bool((out[1] - base[1]).abs().max() > 1e-4) == changed
        assert bool((out[1] - corner[1]).abs().max() > 1e-6) == changed
    assert forwards(unet) == {}


def test_with_share_one_a_view_no_longer_hears_its_own_text():
    unet, x = sdxl_shaped(), torch.randn(2, 4, 16, 16)
    views = composer(1.0)
    with views.patch(unet, a_call()):
        captured(unet, views, text(4))
        views.call.items = torch.tensor([4])
        outs = [run(unet, x, torch.cat([text(1), text(seed)])) for seed in (2, 3)]
    torch.testing.assert_close(outs[0], outs[1])


def test_a_layer_composes_as_written():
    unet = sdxl_shaped()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    layer, x, small = unet.get_submodule(name), torch.randn(2, 64, 16), torch.randn(1, 64, 16)
    own, whole = torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    views = composer(0.25)
    plain_output = layer(x, own)
    with views.patch(unet, a_call()):
        views.call.branches = (TEXT,)
        with views.capturing():
            assert torch.equal(layer(small, whole), type(layer).forward(layer, small, whole))
        views.call.branches, views.call.items = (NEGATIVE, TEXT), torch.tensor([8])
        out = layer(x, own)
    words = attention_map(layer.to_q(small), layer.to_k(whole), layer.heads)  # [1, 64, 3]
    part = sampled(words.transpose(1, 2).unflatten(2, (8, 8)), views.places(64)[8:])
    expected = 0.75 * plain_output[1] + 0.25 * layer.to_out[0](part @ layer.to_v(whole))[0]
    torch.testing.assert_close(out[1], expected)
    torch.testing.assert_close(out[0], plain_output[0])


def test_capturing_and_patches_end_with_exceptions():
    unet, views = sdxl_shaped(), composer()
    with pytest.raises(RuntimeError, match="boom"), views.patch(unet, a_call()), views.capturing():
        raise RuntimeError("boom")
    assert not views._capturing
    assert forwards(unet) == {}


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"steps": 4}, [(1, 4, 16, 16), (18, 4, 16, 16)] * 2),
        ({"steps": 2, "share": 0.0}, [(18, 4, 16, 16)]),
        ({"steps": 2, "view_batch": 5, "guidance_scale": 1}, [(1, 4, 16, 16), *[(3, 4, 16, 16)] * 3]),
    ],
)
def test_unet_calls(values, shapes):
    assert calls_of("c_upscale", **values) == shapes


@pytest.mark.parametrize("preset", ["default", "faithful"])
def test_the_structure_is_held_at_every_step_of_its_own_path(preset):
    config = settings("c_upscale", preset=preset, steps=50)
    course = even_course(config.steps)
    assert all(swap_weights(config.structure, course.done)[course.first(config.start) :])
    assert (config.structure.cutoff, config.structure.cutoff_units) == (0.8, "lr_nyquist")


def make(captions=None, **values):
    config = settings(**{"method": "c_upscale", "steps": 4, **values})
    return upscale_image(adapted(), some_image(), "a cat", config=config, captions=captions)


def test_without_its_priors_it_is_multidiffusion_from_the_noised_reference():
    bare = make(**OFF, share=0.0, start=0.0)
    assert bare.tobytes() == make(method="multidiffusion", init="noised_lr").tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"structure": {"enabled": False}},
        {"text_prompt": {"enabled": False}},
        {"share": 0.9},
        {"start": 0.2},
    ],
)
def test_every_prior_has_an_effect(change):
    captions = ["a dog", "tree", "sky"] * 3
    assert difference(make(captions), make(captions, **change)) > 0


def test_the_batch_of_views_does_not_matter():
    captions = [f"patch {letter}" for letter in "abcdefghi"]
    assert difference(make(captions, view_batch=16), make(captions, view_batch=2)) <= 1
