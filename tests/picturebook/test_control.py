"""The training of a tile ControlNet for the picturebook."""

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.agreement import psnr
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.picturebook.training import data
from resmaster_stages.picturebook.training.course import Budget
from resmaster_stages.picturebook.training.train_control import (
    ControlRecipe,
    cut_views,
    enlarged_again,
    export,
    frozen_unet,
    held_out_losses,
    make_views,
    new_net,
    train,
)
from resmaster_stages.picturebook.training.train_super_resolution import draw_large

pytest.importorskip("resvg_py")


def test_a_condition_shows_what_its_view_shows_with_less_detail() -> None:
    views = cut_views(data.TRAIN_SEED, 4)
    assert {tuple(part.shape) for pixels, condition, _ in views for part in (pixels, condition)} == {(3, 128, 128)}
    pixels = torch.stack([each[0] for each in views]).float()
    conditions = torch.stack([each[1] for each in views]).float()
    own = (pixels - conditions).abs().mean((1, 2, 3))
    others = (pixels - conditions.roll(1, 0)).abs().mean((1, 2, 3))
    assert (own < others).all()
    detail = [each.diff(dim=-1).square().mean() for each in (pixels, conditions)]
    assert detail[1] < detail[0]
    assert len({text for *_, text in views}) >= 2


def test_an_even_image_is_its_own_condition() -> None:
    even = torch.full((3, 64, 64), 128 / 255)
    torch.testing.assert_close(enlarged_again(even), even)


def test_a_new_net_says_nothing_and_starts_from_the_encoder() -> None:
    unet = frozen_unet()
    net = new_net(unet)
    key = "down_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(net.state_dict()[key], unet.state_dict()[key])
    down, mid = net(
        torch.randn(1, 16, 16, 16), 500, torch.randn(1, 77, 256), torch.rand(1, 3, 128, 128), return_dict=False
    )
    assert not any(part.any() for part in (*down, mid))


@pytest.mark.timeout(180)
def test_training_resumes_and_exports_what_diffusers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ControlRecipe(photos=2, held_out=1, views=2, batch=2)
    train(tmp_path, Budget(steps=2), recipe)
    views = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("views-*")}
    assert len(views) == 2
    train(tmp_path, Budget(steps=3), recipe)
    said = capsys.readouterr().out
    assert "from step 0" in said
    assert "from step 2" in said
    assert "control: step 3 held-out loss" in said
    assert views == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("views-*")}
    assert export(tmp_path, tmp_path / "net") < 8_000_000
    net = ControlNetModel.from_pretrained(tmp_path / "net")
    assert net.controlnet_down_blocks[1].weight.any()  # no longer zero


@pytest.fixture(scope="module")
def models() -> Models:
    """The pack with its net."""
    return load_models(parse_config({"name": "d", "model": {"controlnet": {"id": "picturebook"}}}).model)


def test_the_packs_net_knows_what_views_show_that_it_was_not_trained_on(models: Models, tmp_path: Path) -> None:
    views = make_views(tmp_path / "views.pt", data.HELD_OUT_SEED, 4, 4)
    ours, plain = held_out_losses(frozen_unet(), models.control_net, views, ControlRecipe())
    assert ours < 0.85 * plain


def test_with_the_packs_net_tiles_stay_what_the_low_res_image_shows(models: Models) -> None:
    low_res = Image.fromarray(draw_large(data.HELD_OUT_SEED)).resize((128, 128), Image.Resampling.BICUBIC)
    text = data.make_photo(data.HELD_OUT_SEED).caption

    def agreement(enabled: bool) -> float:
        values = {"scale": 2, "steps": 6, "init": "noised_lr", "start": 0.35, "micro_conditioning": "native"}
        control = {"enabled": enabled, "scale": 1.0}
        config = Method.model_validate({"method": "multidiffusion", **values, "stride": 0.75, "control": control})
        return psnr(upscale_image(models, low_res, text, config=config).resize((128, 128)), low_res)

    assert agreement(True) > agreement(False) + 1
