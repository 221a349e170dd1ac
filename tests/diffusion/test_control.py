"""ControlNets on views: each view its own crop, embedded once, and nothing at all where the weight is 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode

from resmaster_stages.config.control import ControlConfig
from resmaster_stages.config.method import methods
from resmaster_stages.diffusion.control import Control
from resmaster_stages.diffusion.cost import CONTROL_SHARE, counting
from resmaster_stages.diffusion.edges import canny
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import TEXT, DenoiserCall
from resmaster_stages.diffusion.irregular_views import ScatteredViews
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.diffusion.reference import enlarged
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.settings import Views
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.acceleration import compile_blocks
from resmaster_stages.models.bases.as_flow import AsFlowPipeline
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.diffusion.test_memory import SDXL
from tests.methods.common import adapted, difference, forwards, plain, request, settings, some_image
from tests.models.bases.common import relative, start
from tests.tiny_models import (
    LATENT_FACTOR,
    SCHEDULER,
    make_control_net,
    make_pipeline,
    make_stable_diffusion,
    tiny,
    with_base,
)

METHODS = [name for name, each in methods().items() if issubclass(each, Views)]
ON = {"enabled": True, "scale": 0.8}


@lru_cache(maxsize=1)
def net() -> Any:
    return make_control_net(tiny().unet)


def controlled(models: Models | None = None) -> Models:
    return with_base(models or adapted(), control_net=net())


def draw(method: str, models: Models | None = None, image=None, seed: int = 4, **values: Any):
    config = settings(method, **{"steps": 3, "view_batch": 4, **values})
    return upscale_image(models or controlled(), image or some_image(), "a cat", config=config, seed=seed)


@contextmanager
def calls_of(module: Any):
    """What a module is called with: (positional, named) arguments."""
    seen: list[tuple[tuple, dict]] = []
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return before(*args, **kwargs)

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward


# ------------------------------------------------------------------------------------------- beside diffusers


def latents(models: Models, noise: torch.Tensor, control: ControlConfig, shown: torch.Tensor) -> torch.Tensor:
    """What the engine draws from `noise` on one view, with the control image `shown` [B, 3, H, W] in [0, 1]."""
    height, width = (side * LATENT_FACTOR for side in noise.shape[-2:])
    config = settings("multidiffusion", stepper="ddim_keep", steps=4, guidance_scale=5.0, micro_conditioning="native")
    asked = replace(
        request(models, config),
        height=height,
        width=width,
        prompts=("a cat",) * len(noise),
        negative_prompts=("ugly",) * len(noise),
    )
    composition = Control(models, shown, control).applied(config.compose(asked))
    draw = CanvasNoise([0], 4, *noise.shape[-2:], models.device)
    return denoise(models, composition, asked.path, noise, draw, view_batch=16)


@pytest.mark.parametrize(
    ("kind", "union", "image"),
    [("sdxl", False, "tile"), ("sdxl", True, "tile"), ("sdxl", True, "canny"), ("sd", False, "tile")],
)
def test_one_view_is_what_diffusers_draws(kind: str, union: bool, image: str) -> None:
    pipe = make_pipeline() if kind == "sdxl" else make_stable_diffusion()
    own = make_control_net(pipe.unet, union)
    pipe.scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
    models = Models.from_pipeline(pipe)
    noise = start(models, 64, 48, batch=2)
    shown = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(3))
    ours = latents(with_base(models, control_net=own), noise, ControlConfig(**ON, image=image), shown)

    theirs: dict[str, Any] = {"image": shown}
    if kind == "sd":
        there: Any = StableDiffusionControlNetPipeline
    elif union:
        there = StableDiffusionXLControlNetUnionPipeline
        theirs = {"control_image": [shown], "control_mode": [{"tile": 6, "canny": 3}[image]]}
    else:
        there = StableDiffusionXLControlNetPipeline
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder",)}
    drawn = there(**parts, controlnet=own)
    drawn.set_progress_bar_config(disable=True)
    expected = drawn(
        ["a cat"] * 2,
        negative_prompt=["ugly"] * 2,
        num_inference_steps=4,
        guidance_scale=5.0,
        controlnet_conditioning_scale=ON["scale"],
        latents=noise.clone(),
        height=64,
        width=48,
        output_type="latent",
        **theirs,
    ).images
    assert relative(ours, expected) <= 1e-5
    without = latents(with_base(models, control_net=own), noise, ControlConfig(enabled=True, scale=1e-3), shown)
    assert relative(without, expected) > 0.01  # the net matters


# ------------------------------------------------------------------------------------------- weight 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("control", [{"enabled": False}, {"enabled": True, "scale": 0}], ids=str)
def test_without_weight_nothing_changes_and_no_net_is_needed(method: str, control: dict) -> None:
    before = draw(method, adapted()).tobytes()
    assert draw(method, adapted(), control=control).tobytes() == before
    with calls_of(net()) as calls:
        assert draw(method, control=control).tobytes() == before
    assert not calls


@pytest.mark.parametrize("method", METHODS)
def test_with_weight_the_image_changes_and_the_model_is_left_as_it_was(method: str) -> None:
    models = controlled()
    assert difference(draw(method, models), draw(method, models, control=ON)) > 3
    assert forwards(models.base.denoiser) == forwards(models.control_net) == {}


def test_patches_are_undone_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    models = controlled()

    def lost(*arguments: Any) -> None:
        raise ValueError("lost")

    monkeypatch.setattr(net().controlnet_mid_block, "forward", lost)
    with pytest.raises(ValueError, match="lost"):
        draw("multidiffusion", models, control=ON)
    monkeypatch.undo()
    assert forwards(models.base.denoiser) == forwards(models.control_net) == {}


def test_outside_its_range_the_net_is_not_called() -> None:
    values = {"steps": 10, "guidance_scale": 1.0, "view_batch": 16, "init": "noise"}
    for control, calls in (({"start": 0.3, "stop": 0.8}, 5), ({"stop": 0.1}, 1), ({"start": 0.5}, 5)):
        with calls_of(net()) as seen:
            draw("multidiffusion", control={**ON, **control}, **values)
        assert len(seen) == calls
    first = draw("multidiffusion", control={**ON, "start": 0.99}, **values)
    assert first.tobytes() == draw("multidiffusion", adapted(), **values).tobytes()


# ------------------------------------------------------------------------------------------- crops


def numbered(grid: Grid, factor: int) -> torch.Tensor:
    """An image [1, 3, H, W] in which every pixel says where it is."""
    y, x = torch.meshgrid(torch.arange(grid.height * factor), torch.arange(grid.width * factor), indexing="ij")
    return torch.stack([y, x, torch.ones_like(y)])[None] / 1000


def crop(image: torch.Tensor, y: int, x: int, height: int, width: int) -> torch.Tensor:
    """The part of an image [3, H, W] at a place, pixel by pixel, black beyond the image."""
    shown = torch.zeros(3, height, width)
    for row in range(height):
        for col in range(width):
            if 0 <= y + row < image.shape[1] and 0 <= x + col < image.shape[2]:
                shown[:, row, col] = image[:, y + row, x + col]
    return shown


def test_each_view_has_its_own_crop() -> None:
    grid = Grid(26, 21, 16, 8)
    shown = numbered(grid, LATENT_FACTOR)
    control = Control(controlled(), shown, ControlConfig(**ON))
    for there in (grid, replace(grid, shift=(3, 5))):
        expected = [crop(shown[0], y0 * 4, x0 * 4, (y1 - y0) * 4, (x1 - x0) * 4) for y0, x0, y1, x1 in there.boxes]
        torch.testing.assert_close(control.crops(Fuser(there, "uniform")), torch.stack(expected))


def test_beyond_the_canvas_a_crop_is_black() -> None:
    grid = Grid(24, 24, 16, 8)
    shown = numbered(grid, LATENT_FACTOR)
    control = Control(controlled(), shown, ControlConfig(**ON))
    origins = [[(-2, 1), (8, 10), (10, -1)]]  # a window may be shifted by 2
    expected = torch.stack([crop(shown[0], y * 4, x * 4, 64, 64) for y, x in origins[0]])
    torch.testing.assert_close(control.crops(ScatteredViews(grid, origins, "uniform")), expected)


def embedded_by_item(image, **values: Any) -> list[torch.Tensor]:
    """The condition that the net reads in each row of its calls."""
    rows: list[torch.Tensor] = []
    plain_forward = net().conv_in.forward
    with calls_of(net()) as seen:
        draw("multidiffusion", image=image, **values)
    assert net().conv_in.forward == plain_forward
    for args, kwargs in seen:
        assert len(kwargs["controlnet_cond"]) == len(args[0])
        rows += list(kwargs["controlnet_cond"])
    return rows


def test_every_row_reads_the_embedding_of_its_own_view_and_both_branches_see_it() -> None:
    image = some_image(48, 40, seed=7)
    config = settings("multidiffusion", steps=1, control=ON)
    asked = request(controlled(), config, image)
    shown = asked.control_image("tile", 80, 96)
    expected = [
        net().controlnet_cond_embedding(crop(shown[0], *box[:2], box[2] - box[0], box[3] - box[1])[None])[0]
        for box in asked.views().canvas_boxes
    ]
    assert len(expected) == 4
    rows = embedded_by_item(image, steps=2, control=ON, view_batch=16)
    assert len(rows) == 2 * 2 * 4  # steps, branches, views
    for number, row in enumerate(rows):
        torch.testing.assert_close(row, expected[number % 4], rtol=1e-5, atol=1e-6)
    apart = torch.stack(expected)
    assert (apart[0] - apart[1]).abs().max() > 0.01  # the whole image for every view would fail


def test_every_view_is_embedded_once() -> None:
    embedding = net().controlnet_cond_embedding
    for values, views in (({}, 9), ({"view_batch": 2}, 9), ({"shift": "every_step", "shift_stop": 0.5}, 2 * 16 + 9)):
        with calls_of(embedding.conv_in) as seen:
            draw("multidiffusion", control=ON, **{"steps": 4, "guidance_scale": 4.0, **values})
        assert sum(len(args[0]) for args, _ in seen) == views


def test_embeddings_that_are_kept_are_those_that_the_net_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The net embeds the crops of every call anew instead, as diffusers does."""
    kept = draw("multidiffusion", control=ON)
    embed, features, times = net().controlnet_cond_embedding.forward, Control._features, 0

    def anew(self, sample, timestep, arguments, condition, weight):
        nonlocal times
        times += 1
        (same,) = {int(row) for row in (condition[:, None] == self._embedded).flatten(2).all(2).sum(1)}
        assert same == 1  # every row is one of the kept embeddings
        items = (condition[:, None] == self._embedded).flatten(2).all(2).int().argmax(1)
        return features(self, sample, timestep, arguments, embed(self.crops(self._views)[items]), weight)

    monkeypatch.setattr(Control, "_features", anew)
    assert difference(kept, draw("multidiffusion", control=ON)) <= 1
    assert times == 3 * 3  # steps, calls


def test_permuted_items_give_permuted_predictions() -> None:
    models = controlled()
    grid = Grid(24, 24, 16, 8)
    control = Control(models, torch.rand(1, 3, 96, 96), ControlConfig(**ON))
    step = request(models, settings("multidiffusion", steps=2)).path[0]
    views = Fuser(grid, "uniform")
    composition = settings("multidiffusion").compose(request(models, settings("multidiffusion")))
    (group,) = control.applied(
        replace(composition, groups=(replace(composition.groups[0], at=lambda s: (views, None)),))
    ).groups
    unet = models.base.denoiser
    x, states = torch.randn(4, 4, 16, 16), torch.randn(4, 77, 32)
    added = {"text_embeds": torch.randn(4, 16), "time_ids": torch.rand(4, 6), "image_embeds": []}
    call = DenoiserCall(step=step, branches=(TEXT,))

    def predicted(items: torch.Tensor) -> torch.Tensor:
        call.items, call.states = items, states[items]
        arguments = {
            "text_embeds": added["text_embeds"][items],
            "time_ids": added["time_ids"][items],
            "image_embeds": [],
        }
        return unet(
            x[items],
            torch.tensor(500),
            return_dict=False,
            encoder_hidden_states=call.states,
            added_cond_kwargs=arguments,
        )[0]

    with torch.inference_mode(), models.base.image_scale(0.0), control.patch(unet, call):
        group.at(step)
        straight = predicted(torch.arange(4))
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(predicted(order), straight[order], rtol=1e-4, atol=1e-5)
        repeated = torch.tensor([1, 1, 3])
        torch.testing.assert_close(predicted(repeated), straight[repeated], rtol=1e-4, atol=1e-5)
        call.step = None
        assert (predicted(torch.arange(4)) - straight).abs().max() > 1e-3  # other calls are not controlled


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [{}, {"scale": 2.3}, {"fuse": "cosine"}], ids=str)
def test_the_batch_makes_no_difference(method: str, values: dict) -> None:
    image = some_image(56, 48)
    several = draw(method, image=image, control=ON, view_batch=5, **values)
    single = draw(method, image=image, control=ON, view_batch=1, **values)
    assert difference(several, single) <= 1


def test_samples_of_a_batch_have_their_own_control_images() -> None:
    models = controlled(models=plain())
    config = settings("multidiffusion", steps=3, control=ON)
    images = [some_image(seed=seed) for seed in (1, 2)]
    asked = [request(models, config, image) for image in images]
    both = replace(
        asked[0],
        prompts=("a cat",) * 2,
        negative_prompts=("",) * 2,
        reference=replace(
            asked[0].reference,
            pixels=torch.cat([each.reference.pixels for each in asked]),
            low_res=torch.cat([each.reference.low_res for each in asked]),
        ),
    )
    asked = [replace(each, negative_prompts=("",)) for each in asked]

    def drawn(of, seeds) -> torch.Tensor:
        noise = CanvasNoise(seeds, 4, 32, 32, models.device)
        composition = config.controlled(of, config.compose(of), 32, 32)
        return denoise(models, composition, of.path, noise(), noise, view_batch=16)

    together = drawn(both, [5, 6])
    for number, (of, seed) in enumerate(zip(asked, (5, 6))):
        torch.testing.assert_close(together[number : number + 1], drawn(of, [seed]), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------- control images


def test_the_control_image_is_the_enlarged_low_res_image_or_its_edges() -> None:
    asked = request(controlled(), settings("multidiffusion", scale=2.5), some_image(50, 40))
    height, width = (side * LATENT_FACTOR for side in asked.canvas_size)
    assert (height, width) == (100, 128)
    tile = asked.control_image("tile", height, width)
    assert torch.equal(tile, asked.reference.pixels / 2 + 0.5)
    edges = asked.control_image("canny", height, width)
    assert edges.shape == tile.shape
    assert torch.equal(edges[:, 0], edges[:, 2])
    small = canny(asked.reference.small)
    torch.testing.assert_close(edges[:, :1], enlarged(small * 2 - 1, height, width) / 2 + 0.5)
    assert 0 == edges.min() < edges.max() == 1
    half = asked.control_image("tile", 52, 64)  # of a phase on the way
    torch.testing.assert_close(half, enlarged(asked.reference.small, 52, 64) / 2 + 0.5)


def test_a_control_image_needs_a_low_res_image() -> None:
    asked = replace(request(controlled(), settings("multidiffusion", control=ON)), reference=None)
    with pytest.raises(ConfigError, match="follows a low-res image"):
        asked.control_image("tile", 128, 128)
    assert asked.config.uses("reference")
    assert not settings("multidiffusion").uses("reference")


def test_edges_and_tiles_lead_to_different_images() -> None:
    images = [draw("resmaster", control={**ON, "image": image}) for image in ("tile", "canny")]
    assert difference(*images) > 3


# ------------------------------------------------------------------------------------------- beside other parts


def test_only_windows_are_controlled() -> None:
    """DemoFusion's dilated views, and the low-res image that C-Upscale and a time-matched anchor predict, are not."""
    for method, values in (
        ("demofusion", {"scale": 2, "start": 0.0}),
        ("c_upscale", {}),
        ("c_upscale", {"structure": {"anchor": "time_matched", "stop": 1.0}}),
        ("resmaster", {"structure": {"anchor": "time_matched", "stop": 1.0}, "preset": "exact"}),
    ):
        config = settings(method, **{"steps": 3, "view_batch": 1, "guidance_scale": 1.0, "control": ON, **values})
        with calls_of(net()) as seen:
            upscale_image(controlled(), some_image(), "a cat", config=config)
        (windows,) = [
            each.rows for each in high_res_work(config, Denoising(adapted().geometry), 64, 64) if each.share != 1
        ]
        assert len(seen) == windows
        assert {tuple(args[0].shape[-2:]) for args, _ in seen} == {(16, 16)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scale": 2.5, "guidance_stop": 0.5},
        {"via": [1.5], "scale": 3},
        {"control": {**ON, "start": 0.3, "stop": 0.7}},
    ],
    ids=str,
)
def test_the_forecast_is_what_is_counted(method: str, values: dict) -> None:
    config = settings(method, **{"steps": 10, "view_batch": 1, "control": ON, **values})
    with counting() as counted:
        upscale_image(controlled(), some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(adapted().geometry), 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.native_rows for each in work) == pytest.approx(counted.native_rows)
    assert {each.share for each in work} == {1.0, CONTROL_SHARE}


@pytest.mark.parametrize("shift", ["none", "every_step"])
def test_a_row_with_a_control_net_costs_1_44_rows(shift: str) -> None:
    config = settings("multidiffusion", scale=4, steps=20, shift=shift)
    sizes = (Denoising(adapted().geometry), 64, 64)
    without = sum(each.native_rows for each in high_res_work(config, *sizes))
    on = config.model_copy(update={"control": ControlConfig(**ON)})
    assert sum(each.native_rows for each in high_res_work(on, *sizes)) == pytest.approx(1.44 * without)
    half = config.model_copy(update={"control": ControlConfig(**ON, stop=0.5)})
    assert sum(each.native_rows for each in high_res_work(half, *sizes)) == pytest.approx((1 + 0.44 / 2) * without)


def test_the_share_of_a_control_net_is_that_of_sdxls() -> None:
    """Counted on shapes without values, layer by layer."""
    with torch.device("meta"), torch.inference_mode():
        unet = UNet2DConditionModel(**SDXL)
        own = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        states, added = torch.empty(1, 77, 2048), {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        latents, crop = torch.empty(1, 4, 128, 128), torch.empty(1, 3, 1024, 1024)

        def work(call: Callable[[], Any]) -> int:
            with FlopCounterMode(display=False) as counted:
                call()
            return int(counted.get_total_flops())

        own_work = work(lambda: own(latents, torch.tensor(9), states, crop, added_cond_kwargs=added))
        embedding = work(lambda: own.controlnet_cond_embedding(crop))
        row = work(lambda: unet(latents, torch.tensor(9), states, added_cond_kwargs=added))
    assert (own_work - embedding) / row == pytest.approx(CONTROL_SHARE, abs=0.005)


def test_image_prompts_and_a_control_net_add_up() -> None:
    both = draw("resmaster", control=ON)
    for other in ({"image_prompt": {"enabled": False}, "control": ON}, {}):
        assert difference(both, draw("resmaster", **other)) > 1


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_image() -> None:
    plain_image = draw("multidiffusion", controlled(models=plain()), steps=2, control=ON)
    pipe = make_pipeline()
    compile_blocks(pipe.unet)
    models = with_base(Models.from_pipeline(pipe), control_net=net())
    assert difference(plain_image, draw("multidiffusion", models, steps=2, control=ON)) <= 2


def test_without_a_net_one_line_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"needs a ControlNet; set model\.controlnet, or upscale\.control\.enabled"):
        draw("multidiffusion", adapted(), control=ON)


def test_a_users_own_pipeline_brings_its_net() -> None:
    pipe = make_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    own = StableDiffusionXLControlNetPipeline(**parts, controlnet=net())
    models = Models.from_pipeline(own)
    assert models.control_net is net()
    assert difference(draw("multidiffusion", models, control=ON), draw("multidiffusion", control=ON)) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_same_unet_on_a_flow_path_is_controlled_in_the_same_way(method: str) -> None:
    pipe = make_pipeline()
    pipe.controlnet = net()
    values = {"control": ON, "guidance_scale": 2.0, "jitter": "off"} if method == "demofusion" else {"control": ON}
    if method == "resmaster":
        values |= {"image_prompt": {"enabled": False}}
    if method == "demofusion":
        values |= {"phases": "last", "sigma": 1e-3}  # its blurred views mean something else on a flow path
    images = [draw(method, Models.from_pipeline(each), **values) for each in (pipe, AsFlowPipeline(pipe))]
    assert difference(*images) <= 2


def test_a_net_of_another_model_is_refused_in_one_line() -> None:
    other = make_control_net(make_stable_diffusion().unet)
    models = with_base(adapted(), control_net=other)
    with pytest.raises(ConfigError, match=r"model\.controlnet: it was made for another base model"):
        draw("multidiffusion", models, control=ON)
