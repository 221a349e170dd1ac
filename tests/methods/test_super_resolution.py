import argparse
import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from resmaster_flows.cli.main import parser
from resmaster_flows.cli.upscale import run as upscale
from resmaster_stages import high_res
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.methods.super_resolution import SuperResolution, cores, enlarged, sizes, tile_grid, tiled
from resmaster_stages.models import load
from resmaster_stages.models.busy import timing
from resmaster_stages.models.enlarger import Enlarger, load_enlarger
from resmaster_stages.models.identity import NetworkFile, network_file, network_identity, weights_of
from resmaster_stages.models.rrdbnet import RRDBNet, RRDBShape, network_of, official_state, shape_of
from resmaster_stages.storage.images import encode_image
from tests.methods.common import difference, some_image

CPU = torch.device("cpu")
SMALL = RRDBShape(features=8, blocks=2, growth=4)


def network(shape=SMALL, seed=0) -> RRDBNet:
    torch.manual_seed(seed)
    return RRDBNet(shape).eval().requires_grad_(False)


def super_resolve(image, height, width, settings, dtype=torch.float32) -> Image.Image:
    return settings.enlarge(image, height, width, CPU, dtype)


def published(enlargements: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in BSRGAN.pth (two enlargements) and BSRGANx2.pth (one)."""
    inputs = {"conv1": 64, "conv2": 96, "conv3": 128, "conv4": 160, "conv5": 192}
    convolutions = {
        f"RRDB_trunk.{block}.RDB{dense}.{conv}": (64 if conv == "conv5" else 32, channels)
        for block in range(23)
        for dense in (1, 2, 3)
        for conv, channels in inputs.items()
    }
    places = ["trunk_conv", "HRconv", *(f"upconv{i + 1}" for i in range(enlargements))]
    convolutions |= {"conv_first": (64, 3), "conv_last": (3, 64), **dict.fromkeys(places, (64, 64))}
    weights = {f"{name}.weight": (*channels, 3, 3) for name, channels in convolutions.items()}
    return weights | {f"{name}.bias": (channels[0],) for name, channels in convolutions.items()}


@pytest.mark.parametrize(("enlargements", "scale"), [(2, 4), (1, 2)])
def test_the_official_layout_loads_strictly(enlargements, scale):
    with torch.device("meta"):
        ours = RRDBNet(RRDBShape(enlargements=enlargements))
        official = {name: torch.empty(shape) for name, shape in published(enlargements).items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == published(enlargements)
    assert shape_of(official) == RRDBShape(enlargements=enlargements)
    assert ours.scale == scale
    ours.load_state_dict(official, strict=True, assign=True)
    assert len(official) == 700 + 2 * (enlargements - 1)
    if enlargements == 2:
        assert sum(value.numel() for value in official.values()) == 16_697_987  # the 16.7 M of the papers


def as_real_esrgan(state):
    """Under Real-ESRGAN's names."""
    renamed = {}
    for name, value in state.items():
        for old, new in (
            ("RRDB_trunk", "body"),
            ("RDB", "rdb"),
            ("trunk_conv", "conv_body"),
            ("HRconv", "conv_hr"),
            ("upconv", "conv_up"),
        ):
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("unshuffle", [1, 2])
def test_real_esrgan_is_the_same_network_under_other_names(unshuffle):
    shape = replace(SMALL, unshuffle=unshuffle)
    ours = network(shape)
    theirs = as_real_esrgan(ours.state_dict())
    assert {"body.0.rdb1.conv1.weight", "conv_body.bias", "conv_up2.weight", "conv_hr.weight"} <= theirs.keys()
    loaded = network_of(official_state(theirs))
    assert loaded.shape == shape
    x = torch.rand(1, 3, 6, 8)
    assert loaded(x).shape == (1, 3, *(side * 4 // unshuffle for side in (6, 8)))
    assert torch.equal(loaded(x), ours(x))


def test_the_network_computes_what_the_paper_draws():
    ours, x = network(replace(SMALL, blocks=1)), torch.rand(2, 3, 5, 7)
    w = ours.state_dict()

    def conv(name, x):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    first = conv("conv_first", x)
    dense = first
    for block in ("RDB1", "RDB2", "RDB3"):
        known = [dense]
        for number in range(1, 5):
            known.append(F.leaky_relu(conv(f"RRDB_trunk.0.{block}.conv{number}", torch.cat(known, 1)), 0.2))
        dense = dense + 0.2 * conv(f"RRDB_trunk.0.{block}.conv5", torch.cat(known, 1))
    features = first + conv("trunk_conv", first + 0.2 * dense)
    for number in (1, 2):
        features = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
        features = F.leaky_relu(conv(f"upconv{number}", features), 0.2)
    torch.testing.assert_close(ours(x), conv("conv_last", F.leaky_relu(conv("HRconv", features), 0.2)))


@given(st.integers(1, 200), st.integers(5, 60), st.integers(0, 2))
@examples(max_examples=60)
def test_tiles_contribute_every_pixel_once_and_at_least_a_halo_from_their_inner_borders(length, tile, halo):
    grid = tile_grid(length, length, SuperResolution.model_construct(tile=tile, halo=halo))
    parts = cores(grid.rows, grid.window_height, halo)
    assert [pixel for start, end in parts for pixel in range(start, end)] == list(range(length))
    for origin, (start, end) in zip(grid.rows, parts):
        assert start >= origin + (halo if start else 0)
        assert end <= origin + grid.window_height - (halo if end < length else 0)


def test_tiled_is_untiled_with_a_halo_as_wide_as_the_network_sees():
    ours = network(replace(SMALL, blocks=1))  # 1 + 15 + 1 convolutions, and two more after the enlargements
    pixels, ticks = torch.rand(1, 3, 61, 90), []
    wide = SuperResolution(tile=52, halo=20)
    result = tiled(ours, 4, pixels, wide, lambda: ticks.append(1))
    torch.testing.assert_close(result, ours(pixels), atol=1e-5, rtol=1e-5)
    assert len(ticks) == len(tile_grid(61, 90, wide)) == 2 * 5
    narrow = tiled(ours, 4, pixels, SuperResolution(tile=52, halo=0), lambda: None)
    assert (narrow - ours(pixels)).abs().max() > 1e-3


def test_the_pack_s_network_in_tiles_differs_by_a_level_at_most():
    image = some_image(96, 80)
    whole = super_resolve(image, 320, 384, SuperResolution(tile=128))
    assert difference(whole, super_resolve(image, 320, 384, SuperResolution(tile=64, halo=16))) <= 1
    assert whole.size == (384, 320)


@pytest.mark.parametrize(
    ("scale", "factor", "passes"),
    [(4, 4, 1), (2.3, 4, 1), (1, 4, 1), (8, 4, 2), (16, 4, 2), (17, 4, 3), (4, 2, 2), (2, 2, 1)],
)
def test_as_many_passes_as_the_scale_needs(scale, factor, passes):
    found = sizes(10, 20, scale, factor)
    assert len(found) == passes
    assert found[-1] == (10 * factor ** (passes - 1), 20 * factor ** (passes - 1))


@pytest.mark.parametrize(("width", "height", "scale"), [(37, 61, 2.3), (5, 19, 7.0), (16, 16, 1.0)])
@pytest.mark.parametrize("unshuffle", [1, 2])
def test_any_size_is_served_exactly(width, height, scale, unshuffle):
    shape = replace(SMALL, blocks=1, unshuffle=unshuffle)
    enlarger = Enlarger(network(shape), shape.scale, CPU, torch.float32, unshuffle)
    wanted, heard = (round(height * scale), round(width * scale)), []
    config = SuperResolution(scale=scale, tile=16, halo=3)
    result = enlarged(enlarger, some_image(width, height), *wanted, config, lambda *each: heard.append(each))
    assert result.shape == (3, *wanted)
    assert heard[-1] == (len(heard), len(heard))


def test_the_image_is_kept_and_half_precision_draws_nearly_the_same():
    image = some_image(48, 48)
    whole = super_resolve(image, 192, 192, SuperResolution())
    assert difference(whole, super_resolve(image, 192, 192, SuperResolution(), torch.float16)) <= 4
    small = np.asarray(whole.resize((48, 48), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - np.asarray(image)).mean() < 8


def test_a_network_that_produces_nan_costs_the_sample(monkeypatch):
    broken = Enlarger(lambda x: torch.full((1, 3, 64, 64), float("nan")), 4, CPU, torch.float32)
    monkeypatch.setattr("resmaster_stages.models.enlarger.load_enlarger", lambda *each: broken)
    with pytest.raises(SampleError, match="NaN"):
        super_resolve(some_image(16, 16), 64, 64, SuperResolution())


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(autouse=True)
def forget():
    yield
    load_enlarger.cache_clear()


def test_weights_come_as_safetensors_or_as_allowed_pickles_of_tensors(tmp_path):
    state = network().state_dict()
    save_file(state, tmp_path / "net.safetensors")
    torch.save({"params_ema": as_real_esrgan(state), "params": {}}, tmp_path / "net.pth")
    x = torch.rand(1, 3, 8, 8)
    expected = network()(x)
    for name, allow in (("net.safetensors", False), ("net.pth", True)):
        config = SuperResolution(model=str(tmp_path / name), allow_pickle=allow)
        enlarger = load_enlarger(config.network(), CPU, torch.float32)
        assert enlarger.scale == 4
        torch.testing.assert_close(enlarger(x), expected)
    with pytest.raises(ValueError, match="allow_pickle"):
        SuperResolution(model=str(tmp_path / "net.pth"))


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a pickle ran",))


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, monkeypatch):
    def refused(name, **values) -> str:
        with pytest.raises(ConfigError) as caught:
            load_enlarger(NetworkFile(str(tmp_path / name), **values), CPU, torch.float32)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    assert "tensors alone" in refused("evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no state dict" in refused("list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    assert "as safetensors" in refused("cut.safetensors")
    assert "is no file" in refused("missing.safetensors")
    assert "hub id" in refused("missing.safetensors")
    state = network().state_dict()
    del state["HRconv.bias"]
    save_file(state, tmp_path / "part.safetensors")
    assert "not a whole RRDBNet" in refused("part.safetensors")
    save_file({"layers.0.weight": torch.zeros(3)}, tmp_path / "swin.safetensors")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    assert "resmaster-pipeline[spandrel]" in refused("swin.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"cannot get x\.pth of owner/none"):
        network_file(NetworkFile("owner/none", "x.pth"))


def test_identity_is_the_file_s_content_and_nothing_that_the_method_does_not_read(tmp_path):
    save_file(network().state_dict(), tmp_path / "net.safetensors")

    def hashed(base=None, **values) -> str:
        config = parse_config(
            {
                "name": "d",
                "images": "images",
                "model": base or {},
                "upscale": {"method": "super_resolution", **values},
            }
        )
        return hashes_of(config, replace(weights_of(config), model="any"))["high_res"]

    own = {"model": str(tmp_path / "net.safetensors")}
    assert hashed(**own) == hashed(**own, base={"dtype": "float32"})
    assert hashed(**own) != hashed(**own, halo=8)
    assert hashed(**own) != hashed()
    before = network_identity(NetworkFile(**own))
    save_file(network(seed=1).state_dict(), tmp_path / "net.safetensors")
    assert network_identity(NetworkFile(**own)) != before
    hub = NetworkFile("owner/name", "x.safetensors", "abc")
    assert network_identity(hub) == "owner/name/x.safetensors@abc"


# ------------------------------------------------------------------------------------------------- stage, command line


def test_the_stage_loads_no_base_model_and_calls_no_unet(monkeypatch):
    monkeypatch.setattr(load, "load_pipeline", lambda config: pytest.fail("the base model was loaded"))
    config = parse_config(
        {
            "name": "d",
            "model": {"device": "cpu"},
            "upscale": {"method": "super_resolution", "scale": 3},
            "image_format": "png",
        }
    )
    low_res = EncodedImage(encode_image(some_image(40, 24), "png"), "png", {})
    sample = Sample("k", 0, "a cat", "", 24, 40, 0, low_res=low_res)
    with counting() as cost, timing() as device:
        (output,) = high_res.process(config, [sample])
    assert cost.calls == 0
    assert device.seconds > 0
    facts = json.loads(output.finished().files["json"])
    assert (facts["width"], facts["height"], facts["method"]) == (120, 72, "super_resolution")
    assert facts["model"].startswith("picturebook@")
    assert facts["upscale"].keys() == {"method", "scale", "model", "weight_name", "revision", "tile", "halo"}


def test_the_command_line_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_pipeline", lambda config: pytest.fail("the base model was loaded"))
    some_image(30, 20).save(tmp_path / "in.png")
    words = [
        "upscale",
        str(tmp_path / "in.png"),
        str(tmp_path / "out.png"),
        "--method",
        "super_resolution",
        "--scale",
        "4",
    ]
    args: argparse.Namespace = parser().parse_args(words)
    assert upscale(args, Console(quiet=True)) == 0
    with Image.open(tmp_path / "out.png") as result:
        assert result.size == (120, 80)
