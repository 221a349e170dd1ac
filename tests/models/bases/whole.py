"""What every family of transformers must do beyond its parity: rows, methods, folders, datasets and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.loop import predict, static_batches
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import captioner, places
from resmaster_stages.models.bases import family_of_pipeline
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import Denoising, high_res_work
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage
from tests.methods.common import settings, some_image

METHODS: dict[str, dict[str, Any]] = {
    "direct": {},
    "multidiffusion": {},
    "resmaster": {"image_prompt": {"enabled": False}},
    "demofusion": {},
    "c_upscale": {"share": 0},
}
"""The methods that need neither convolutions nor attentions of UNets, and their settings."""

CONVOLUTIONS = ("scalecrafter", "fouriscale", "freescale")


def forget() -> None:
    """Drops what is kept of models' files."""
    places._read_json.cache_clear()
    captioner.token_counter.cache_clear()
    load_models.cache_clear()


# ---------------------------------------------------------------------------------------------------------- rows


def rows_of(models: Models, views: Tensor, prompts: Sequence[str], level: float = 700.0, at_once: int = 16) -> Tensor:
    """The unconditional and conditional predictions of `views` [N, C, h, w]: [2, N, C, h, w]."""
    factor = models.geometry.latent_factor
    grid = view_grid(models.geometry, views.shape[-2] * factor, views.shape[-1] * factor, 0.5)
    assert len(grid) == 1
    with torch.inference_mode():
        conditions = make_conditions(models, grid, prompts, [""] * len(prompts), guidance_scale=4.0)
        branches = (NEGATIVE, TEXT) if models.guided(4.0) else (TEXT,)
        call = DenoiserCall(branches=branches)
        batches = static_batches(len(views), at_once)
        return torch.stack(predict(models.base, views, torch.tensor(level), conditions, call, batches))


def some_views(models: Models, count: int, height: int = 16, width: int = 16) -> Tensor:
    """Noise: [count, C, height, width]."""
    shape = (count, models.base.latent_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------------- methods


def drawn(models: Models, method: str, prompt: str = "a cat", **values: Any) -> Image.Image:
    """An image of 40 x 56 px, whose canvas must be padded, enlarged to 80 x 112 px."""
    config = settings(method, **METHODS[method], view_batch=1, **values)
    return upscale_image(models, some_image(56, 40), prompt, config=config, seed=2)


def counted_and_forecast(models: Models, pipe: Any, method: str, **values: Any) -> tuple[int, int]:
    """Rows that a method computes, and the rows that are forecast from the sizes and the course of the model."""
    config = settings(method, **METHODS[method], view_batch=1, **values)
    with counting() as counted:
        upscale_image(models, some_image(56, 40), "a cat", config=config)
    base, guided = models.base, models.base.sampling.kind == "cfg"
    course: Callable[..., Any] = lambda steps, timing: course_of_path(base, steps, timing)  # noqa: E731
    work = high_res_work(config, Denoising(models.geometry, guided, course), 40, 56)
    assert family_of_pipeline(pipe, "m").name == base.family.name
    return counted.rows, sum(each.rows for each in work)


def course_of_path(base: Any, steps: int, timing: Any) -> Any:
    """The course of a loaded model's path."""
    from resmaster_stages.models.schedule import course_of

    return course_of(base.path(steps, timing), base.sampling.kind == "cfg")


def is_visible(image: Image.Image) -> bool:
    """Whether an image has contents: finite, and not of one colour."""
    return float(np.asarray(image).std()) > 1


# ------------------------------------------------------------------------------------------------------- folders


def dataset_of(folder: Path, root: str, model: dict[str, Any], **values: Any) -> DatasetConfig:
    """A dataset of two images of 64 px, enlarged to twice their size by resmaster."""
    (folder / "prompts.txt").write_text("a cat\na big house, red and old\n")
    scale = values.pop("guidance_scale", 4.0)
    base: dict[str, Any] = {
        "name": "d",
        "root": str(folder / root),
        "prompts": str(folder / "prompts.txt"),
        "model": {"device": "cpu", **model},
        "low_res": {"steps": 2, "guidance_scale": scale, "height": 64, "width": 64},
        "captions": {"model": "picturebook"},
        "upscale": {
            "method": "resmaster",
            "scale": 2,
            "steps": 2,
            "guidance_scale": scale,
            "image_prompt": {"enabled": False},
        },
        "quality": {"clip": None},
    }
    for name, value in values.items():
        base[name] = {**base.get(name, {}), **value}
    return parse_config(base)


def built(config: DatasetConfig) -> dict[str, str]:
    """Runs all stages over the one shard. Stage -> sha256 of its object."""
    dataset: Dataset = ingest(config)
    found = {}
    for stage in STAGES:
        receipt = run_stage(dataset, stage, 0)
        assert (receipt.samples_ok, receipt.samples_failed) == (2, 0), stage
        (stored,) = receipt.objects
        found[stage] = stored.sha256
    return found


@contextmanager
def changed(file: Path, **values: Any) -> Iterator[None]:
    """Within the block, a JSON file has other values. A value of `...` is left out."""
    before = file.read_bytes()
    found = {**json.loads(before), **values}
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))
    forget()
    try:
        yield
    finally:
        file.write_bytes(before)
        forget()


def refusals(config: DatasetConfig) -> tuple[str, ...]:
    """What planning, loading or drawing says against a dataset's model; nothing if it draws. Other errors are
    raised."""
    try:
        check(config)
    except ConfigError as error:
        return error.mistakes
    try:
        models, asked = load_models(config.model), config.low_res
        scale = asked.guidance_scale
        (image,) = generate(models, ["a cat"], [""], [0], 32, 32, asked.steps, scale, 1)
    except ConfigError as error:
        return error.mistakes
    assert isinstance(image, Image.Image | SampleError)
    return ()
