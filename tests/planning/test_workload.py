"""What is estimated of a method's work is what the engine counts when it does it."""

from dataclasses import dataclass, fields, replace

import pytest

from resmaster_stages.config.dataset import LowResConfig
from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.diffusion.cost import UnetWork, counting
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry, Sampling
from resmaster_stages.models.bases.unet import Unet
from resmaster_stages.models.flow import SCHEDULER, flow_schedule
from resmaster_stages.models.schedule import course_of
from resmaster_stages.planning.workload import Denoising, high_res_work, low_res_work
from tests.methods.common import DIFFUSION_METHODS, adapted, settings, some_image

CASES = [(method, preset) for method, each in methods().items() for preset in each.presets]


@pytest.mark.parametrize(("method", "preset"), CASES)
@pytest.mark.parametrize(
    "values", [{"scale": 2.5}, {"scale": 4, "steps": 3}, {"scale": 2, "guidance_scale": 1.0}], ids=str
)
def test_every_method_does_the_work_that_is_estimated(method: str, preset: str, values: dict) -> None:
    config = Method.model_validate({**with_method({"steps": 2, "view_batch": 1, **values}, method), "preset": preset})
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


@pytest.mark.parametrize("method", DIFFUSION_METHODS)
def test_images_that_are_finished_on_the_way(method: str) -> None:
    config = settings(method, scale=3.5, via=[1.5], view_batch=1)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


@pytest.mark.parametrize(
    "method", ["direct", "multidiffusion", "resmaster", "scalecrafter", "fouriscale", "hidiffusion"]
)
@pytest.mark.parametrize("start", [0.5, 0.9])
def test_paths_that_begin_later(method: str, start: float) -> None:
    config = settings(method, scale=4, steps=6, init="noised_lr", start=start, view_batch=1)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(32, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 32)
    assert sum(each.rows for each in work) == counted.rows


@pytest.mark.parametrize("preset", ["default", "rectifiedhr", "frecas", "diffusehigh", "megafusion"])
@pytest.mark.parametrize(
    "values",
    [
        {"scale": 3.5, "steps": 9},
        {"scale": 4, "steps": 1},
        {"scale": 8, "steps": 20, "guidance_scale": 1.0, "guidance_last": 9.0},
        {"scale": 3, "steps": 7, "first": "low_res", "guidance_low": 1.0},
    ],
    ids=str,
)
def test_cascades_of_any_scale(preset: str, values: dict) -> None:
    config = settings("cascade", preset=preset, view_batch=1, **values)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(40, 24), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 24, 40)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


def test_moving_windows() -> None:
    config = settings("resmaster", shift="every_step", view_batch=1)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(64, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 64)
    assert sum(each.rows for each in work) == counted.rows


@pytest.mark.parametrize("method", ["resmaster", "c_upscale"])
@pytest.mark.parametrize("values", [{}, {"guidance_stop": 0.7}, {"guidance_scale": 1.0}], ids=str)
def test_a_reference_that_keeps_pace(method: str, values: dict) -> None:
    structure = {"preset": "hiflow", "start": 0.2, "stop": 0.9}
    config = settings(method, scale=3, steps=10, structure=structure, view_batch=1, **values)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


def test_low_res_images() -> None:
    models = adapted()
    with counting() as counted:
        list(generate(models, ["a cat"], [""], [0], 32, 64, 3, 5.0, 1))
    work = low_res_work(LowResConfig(steps=3, guidance_scale=5.0), Denoising(models.geometry), 32, 64)
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


def test_the_papers_numbers() -> None:
    """4096 px from 1024 px: 49 views a step, and DemoFusion's 112 over its three phases.

    (Less the steps before its start.)
    """
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    assert high_res_work(settings("resmaster", preset="exact", scale=4, steps=50), *sizes) == (
        UnetWork(50 * 2 * 49, 1.0),
    )
    demofusion = high_res_work(settings("demofusion", scale=4, steps=50, start=0), *sizes)
    assert sum(each.rows for each in demofusion) == 50 * 2 * (9 + 4 + 25 + 9 + 49 + 16)


def test_resmasters_default_takes_a_sixth_of_the_rows() -> None:
    sizes = (Denoising(Geometry(1024, 8)), 1024, 1024)
    rows = {
        preset: sum(each.rows for each in high_res_work(ResMaster(preset=preset), *sizes))
        for preset in ("exact", "default")
    }
    # 18 of 25 steps: 11 with guidance and 2 without on 25 moving views, the last 5 on 49 that stand still
    assert rows == {"exact": 4900, "default": 11 * 25 * 2 + 2 * 25 + 5 * 49}
    assert rows["default"] <= 850


@pytest.mark.parametrize(
    ("method", "values"), [("resmaster", {}), ("resmaster", {"preset": "exact"}), ("multidiffusion", {})], ids=str
)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (48, 64), (80, 32)])
def test_automatic_batches_repeat_no_view(method: str, values: dict, width: int, height: int) -> None:
    """At 2x, 3x and 4x of a native-size image, in as few calls of one shape as there can be."""
    for scale in (2, 3, 4):
        config = settings(method, scale=scale, steps=2, view_batch=None, **values)
        models = adapted()
        with counting() as counted:
            upscale_image(models, some_image(width, height), "a cat", config=config)
        work = high_res_work(config, Denoising(models.geometry), height, width)
        assert counted.rows == sum(each.rows for each in work)


@pytest.mark.parametrize(
    "method",
    ["direct", "multidiffusion", "resmaster", "demofusion", "hidiffusion", "freescale", "scalediff", "c_upscale"],
)
def test_guidance_that_ends_earlier(method: str) -> None:
    config = settings(method, scale=2, steps=10, guidance_stop=0.5, view_batch=1)
    models = adapted()
    with counting() as counted:
        upscale_image(models, some_image(32, 32), "a cat", config=config)
    work = high_res_work(config, Denoising(models.geometry), 32, 32)
    assert sum(each.rows for each in work) == counted.rows
    assert counted.rows < sum(
        each.rows for each in high_res_work(settings(method, scale=2, steps=10), Denoising(models.geometry), 32, 32)
    )


SHIFTED = {"_class_name": SCHEDULER, "shift": 3.0}


@dataclass(frozen=True, eq=False)
class OnFlow(Unet):
    """A UNet whose output is read as the velocity of a flow path, on which steps are not even in noise level."""

    kind: str

    @property
    def sampling(self):
        return Sampling(self.kind)

    def path(self, steps, timing):
        return flow_schedule(SHIFTED, steps, timing)


def on_flow(kind: str):
    """The model, and what its forecast needs."""
    models = adapted()
    known = {field.name: getattr(models.base, field.name) for field in fields(models.base)}
    models = replace(models, base=OnFlow(**known, kind=kind))
    guided = kind == "cfg"
    return models, Denoising(
        models.geometry, guided, lambda steps, timing: course_of(flow_schedule(SHIFTED, steps, timing), guided)
    )


FLOW_CASES = [
    ("direct", {}),
    ("direct", {"init": "noised_lr", "start": 0.5}),
    ("multidiffusion", {}),
    ("multidiffusion", {"init": "noised_lr", "start": 0.35, "shift": "every_step"}),
    ("resmaster", {"image_prompt": {"enabled": False}}),
    ("resmaster", {"image_prompt": {"enabled": False}, "preset": "exact"}),
    ("resmaster", {"image_prompt": {"enabled": False}, "preset": "faithful"}),
    ("demofusion", {}),
    ("demofusion", {"preset": "faithful"}),
    ("scalediff", {}),
    ("scalediff", {"start": 0.9}),
    ("demofusion", {"skip": "low", "shuffle": "positions"}),
    ("c_upscale", {"share": 0}),
    ("c_upscale", {"share": 0, "start": 0.9}),
]


@pytest.mark.parametrize(("method", "values"), FLOW_CASES, ids=str)
@pytest.mark.parametrize("kind", ["cfg", "none", "embedded"])
@pytest.mark.parametrize("more", [{}, {"time_shift": "sqrt"}, {"time_shift": 0.5, "guidance_stop": 0.6}], ids=str)
def test_flow_paths_do_the_work_that_is_estimated(method: str, values: dict, kind: str, more: dict) -> None:
    sampling = {"steps": 12, "guidance_scale": 1.0 if kind == "none" else 4.0}
    config = settings(method, **{"scale": 2.5, "view_batch": 1, **sampling, **values, **more})
    models, denoising = on_flow(kind)
    with counting() as counted:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, denoising, 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"first": "noise", "leave": 0.6, "restart": None},
        {"first": "noise", "leave": [0.8, 0.6], "restart": None, "gamma": [1.5, 2], "middle": 0.1},
        {"leave": 0.9, "phases": "every", "scale": 3.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["cfg", "none", "embedded"])
@pytest.mark.parametrize("more", [{}, {"time_shift": "sqrt"}, {"time_shift": 0.5}], ids=str)
def test_cascades_along_flow_paths(values: dict, kind: str, more: dict) -> None:
    sampling = {"steps": 12, "guidance_scale": 1.0 if kind == "none" else 4.0}
    config = settings("cascade", **{"scale": 2.5, "view_batch": 1, **sampling, **values, **more})
    models, denoising = on_flow(kind)
    with counting() as counted:
        upscale_image(models, some_image(48, 32), "a cat", config=config)
    work = high_res_work(config, denoising, 32, 48)
    assert sum(each.rows for each in work) == counted.rows
    assert sum(each.rows * each.area for each in work) == pytest.approx(counted.native_rows)


def test_flow_paths_end_guidance_and_begin_at_the_noise_level_and_not_at_the_step() -> None:
    """Shifted paths spend more steps on much noise."""
    sizes = (Denoising(Geometry(64, 4)), 64, 64)
    later = (on_flow("cfg")[1], 64, 64)
    begun = {"scale": 2, "steps": 20, "init": "noised_lr", "start": 0.5}
    rows = [sum(each.rows for each in high_res_work(settings("direct", **begun), *each)) for each in (sizes, later)]
    assert rows == [20, 12]
    stopped = {"scale": 2, "steps": 20, "guidance_stop": 0.5}
    rows = [sum(each.rows for each in high_res_work(settings("direct", **stopped), *each)) for each in (sizes, later)]
    assert rows == [30, 34]
