"""Files from outside, made to harm: each is turned down with a reason, and nothing is read, run or written that should
not be."""

import gzip
import io
import json
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from resmaster_stages.errors import PlanError, SampleError, ShardError, UserError
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.planning.prompt_files import read_prompts
from resmaster_stages.storage import sources
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.images import decode_image, image_size
from resmaster_stages.storage.shards import read_index
from resmaster_stages.storage.sources import find_images, read_image
from tests.fake_stages import config_at, png
from tests.storage.test_images import encoded, tar_of


def member(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in values.items():
        setattr(info, field, value)
    return info


def raw_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    """Headers as they are given, each followed by its data, whatever size the header claims."""
    blocks = b""
    for info, data in members:
        blocks += info.tobuf(form, errors="surrogateescape") + data + bytes(-len(data) % 512)
    path.write_bytes(blocks + bytes(1024))
    return path


def problems(url: Path) -> dict[str, str]:
    return {image.source.rpartition("#")[2].rpartition("/")[2]: image.problem for image in find_images(str(url))}


def test_links_devices_and_sparse_members_of_a_tar_are_turned_down(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(png((9, 9, 9)))
    good = png((1, 1, 1))
    kinds = {
        "soft.png": tarfile.SYMTYPE,
        "hard.png": tarfile.LNKTYPE,
        "char.png": tarfile.CHRTYPE,
        "block.png": tarfile.BLKTYPE,
        "fifo.png": tarfile.FIFOTYPE,
    }
    entries = [(member(name, kind, linkname=str(secret)), b"") for name, kind in kinds.items()]
    sparse = member("sparse.png", tarfile.GNUTYPE_SPARSE, size=len(good))
    tar = raw_tar(tmp_path / "in.tar", *entries, (sparse, good), (member("good.png", size=len(good)), good))
    found = problems(tar)
    assert found.pop("good.png") == ""
    assert len(found) == 6
    assert all("a link, a device or a sparse file" in problem for problem in found.values())
    for name in found:
        with pytest.raises(SampleError, match="a link, a device"):
            read_image(f"{tar}#{name}")
    draft = draft_samples(config_at(tmp_path, images=str(tar)))
    assert (len(draft.samples), len(draft.rejected)) == (1, 6)


@pytest.mark.parametrize("size", [-512, -1024, 2**63])
def test_absurd_sizes_of_a_member_end_the_reading(tmp_path: Path, size: int) -> None:
    """A negative size leads tarfile back to where it was, for ever."""
    tar = raw_tar(tmp_path / "in.tar", (member("a.png", size=0), b""), (member("b.png", size=size), png((1, 1, 1))))
    with pytest.raises(PlanError, match="not a readable tar"):
        list(find_images(str(tar)))
    with tar.open("rb") as file, pytest.raises(ShardError, match="not a readable tar"):
        read_index(file, "x")


def test_absurd_sizes_of_an_extended_header_end_the_reading(tmp_path: Path) -> None:
    tar = raw_tar(tmp_path / "in.tar", (member("x", tarfile.XHDTYPE, size=2**62), b"20 path=../../evil\n"))
    with pytest.raises(PlanError, match="not a readable tar"):
        list(find_images(str(tar)))


def test_what_is_too_large_is_turned_down_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 10)
    big, small = b"x" * 1001, png((1, 1, 1))
    tar = tar_of(tmp_path / "in.tar", {"a.png": big, "b.png": small, "b.txt": b"x" * 11, "c.png": small, "c.txt": b"c"})
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tar) as packed:
        packed.extractall(folder, filter="data")
    for place in (tar, folder):
        found = problems(place)
        assert "a.png has 1,001 bytes, more than 1,000" in found["a.png"]
        assert "b.txt has 11 bytes, more than 10" in found["b.png"]
        assert found["c.png"] == ""


def test_names_that_command_terminals_are_turned_down_and_shown_harmlessly(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"a\x1b]0;owned\x07.png", b"b\xff.png", b"c.png"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(png((name[0], 1, 1)))
    tar = raw_tar(
        tmp_path / "in.tar",
        (member("a\x1b[2J.png", size=70), png((1, 1, 1))[:70]),
        (member("b\udcff.png", size=0), b""),
    )
    for place, good in ((folder, 1), (tar, 0)):
        found = list(find_images(str(place)))
        assert sum(not image.problem for image in found) == good
        assert {image.problem for image in found} - {""} == {"its name holds control characters or is not UTF-8"}
    draft = draft_samples(config_at(tmp_path, images=str(folder)))
    assert len(draft.samples) == 1
    assert len(draft.rejected) == 2
    for rejected in draft.rejected:
        assert str(rejected).isprintable()
        assert str(rejected).encode()


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_compressed_files_are_not_unpacked(tmp_path: Path, pack) -> None:
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(pack(bytes(50_000_000)))
    with pytest.raises(PlanError, match=r"bomb\.tar: not a readable tar"):
        list(find_images(str(bomb)))


def test_texts_are_not_read_through_links_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    folder = tmp_path / "in"
    (folder / "texts").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png((ord(name), 1, 1)))
    (folder / "a.txt").symlink_to("../id_rsa")
    (folder / "texts" / "b").write_text("a barn")
    (folder / "b.txt").symlink_to("texts/b")
    a, b = find_images(str(folder))
    assert "a.txt is a link that leads out of the folder" in a.problem
    assert (a.data, a.prompt) == (b"", "")
    assert b.prompt == "a barn"


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS file would start Ghostscript."""
    run = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: run.append(args))
    monkeypatch.setattr("shutil.which", lambda *args, **options: "/bin/gs")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(png((1, 2, 3)))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(run) print\nshowpage\n%%EOF\n"
    pdf = encoded(Image.new("RGB", (8, 8)), "PDF")
    for data in (program, pdf, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", b"<html>"):
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match=r"x\.png: not a readable image"):
                look(data, "x.png")
        (tmp_path / "in" / f"{len(data)}.png").write_bytes(data)
    draft = draft_samples(config_at(tmp_path, images=str(tmp_path / "in")))
    assert [sample.source for sample in draft.samples] == [str(tmp_path / "in" / "good.png")]
    assert len(draft.rejected) == 4
    assert all(each.reason.startswith("not a readable image (it is none of PNG, JPEG") for each in draft.rejected)
    assert run == []


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_decompression_bombs() -> None:
    """Small files that claim, or unfold to, far too much."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    claim = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for look in (decode_image, image_size):
        with pytest.raises(SampleError, match=r"too many pixels \(more than 89,478,485\); scale it down"):
            look(claim, "x")
    good = png((1, 2, 3))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200_000_000), 9))
    for extra in (text, profile):
        data = good[:33] + extra + good[33:]  # after IHDR
        assert len(data) < 300_000
        try:
            assert decode_image(data, "x").size == (16, 16), "left out"
        except SampleError as error:
            assert "too large" in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whatever_is_broken_in_an_image_costs_one_sample(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    good = encoded(Image.effect_noise((24, 16), 50).convert("RGB"), kind, exif=exif)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans()
    )
    def check(changes: list[tuple[int, int]], cut: bool) -> None:
        data = bytearray(good)
        for place, value in changes:
            data[place] = value
        data = data[: changes[0][0]] if cut else data
        for look in (decode_image, image_size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    look(bytes(data), "x")
                except SampleError as error:
                    assert str(error).startswith("x: ")  # noqa: PT017  (either outcome is right)

    check()


def test_whatever_is_broken_in_a_tar_costs_the_tar(tmp_path: Path) -> None:
    good = tar_of(
        tmp_path / "good.tar", {"a.png": png((1, 1, 1)), "a.txt": b"text", "b.png": png((2, 2, 2))}
    ).read_bytes()
    path = tmp_path / "in.tar"

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, len(good))
    )
    def check(changes: list[tuple[int, int]], length: int) -> None:
        data = bytearray(good)
        for place, value in changes:
            data[place] = value
        path.write_bytes(data if length % 2 else data[:length])
        try:
            assert len(list(find_images(str(path)))) <= 2
        except PlanError as error:
            assert "in.tar" in str(error)  # noqa: PT017

    check()


def test_a_small_parquet_file_may_hold_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read as they are asked for: here 20 million in 100 kB, of which five are looked at."""
    path = tmp_path / "prompts.parquet"
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), 20_000_000), ["a red house"])
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd")
    assert path.stat().st_size < 200_000
    before = pa.total_allocated_bytes()
    prompts = read_prompts(str(path))
    assert [next(prompts).prompt for _ in range(5)] == ["a red house"] * 5
    assert pa.total_allocated_bytes() - before < 150_000_000


def test_prompts_stay_text(tmp_path: Path) -> None:
    """Formulas are data: no table of this project is CSV, and Parquet cells are not evaluated."""
    path = tmp_path / "prompts.csv"
    path.write_text('prompt\n"=HYPERLINK(""http://x"",""y"")"\n@SUM(1+1)\n-2+3\n')
    draft = draft_samples(config_at(tmp_path, prompts=str(path)))
    assert [sample.prompt for sample in draft.samples] == ['=HYPERLINK("http://x","y")', "@SUM(1+1)", "-2+3"]


@pytest.mark.parametrize("root", ["local", "memory"])
@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../evil", ".."])
def test_names_in_records_do_not_lead_out_of_the_folder(tmp_path: Path, root: str, name: str) -> None:
    evil = tmp_path / "evil"
    evil.write_bytes(b"outside")
    (tmp_path / "data").mkdir()
    folder = open_root(str(tmp_path / "data") if root == "local" else "memory://data")
    actions = [
        lambda: folder.read(name),
        lambda: folder.read_many([name]),
        lambda: folder.open(name),
        lambda: folder.exists(name),
        lambda: folder.remove(name),
        lambda: folder.write(name, b""),
        lambda: folder.create(name, b""),
        lambda: folder.download(name, tmp_path),
        lambda: folder.upload(name, evil),
    ]
    for act in actions:
        with pytest.raises(UserError, match="leads out of this folder"):
            act()
    assert evil.read_bytes() == b"outside"


def test_json_from_outside_cannot_exhaust_the_stack(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    tar = tar_of(tmp_path / "in.tar", {"a.png": png((1, 1, 1)), "a.json": deep})
    (found,) = find_images(str(tar))
    assert found.problem.startswith("a.json: not valid JSON")
    with pytest.raises((RecursionError, ValueError)):
        json.loads(io.BytesIO(deep).read())
