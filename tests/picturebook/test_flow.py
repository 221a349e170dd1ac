"""The second base's training: targets that are the UNet's, the path's algebra, resuming, and a folder that diffusers
loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDPMScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from resmaster_stages.picturebook.training import data, evaluate, export_flow, train_flow, train_unet
from resmaster_stages.picturebook.training.course import Budget, Course
from resmaster_stages.picturebook.training.evaluate import Amounts, paint
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.train_flow import Batch, FlowPainter, FlowRecipe

RECIPE = FlowRecipe(batch=3, adapter_share=0.5, short_share=0.5, text_steps=2)
BUDGET = Budget(steps=4, warmup_steps=2)


def a_batch(sigma: Tensor, adapter: bool = False) -> Batch:
    """Noised random latents at `sigma` with random conditions."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(len(sigma), *shape, generator=generator)

    x0, noise, level = draw(16, 16, 16), draw(16, 16, 16), sigma[:, None, None, None]
    return Batch(
        z=(1 - level) * x0 + level * noise,
        sigma=sigma,
        velocity=noise - x0,
        words=torch.randint(0, 800, (len(sigma), 9), generator=generator),
        pooled=draw(128),
        image=draw(128) if adapter else None,
        context=draw(77, 256),
        vector=draw(128),
        view=draw(128),
        time_ids=torch.full((len(sigma), 6), 128),
    )


def awake(painter: Any) -> Any:
    """A painter whose layers that are still about zero were drawn, so that every part shows in its output."""
    for value in painter.parameters():
        if value.abs().max() < 0.02:
            nn.init.normal_(value, std=0.05)
    return painter.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of four steps on a few photos."""
    folder = tmp_path_factory.mktemp("flow")
    data.draw_photos(folder / "photos", 16, 1, shard=16)
    train_flow.train(folder, BUDGET, RECIPE)
    return folder


# ------------------------------------------------------------------------------------------------------------ path


def test_the_noise_that_the_unet_says_becomes_the_velocity() -> None:
    """A network that says the true noise teaches the photo's velocity, at the input scale and time that it knows."""
    batch = a_batch(torch.tensor([0.1, 0.5, 0.9]))
    level = batch.sigma[:, None, None, None]
    noise = batch.z + (1 - level) * batch.velocity
    seen: list[tuple[Tensor, Tensor]] = []

    class Knows(nn.Module):
        attn_processors: ClassVar[dict[str, Any]] = {}

        def forward(self, z: Tensor, times: Tensor, *_: Any, **__: Any) -> SimpleNamespace:
            seen.append((z, times))
            return SimpleNamespace(sample=noise.repeat(len(z) // 3, 1, 1, 1))

    for guidance in (1.0, 2.5):  # both branches say the same, so guidance changes nothing
        said = train_flow.taught(Knows(), batch, guidance)
        assert torch.allclose(said, batch.velocity, atol=2e-5)
    z, times = seen[0]
    alphas = DDPMScheduler(**train_unet.SCHEDULE).alphas_cumprod
    alpha = alphas[times.round().long()].sqrt()[:, None, None, None]
    x0 = noise - batch.velocity
    assert torch.allclose(z, alpha * x0 + (1 - alpha**2).sqrt() * noise, atol=5e-3), "the variance-preserving input"
    assert [len(z) for z, _ in seen] == [3, 6], "without guidance there is one branch"


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_taught_is_what_the_unet_says_at_equal_noise(adapter: bool) -> None:
    unet = train_flow.load_teacher(PACK)[0].unet
    times = torch.tensor([40, 400, 800])
    batch = a_batch(torch.from_numpy(train_flow.vp_levels()[times.numpy()]).float(), adapter)
    assert torch.allclose(train_flow.vp_times(batch.sigma), times.float(), atol=1e-2)
    alpha = DDPMScheduler(**train_unet.SCHEDULE).alphas_cumprod[times].sqrt()[:, None, None, None]
    noise_std = (1 - alpha**2).sqrt()
    input_ = batch.z * (alpha + noise_std)
    train_unet.set_adapter_scale(unet, 1.0 if adapter else 0.0)

    def says(keep: float) -> Tensor:
        added = {"text_embeds": keep * batch.vector, "time_ids": batch.time_ids}
        added["image_embeds"] = [keep * batch.view[:, None]]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return unet(input_, times.float(), keep * batch.context, added_cond_kwargs=added).sample.float()

    noise = says(0.0) + 2.5 * (says(1.0) - says(0.0))
    x0 = (input_ - noise_std * noise) / alpha
    said = train_flow.taught(unet, batch, 2.5)
    level = batch.sigma[:, None, None, None]
    assert torch.allclose(batch.z - level * said, x0, atol=0.02 * float(x0.std()))
    assert torch.allclose(batch.z + (1 - level) * said, noise, atol=0.05)
    other = train_flow.taught(unet, replace(batch, view=-batch.view), 2.5)
    assert torch.equal(other, said) is not adapter, "the UNet's adapter is there where the transformer's is"


def test_beyond_the_noise_that_the_unet_knows_the_photo_teaches() -> None:
    unet = train_flow.load_teacher(PACK)[0].unet
    edge = float(train_flow.vp_levels()[-1])
    batch = a_batch(torch.tensor([edge - 0.01, edge + 0.01, 1.0]))
    said = train_flow.taught(unet, batch, 2.5)
    assert torch.equal(said[1:], batch.velocity[1:])
    assert not torch.allclose(said[0], batch.velocity[0], atol=0.1)


def test_noise_levels_are_spread_evenly_over_their_distribution() -> None:
    torch.manual_seed(0)
    recipe = FlowRecipe(sigma_mean=0.5, sigma_spread=1.2)
    levels = train_flow.noise_levels(64, recipe)
    normal = (levels.logit().double() - 0.5) / 1.2
    shares = torch.special.ndtr(normal).sort().values * 64
    assert torch.equal(shares.floor(), torch.arange(64, dtype=torch.float64)), "one in each 64th"
    assert not torch.equal(levels, levels.sort().values), "in random order"


def test_tokens_and_their_places_are_the_pipeline_s() -> None:
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(train_flow.pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(train_flow.image_ids(6, 10), ids)


# ------------------------------------------------------------------------------------------------------------ step


def test_a_batch_noises_photos_and_drops_what_it_says(work: Path) -> None:
    teacher, scaling = train_flow.load_teacher(PACK)
    cache = train_flow.make_cache(work, teacher, scaling)
    assert len(cache.ids) < 16, "enlarged photos are left out"
    recipe = replace(RECIPE, batch=6, adapter_share=1.0, text_dropped_with_adapter=0.5, image_dropped=0.5)
    long = replace(recipe, short_share=0.0)
    torch.manual_seed(1)
    for chosen, length in ((replace(recipe, short_share=1.0), 32), (long, 77)):
        batch = train_flow.draw_batch(cache, chosen, Random(3))
        assert batch.words.shape == (6, length)
        level = batch.sigma[:, None, None, None]
        x0 = batch.z - level * batch.velocity
        distance = (x0[:, None] - cache.latents[None].float()).abs().amax((2, 3, 4))
        assert distance.amin(1).max() < 1e-2, "the photos' latents, noised"
        dropped = (batch.words == cache.empty_ids[:, :length]).all(1)
        assert 0 < int(dropped.sum()) < 6
        assert torch.equal(dropped, ~batch.context.flatten(1).any(1)), "the UNet's text is zero where it is dropped"
        assert torch.equal(dropped, ~batch.vector.any(1))
        assert torch.equal(batch.pooled[dropped], cache.empty_pooled.float().expand(int(dropped.sum()), -1))
        assert batch.image is not None
        absent = (batch.image == cache.empty_image).all(1)
        assert 0 < int(absent.sum()) < 6
        assert torch.equal(absent, ~batch.view.any(1)), "a black image for the transformer, zeros for the UNet"
    plain = train_flow.draw_batch(cache, replace(recipe, adapter_share=0.0), Random(3))
    assert plain.image is None


def test_a_fresh_transformer_says_nothing_and_its_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    painter = FlowPainter().eval().requires_grad_(False)
    for adapter in (False, True):
        assert not train_flow.said_velocity(painter, a_batch(torch.tensor([0.3]), adapter)).any()
    batch = a_batch(torch.tensor([0.3, 0.7]), adapter=True)
    awake(painter)
    without, with_image = (train_flow.said_velocity(painter, b) for b in (replace(batch, image=None), batch))
    assert not torch.allclose(without, with_image, atol=1e-3)
    plain = FluxTransformer2DModel(**train_flow.CONFIG)
    plain.load_state_dict(export_flow.split_adapter(painter.transformer.state_dict())[0])
    said = plain.eval()(
        train_flow.pack(batch.z),
        painter.text(batch.words).last_hidden_state,
        batch.pooled,
        batch.sigma,
        train_flow.image_ids(16, 16),
        torch.zeros(9, 3),
        return_dict=False,
    )[0]
    assert torch.allclose(said, without, atol=1e-5), "no image prompt is no adapter"


def test_the_loss_is_the_distance_to_the_taught_velocity() -> None:
    unet = train_flow.load_teacher(PACK)[0].unet
    batch = a_batch(torch.tensor([0.2, 0.6]))
    torch.manual_seed(0)
    silent = FlowPainter()  # says zero
    taught = train_flow.taught(unet, batch, RECIPE.guidance)
    loss = train_flow.flow_loss(silent, unet, batch, RECIPE)
    assert loss.item() == pytest.approx(taught.square().mean().item(), rel=1e-5)


def test_the_text_encoder_first_learns_what_the_pack_s_say() -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, 876, (96, 77))
    table = torch.randn(876, 256)
    cache = SimpleNamespace(ids=rows, context=table[rows].half())
    text = FlowPainter().text

    def unread(states: Tensor) -> float:
        """The share of the context that no linear reading of the states gives."""
        wanted = table[rows].flatten(0, 1)
        found = torch.linalg.lstsq(states.flatten(0, 1), wanted).solution
        return float((states.flatten(0, 1) @ found - wanted).square().mean() / wanted.square().mean())

    with torch.no_grad():
        before = unread(text(rows).last_hidden_state)
    train_flow.learn_text(text, cache, 40, batch=16)
    with torch.no_grad():
        after = unread(text(rows).last_hidden_state)
    assert after < 0.9 * before


# ------------------------------------------------------------------------------------------------------------ course


def test_an_interrupted_training_ends_with_the_same_bytes(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for path in work.iterdir():
        if path.name != "flow.pt":
            (tmp_path / path.name).symlink_to(path)
    calls = 0
    loss = train_flow.flow_loss

    def breaks(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(train_flow, "flow_loss", breaks)
    monkeypatch.setattr(Course, "due", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        train_flow.train(tmp_path, BUDGET, RECIPE)
    assert torch.load(tmp_path / "flow.pt", weights_only=True)["step"] == 2
    train_flow.train(tmp_path, BUDGET, RECIPE)
    whole, parts = (torch.load(folder / "flow.pt", weights_only=True) for folder in (work, tmp_path))
    assert whole["step"] == parts["step"] == 4
    for name in ("model", "ema"):
        differing = [key for key, value in whole[name].items() if not value.equal(parts[name][key])]
        assert not differing
    assert not whole["model"]["transformer.proj_out.weight"].equal(whole["ema"]["transformer.proj_out.weight"])


def test_a_longer_course_goes_on(work: Path, tmp_path: Path) -> None:
    for path in work.iterdir():
        if path.name == "flow.pt":
            (tmp_path / path.name).write_bytes(path.read_bytes())
        else:
            (tmp_path / path.name).symlink_to(path)
    train_flow.train(tmp_path, Budget(steps=5, warmup_steps=2), RECIPE)
    before, after = (torch.load(folder / "flow.pt", weights_only=True) for folder in (work, tmp_path))
    assert (before["step"], after["step"]) == (4, 5)
    for key in ("transformer.proj_out.weight", "text.shared.weight"):
        assert not before["model"][key].equal(after["model"][key])


# ------------------------------------------------------------------------------------------------------------ folder


def test_the_folder_loads_as_any_flux_and_its_adapter_too(work: Path, tmp_path: Path) -> None:
    painter = awake(train_flow.load(work))
    state = torch.load(work / "flow.pt", weights_only=True)
    changed = tmp_path / "work"
    changed.mkdir()
    (changed / "clip.pt").symlink_to(work / "clip.pt")
    torch.save({**state, "ema": painter.state_dict()}, changed / "flow.pt")
    folder = tmp_path / "pack_flow"
    size = export_flow.export(changed, folder)
    assert 20e6 < size < 26e6
    assert export_flow.export(changed, folder) == size, "an earlier folder is replaced"
    assert json.loads((folder / "card.json").read_text())["stages"]["flow"]["steps"] == 4

    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.vae.config.shift_factor, pipe.vae.config.sample_size) == (0.0, data.NATIVE_PX)
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.use_dynamic_shifting) == (1.5, False)
    assert pipe.tokenizer_2.model_max_length == 77
    batch = replace(a_batch(torch.tensor([0.5, 0.5])), words=train_flow.train_clip.tokenize(["a red cat", ""])[0])
    states, pooled, _ = pipe.encode_prompt(["a red cat", ""], max_sequence_length=77)
    assert torch.allclose(states, painter.text(batch.words).last_hidden_state, atol=2e-2)
    cached = export_flow.train_flow.pooled_tower(work)(batch.words).pooler_output
    assert torch.allclose(pooled, cached, atol=2e-2)

    batch = replace(batch, pooled=pooled, image=torch.randn(2, 128))
    places = {"img_ids": train_flow.image_ids(16, 16), "txt_ids": torch.zeros(77, 3)}

    def says(**more: Any) -> Tensor:
        with torch.no_grad():
            said: Tensor = pipe.transformer(
                train_flow.pack(batch.z), states, pooled, batch.sigma, **places, **more, return_dict=False
            )[0]
        return said

    close = {"atol": 0.05 * float(says().std())}
    assert torch.allclose(says(), train_flow.said_velocity(painter, replace(batch, image=None)), **close)
    pipe.load_ip_adapter(str(folder), subfolder="ip_adapter", weight_name="ip-adapter.safetensors")
    pipe.set_ip_adapter_scale(1.0)
    assert batch.image is not None
    prompted = says(joint_attention_kwargs={"ip_adapter_image_embeds": [batch.image[:, None]]})
    assert torch.allclose(prompted, train_flow.said_velocity(painter, batch), **close)
    assert not torch.allclose(prompted, says(joint_attention_kwargs={"ip_hidden_states": []}), **close)
    kept = load_file(folder / "ip_adapter" / "ip-adapter.safetensors")
    assert {k.split(".")[0] for k in kept} == {"image_proj", "ip_adapter"}
    assert {k.split(".")[1] for k in kept if k.startswith("ip_adapter.")} == {"0", "1", "2"}


def test_the_flow_base_paints_at_its_native_size_with_and_without_guidance(work: Path) -> None:
    pipe, _ = export_flow.assemble(work)
    awake(pipe.transformer)
    prompts = ["a red cat on the sand", "a blue boat on the water"]
    guided, plain = (paint(pipe, prompts, steps=2, guidance=guidance) for guidance in (4.0, 1.0))
    assert {image.size for image in guided} == {(data.NATIVE_PX, data.NATIVE_PX)}
    assert guided[0].tobytes() != plain[0].tobytes()
    alone = paint(pipe, prompts, steps=2, guidance=4.0, batch=1)
    assert max(abs(a - b) for a, b in zip(alone[1].tobytes(), guided[1].tobytes())) <= 2, "seeds go by place"


def test_a_flow_base_is_measured_by_its_scenes_and_held_to_its_own_aims(work: Path, tmp_path: Path) -> None:
    export_flow.export(work, tmp_path / "pack_flow")
    found = {m.name: m for m in evaluate.evaluate(tmp_path / "pack_flow", Amounts(scenes=2, guidance=1.0))}
    assert found["pairs found in generated scenes"].aim == 0.6
    assert found["pairs found in generated scenes"].met is False, "it was hardly trained"
    assert found["pairs found in real drawings of the prompts"].value > 0.7
    assert found["FID of 2 generated scenes against 8 real"].value > found["FID of 2 real scenes against 8 real"].value
    assert found["image-prompt agreement, text dropped (generated / real)"].aim is None
    assert set(evaluate.FLOW_AIMS) == {"pairs found in generated scenes", "FID of 96 generated scenes against 384 real"}
