"""Damaged models: whatever is broken in a file of weights or settings, one line names the file, and no memory is lost.

The damages are drawn with a seed. Where a damage changes only numbers, nothing shows it, and the model loads.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resmaster_stages.config.dataset import CaptionsConfig
from resmaster_stages.config.model import IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.clip_score import load_clip
from resmaster_stages.models import captioner, places
from resmaster_stages.models.enlarger import load_enlarger
from resmaster_stages.models.identity import NetworkFile, pack_folder
from resmaster_stages.models.load import load_pipeline
from resmaster_stages.models.rrdbnet import RRDBNet, RRDBShape
from tests.tiny_models import save

ADAPTER = {"subfolder": "ip_adapter", "weight_name": "ip-adapter.safetensors"}
SHAPES: list[Any] = [[], [10**15], [-1], [1, 2, 3, 4, 5, 6, 7], ["a"], [0], None]
VALUES: list[Any] = [None, -1, 0, 10**6, 10**15, "x", [], {}, 0.5, float("nan"), True, "../../x"]
Damage = Callable[[bytes, random.Random], bytes]


def load_network(file: Path) -> None:
    load_enlarger.cache_clear()
    load_enlarger(NetworkFile(str(file)), torch.device("cpu"), torch.float32)


def load_base(folder: Path) -> None:
    places._read_json.cache_clear()
    captioner.token_counter.cache_clear()
    adapter = IpAdapterConfig(id=str(folder), **ADAPTER)
    config = ModelConfig(id=str(folder), device="cpu", ip_adapter=adapter)
    load_pipeline(config)
    captioner.token_counter(config)


def load_captioner(folder: Path) -> None:
    captioner._load_local.cache_clear()
    captioner.load_captioner(CaptionsConfig(model=str(folder)), "cpu")


def load_judge(folder: Path) -> None:
    load_clip.cache_clear()
    load_clip(str(folder), None, "cpu")


LOADERS: dict[str, Callable[[Path], None]] = {"base": load_base, "captioner": load_captioner, "clip": load_judge}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("whole")
    save(folder / "base")
    for kind in ("captioner", "clip"):
        shutil.copytree(pack_folder() / kind, folder / kind)
    state = RRDBNet(RRDBShape(features=4, blocks=1, growth=2)).state_dict()
    (folder / "networks").mkdir()
    save_file(state, folder / "networks" / "n.safetensors")
    torch.save(state, folder / "networks" / "n.pth")
    torch.save({"params": state}, folder / "networks" / "old.pth", _use_new_zipfile_serialization=False)
    return folder


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    """Some bits of the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 20])):
        changed[draw.randrange(min(len(changed), 3000))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zero(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.randrange(1, 200)
    return data[:start] + bytes(size) + data[start + size :]


def length(data: bytes, draw: random.Random) -> bytes:
    """Another length of a safetensors header than it has."""
    return struct.pack("<Q", draw.choice([0, 1, 7, 10**15, 2**63, 2**64 - 1, len(data), 2 * len(data)])) + data[8:]


def header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors header that says something else of one tensor."""
    size = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + size])
    name = draw.choice([name for name in tensors if name != "__metadata__"])
    match draw.choice(["dtype", "shape", "gone", "renamed", "offsets"]):
        case "dtype":
            tensors[name]["dtype"] = draw.choice(["I8", "F64", "BOOL", "X", 3, None])
        case "shape":
            tensors[name]["shape"] = draw.choice(SHAPES)
        case "gone":
            del tensors[name]
        case "renamed":
            tensors[f"{name}x"] = tensors.pop(name)
        case "offsets":
            tensors[name]["data_offsets"] = draw.choice([[0, 10**15], [5, 1], [-1, 2], ["a", "b"], []])
    changed = json.dumps(tensors).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def setting(data: bytes, draw: random.Random) -> bytes:
    """A setting that is gone or has another value."""
    values = json.loads(data)
    spots: list[tuple[Any, Any]] = [(values, key) for key in values]
    for inner in values.values():
        spots += [(inner, key) for key in inner] if isinstance(inner, dict) else []
    place, key = draw.choice(spots)
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = draw.choice(VALUES)
    return json.dumps(values).encode()


def other_json(data: bytes, draw: random.Random) -> bytes:
    return draw.choice([b"", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])


DAMAGES: dict[str, tuple[Damage, ...]] = {
    ".safetensors": (cut, flip, zero, length, header, header),
    ".pth": (cut, flip, flip, zero),
    ".json": (cut, flip, setting, setting, other_json),
}


def refusal(load: Callable[[Path], None], place: Path) -> str:
    """The line that refuses a model; "" if it loads."""
    try:
        load(place)
    except ConfigError as error:
        line = str(error)
    else:
        return ""
    assert "\n" not in line
    assert len(line) < 800
    assert " object at 0x" not in line
    assert "; " in line
    return line


@pytest.mark.parametrize("name", ["n.safetensors", "n.pth", "old.pth"])
def test_a_damaged_network_is_one_line_that_names_the_file(models: Path, tmp_path: Path, name: str) -> None:
    load_network(models / "networks" / name)
    draw, told = random.Random(name), 0
    for number in range(100):
        file = tmp_path / f"{number}-{name}"
        damage = draw.choice(DAMAGES[file.suffix])
        file.write_bytes(damage((models / "networks" / name).read_bytes(), draw))
        if line := refusal(load_network, file):
            told += 1
            assert str(file) in line, damage
        file.unlink()
    assert told > 50


@pytest.mark.parametrize("kind", LOADERS)
def test_a_damaged_model_is_one_line_that_names_it(models: Path, tmp_path: Path, kind: str) -> None:
    LOADERS[kind](models / kind)
    draw, told = random.Random(kind), 0
    found = [file.relative_to(models / kind) for file in sorted((models / kind).rglob("*"))]
    files = [file for file in found if file.suffix in DAMAGES]
    for _ in range(40):
        folder = shutil.copytree(models / kind, tmp_path / "work")
        file = folder / draw.choice(files)
        damage = draw.choice(DAMAGES[file.suffix])
        file.write_bytes(damage(file.read_bytes(), draw))
        if line := refusal(LOADERS[kind], folder):
            told += 1
            assert str(folder) in line, (file, damage)
            if damage in (length, cut):
                assert file.name in line, (file, damage)
        shutil.rmtree(folder)
    assert told > 15


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("captioner", "model"),
        ("clip", "model"),
        ("base", "text_encoder/model"),
        ("base", "text_encoder_2/model"),
        ("base", "image_encoder/model"),
        ("base", "unet/diffusion_pytorch_model"),
        ("base", "vae/diffusion_pytorch_model"),
        ("base", "ip_adapter/ip-adapter"),
    ],
)
def test_weights_that_a_file_lacks_are_not_made_up(models: Path, tmp_path: Path, kind: str, part: str) -> None:
    folder = shutil.copytree(models / kind, tmp_path / kind)
    file = folder / f"{part}.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + size])
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    tensors[f"{name}-of-another-model"] = tensors.pop(name)
    changed = json.dumps(tensors).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    assert refusal(LOADERS[kind], folder)


@pytest.mark.parametrize(("kind", "part"), [("captioner", ""), ("clip", ""), ("base", "image_encoder/")])
def test_layers_without_end_are_refused_unmade(models: Path, tmp_path: Path, kind: str, part: str) -> None:
    folder = shutil.copytree(models / kind, tmp_path / kind)
    file = folder / f"{part}config.json"
    text = file.read_text()
    for number in (10**6, 10**15):
        file.write_text(re.sub(r'("num_hidden_layers": )\d+', rf"\g<1>{number}", text))
        assert re.search(rf"{file}: num_hidden_layers is larger than 10,000", refusal(LOADERS[kind], folder))


def test_sizes_that_a_pickle_only_claims_take_no_memory(tmp_path: Path) -> None:
    state = RRDBNet(RRDBShape(features=4, blocks=1, growth=2)).state_dict()
    state["conv_first.weight"] = torch.zeros(1).expand(10**9, 3, 3, 3)  # 100 GB if it were filled
    torch.save(state, tmp_path / "claims.pth")
    assert "claims.pth" in refusal(load_network, tmp_path / "claims.pth")
