"""The training of latent enlargers: what they learn from, by which loss, and by which command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.models.latent_enlarger import LatentEnlarger
from resmaster_stages.models.latent_enlarger_files import check_latent_enlarger, enlarge_latents, fingerprint_of
from resmaster_stages.models.load import load_models
from resmaster_stages.picturebook.training import data
from resmaster_stages.picturebook.training import train_latent_enlarger as training
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.train_latent_enlarger import (
    FOLDER,
    FULL,
    LatentCache,
    LatentRecipe,
    begin_at_bicubic,
    block_loss,
    crops_of,
    export,
    held_out_l1,
    lesson_of,
    load,
    own_lesson,
    reduced_sizes,
    train,
)
from tests import tiny_models

TINY = LatentRecipe(
    edge_px=64, dim=8, depths=(2,), heads=2, hidden=12, layers=2, images=6, held_out=2, batch=2, block=5
)


def image_folder(folder: Path, count: int = 4, size: tuple[int, int] = (90, 70)) -> Path:
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(id=str(tiny_models.save(tmp_path_factory.mktemp("models") / "tiny")), device="cpu")


def test_reduced_images_have_sides_that_the_vae_takes() -> None:
    assert reduced_sizes(512, 8) == {"1/4": 128, "1/3": 168, "1/2": 256, "2/3": 344, FULL: 512}
    assert all(edge_px % 64 == 0 for edge_px in reduced_sizes(1024, 64).values())


def test_crops_are_parts_of_the_images_and_the_same_every_time(tmp_path: Path) -> None:
    files = sorted(image_folder(tmp_path / "images").iterdir())
    images = crops_of(files, 64)
    assert torch.equal(images(5), images(5))
    assert not torch.equal(images(1), images(5))  # another crop of the same image
    whole = torch.from_numpy(np.array(Image.open(files[1]))).permute(2, 0, 1)
    windows = whole.unfold(1, 64, 1).unfold(2, 64, 1).permute(1, 2, 0, 3, 4)
    assert (windows == images(5)).flatten(2).all(-1).any()


def test_what_is_measured_on_is_not_learned_from(tmp_path: Path) -> None:
    lesson = lesson_of(image_folder(tmp_path / "images"), lambda: pytest.fail("loaded"), TINY)
    assert (len(lesson.learned), len(lesson.measured)) == (6, 2)
    kept = sorted((tmp_path / "images").iterdir())[:2]
    for path in kept:
        Image.new("RGB", (90, 70)).save(path)
    assert all(lesson.images(number).max() == 0 for number in lesson.measured)
    assert all(lesson.images(number).max() > 0 for number in lesson.learned)
    own = own_lesson(lambda: pytest.fail("loaded"), TINY)
    assert own.learned.start == data.TRAIN_SEED
    assert own.measured.start == data.HELD_OUT_SEED


def test_latents_are_encoded_once(tiny: ModelConfig, tmp_path: Path) -> None:
    numbers: list[int] = []

    def images(number: int) -> torch.Tensor:
        numbers.append(number)
        return torch.full((3, 64, 64), number, dtype=torch.uint8)

    cache = LatentCache(tmp_path, lambda: load_models(tiny), 64, shard=2)
    first = cache.latents(images, range(10, 15))
    assert {name: tuple(each.shape) for name, each in first.items()} == {
        "1/4": (5, 4, 4, 4),
        "1/3": (5, 4, 5, 5),
        "1/2": (5, 4, 8, 8),
        "2/3": (5, 4, 11, 11),
        FULL: (5, 4, 16, 16),
    }
    again = replace(cache, models=lambda: pytest.fail("loaded")).latents(images, range(10, 15))
    assert numbers == [10, 11, 12, 13, 14]
    assert torch.equal(first[FULL], again[FULL])


def test_the_loss_of_a_new_network_is_that_of_bicubic_enlargement() -> None:
    small, full = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 16, 16)
    network = begin_at_bicubic(LatentEnlarger(TINY.shape(4)))
    plain = F.interpolate(small, size=(16, 16), mode="bicubic", align_corners=False)
    whole = block_loss(network, small, full, 16, Random(0))
    torch.testing.assert_close(whole, F.l1_loss(plain, full))
    parts = [block_loss(network, small, full, 5, Random(seed)).item() for seed in range(4)]
    assert len(set(parts)) > 1
    ours, theirs = held_out_l1(network, {"1/4": small, FULL: full})
    assert ours == theirs == pytest.approx(whole.item())


@pytest.mark.timeout(120)
def test_any_model_s_network_is_trained_by_the_command_resumed_and_served(
    tiny: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny.id, "--images", str(image_folder(tmp_path / "images")), "--work", str(tmp_path / "work")]
    sizes = {"edge-px": 64, "count": 6, "held-out": 2, "batch": 2, "dim": 8, "depths": 2, "heads": 2, "hidden": 12}
    for name, value in {"device": "cpu", "layers": 2, "rate": 0.01, **sizes}.items():
        words += [f"--{name}", str(value)]
    training.main([*words, "--steps", "60"])
    training.main([*words, "--steps", "120"])
    said = capsys.readouterr().out
    assert "from step 0" in said
    assert "from step 60" in said
    assert "decoded PSNR of 2 held-out images: image" in said
    work = tmp_path / "work"
    path = work / FOLDER / "model.safetensors"
    reference = ReferenceConfig(enlarge="network", model=str(path))
    check_latent_enlarger(reference, tiny)
    made = enlarge_latents(load_models(tiny), torch.randn(1, 4, 5, 6), 10, 12, reference)
    assert made.shape == (1, 4, 10, 12)
    lesson = lesson_of(tmp_path / "images", lambda: pytest.fail("loaded"), TINY)
    cached = LatentCache(work / "latents", lesson.models, 64)
    ours, bicubic = held_out_l1(load(work), cached.latents(lesson.images, lesson.learned))
    assert ours < bicubic


def test_latents_and_networks_of_another_vae_are_not_gone_on_with(tiny: ModelConfig, tmp_path: Path) -> None:
    vae = fingerprint_of(load_models(tiny))
    lesson = lesson_of(image_folder(tmp_path / "images"), lambda: load_models(tiny), TINY)
    train(tmp_path / "work", Budget(steps=1), TINY, lesson)
    export(tmp_path / "work", tmp_path / "out", vae * 1.001)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["first.weight"], load(tmp_path / "work").first.weight.half())
    why = r"latents and .*latent_enlarger\.pt are of another VAE; move both away"
    with pytest.raises(SystemExit, match=why):
        export(tmp_path / "work", tmp_path / "out", vae + 1)
    other = replace(lesson, models=lambda: load_models(ModelConfig(device="cpu")))
    with pytest.raises(SystemExit, match=why):
        train(tmp_path / "work", Budget(steps=2), TINY, other)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--images", "none"], "none: has 0 images; give a folder with at least two"),
        (["--dim", "10", "--heads", "4"], "--dim: 10 is no multiple of the 4 heads; use 24"),
        (["--edge-px", "500"], "--edge-px: 500 is no multiple of 8 px"),
        (["--batch", "0"], "--batch: 0 is not above 0"),
        (["--model", "/none"], "model /none: no such folder"),
    ],
)
def test_mistakes_of_the_command_line_are_told_in_one_line(words: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        training.main(["--work", str(tmp_path), *words])
    assert str(caught.value.code).startswith(why)
    assert "\n" not in str(caught.value.code)


def test_images_that_are_too_small_or_none_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", size=(40, 70))
    lesson = lesson_of(folder, lambda: pytest.fail("loaded"), TINY)
    with pytest.raises(SystemExit, match=r"0\.png: has 40 x 70 px; take it out of the folder, or lower --edge-px"):
        lesson.images(0)
    (folder / "0.png").write_bytes(b"none")
    with pytest.raises(SystemExit, match=r"0\.png: cannot be read as an image"):
        lesson.images(0)
