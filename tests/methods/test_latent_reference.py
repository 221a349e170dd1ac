"""How the low-res image becomes latents of the target's size (`upscale.reference`): what each way does, and to what."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from pydantic import ValidationError

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method, methods
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.diffusion import autoencoder, image_prompts
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.edges import edge_density
from resmaster_stages.diffusion.frequency import resampled
from resmaster_stages.diffusion.loop import CanvasNoise
from resmaster_stages.diffusion.reference import to_tensor
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.settings import Following
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import latent_enlarger_files
from resmaster_stages.models.identity import weights_of
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.checkout import ROOT
from tests.latent_enlargers import SHAPE, network, save
from tests.methods.common import DIFFUSION_METHODS, adapted, request, settings, some_image
from tests.tiny_transformers import make_flux

VALUES = {
    "resmaster": {"image_prompt": {"enabled": False}},
    "c_upscale": {"share": 0.0},
    "multidiffusion": {"init": "noised_lr", "start": 0.3},
    "direct": {"init": "noised_lr", "start": 0.3},
    "scalecrafter": {"init": "noised_lr"},
    "fouriscale": {"init": "noised_lr"},
    "hidiffusion": {"init": "noised_lr"},
}
"""Settings with which a method begins from the low-res image."""
OWN = {"demofusion": "latent", "scalediff": "mixed"}
"""How a method's authors enlarge the low-res image, if not in pixels."""
FOLLOWING = tuple(name for name in DIFFUSION_METHODS if issubclass(type(settings(name)), Following))
SIZE = (32, 32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("net") / "net.safetensors", adapted()))


def configured(method: str, reference: dict | None = None, **values):
    given = {} if reference is None else {"reference": reference}
    return settings(method, **{**VALUES.get(method, {}), **given, **values})


def begun(method: str, reference: dict | None = None, image: Image.Image | None = None, **values) -> torch.Tensor:
    """The clean latents that a method's first pass begins from at 2x, less the noise of the pass."""
    asked = request(adapted(), configured(method, reference, **values), image)
    first = asked.config.passes(asked)[0]
    noise, again = (CanvasNoise([1], 4, first.height, first.width, asked.models.device) for _ in range(2))
    step = (first.path or asked.path)[first.first]
    z, _ = first.begin(None, noise, step)
    return (z - step.sigma * again()) / step.alpha


def drawn(config, seed=5, image=None, models: Models | None = None) -> np.ndarray:
    return np.asarray(upscale_image(models or adapted(), image or some_image(), "a cat", config=config, seed=seed))


def small_latents(image=None) -> torch.Tensor:
    return autoencoder.encode(adapted(), to_tensor(image or some_image()))


def test_the_methods_that_the_page_names_have_the_part() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    named = re.search(r"All methods but ([^.]*) have the setting\. ([^.]*) read it with `init: noised_lr`\.", page)
    assert named
    without, from_noise = (set(re.findall(r"[a-z_]+", each)) & set(methods()) for each in named.groups())
    assert set(methods()) - without == set(FOLLOWING)
    assert {name for name in FOLLOWING if not settings(name).uses("reference")} == from_noise


@pytest.mark.parametrize("method", FOLLOWING)
def test_a_pass_begins_from_latents_that_were_enlarged_as_the_settings_say(method: str, file: str) -> None:
    pixels = request(adapted(), settings(method)).reference.pixels
    ways = {
        "image": autoencoder.encode(adapted(), pixels),
        "latent": F.interpolate(small_latents(), size=SIZE, mode="bicubic", align_corners=False),
        "network": network()(small_latents(), *SIZE),
    }
    pixels, latents = ways["image"], ways["latent"]
    ways["mixed"] = pixels + resampled(latents - pixels, getattr(settings(method), "mix_cutoff", 1.0))
    ways["own"] = ways[OWN.get(method, "image")]
    del ways["mixed"]
    assert (ways["image"] - ways["latent"]).abs().max() > 0.05
    assert (ways["network"] - ways["latent"]).abs().max() > 0.05
    for way, latents in ways.items():
        reference = {"enlarge": way, **({"model": file} if way == "network" else {})}
        torch.testing.assert_close(begun(method, reference), latents, atol=2e-3, rtol=0)
    torch.testing.assert_close(begun(method), ways["own"], atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", FOLLOWING)
def test_without_the_part_identity_and_bytes_are_what_they_were(method: str) -> None:
    plain = configured(method)
    assert "reference" not in plain.identity()
    same = configured(method, {"enlarge": "own", "edge_noise": [0, 0]})
    assert same.identity() == plain.identity()
    assert (drawn(same) == drawn(plain)).all()
    own = OWN.get(method, "image")
    if own != "mixed":
        explicit = configured(method, {"enlarge": own})
        assert explicit.identity()["reference"] == {"enlarge": own}
        assert (drawn(explicit) == drawn(plain)).all()


def test_structural_guidance_takes_the_low_frequencies_of_the_enlarged_latents(file: str) -> None:
    def anchor(reference: dict | None) -> torch.Tensor:
        asked = request(adapted(), configured("resmaster", reference, preset="exact"))
        return asked.config._anchor(asked, CanvasNoise([1], 4, *SIZE, asked.models.device), nullcontext)(asked.path[0])

    by_network = anchor({"enlarge": "network", "model": file})
    torch.testing.assert_close(by_network, network()(small_latents(), *SIZE))
    assert (anchor(None) - by_network).abs().max() > 0.05
    exact = configured("resmaster", {"enlarge": "network", "model": file}, preset="exact")
    assert (drawn(exact) != drawn(configured("resmaster", preset="exact"))).any()


def test_image_prompts_still_see_the_enlarged_pixels(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    embed = image_prompts.embed_crops
    monkeypatch.setattr(
        image_prompts,
        "embed_crops",
        lambda models, pixels, boxes: (seen.append(pixels), embed(models, pixels, boxes))[1],
    )
    for reference in ({}, {"enlarge": "network", "model": file}):
        drawn(settings("resmaster", reference=reference))
    assert torch.equal(*seen)


@pytest.mark.parametrize("method", ["demofusion", "freescale", "scalediff", "pixelrush"])
def test_every_phase_enlarges_the_latents_of_the_one_before_by_the_network(
    method: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []

    def watched(models, latents, height, width, config):
        sizes.append((*latents.shape[-2:], height, width))
        return network()(latents, height, width)

    monkeypatch.setattr(latent_enlarger_files, "enlarge_latents", watched)
    values = {"scale": 3, "phases": "every"}
    drawn(configured(method, {"enlarge": "network", "model": file}, **values))
    assert sizes == [(16, 16, 32, 32), (32, 32, 48, 48)]


@pytest.mark.parametrize(("size", "scale"), [((50, 38), 2.3), ((64, 64), 1.0), ((36, 80), 3.0)])
def test_images_of_any_size_and_scale(size: tuple[int, int], scale: float, file: str) -> None:
    image, reference = some_image(*size), {"enlarge": "network", "model": file, "edge_noise": [0.1, 0.5]}
    for method in ("resmaster", "demofusion"):
        made = drawn(configured(method, reference, scale=scale), image=image)
        assert made.shape[:2] == (round(size[1] * scale), round(size[0] * scale))


def test_transformers_can_be_served_too(tmp_path: Path) -> None:
    models = Models.from_pipeline(make_flux())
    shape = replace(SHAPE, channels=models.base.latent_channels)
    path = save(tmp_path / "net.safetensors", models, network(shape=shape))
    values = {"guidance_scale": 3.5, "negative_prompt": "", **VALUES["multidiffusion"]}
    plain = settings("multidiffusion", **values)
    by_network = settings("multidiffusion", **values, reference={"enlarge": "network", "model": str(path)})
    assert (drawn(plain, models=models) != drawn(by_network, models=models)).any()


# ------------------------------------------------------------------------------------------------------- noise at edges


def half_striped() -> Image.Image:
    """Smooth on the left, black and white stripes on the right."""
    image = np.full((64, 64, 3), 128, dtype=np.uint8)
    image[:, 32:] = np.where(np.arange(32) // 4 % 2, 255, 0)[None, :, None]
    return Image.fromarray(image)


def test_edges_are_counted_from_none_to_all() -> None:
    density = edge_density(to_tensor(half_striped()), 32, 24)
    assert density.shape == (1, 1, 32, 24)
    assert (density.min(), density.max()) == (0, 1)
    assert density[..., :10].max() == 0
    assert density[..., 13:-1].mean() > 0.3


def test_an_image_without_edges_has_none_and_samples_do_not_share_their_range() -> None:
    flat, striped = torch.zeros(1, 3, 64, 64), to_tensor(half_striped())
    assert edge_density(flat, 16, 16).abs().max() == 0
    both = edge_density(torch.cat([flat, striped]), 16, 16)
    assert torch.equal(both[1:], edge_density(striped, 16, 16))


@pytest.mark.parametrize("method", FOLLOWING)
def test_noise_at_edges_is_drawn_after_the_noise_of_the_pass_and_has_the_asked_spread(method: str) -> None:
    image, (low, high) = half_striped(), (0.25, 1.5)
    added = begun(method, {"edge_noise": [low, high]}, image) - begun(method, image=image)
    noise = CanvasNoise([1], 4, *SIZE, torch.device("cpu"))
    if method != "pixelrush":  # which inverts the image instead of noising it
        noise()
    spread = low + (high - low) * edge_density(to_tensor(image), *SIZE)
    assert (spread.min(), spread.max()) == (low, high)
    torch.testing.assert_close(added, spread * noise(), atol=5e-3, rtol=0)


def test_noise_at_edges_changes_the_image_and_is_drawn_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy, image = configured("demofusion", {"edge_noise": [0, 1.2]}), half_striped()
    assert (drawn(noisy, image=image) != drawn(configured("demofusion"), image=image)).any()
    assert (drawn(noisy, image=image) == drawn(noisy, image=image)).all()
    assert (drawn(noisy, image=image, seed=6) != drawn(noisy, image=image)).any()


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("method", "values", "why"),
    [
        ("resmaster", {"reference": {"edge_noise": [1, 0.5]}}, "the smaller one first"),
        ("resmaster", {"reference": {"edge_noise": [0, 40]}}, "two numbers from 0 to 4"),
        ("resmaster", {"wrap": "both", "reference": {"edge_noise": [0, 1]}}, "do not continue at the opposite border"),
        (
            "c_upscale",
            {"wrap": "horizontal", "reference": {"enlarge": "network", "model": "n.safetensors"}},
            "do not continue at the opposite border",
        ),
        ("resmaster", {"reference": {"enlarge": "network"}}, "needs a network; set model to a file"),
        ("resmaster", {"reference": {"model": "net.safetensors"}}, "model is set, but is read only with enlarge: netw"),
        ("resmaster", {"reference": {"enlarge": "network", "model": "net.pth"}}, r"not a \.safetensors file"),
        ("resmaster", {"reference": {"enlarge": "pixels"}}, "'own', 'image', 'latent' or 'network'"),
        ("resmaster", {"preset": "exact", "reference": {"edge_noise": [0, 1]}}, "edge_noise is read only with init"),
        (
            "multidiffusion",
            {"reference": {"enlarge": "latent"}},
            "reference is set, but is read only with init: noised",
        ),
        ("lanczos", {"reference": {"enlarge": "latent"}}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method: str, values: dict, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        settings(method, **values)


def test_the_settings_of_lsrna_on_the_page_of_methods(file: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    (written,) = re.findall(r"\*\*LSRNA itself\*\* is `upscale: (\{[^`]*\})`", page)
    values = yaml.safe_load(written)
    values["reference"]["model"] = file
    config = Method.model_validate(values)
    assert config.reference == ReferenceConfig(enlarge="network", model=file, edge_noise=(0.0, 1.2))
    assert (config.phases, config.stepper, config.jitter, config.steps) == ("last", "ddim_keep", "zeros", 50)
    asked = request(adapted(), config)
    (only,) = config.passes(asked)
    assert len(asked.path[only.first :]) == 30
    small = config.model_copy(update={"steps": 5, "scale": 2})
    with counting() as counted:
        drawn(small)
    assert counted.rows == 3 * 2 * (9 + 4)
    work = high_res_work(small, Denoising(adapted().geometry), 64, 64)
    assert sum(each.rows for each in work) == counted.rows


def test_the_identity_holds_the_weights_of_the_network_where_one_is_used(file: str, tmp_path: Path) -> None:
    def hashed(**reference) -> str:
        config = parse_config({"name": "d", "upscale": {"method": "resmaster", "reference": reference}})
        return hashes_of(config, weights_of(config))["high_res"]

    copy = tmp_path / "net.safetensors"
    copy.write_bytes(Path(file).read_bytes())
    before = hashed(enlarge="network", model=str(copy))
    assert len({before, hashed(), hashed(enlarge="latent")}) == 3
    save(copy, adapted(), network(1))
    assert hashed(enlarge="network", model=str(copy)) != before
    assert hashed(enlarge="image") != hashed()


def test_planning_refuses_a_network_for_another_vae_and_one_that_is_not_there(file: str, tmp_path: Path) -> None:
    def lines(model: str) -> tuple[str, ...]:
        reference = {"enlarge": "network", "model": model}
        values = {"name": "d", "root": str(tmp_path / "root"), "upscale": {"reference": reference}}
        with pytest.raises(ConfigError) as caught:
            check(parse_config(values))
        return caught.value.mistakes

    (line,) = lines(file)
    assert line.startswith("upscale.reference.model: ")
    assert "another VAE than that of model picturebook" in line
    (line,) = lines("none.safetensors")
    assert line.startswith("upscale.reference.model: none.safetensors is no file")
