"""What training stages share: the optimiser, the start from an earlier pack, ordered latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from resmaster_stages.picturebook.training import course as training
from resmaster_stages.picturebook.training import data, train_decoder, train_vae, warm_start
from resmaster_stages.picturebook.training.course import Budget, Course, muon, set_rate, vectors


def _net(layout: torch.memory_format) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 3))
    return net.to(memory_format=layout)


def _train(net: nn.Module, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 9, 9, generator=generator), torch.randn(4, 5, 5, 5, generator=generator)
    optims = (muon([net], 1e-2), vectors([net], 1e-2))
    losses = []
    for _ in range(steps):
        loss = (net(x) - y).square().mean()
        loss.backward()
        for optim in optims:
            optim.step()
        net.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_muon_learns_and_memory_layout_changes_nothing() -> None:
    plain, last = _net(torch.contiguous_format), _net(torch.channels_last)
    a, b = _train(plain, 30), _train(last, 30)
    assert a[-1] < 0.8 * a[0]
    # the products' order differs and they run in bfloat16, so only nearly equal
    assert b == pytest.approx(a, rel=0.02)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_muon_moves_every_weight_and_no_bias() -> None:
    net = _net(torch.channels_last)
    before = {name: value.clone() for name, value in net.named_parameters()}
    optim = muon([net], 1e-2, weight_decay=0.0)
    net(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optim.step()
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "2.weight"}
    step = net[0].weight.detach() - before["0.weight"]
    # an update's root mean square is a fifth of the rate, as Muon's is beside AdamW's
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.35)


def test_muon_goes_on_from_its_state() -> None:
    whole, parts = _net(torch.channels_last), _net(torch.channels_last)
    x = torch.randn(2, 3, 9, 9)

    def steps(net: nn.Module, optim: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            net(x).square().mean().backward()
            optim.step()
            net.zero_grad(set_to_none=True)

    steps(whole, muon([whole], 1e-2), 4)
    first = muon([parts], 1e-2)
    steps(parts, first, 2)
    second = muon([parts], 5e-1)
    second.load_state_dict(first.state_dict())
    set_rate(second, 1e-2)
    steps(parts, second, 2)
    assert torch.allclose(whole[0].weight, parts[0].weight)


def _vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(channels)
    return AutoencoderKL(**{**train_vae.CONFIG, "latent_channels": channels}).eval().requires_grad_(False)


def test_a_wider_vae_draws_what_the_packs_did_by_its_first_channels(tmp_path: Path) -> None:
    earlier, wider = _vae(4), _vae(16)
    earlier.save_pretrained(tmp_path / "vae")
    warm_start.vae(wider, tmp_path)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    before, now = earlier.encode(x).latent_dist, wider.encode(x).latent_dist
    assert torch.allclose(now.mean[:, :4], before.mean, atol=1e-5)
    assert torch.allclose(now.logvar[:, :4], before.logvar, atol=1e-5)
    assert now.logvar[:, 4:].mean() == pytest.approx(warm_start.NEW_LOG_VARIANCE, abs=1.0)
    latents = now.mode()
    shown = wider.decode(train_vae.first_channels(latents, 4)).sample
    assert torch.allclose(shown, earlier.decode(before.mode()).sample, atol=1e-5)
    assert not torch.allclose(wider.decode(latents).sample, shown, atol=1e-2), "new channels are read"


def test_normalising_whitens_latents_and_changes_no_round_trip() -> None:
    vae = _vae(16)
    pixels = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    x = pixels.float() / 127.5 - 1
    before = vae.decode(vae.encode(x).latent_dist.mode()).sample
    train_vae.normalise(vae, pixels)
    after = vae.encode(x).latent_dist
    assert torch.allclose(vae.decode(after.mode()).sample, before, atol=1e-3)
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(16), atol=1e-3)
    flat = after.mean.permute(1, 0, 2, 3).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(16)).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("state", "lacks"), [({"model": {}, "optim": {}}, "ema and no optims"), ({"ema": {}}, "model and no optims")]
)
def test_a_checkpoint_that_cannot_be_trained_further_is_refused(
    tmp_path: Path, state: dict[str, Any], lacks: str
) -> None:
    training.keep(tmp_path / "unet.pt", state)
    course = Course(Budget(), tmp_path / "unet.pt")
    with pytest.raises(SystemExit, match=f"unet.pt cannot be trained further: it has no {lacks}"):
        course.resume("model", "ema", "optims")
    assert course.resume() == {**state, "step": 0, "elapsed": 0.0, "stopping_since": None}


def test_a_course_that_was_stopped_goes_on_once_its_stop_file_is_gone(tmp_path: Path) -> None:
    stop = tmp_path / "STOP"

    def resumed() -> Course:
        course = Course(Budget(steps=100, warmup_steps=1, decay_seconds_on_stop=1e-9), tmp_path / "x.pt", stop)
        course.resume()
        course.start()
        return course

    course = resumed()
    assert course.advance()
    stop.touch()
    course.advance()
    assert not course.advance(), "the decay is over"
    course.save({})
    assert resumed().rate() == 0.0, "still there: ended"
    stop.unlink()
    again = resumed()
    assert (again.step, again.rate()) == (3, 1.0)
    assert again.advance()


def test_the_decoder_trains_further_and_latents_stay(tmp_path: Path) -> None:
    data.draw_photos(tmp_path / "photos", 4, 1, data.TRAIN_SEED, shard=4)
    data.draw_photos(tmp_path / "held-out", 4, 1, data.HELD_OUT_SEED, shard=4)
    fresh_vae = AutoencoderKL(**train_vae.CONFIG)
    torch.save(fresh_vae.state_dict(), tmp_path / "vae-final.pt")
    before = train_vae.load(tmp_path)
    recipe = train_decoder.DecoderRecipe(batch=2, crop_cells=4)
    for steps in (2, 3):  # the second goes on
        train_decoder.train(tmp_path, Budget(steps=steps, warmup_steps=1), recipe)
    after = train_decoder.load(tmp_path)
    assert torch.load(tmp_path / "decoder.pt", weights_only=True)["step"] == 3
    moved = {
        name.partition(".")[0]
        for name, value in after.state_dict().items()
        if not value.equal(before.state_dict()[name])
    }
    assert moved == {"decoder", "post_quant_conv"}
    torch.save(fresh_vae.state_dict(), tmp_path / "vae-final.pt")
    assert (
        train_decoder.load(tmp_path)
        .state_dict()["decoder.conv_in.weight"]
        .equal(fresh_vae.state_dict()["decoder.conv_in.weight"])
    ), "another VAE's decoder is left alone"
    with pytest.raises(SystemExit, match="belongs to an earlier VAE"):
        train_decoder.train(tmp_path, Budget(steps=4), recipe)


def test_muon_leaves_parts_that_took_no_part_in_a_step() -> None:
    used, idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    optim = muon([used, idle], 1e-2)
    for part in (used, idle):
        part(torch.ones(1, 4)).sum().backward()
    optim.step()
    before = used.weight.clone(), idle.weight.clone()
    for part in (used, idle):
        part.zero_grad(set_to_none=True)
    used(torch.ones(1, 4)).sum().backward()
    optim.step()
    assert not used.weight.equal(before[0])
    assert idle.weight.equal(before[1])
