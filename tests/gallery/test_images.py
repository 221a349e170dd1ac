"""Thumbnails, tiles and stored files: right pixels, read once, within memory, and errors that say what to do."""

import io
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.gallery import images
from resmaster_stages.gallery.images import PIECE_BYTES, Images, Place, places
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.images import decode_image
from tests.gallery.conftest import Opener
from tests.gallery.test_samples import manifest, rewritten


def stored(dataset: Dataset, row: dict[str, Any], kind: str = "high_res") -> bytes:
    """The image of a row, straight from its tar."""
    tar = Path(dataset.folder.full(row[f"{kind}_object"])).read_bytes()
    return tar[row[f"{kind}_offset"] :][: row[f"{kind}_bytes"]]


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails and tiles are encoded as PNG, so that pixels can be compared."""

    def png(image: Image.Image, quality: int) -> bytes:
        assert quality >= 80
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(images, "_jpeg", png)


def opened_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def differ(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is decoded, by name."""
    counts: Counter[str] = Counter()

    def count(data: bytes, name: str) -> Image.Image:
        counts[name] += 1
        return decode_image(data, name)

    monkeypatch.setattr(images, "decode_image", count)
    return counts


@pytest.mark.parametrize("kind", ["high_res", "low_res"])
def test_the_stored_file(made: Dataset, client: TestClient, kind: str) -> None:
    for row in manifest(made):
        answer = client.get(f"image/{row['key']}/{kind.split('_')[0]}/file")
        assert answer.content == stored(made, row, kind)
        assert answer.headers["Content-Type"] == "image/webp"
        assert answer.headers["Content-Length"] == str(len(answer.content))


def test_a_large_file_comes_in_pieces(
    made: Dataset, client: TestClient, monkeypatch: pytest.MonkeyPatch, parts: list[tuple[str, int, int]]
) -> None:
    monkeypatch.setattr(images, "PIECE_BYTES", 1000)
    row = manifest(made)[2]
    assert client.get(f"image/{row['key']}/high/file").content == stored(made, row)
    sizes = [size for _, _, size in parts]
    assert max(sizes) == 1000
    assert sum(sizes) == row["high_res_bytes"]
    assert PIECE_BYTES <= 8 << 20


@pytest.mark.parametrize("px", [128, 256, 512])
@pytest.mark.parametrize("kind", ["high", "low"])
def test_thumbnails(made: Dataset, client: TestClient, lossless: None, px: int, kind: str) -> None:
    row = manifest(made)[1]
    answer = client.get(f"image/{row['key']}/{kind}/thumb/{px}")
    assert answer.headers["Content-Type"] == "image/jpeg"
    image = decode_image(stored(made, row, f"{kind}_res"), "x")
    side = min(px, image.width)  # a small image is not enlarged
    expected = image.resize((side, side), Image.Resampling.LANCZOS)
    assert differ(opened_image(answer.content), expected) < 2


def test_a_thumbnail_of_a_long_image(made: Dataset, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2), (200, 10, 10)).save(buffer, "PNG")
    dataset = made.__class__(made.folder.__class__(made.folder.fs, str(tmp_path)), made.config)
    dataset.folder.write("x.tar", buffer.getvalue())
    place = Place("x.tar", "x.png", 0, len(buffer.getvalue()), 2, 3000)
    (tmp_path / "scratch").mkdir()
    assert opened_image(Images(dataset, tmp_path / "scratch").thumb(place, 128)).size == (128, 1)


def test_all_thumbnails_of_an_image_take_one_decode(
    made: Dataset, client: TestClient, decoded: Counter[str], parts: list[tuple[str, int, int]]
) -> None:
    row = manifest(made)[0]
    for px in (128, 256, 512, 128, 256):
        assert client.get(f"image/{row['key']}/high/thumb/{px}").status_code == 200
    assert decoded == {row["high_res_member"]: 1}
    assert parts == [(row["high_res_object"], row["high_res_offset"], row["high_res_bytes"])]


def pyramid(client: TestClient, row: dict[str, Any], level: int) -> Image.Image:
    """A level of the pyramid, put together from its tiles."""
    scale = 2 ** (10 - level)
    size = (-(-row["width"] // scale), -(-row["height"] // scale))
    whole = Image.new("RGB", size)
    for y in range(0, size[1], 512):
        for x in range(0, size[0], 512):
            answer = client.get(f"image/{row['key']}/high/tile/{level}/{x // 512}_{y // 512}")
            assert answer.status_code == 200, answer.text
            whole.paste(opened_image(answer.content), (x, y))
    return whole


def test_the_pyramid(made: Dataset, client: TestClient, lossless: None, decoded: Counter[str]) -> None:
    """1024 px: the levels 10 (2 x 2 tiles), 9, ..., 0 (1 px)."""
    row = manifest(made)[3]
    image = decode_image(stored(made, row), "x")
    assert differ(pyramid(client, row, 10), image) == 0
    for level in range(10):
        side = 2**level
        assert differ(pyramid(client, row, level), image.resize((side, side), Image.Resampling.BOX)) < 1
    assert decoded == {row["high_res_member"]: 1}


@pytest.mark.parametrize(
    "tile",
    [
        "10/2_0",
        "10/0_2",
        "9/1_0",
        "11/0_0",
        "-1/0_0",
        "10/-1_0",
        "10/0",
        "10/0_0_0",
        "a/0_0",
        "10/0_",
        "9" * 30 + "/0_0",
    ],
)
def test_tiles_that_are_not_there(made: Dataset, client: TestClient, decoded: Counter[str], tile: str) -> None:
    answer = client.get(f"image/{manifest(made)[0]['key']}/high/tile/{tile}")
    assert answer.status_code == 404
    assert "reload the page" in answer.json()["error"]
    assert not decoded


@pytest.mark.parametrize(("height", "width"), [(1, 1), (512, 512), (513, 512), (1000, 1537), (3, 4097), (8192, 8192)])
def test_the_numbers_of_levels_and_tiles(height: int, width: int) -> None:
    """As OpenSeadragon counts them: the highest level is ceil(log2(longer side)), sides are halved and rounded up."""
    place = Place("o", "m", 0, 1, height, width)
    assert place.top_level == int(np.ceil(np.log2(max(height, width))))
    level, h, w = place.top_level, height, width
    while level >= 0:
        assert place.tiles(level) == (-(-w // 512), -(-h // 512))
        level, h, w = level - 1, -(-h // 2), -(-w // 2)


def test_many_who_ask_for_an_image_at_once_decode_it_once(
    made: Dataset, client: TestClient, decoded: Counter[str]
) -> None:
    row = manifest(made)[4]
    tiles = [(10, 0, 0), (10, 1, 0), (10, 0, 1), (10, 1, 1), (9, 0, 0), (8, 0, 0)] * 2
    answers: list[int] = []

    def ask(level: int, x: int, y: int) -> None:
        answers.append(client.get(f"image/{row['key']}/high/tile/{level}/{x}_{y}").status_code)

    threads = [threading.Thread(target=ask, args=tile) for tile in tiles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 12
    assert decoded == {row["high_res_member"]: 1}


def test_memory_and_disk_stay_within_their_bounds(
    made: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch, decoded: Counter[str]
) -> None:
    """Of six images with their pyramids, at most two are held at a time."""
    one = 1024 * 1024 * 4
    monkeypatch.setattr(images, "DECODED_BYTES", int(2.5 * one))
    monkeypatch.setattr(images, "DISK_BYTES", 200_000)
    gallery, client = opened(made)
    for row in manifest(made):
        for tile in ("10/0_0", "10/1_1", "9/0_0", "5/0_0"):
            assert client.get(f"image/{row['key']}/high/tile/{tile}").status_code == 200
            assert gallery.images._decoded.bytes <= 2.5 * one
            assert gallery.images._files.bytes <= 200_000
        assert client.get(f"image/{row['key']}/high/thumb/512").status_code == 200
    assert set(decoded.values()) == {1}, "an image that is held is not decoded for its thumbnail"
    assert len(decoded) == 6
    assert gallery.images._decoded.bytes > one
    assert Image.core.get_block_size() > 32 << 20, "so the C library gives the memory of images back"


def test_images_whose_address_names_their_version_are_kept(made: Dataset, client: TestClient) -> None:
    sample = client.get("api/samples?limit=1").json()["samples"][0]
    for what in ("thumb/128", "tile/0/0_0", "file"):
        address = f"image/{sample['key']}/high/{what}"
        assert "immutable" in client.get(f"{address}?v={sample['v']}").headers["Cache-Control"]
        for other in ("", "?v=", "?v=0"):
            assert client.get(address + other).headers["Cache-Control"] == "private, no-cache"


def test_the_version_changes_with_the_images(made: Dataset) -> None:
    found = places(manifest(made)[0])
    versions = {images.version(found)}
    for change in ({"object": "other.tar"}, {"offset": 7}, {"bytes": 8}):
        place = Place(**{**found["high"].__dict__, **change})
        versions.add(images.version({**found, "high": place}))
        versions.add(images.version({**found, "low": place}))
    assert len(versions) == 7


# ----------------------------------------------------------------------------------------------------------------------
# what is wrong


def gone(dataset: Dataset, row: dict[str, Any]) -> None:
    dataset.folder.remove(row["high_res_object"])


def cut_off(dataset: Dataset, row: dict[str, Any]) -> None:
    path = Path(dataset.folder.full(row["high_res_object"]))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: row["high_res_offset"] + 3])


def no_image(dataset: Dataset, row: dict[str, Any]) -> None:
    path = Path(dataset.folder.full(row["high_res_object"]))
    path.chmod(0o644)
    data = path.read_bytes()
    start, end = row["high_res_offset"], row["high_res_offset"] + row["high_res_bytes"]
    path.write_bytes(data[:start] + b"\0" * (end - start) + data[end:])


def other_size(dataset: Dataset, row: dict[str, Any]) -> None:
    rewritten(dataset, [{"width": 32}])


@pytest.mark.parametrize(
    ("spoil", "status", "says"),
    [
        (gone, 404, "is gone; run: resmaster verify"),
        (cut_off, 502, "cut off inside"),
        (no_image, 502, "none of PNG, JPEG"),
        (other_size, 502, "run: resmaster publish"),
    ],
)
def test_an_image_that_cannot_be_shown(
    own: Dataset,
    opened: Opener,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Dataset, dict[str, Any]], None],
    status: int,
    says: str,
) -> None:
    row = manifest(own)[0]
    spoil(own, row)
    _, client = opened(own)
    capsys.readouterr()
    for what in ("thumb/128", "tile/0/0_0"):
        answer = client.get(f"image/{row['key']}/high/{what}")
        assert answer.status_code == status
        assert says in answer.json()["error"]
        assert "resmaster " in answer.json()["error"]
        assert answer.headers["Cache-Control"] == "no-store"
    assert client.get(f"image/{row['key']}/low/thumb/128").status_code == 200
    assert client.get(f"image/{manifest(own)[-1]['key']}/high/thumb/128").status_code == 200
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if status == 502 else 0), lines
    assert all(line.startswith("view: ") for line in lines)


def test_a_file_that_is_gone_is_an_answer(own: Dataset, opened: Opener) -> None:
    row = manifest(own)[0]
    gone(own, row)
    answer = opened(own)[1].get(f"image/{row['key']}/high/file")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/json")
    assert row["high_res_object"] in answer.json()["error"]


def test_a_manifest_that_leads_out_of_the_dataset(own: Dataset, opened: Opener) -> None:
    row = rewritten(own, [{"high_res_object": "../../secret", "high_res_member": "a.html"}])[0]
    Path(own.folder.full("")).parent.parent.joinpath("secret").write_bytes(b"secret" * 1000)
    answer = opened(own)[1].get(f"image/{row['key']}/high/file")
    assert answer.status_code == 502
    assert "leads out of this folder" in answer.json()["error"]


def test_a_file_is_never_a_page(own: Dataset, opened: Opener) -> None:
    row = rewritten(own, [{"high_res_member": "a.html"}])[0]
    answer = opened(own)[1].get(f"image/{row['key']}/high/file")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the parts of files that are read."""
    found: list[tuple[str, int, int]] = []
    read = Folder.read_part

    def noted(self: Folder, name: str, offset: int, size: int) -> bytes:
        found.append((name, offset, size))
        return read(self, name, offset, size)

    monkeypatch.setattr(Folder, "read_part", noted)
    return found
