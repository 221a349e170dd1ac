"""The network that enlarges latents, and its files."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models import latent_enlarger
from resmaster_stages.models.files import NotOnThisMachine
from resmaster_stages.models.identity import latent_network, network_identity
from resmaster_stages.models.latent_enlarger import EnlargerShape, Places, network_of, shape_of
from resmaster_stages.models.latent_enlarger_files import (
    check_latent_enlarger,
    enlarge_latents,
    fingerprint_of,
)
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from tests import tiny_models
from tests.latent_enlargers import SHAPE, network, save
from tests.tiny_flux import make_chroma
from tests.tiny_flux2 import make_klein
from tests.tiny_qwen_image import make_qwen_image
from tests.tiny_transformers import make_flux

# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("size", [(26, 18), (52, 36), (31, 23)])
def test_a_head_that_adds_nothing_leaves_the_bicubic_enlargement(size):
    net, z = network(), torch.randn(2, 4, 13, 9)
    net.out.weight.zero_()
    net.out.bias.zero_()
    assert torch.equal(net(z, *size), F.interpolate(z, size=size, mode="bicubic", align_corners=False))


def test_a_constant_becomes_the_same_block_everywhere_at_a_whole_scale():
    net, z = network(), torch.full((1, 4, 13, 9), 0.7)
    made = net(z, 39, 27).view(1, 4, 13, 3, 9, 3).permute(0, 1, 3, 5, 2, 4).flatten(4)
    assert (made - made[..., :1]).abs().max() < 1e-5
    assert (made[0, 0, ..., 0] - made[0, 0, 0, 0, 0]).abs().max() > 1e-4  # within a block it depends on the place
    net.place.weight.zero_()
    flat = net(z, 39, 27)
    assert (flat - flat[..., :1, :1]).abs().max() < 1e-5


@pytest.mark.parametrize("core", [4, 8])
def test_tiles_with_their_halo_give_the_same_as_the_whole(core):
    net, z = network(), torch.randn(2, 4, 46, 61)
    whole = net.encode_by_tiles(z, core=64)
    assert (net.encode_by_tiles(z, core=core) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("depths", [(2,), (2, 2), (3, 2)])
def test_the_halo_is_what_a_cell_can_see_in_whole_windows(depths):
    shape = replace(SHAPE, depths=depths)
    net = network(shape=shape).double()
    start = 40
    z = torch.randn(1, 4, 84, 84, dtype=torch.double, requires_grad=True)
    net.encode(z)[..., start : start + 4, start : start + 4].square().sum().backward()
    seen = z.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    reach = max(start - int(seen.min()), int(seen.max()) - (start + 3))
    assert shape.window % 2 == shape.halo % shape.window == 0
    assert shape.halo - shape.window < reach <= shape.halo


def test_the_network_sees_what_is_near_and_not_around_the_border():
    net, z = network(), torch.randn(1, 4, 40, 40)
    other = z.clone()
    other[..., -4:, :] += 1.0
    change = (net.encode(other) - net.encode(z)).abs().amax((0, 1, 3))
    assert change[-4:].min() > 1e-4
    assert change[: 40 - 4 - SHAPE.halo].max() == 0


def test_results_are_the_same_in_chunks_and_sample_by_sample(monkeypatch):
    net, z = network(), torch.randn(2, 4, 10, 12)
    whole = net(z, 25, 30)
    assert whole.shape == (2, 4, 25, 30)
    assert whole.isfinite().all()
    monkeypatch.setattr(latent_enlarger, "QUERIES", 61)
    assert (net(z, 25, 30) - whole).abs().max() < 1e-5
    assert torch.equal(net(z[1:], 25, 30), net(z, 25, 30)[1:])


def test_places_lie_as_interpolation_has_them():
    ramp = torch.arange(8.0).view(1, 1, 1, 8)
    for places in (8, 12, 19, 32):
        at = Places.of(8, places, torch.device("cpu"))
        (one, _, near_one), (other, _, near_other) = at.neighbour(0), at.neighbour(1)
        found = ramp[0, 0, 0, one] * near_one + ramp[0, 0, 0, other] * near_other
        wanted = F.interpolate(ramp, size=(1, places), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found, wanted.flatten(), atol=1e-5, rtol=0)
        torch.testing.assert_close(near_one + near_other, torch.ones(places))


def test_the_sizes_are_read_from_the_weights():
    for shape in (SHAPE, EnlargerShape(16, 12, (1, 3), 3, 8, 10, 1)):
        assert shape_of(network(shape=shape).state_dict()) == shape
    state = network(3).state_dict()
    again, z = network_of(state), torch.randn(1, 4, 9, 9)
    assert torch.equal(again(z, 20, 20), network(3)(z, 20, 20))


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def models() -> Models:
    return Models.from_pipeline(tiny_models.make_pipeline())


@pytest.fixture
def file(tmp_path: Path, models: Models) -> Path:
    return save(tmp_path / "net.safetensors", models)


def by(path: Path | str, **values) -> ReferenceConfig:
    return ReferenceConfig(enlarge="network", model=str(path), **values)


def test_a_file_is_read_whole_and_computes_in_float32(file: Path, models: Models):
    z = torch.randn(1, 4, 6, 7)
    made = enlarge_latents(models, z, 15, 14, by(file))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, network()(z, 15, 14))
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    torch.testing.assert_close(enlarge_latents(models, z, 15, 14, by(file)), made, atol=0.02, rtol=0)


def test_a_file_that_changed_is_read_anew(file: Path, models: Models):
    z = torch.randn(1, 4, 6, 7)
    enlarge_latents(models, z, 12, 14, by(file))
    before = network_identity(latent_network(by(file)))
    save(file, models, network(5))
    torch.testing.assert_close(enlarge_latents(models, z, 12, 14, by(file)), network(5)(z, 12, 14))
    assert network_identity(latent_network(by(file))) != before


def refusal(path: Path, models: Models) -> str:
    """What loading says. Checking before loading says the same."""
    with pytest.raises(ConfigError) as loading:
        enlarge_latents(models, torch.zeros(1, 4, 6, 6), 12, 12, by(path))
    with pytest.raises(ConfigError) as checking:
        check_latent_enlarger(by(path), ModelConfig())
    assert "\n" not in str(loading.value)
    said = [str(each.value).split(" (")[0].replace(":", "") for each in (loading, checking)]
    assert said[0] == said[1]
    return str(loading.value)


def test_files_that_are_missing_damaged_or_of_another_kind_are_refused_in_one_line(
    file: Path, models: Models, tmp_path: Path
):
    assert "upscale.reference.model:" in refusal(tmp_path / "none.safetensors", models)
    state = load_file(file)
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert "as safetensors" in refusal(tmp_path / "evil.safetensors", models)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    assert "as safetensors" in refusal(tmp_path / "cut.safetensors", models)
    save_file({"conv_first.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    assert "is no latent enlarger" in refusal(tmp_path / "other.safetensors", models)
    save_file({name: each for name, each in state.items() if name != "last.bias"}, tmp_path / "part.safetensors")
    assert "not a whole latent enlarger" in refusal(tmp_path / "part.safetensors", models)
    save_file({**state, "look.weight": torch.zeros(0)}, tmp_path / "odd.safetensors")
    assert "not a whole latent enlarger" in refusal(tmp_path / "odd.safetensors", models)
    save_file({**state, "more.weight": torch.zeros(3)}, tmp_path / "more.safetensors")
    assert "not a whole latent enlarger" in refusal(tmp_path / "more.safetensors", models)


def test_what_is_no_file_needs_the_name_of_one_at_the_hub(models: Models, monkeypatch: pytest.MonkeyPatch):
    hub = by("owner/none", weight_name="x.safetensors", revision="abc")
    assert network_identity(latent_network(hub)) == "owner/none/x.safetensors@abc"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"upscale\.reference\.model: cannot get x\.safetensors of owner/none"):
        enlarge_latents(models, torch.zeros(1, 4, 6, 6), 12, 12, hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NotOnThisMachine):
        check_latent_enlarger(hub, ModelConfig())


# ----------------------------------------------------------------------------------------------------------- which VAE


def test_the_network_of_another_vae_is_refused_before_and_at_loading(file: Path, models: Models, tmp_path: Path):
    folder = tiny_models.save(tmp_path / "tiny")
    own = ModelConfig(id=str(folder), device="cpu")
    check_latent_enlarger(by(file), own)
    enlarge_latents(load_models(own), torch.zeros(1, 4, 6, 6), 12, 12, by(file))
    other = Models.from_pipeline(tiny_models.make_pipeline(seed=1), identity="tiny-1")
    with pytest.raises(ConfigError, match="another VAE than that of model tiny-1; give a network") as loading:
        enlarge_latents(other, torch.zeros(1, 4, 6, 6), 12, 12, by(file))
    assert "\n" not in str(loading.value)
    with pytest.raises(ConfigError, match="another VAE than that of model picturebook; give a network"):
        check_latent_enlarger(by(file), ModelConfig())
    with pytest.raises(ConfigError, match="another VAE"):
        check_latent_enlarger(by(file), own.model_copy(update={"vae": str(_pack_vae())}))


def _pack_vae() -> Path:
    from resmaster_stages.models.identity import pack_folder

    return pack_folder() / "vae"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_format_of_a_vae_does_not_make_it_another(file: Path, dtype: torch.dtype):
    pipe = tiny_models.make_pipeline()
    pipe.vae.to(dtype)
    enlarge_latents(Models.from_pipeline(pipe), torch.zeros(1, 4, 6, 6), 12, 12, by(file))


def test_a_vae_that_scales_its_latents_otherwise_is_another(file: Path):
    pipe = tiny_models.make_pipeline()
    pipe.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(ConfigError, match="another VAE"):
        enlarge_latents(Models.from_pipeline(pipe), torch.zeros(1, 4, 6, 6), 12, 12, by(file))


@pytest.mark.parametrize("make", [make_flux, make_chroma, make_klein, make_qwen_image])
def test_vaes_of_all_families_have_a_fingerprint_and_serve(make, tmp_path: Path):
    models = Models.from_pipeline(make())
    shape = replace(SHAPE, channels=models.base.latent_channels)
    path = save(tmp_path / "net.safetensors", models, network(shape=shape))
    z = torch.randn(1, shape.channels, 6, 6)
    assert enlarge_latents(models, z, 12, 18, by(path)).shape == (1, shape.channels, 12, 18)
    assert len(fingerprint_of(models)) > 10
