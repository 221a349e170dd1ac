import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from resmaster_stages.errors import PlanError, SampleError
from resmaster_stages.storage.images import decode_image, image_size
from resmaster_stages.storage.sources import find_images, read_image
from tests.fake_stages import png


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_folder_with_sidecars(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png"):
        (tmp_path / name).write_bytes(png((1, 2, 3)))
    (tmp_path / "b.txt").write_text("a barn\n")
    (tmp_path / "sub/c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("no image")
    *found, bad = find_images(str(tmp_path))
    assert [(Path(image.source).name, image.prompt) for image in found] == [("a.JPG", ""), ("b.png", "a barn\n")]
    assert bad.problem.startswith("c.txt: not UTF-8 text; save the file as UTF-8")
    for image in found:
        assert read_image(image.source) == image.data == png((1, 2, 3))


def test_tars_and_hostile_names(tmp_path: Path) -> None:
    members = {
        "../../evil.png": png((1, 0, 0)),
        "/etc/passwd.png": png((2, 0, 0)),
        "x.json": b'{"prompt": "from json"}',
        "x.png": png((3, 0, 0)),
        "y.txt": b"from text",
        "y.jpg": png((4, 0, 0)),
        "z.json": b"[",
        "z.png": png((5, 0, 0)),
    }
    tar = tar_of(tmp_path / "in.tar", members)
    before = sorted(tmp_path.rglob("*"))
    for url in (str(tar), str(tmp_path)):
        found = {image.source: image for image in find_images(url)}
        assert found.pop(f"{tar}#z.png").problem.startswith("z.json: not valid JSON")
        assert {source.removeprefix(f"{tar}#"): image.prompt for source, image in found.items()} == {
            "../../evil.png": "",
            "/etc/passwd.png": "",
            "x.png": "from json",
            "y.jpg": "from text",
        }
        for source, image in found.items():
            assert read_image(source) == image.data == members[source.removeprefix(f"{tar}#")]
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such folder"):
        list(find_images(str(tmp_path / "gone")))
    with pytest.raises(PlanError, match="no such file"):
        list(find_images(str(tmp_path / "gone.tar")))
    with pytest.raises(PlanError, match="no images"):
        list(find_images(str(tmp_path)))
    (tmp_path / "cut.tar").write_bytes(b"hello")
    with pytest.raises(PlanError, match=r"cut\.tar: not a readable tar"):
        list(find_images(str(tmp_path)))
    with pytest.raises(PlanError, match="no images"):
        list(find_images(str(tar_of(tmp_path / "none.tar", {"a.txt": b""}))))


def test_what_is_gone_later_costs_one_sample(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "in.tar", {"a.png": b""})
    for source in (str(tmp_path / "gone.png"), f"{tar}#gone.png", f"{tmp_path}/gone.tar#a.png"):
        with pytest.raises(SampleError, match="gone or cannot be read"):
            read_image(source)


def test_decoding_is_upright_rgb_on_white() -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, "JPEG", exif=exif)
    assert decode_image(turned, "x").size == (2, 4)
    assert image_size(turned, "x") == (4, 2)
    assert image_size(encoded(image, "JPEG"), "x") == (2, 4)
    clear = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")
    assert decode_image(clear, "x").getpixel((0, 0)) == (255, 255, 255)
    grey = encoded(Image.new("L", (2, 2), 7), "PNG")
    assert decode_image(grey, "x").getpixel((0, 0)) == (7, 7, 7)


def test_undecodable_images(monkeypatch: pytest.MonkeyPatch) -> None:
    good = png((1, 2, 3), (64, 64))
    for data in (b"", b"hello", good[:60]):
        with pytest.raises(SampleError, match="x: not a readable image"):
            decode_image(data, "x")
    with pytest.raises(SampleError):
        image_size(b"hello", "x")
    for limit in (1000, 3000):  # far over Pillow's limit, and just over it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match="too many pixels"):
                look(good, "x")
