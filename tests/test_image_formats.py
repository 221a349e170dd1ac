"""A dataset of each image format: built, published, read by its card's code, damaged and mended to the byte."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.inspection.verify import verify
from resmaster_stages.models.identity import Weights
from resmaster_stages.storage import images
from resmaster_stages.storage.images import decode_image

SIZE = (40, 24)


def photos(folder: Path) -> list[Image.Image]:
    """Two images in a folder, each with its prompt."""
    folder.mkdir()
    made = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 10, 3), dtype=np.uint8)
        made.append(Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC))
        made[-1].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return made


def configuration(folder: Path, **values: object) -> Path:
    values = {"name": "d", "root": str(folder / "out"), "images": str(folder / "in"), "samples_per_shard": 2, **values}
    values.setdefault("upscale", {"method": "lanczos", "scale": 2})
    (folder / "d.yaml").write_text(yaml.safe_dump(values))
    return folder / "d.yaml"


def members(folder: Path, stage: str) -> dict[str, bytes]:
    """Member -> content, over the tars of a stage."""
    found = {}
    for path in sorted((folder / "out" / "d" / stage).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


@pytest.mark.parametrize(
    ("image_format", "low_extension"), [("webp", "webp"), ("png", "png"), ("avif", "webp"), ("jxl", "jxl")]
)
def test_a_dataset_of_each_format(image_format, low_extension, tmp_path, capsys):
    low = photos(tmp_path / "in")
    assert main(["run", str(configuration(tmp_path, image_format=image_format))]) == 0
    names = {stage: {name.split(".")[1] for name in members(tmp_path, stage)} for stage in ("low_res", "high_res")}
    assert names == {"low_res": {low_extension, "json", "txt"}, "high_res": {image_format, "json", "txt"}}
    stored = {
        json.loads(data)["prompt"]: decode_image(members(tmp_path, "low_res")[f"{name[:-5]}.{low_extension}"], name)
        for name, data in members(tmp_path, "low_res").items()
        if name.endswith(".json")
    }
    assert all(stored[f"photo {number}"].tobytes() == image.tobytes() for number, image in enumerate(low))

    dataset = open_dataset(str(tmp_path / "out" / "d"))
    assert not verify(dataset).damage
    for stage in ("low_res", "high_res"):
        (path,) = (tmp_path / "out" / "d" / stage).glob("*.tar")
        before = path.read_bytes()
        path.write_bytes(before[:1000])
        assert main(["verify", dataset.url]) == 1
        assert main(["repair", dataset.url]) == 0
        assert path.read_bytes() == before
    assert not verify(dataset).damage
    capsys.readouterr()
    key = dataset.plan.read(0)[0].key
    assert main(["explain", dataset.url, key]) == 0
    assert f"{key}.{image_format}" in capsys.readouterr().out

    card = (tmp_path / "out" / "d" / "README.md").read_text()
    assert f"`KEY.{image_format}`" in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    probes = ["    print(image.size, prompt)\n", "        print(image.size, row['prompt'])\n"]
    for snippet, probe in zip(snippets, probes, strict=True):
        script = snippet.replace('("agreement_psnr", ">", 20)', '("agreement_psnr", ">", 0)') + probe
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path / "out" / "d"
        )
        assert sorted(done.stdout.splitlines()) == ["(80, 48) photo 0", "(80, 48) photo 1"], done.stderr


@pytest.mark.parametrize("image_format", ["avif", "jxl"])
def test_the_hubs_library_makes_images_of_the_bytes_as_the_card_says(image_format, tmp_path):
    datasets = pytest.importorskip("datasets")
    photos(tmp_path / "in")
    assert main(["run", str(configuration(tmp_path, image_format=image_format))]) == 0
    card = (tmp_path / "out" / "d" / "README.md").read_text()
    assert f'`dataset.cast_column("{image_format}", datasets.Image())`' in card
    found = datasets.load_dataset(str(tmp_path / "out" / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    found = found.cast_column(image_format, datasets.Image())
    assert [row[image_format].size for row in found] == [(80, 48)] * 2


def test_quality_counts_in_the_format_that_has_it(tmp_path):
    def hashes(**values: object) -> dict[str, str]:
        config = parse_config({"name": "d", "images": "in", "upscale": {"method": "lanczos"}, **values})
        return hashes_of(config, Weights("m"))

    assert hashes(avif_quality=50, jxl_quality=50) == hashes(), "WebP reads neither"
    for image_format in ("avif", "jxl"):
        own, other = f"{image_format}_quality", "webp_quality"
        assert hashes(image_format=image_format, **{other: 50}) == hashes(image_format=image_format)
        changed = hashes(image_format=image_format, **{own: 50})
        assert changed["low_res"] == hashes(image_format=image_format)["low_res"], "low-res images are lossless"
        assert changed["high_res"] != hashes(image_format=image_format)["high_res"]


def test_jpeg_xl_that_is_not_installed_is_told_before_anything_is_planned(tmp_path, monkeypatch, capsys):
    photos(tmp_path / "in")
    path = configuration(tmp_path, image_format="jxl")
    monkeypatch.setattr(images, "FORMATS", tuple(name for name in images.FORMATS if name != "JXL"))
    for verb in ("plan", "run"):
        assert main([verb, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            "image_format: JPEG XL is not installed; pip install 'resmaster-pipeline[jxl]', or choose another format"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".avif", ".jxl", ".AVIF"])
def test_one_image_is_upscaled_to_these_formats(suffix, tmp_path, monkeypatch, capsys):
    photos(tmp_path / "in")
    target = tmp_path / f"out{suffix}"
    words = ["upscale", str(tmp_path / "in" / "0.png"), str(target), "--method", "lanczos", "--scale", "2"]
    assert main(words) == 0
    assert Image.open(io.BytesIO(target.read_bytes())).format == suffix[1:].upper()
    assert decode_image(target.read_bytes(), "x").size == (80, 48)
    if suffix == ".jxl":
        monkeypatch.setattr(images, "FORMATS", ("PNG",))
        capsys.readouterr()
        assert main([*words, "--force"]) == 2
        assert "out.jxl: JPEG XL is not installed; pip install" in capsys.readouterr().err
