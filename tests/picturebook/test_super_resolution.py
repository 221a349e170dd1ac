"""The pack's super-resolution network: its degradations, its training, and what it is good for."""

from pathlib import Path
from random import Random

import pytest
import torch

from resmaster_stages.models.enlarger import load_enlarger
from resmaster_stages.models.identity import NetworkFile
from resmaster_stages.picturebook.training import data
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.train_super_resolution import (
    FOLDER,
    LARGE_PX,
    SuperResolutionRecipe,
    degraded,
    draw_large,
    draw_photos,
    export,
    loss_of,
    psnr,
    train,
)

pytest.importorskip("resvg_py")
CPU = torch.device("cpu")


def test_low_res_images_are_a_quarter_of_the_size_and_degraded_by_their_seed() -> None:
    image = torch.rand(3, 64, 48)
    versions = [degraded(image, Random(seed)) for seed in range(12)]
    assert {tuple(version.shape) for version in versions} == {(3, 16, 12)}
    assert all(torch.equal(version, (version * 255).round() / 255) for version in versions)
    assert torch.equal(versions[3], degraded(image, Random(3)))
    assert len({version.numpy().tobytes() for version in versions}) > 9
    means = torch.tensor([float((version - versions[0]).mean()) for version in versions])
    assert means.abs().max() < 0.03  # colours stay


def test_photos_are_the_pack_s_own_four_times_larger() -> None:
    seed = next(s for s in range(100) if data.make_photo(s).render_px == data.NATIVE_PX)
    large, small = (
        torch.from_numpy(draw_large(seed).copy()).float(),
        torch.from_numpy(data.draw(data.make_photo(seed)).copy()),
    )
    assert large.shape == (LARGE_PX, LARGE_PX, 3)
    reduced = large.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).mean((1, 3))
    assert (reduced - small.float()).abs().mean() < 3


def test_the_loss_is_zero_for_the_truth_and_punishes_blur_more_than_a_shade() -> None:
    recipe, truth = SuperResolutionRecipe(), torch.rand(1, 3, 32, 32)
    assert loss_of(truth, truth, recipe) == 0
    flat = truth.mean((2, 3), keepdim=True).expand_as(truth)
    assert loss_of(flat, truth, recipe) > loss_of(truth + (flat - truth).abs().mean(), truth, recipe)


@pytest.mark.timeout(120)
def test_training_resumes_and_exports_what_the_loader_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SuperResolutionRecipe(photos=2, held_out=1, batch=1, crop_px=8)
    train(tmp_path, Budget(steps=2), recipe)
    drawn = sorted(path.name for path in (tmp_path / "large").iterdir())
    assert len(drawn) == 2
    train(tmp_path, Budget(steps=3), recipe)
    said = capsys.readouterr().out
    assert "from step 0" in said
    assert "from step 2" in said
    assert "step 3 held-out PSNR" in said
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == drawn
    export(tmp_path, tmp_path / FOLDER)
    config = NetworkFile(str(tmp_path / FOLDER / "model.safetensors"))
    assert load_enlarger(config, CPU, torch.float32)(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)


def test_the_pack_s_network_beats_bicubic_enlargement(tmp_path: Path) -> None:
    weights = PACK / FOLDER / "model.safetensors"
    assert weights.stat().st_size < 1_500_000
    photos = draw_photos(tmp_path, 6, data.HELD_OUT_SEED + 5000)
    ours, bicubic = psnr(load_enlarger(NetworkFile("picturebook"), CPU, torch.float32), photos)
    assert ours > bicubic
