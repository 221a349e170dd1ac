"""`resmaster upscale` of several images: names of results, what is kept, pipes, formats."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resmaster_flows.cli import upscale
from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import SDXL
from resmaster_stages.models.downloads import Download, downloads_of
from tests.checkout import PYTHONPATH

LANCZOS = ("--method", "lanczos", "--scale", "2")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `photos/a.png`, `photos/b.jpg` and `photos/below/c.webp`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "below/c.webp"):
        Image.effect_noise((16, 12), 60).convert("RGB").save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def upscaled(*words: str) -> int:
    return main(["upscale", *words, *LANCZOS])


def last(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_a_folder_with_its_sub_folders(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"no image")
    assert upscaled("photos", "large") == 0
    assert last(capsys) == "3 of 3 images upscaled"
    assert names("large") == ["a.png", "b.jpg", "below/c.webp"]
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("below/c.webp", "WEBP")):
        made = Image.open(Path("large", name))
        assert (made.format, made.size) == (kind, (32, 24))


def test_several_files_with_options_between_them(photos: Path) -> None:
    words = ["upscale", "photos/a.png", *LANCZOS, "photos/below/c.webp", "--output-format", "jpeg", "large"]
    assert main(words) == 0
    assert names("large") == ["a.jpg", "c.jpg"]
    assert Image.open("large/c.jpg").format == "JPEG"


def test_a_pattern_in_quotes(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscaled("photos/**/*.[wj]*", "large") == 0
    assert names("large") == ["b.jpg", "c.webp"]
    assert upscaled("photos/*.gif", "large") == 2
    assert "photos/*.gif: no file has a name like this" in last(capsys)


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(photos: Path) -> None:
    (photos / "a.png").rename("a[1].png")
    assert upscaled("a[1].png", "large.png") == 0
    assert names(".") == ["a[1].png", "large.png", "photos/b.jpg", "photos/below/c.webp"]


def test_one_image_into_a_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("there")
    assert upscaled("photos/a.png", "there") == 0
    assert upscaled("photos/a.png", "new/", "--suffix", "_2x") == 0
    assert names("there") + names("new") == ["a.png", "a_2x.png"]
    assert upscaled("photos/a.png", "new", "--suffix", "_2x") == 0
    assert "1 result is there already and kept" in last(capsys)


def test_what_is_there_is_kept_and_a_second_run_goes_on(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("large")
    Path("large/b.jpg").write_bytes(b"mine")
    assert upscaled("photos", "large") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1 result is there already and kept; --force makes them anew"
    assert said[-1] == "2 of 2 images upscaled"
    assert Path("large/b.jpg").read_bytes() == b"mine"
    assert upscaled("photos", "large") == 0
    assert capsys.readouterr().err == "3 results are there already and kept; --force makes them anew\n"
    assert upscaled("photos", "large", "--force") == 0
    assert Image.open("large/b.jpg").size == (32, 24)


def test_an_interrupted_run_keeps_what_is_done(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, count = upscale.upscale_as_configured, 0

    def stop(*args: Any, **kwargs: Any) -> Image.Image:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(upscale, "upscale_as_configured", stop)
    assert upscaled("photos", "large") == 130
    assert last(capsys) == "interrupted; what is done is kept: run the same command again to go on"
    assert names("large") == ["a.png"]
    assert upscaled("photos", "large") == 0
    assert count == 4, "the first image is not made again"
    assert names("large") == ["a.png", "b.jpg", "below/c.webp"]


def test_one_bad_file_does_not_stop_the_rest(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "a.png").write_bytes(b"no image")
    (photos / "x.heic").write_bytes(b"no image")
    assert upscaled("photos", "large") == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": not a readable image")[0] for line in said if line.startswith("resmaster: ")] == [
        "resmaster: photos/a.png",
        "resmaster: photos/x.heic",
    ]
    assert said[-1] == "2 of 4 images upscaled, 2 failed"
    assert names("large") == ["b.jpg", "below/c.webp"]


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_no_input_is_overwritten(photos: Path, force: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (photos / name).read_bytes() for name in names("photos")}
    os.symlink("photos", "link")
    for folder in ("photos", "./photos/", "link", "photos/../link"):
        assert upscaled("photos", folder, *force) == 2
        assert "is the input itself, which is never overwritten" in last(capsys)
    os.link("photos/a.png", "photos/below/a.png")
    assert upscaled("photos/a.png", "photos/b.jpg", "photos/below", *force) == 2
    assert "photos/below/a.png: is the input itself" in last(capsys)
    os.unlink("photos/below/a.png")
    assert {name: (photos / name).read_bytes() for name in names("photos")} == before


def test_results_beside_the_inputs_are_no_inputs_of_a_second_run(photos: Path) -> None:
    for _ in range(2):
        assert upscaled("photos", "photos", "--suffix", "_2x") == 0
    beside = ["a.png", "a_2x.png", "b.jpg", "b_2x.jpg", "below/c.webp", "below/c_2x.webp"]
    assert names("photos") == beside
    for _ in range(2):
        assert upscaled("photos", "photos/large") == 0
    assert names("photos/large") == beside


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos", "large.png"], "photos: is a folder; give an image file, or a folder as OUTPUT"),
        (["photos/*.*", "large.png"], "large.png: several images go into a folder; give a folder as OUTPUT"),
        (["photos/a.png", "photos/b.jpg", "photos/a.png"], "photos/a.png: several images go into a folder"),
        (["photos", "photos/a.png/large"], "photos/a.png is a file; give a folder as OUTPUT"),
        (["photos", "photos/below", "large", "--output-format", "png"], ""),
        (
            ["photos/a.png", "other/a.jpg", "large", "--output-format", "png"],
            "the results of both would be large/a.png",
        ),
        (["photos/a.png", "large"], "large: unknown image format ''; use one of .png, .webp"),
        (["photos/a.png", "a.png", "--output-format", "webp"], "its name says png, and --output-format webp"),
        (["photos/a.png", "a.png", "--suffix", "x"], "--suffix is for results in a folder"),
        (["photos", "large", "--suffix", "/../x"], "cannot be in a name"),
        (["photos/a.png", "a.png", "--quality", "90"], "a.png: --quality 90: png has none"),
        (["photos/a.png", "a.jpg", "--quality", "0"], "--quality 0: give a number from 1 to 100"),
        (["photos/a.png", "a.jpg", "--alpha", "keep"], "a.jpg: --alpha keep: jpeg holds no transparency"),
        (["photos", "large", "--alpha", "keep"], "--alpha keep: jpeg holds no transparency"),
        (["photos/a.png", "a.webp", "--bit-depth", "16"], "a.webp: --bit-depth 16: webp files are written with 8 bits"),
        (["other", "large"], "other: no images (.png"),
        (["-", "-", "large"], "- is standard input, which can be read once"),
        (["-", "photos", "large"], "- as INPUT is standard input: its result has no name in a folder"),
        (["photos", "-"], "- as OUTPUT is standard output, which takes one image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_the_work(
    words: list[str], said: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkdir("other")
    if "other/a.jpg" in words:
        Image.new("RGB", (8, 8)).save("other/a.jpg")
    before = names(".")
    if not said:  # the same file, given twice
        assert upscaled(*words) == 0
        assert names("large") == ["a.png", "b.png", "below/c.png", "c.png"]
        return
    assert upscaled(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert names(".") == before


def piped(words: list[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", "upscale", *words, *LANCZOS],
        input=data,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        check=False,
    )


def test_pipes(photos: Path) -> None:
    data = (photos / "a.png").read_bytes()
    done = piped(["-", "-"], data)
    assert done.returncode == 0, done.stderr
    made = Image.open(io.BytesIO(done.stdout))
    assert (made.format, made.size) == ("PNG", (32, 24))
    assert done.stderr.splitlines()[-1] == b"standard input (16 x 12 px) -> standard output (32 x 24 px)"
    assert upscaled("photos/a.png", "file.webp") == 0
    assert piped(["-", "-", "--output-format", "webp"], data).stdout == Path("file.webp").read_bytes()
    assert piped(["-", "out.png"], data).returncode == 0
    assert Path("out.png").read_bytes() == done.stdout
    bad = piped(["-", "-"], b"no image")
    assert (bad.returncode, bad.stdout) == (2, b"")
    (line,) = bad.stderr.splitlines()
    assert line.startswith(b"resmaster: standard input: not a readable image")


def test_the_model_is_loaded_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resmaster_stages.models import load

    load.load_models.cache_clear()
    loaded: list[object] = []
    original = load.load_pipeline

    def counted(config: Any) -> Any:
        loaded.append(config)
        return original(config)

    monkeypatch.setattr(load, "load_pipeline", counted)
    words = ["--model", "picturebook", "--method", "multidiffusion", "--scale", "1", "--steps", "1"]
    assert main(["upscale", "photos", "large", *words]) == 0
    assert names("large") == ["a.png", "b.jpg", "below/c.webp"]
    assert len(loaded) == 1
    load.load_models.cache_clear()


def test_a_model_that_cannot_be_loaded_is_told_once(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "photos", "large", "--model", "no/such-model", "--method", "multidiffusion"]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("resmaster: ")]
    assert "no/such-model" in line
    assert not Path("large").exists()


def test_a_log_names_the_image_and_its_steps(photos: Path) -> None:
    words = ["--model", "picturebook", "--method", "multidiffusion", "--scale", "1", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", "upscale", "photos", "large", *words],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stderr.splitlines()
    assert said[:4] == [
        "  image 1 of 3: photos/a.png, loading picturebook",
        "  image 1 of 3: upscaling: step 1 of 2",
        "  image 1 of 3: upscaling: step 2 of 2",
        "photos/a.png (16 x 12 px) -> large/a.png (16 x 12 px)",
    ]
    assert said[-1] == "3 of 3 images upscaled"


def test_quality(photos: Path) -> None:
    for name in ("webp", "jpg", "avif"):
        sizes = []
        for quality in ("30", "95"):
            assert upscaled("photos/a.png", f"{quality}.{name}", "--quality", quality) == 0
            sizes.append(Path(f"{quality}.{name}").stat().st_size)
        assert sizes[0] < sizes[1]
    assert upscaled("photos/a.png", "whole.webp", "--quality", "100") == 0
    assert upscaled("photos/a.png", "whole.png") == 0
    assert np.array_equal(np.asarray(Image.open("whole.webp")), np.asarray(Image.open("whole.png")))


def test_transparency_is_kept_on_request(photos: Path) -> None:
    """On white, a result with transparency looks like one without. Elsewhere it has the colour of what is drawn."""
    y, x = np.mgrid[:24, :24]
    alpha = np.clip(255 * (9 - np.hypot(y - 12, x - 12)) / 4, 0, 255)
    Image.fromarray(np.dstack([np.full((24, 24), level) for level in (200, 40, 20)] + [alpha]).astype(np.uint8)).save(
        "a.png"
    )
    for name in ("flat.png", "clear.png", "clear.webp"):
        assert upscaled("a.png", name, *(() if name == "flat.png" else ("--alpha", "keep", "--force"))) == 0
    flat, clear = Image.open("flat.png"), Image.open("clear.png")
    assert (flat.mode, clear.mode, Image.open("clear.webp").mode) == ("RGB", "RGBA", "RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    assert np.abs(np.asarray(on_white, int) - np.asarray(flat, int)).max() <= 2
    values = np.asarray(clear, int)
    seen = values[..., 3] > 64
    assert np.abs(values[seen][:, :3] - (200, 40, 20)).max() <= 24, "no white rim"
    assert values[0, 0, 3] == 0
    wanted = np.asarray(Image.fromarray(alpha.astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC), int)
    assert np.abs(values[..., 3] - wanted).max() <= 4, "Pillow rounds between the axes"


def test_an_opaque_image_has_no_transparency_to_keep(photos: Path) -> None:
    assert upscaled("photos/a.png", "out.png", "--alpha", "keep") == 0
    assert Image.open("out.png").mode == "RGB"


def deep_pixels(path: str) -> np.ndarray:
    """The pixels of a PNG of 16 bits, by a reader of its own: Pillow gives 8 of them."""
    data = Path(path).read_bytes()
    place, chunks = 8, {}
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[place + 8 + size : place + 12 + size])
        chunks[kind] = body
        place += 12 + size
    width, height, bits, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert bits == 16
    channels = {2: 3, 6: 4}[colours]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels * 2)
    assert set(rows[:, 0]) == {2}, "each line is stored as the difference from the one above"
    lines = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8)
    return lines.copy().view(">u2").reshape(height, width, channels).astype(int)


def test_sixteen_bits_are_what_was_computed(photos: Path) -> None:
    """A slow ramp has many more levels than 256, and lies within half a level of the result of 8 bits."""
    ramp = np.tile(np.linspace(100, 110, 64).round(), (64, 1)).astype(np.uint8)
    Image.fromarray(np.dstack([ramp] * 3)).save("ramp.png")
    words = ["ramp.png", "--method", "lanczos", "--scale", "8"]
    assert main(["upscale", *words, "deep.png", "--bit-depth", "16"]) == 0
    assert main(["upscale", *words, "flat.png"]) == 0
    deep, flat = deep_pixels("deep.png"), np.asarray(Image.open("flat.png"), int)
    assert deep.shape == flat.shape == (512, 512, 3)
    assert len(np.unique(deep)) > 4 * len(np.unique(flat))
    assert np.abs(deep / 257 - flat).max() <= 1.1, "Pillow rounds between the axes"
    assert np.array_equal(np.asarray(Image.open("deep.png"), int), deep >> 8), "other readers agree"
    assert b"algorithmicallyEnhanced" in Path("deep.png").read_bytes()


def test_sixteen_bits_of_a_model(photos: Path) -> None:
    """The decoded floats, to the nearest of 65,536 levels."""
    import resmaster_stages as rm

    words = ["--model", "picturebook", "--method", "multidiffusion", "--scale", "1", "--steps", "2"]
    assert main(["upscale", "photos/a.png", "deep.png", *words, "--bit-depth", "16"]) == 0
    assert main(["upscale", "photos/a.png", "flat.png", *words]) == 0
    deep, flat = deep_pixels("deep.png"), np.asarray(Image.open("flat.png"), int)
    assert np.abs(deep / 257 - flat).max() <= 0.51
    assert len(np.unique(deep % 257)) > 100, "no 8-bit image, scaled up"
    settings = {"method": "multidiffusion", "scale": 1, "steps": 2}
    floats = rm.upscale("photos/a.png", model="picturebook", output_type="np", **settings)
    assert np.abs(deep - floats.astype(np.float64) * 65535).max() <= 0.51


def test_sixteen_bits_with_transparency(photos: Path) -> None:
    image = Image.effect_noise((16, 12), 60).convert("RGB")
    image.putalpha(Image.linear_gradient("L").resize((16, 12)))
    image.save("a.png")
    assert upscaled("a.png", "deep.png", "--bit-depth", "16", "--alpha", "keep") == 0
    assert upscaled("a.png", "flat.png", "--alpha", "keep") == 0
    deep, flat = deep_pixels("deep.png"), np.asarray(Image.open("flat.png"), int)
    assert deep.shape == (24, 32, 4)
    assert np.abs(deep[..., 3] / 257 - flat[..., 3]).max() <= 0.51


def test_what_has_eight_bits_only_is_told(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscaled("photos/a.png", "a.png", "--bit-depth", "16", "--colour-match", "wavelet") == 2
    assert "--bit-depth 16: colours are matched in 8 bits; leave colour_match: wavelet out" in last(capsys)
    assert not Path("a.png").exists()


class Hub(BaseHTTPRequestHandler):
    """The hub's answer about one repository: names and sizes of files."""

    files: dict[str, int]

    def do_GET(self) -> None:
        siblings = [{"rfilename": name, "size": size} for name, size in self.files.items()]
        body = json.dumps({"id": "a/b", "modelId": "a/b", "siblings": siblings}).encode()
        self.send_response(200 if "stabilityai" in self.path else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    import huggingface_hub.constants as constants

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def sdxl(**upscale: Any) -> DatasetConfig:
    return parse_config({"name": "x", "model": SDXL, "captions": {"source": "prompt"}, "upscale": upscale})


def test_the_size_of_a_download_is_that_of_the_files_that_are_fetched(hub: type[Hub]) -> None:
    hub.files = {
        "model_index.json": 500,
        "sd_xl_base_1.0.safetensors": 10**13,
        "unet/diffusion_pytorch_model.safetensors": 2_000,
        "unet/diffusion_pytorch_model.fp16.safetensors": 1_000,
        "unet/model.onnx_data": 10**13,
        "vae/diffusion_pytorch_model.safetensors": 30,
    }
    found = downloads_of(sdxl(method="multidiffusion"))
    variant = 1_030 if SDXL.get("variant") == "fp16" else 2_030
    assert found[0] == Download(SDXL["id"], variant)
    assert [each.bytes for each in found[1:]] == [None] * len(found[1:]), "404: the size is unknown"
    adapter = downloads_of(sdxl(method="resmaster"))
    assert {each.model for each in adapter} - {each.model for each in found} == {"h94/IP-Adapter"}
    assert downloads_of(sdxl(method="lanczos")) == ()


def test_downloads_are_announced_with_their_size(
    hub: type[Hub], photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = {"unet/x.safetensors": 6_900_000_000, "unet/x.fp16.safetensors": 6_900_000_000}
    monkeypatch.setattr(upscale, "upscale_as_configured", lambda *args, **kwargs: Image.new("RGB", (8, 8)))
    assert main(["upscale", "photos/a.png", "out.png"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{SDXL['id']} is not on this machine yet, and is downloaded first (some 6.9 GB)"
    assert "h94/IP-Adapter is not on this machine yet, and is downloaded first (size unknown)" in said
    assert "--model picturebook needs no download" in said


def test_what_is_in_the_cache_is_not_downloaded(hub: type[Hub], tmp_path: Path) -> None:
    """The cache may have the configuration, which `plan` reads, and no weights."""
    hub.files = {}
    config = sdxl(method="multidiffusion").model_copy(deep=True)
    folder = tmp_path / "cache" / f"models--{SDXL['id'].replace('/', '--')}"
    commit = "a" * 40
    (folder / "snapshots" / commit / "unet").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / (config.model.revision or "main")).write_text(commit)
    (folder / "snapshots" / commit / "model_index.json").write_text("{}")
    assert SDXL["id"] in {each.model for each in downloads_of(config)}
    (folder / "snapshots" / commit / "unet" / "weights.safetensors").touch()
    assert SDXL["id"] not in {each.model for each in downloads_of(config)}


def test_nothing_is_asked_offline_or_of_what_is_here(monkeypatch: pytest.MonkeyPatch, hub: type[Hub]) -> None:
    hub.files = {}
    here = parse_config({"name": "x", "upscale": {"method": "resmaster"}})
    assert downloads_of(here) == ()
    odd = parse_config({"name": "x", "model": {"id": "a b:c"}, "captions": {"source": "prompt"}})
    assert downloads_of(odd) == (), "no valid name, which loading will say"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert downloads_of(sdxl(method="resmaster")) == ()
