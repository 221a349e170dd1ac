"""Every image in a folder or a tar is given, or rejected with a reason, and is read again by its source."""

import os
import re
import shutil
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.errors import PlanError, SampleError, UserError
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.planning.preview import preview
from resmaster_stages.storage import filesystem, listings, masks, sources
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.images import KNOWN_UNREAD, SUFFIXES
from resmaster_stages.storage.listings import parse_source, spell_source
from resmaster_stages.storage.sources import LoneTexts, find_images, masks_beside, read_image
from tests.fake_stages import config_at, png
from tests.storage.test_images import tar_of
from tests.storage.test_untrusted import member, raw_tar

ODD_NAMES = (
    *("a::b", "x.tar#y", "x.tar%23y", "x.TAR#y", "a#b", "what?", "100%", "a%20b", "*", "[1]", "~a", " a", "a b", "é"),
    *("s3:", "file:", "key=1&sig=2", "photo.v2.final", "{a}", "a;b", "'", '"', "\\", "\u200b", "日本"),
)


def image(number: int = 0) -> bytes:
    return png((number % 256, number // 256 % 256, 7), (2, 2))


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def prompts(place: Path) -> dict[str, object]:
    """Name of each usable image -> its prompt."""
    found = list(find_images(str(place)))
    assert [each.problem for each in found if each.problem] == []
    return {re.split("[/#]", each.source)[-1]: each.prompt for each in found}


def problems(place: Path | str) -> dict[str, str]:
    """Name of each image below a place -> what is wrong with it."""
    return {each.source.removeprefix(f"{place}")[1:]: each.problem for each in find_images(str(place))}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_whatever_an_image_is_called_it_is_read_the_way_it_was_found(folder: Folder, name: str, tmp_path: Path) -> None:
    if name == "\\" and folder.path.startswith("tests/"):
        pytest.skip("SeaweedFS takes a backslash for a slash")
    tar = tar_of(tmp_path / "made.tar", {f"{name}.png": image(3), f"d.tar#{name}/b.jpg": image(4)}).read_bytes()
    for path, data in {
        f"{name}.png": image(1),
        f"{name}.detail_mask.png": image(5),
        f"{name}/in.png": image(2),
        f"{name}.tar": tar,
        f"{name}2.TAR": tar,
    }.items():
        folder.write(path, data)
    found = list(find_images(folder.url))
    assert [each.problem for each in found] == [""] * 6
    assert Counter(each.data for each in found) == {image(1): 1, image(2): 1, image(3): 2, image(4): 2}
    for each in found:
        assert read_image(each.source) == each.data
        if each.mask:
            assert masks.read_mask_beside(each.source) == masks.read_mask(masks_beside(each.source)[0]) == image(5)
    assert sum(each.mask is not None for each in found) == 1
    if name == "key=1&sig=2" and not folder.local:  # given by the user, this would be a signed link
        return
    alone = [*find_images(folder.url_of(f"{name}.tar")), *find_images(folder.url_of(f"{name}2.TAR"))]
    assert {each.source for each in alone} == {each.source for each in found if each.data in (image(3), image(4))}
    assert [each.data for each in find_images(folder.sub(name).url)] == [image(2)]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([".tar", ".TAR", "#", "%", "23", "25", "a", "/", ".png", "::"]), max_size=12),
    st.booleans(),
)
def test_spelling_a_source_and_reading_the_spelling_are_inverse(parts: list[str], packed: bool) -> None:
    url, name = "/r/" + "".join(parts), "".join(reversed(parts))
    assert parse_source(spell_source(url)) == (url, None)
    assert parse_source(spell_source(f"{url}.tar", name)) == (f"{url}.tar", name)
    if not re.search(r"\.tar(#|%(25)*23)", url, re.IGNORECASE):
        assert spell_source(url) == url
        assert spell_source(f"{url}.tar", name) == f"{url}.tar#{name}"


def test_a_file_and_a_member_of_the_same_spelling_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.tar#y.png").write_bytes(image(1))
    tar_of(tmp_path / "x.tar", {"y.png": image(2)})
    found = {each.source: each.data for each in find_images(str(tmp_path))}
    assert found == {f"{tmp_path}/x.tar%23y.png": image(1), f"{tmp_path}/x.tar#y.png": image(2)}
    assert all(read_image(source) == data for source, data in found.items())


BASES = (
    "a",
    "A",
    "b.c",
    "b",
    "é",
    unicodedata.normalize("NFD", "é"),
    "x.tar#y",
    "s0.in",
    "s0",
    "..d",
    ".hidden",
    "a::b",
)
ENDINGS = (
    *(
        ".png",
        ".PNG",
        ".jpg",
        ".webp",
        ".detail_mask.png",
        ".DETAIL_MASK.PNG",
        ".txt",
        ".TXT",
        ".caption",
        ".json",
        ".png.txt",
        ".jpg.json",
    ),
    *(".heic", ".svg", ".zip", ".tar.gz", ".md", ""),
)
TEXTS = (
    b"a red house",
    b"",
    b" \n",
    b"\xff\xfea\0",
    b"caf\xe9",
    b"{}",
    b'{"caption": "c"}',
    b'{"prompt": NaN}',
    b"[",
    b"[1]",
)
FILES = st.lists(
    st.tuples(
        st.sampled_from(("", "d/", ".h/", "d/x.png/", "__MACOSX/")), st.sampled_from(BASES), st.sampled_from(ENDINGS)
    ),
    max_size=10,
)


def is_accounted_for(name: str) -> bool:
    """Whether a name must be given or rejected: written anew, independent of the code."""
    parts = name.split("/")
    if any(part[:1] == "." or part == "__MACOSX" for part in parts):
        return False
    return name.lower().endswith((*SUFFIXES, *KNOWN_UNREAD, ".zip", ".tar.gz"))


def check_found(url: str, names: list[str], again: Counter[str]) -> None:
    """Every name that must be accounted for is found as often as it lies there, and what is usable is read again."""
    expected = Counter(name for name in names if is_accounted_for(name)) + again
    lone = LoneTexts()
    try:
        found = list(find_images(url, lone))
    except PlanError as error:
        assert "no images" in str(error)  # noqa: PT017
        found = []
    counted: Counter[str] = Counter()
    for each in found:
        path, packed = parse_source(each.source)
        name = packed if packed is not None else path.removeprefix(f"{open_root(url).path}/")
        counted[name] += 1
        if each.problem:
            assert (each.data, each.prompt, each.mask) == (b"", "", None)
        else:
            assert read_image(each.source) == each.data
            if each.mask:
                assert masks.read_mask_beside(each.source) == each.mask
    worn = {name for name in expected if name.lower().endswith(".detail_mask.png") and name not in counted}
    for name in worn:  # a mask is accounted for with its image
        assert any(other.lower().endswith(SUFFIXES) and name in masks_beside(other) for other in counted)
    folders = {name for name in counted if name.endswith("x.png") and name not in expected}
    assert folders <= {"d/x.png"}
    assert {name: count for name, count in counted.items() if name not in folders} == {
        name: count for name, count in expected.items() if name not in worn
    }
    assert str(lone).startswith(f"{lone.count} text" if lone.count else "")


@settings(max_examples=100)
@given(FILES, st.lists(st.sampled_from(TEXTS), min_size=10, max_size=10))
def test_every_image_of_a_folder_is_accounted_for(files: list[tuple[str, str, str]], texts: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as root:
        names = []
        for number, (place, base, ending) in enumerate(dict.fromkeys(files)):
            name = f"{place}{base}{ending}"
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(number) if ending.lower().endswith(SUFFIXES) else texts[number])
            names.append(name)
        check_found(root, names, Counter())


@settings(max_examples=100)
@given(FILES, st.lists(st.sampled_from(TEXTS), min_size=10, max_size=10))
def test_every_image_of_a_tar_is_accounted_for(files: list[tuple[str, str, str]], texts: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as root:
        names = [f"{place}{base}{ending}" for place, base, ending in files]
        entries = [
            (member(name), image(number) if name.lower().endswith(SUFFIXES) else texts[number])
            for number, name in enumerate(names)
        ]
        for info, data in entries:
            info.size = len(data)
        tar = raw_tar(Path(root, "in.tar"), *entries)
        check_found(str(tar), names, Counter())


def test_members_with_dots_and_fields_have_the_text_of_their_name_or_their_key(tmp_path: Path) -> None:
    def of(**members: bytes) -> dict[str, object]:
        return prompts(tar_of(tmp_path / "in.tar", members))

    own = {
        "photo.v2.final.jpg": image(1),
        "photo.v2.final.txt": b"own",
        "photo.v1.jpg": image(2),
        "photo.v1.txt": b"v1",
    }
    assert of(**own) == {"photo.v2.final.jpg": "own", "photo.v1.jpg": "v1"}
    assert of(**{"photo.v2.final.jpg": image(1), "photo.txt": b"key"}) == {"photo.v2.final.jpg": "key"}
    assert of(**{"s0.input.jpg": image(1), "s0.outputs.txt": b"out"}) == {"s0.input.jpg": "out"}
    assert of(**{"s0.in.jpg": image(1), "s0.a.txt": b"", "s0.b.json": b'{"caption": "c"}'}) == {"s0.in.jpg": "c"}
    assert of(**{"s0.jpg": image(1), "s0.in.jpg": image(2), "s0.txt": b"own"}) == {"s0.jpg": "own", "s0.in.jpg": ""}
    assert of(**{"s0.jpg": image(1), "s0.url.txt": b"http://x"}) == {"s0.jpg": ""}


def test_members_whose_text_cannot_be_told_are_rejected_with_the_rule(tmp_path: Path) -> None:
    lone = LoneTexts()
    tar = tar_of(tmp_path / "a.tar", {"d/s0.a.jpg": image(1), "d/s0.b.jpg": image(2), "d/s0.txt": b"x", "t.txt": b""})
    found = [each.problem for each in find_images(str(tar), lone)]
    assert found == [
        "WebDataset takes 's0' for its key, which 2 images share, so s0.txt may belong to another; "
        f"call its text s0.{field}.txt"
        for field in "ab"
    ]
    assert str(lone) == "1 text belongs to no image: t.txt"
    tar = tar_of(tmp_path / "b.tar", {"s0.in.jpg": image(1), "s0.a.txt": b"x", "s0.b.txt": b"y"})
    (problem,) = problems(tar).values()
    assert "which several texts have (s0.a.txt, s0.b.txt); call its text s0.in.txt" in problem


def test_members_of_one_name_and_names_that_differ_by_case_are_accounted_for(tmp_path: Path) -> None:
    names = ["a.png", "a.txt", "a.png", "a.txt", "a.PNG", "a.jpg", "a.heic", "a.heic"]
    entries = [(member(name, size=len(image(n))), image(n)) for n, name in enumerate(names)]
    entries[1] = (member("a.txt", size=3), b"one")
    entries[3] = (member("a.txt", size=3), b"two")
    lone = LoneTexts()
    found = list(find_images(str(raw_tar(tmp_path / "in.tar", *entries)), lone))
    usable = {each.source[-5:]: (each.prompt, each.data) for each in found if not each.problem}
    assert usable == {
        "a.PNG": ("one", image(4)),
        "a.jpg".rjust(5, "#"): ("one", image(5)),
        "a.png".rjust(5, "#"): ("one", image(0)),
    }
    assert sum("the same name twice in the tar" in each.problem for each in found) == 2
    assert str(lone) == "1 text belongs to no image: a.txt (second of the name)"


def test_hidden_things_are_left_out_of_folders_and_tars_alike(tmp_path: Path) -> None:
    names = ["a.png", "._a.png", ".hidden/b.png", "d/.h/c.png", "__MACOSX/a.png", "d/e.png"]
    tar = tar_of(tmp_path / "in.tar", {f"./{name}": image(n) for n, name in enumerate(names)})
    with tarfile.open(tar) as packed:
        packed.extractall(tmp_path / "folder", filter="data")
    assert set(problems(tar)) == {"./a.png", "./d/e.png"}
    assert set(problems(tmp_path / "folder")) == {"a.png", "d/e.png"}


def test_what_is_not_read_is_rejected_with_what_to_do(tmp_path: Path) -> None:
    names = ["x.heic", "y.SVG", "a.tar.gz", "b.tgz", "c.tar.zst", "d.ZIP", "e.7z", "f.rar", "g.tar.bz2", "h.tar.xz"]
    for name in [*names, "good.png"]:
        (tmp_path / name).write_bytes(image(1))
    (tmp_path / "notes.md").write_text("no image")
    found = problems(tmp_path)
    assert found.pop("good.png") == ""
    assert set(found) == set(names)
    assert found.pop("x.heic").startswith(".heic is not read; convert the image to one of PNG, JPEG, WEBP")
    assert found.pop("y.SVG").startswith(".svg is not read; convert the image")
    assert set(found.values()) == {"is an archive, which is not read; unpack it, or make a plain .tar of it"}
    nested = tar_of(tmp_path / "out.tar", {"in.tar": b"", "x.heic": b"", "z.zip": b"", "good.png": image(2)})
    assert {name: problem.split(";")[0] for name, problem in problems(nested).items()} == {
        "good.png": "",
        "in.tar": "is a tar inside a tar, which is not read",
        "x.heic": ".heic is not read",
        "z.zip": "is an archive, which is not read",
    }


def test_one_bad_entry_costs_itself(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", **{name: image(n) for n, name in enumerate(["good.png", "a.png", "b.png", "c.png"])}
    )
    (folder / "dangling.png").symlink_to("/nonexistent/x.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "linked.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    write(folder / "folder.png", **{"inside.jpg": image(9)})
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.tar")
    os.mkfifo(folder / "a.txt")
    (folder / "b.txt").symlink_to("nothing")
    os.mkfifo(folder / "c.detail_mask.png")
    (folder / "dangling.tar").symlink_to("nothing")
    (folder / "cut.tar").write_bytes(tar_of(tmp_path / "whole.tar", {"a.png": bytes(2000)}).read_bytes()[:1500])
    tar_of(folder / "none.tar", {"notes.md": b""})
    tar_of(folder / "whole.tar", {"z.png": image(8)})
    found = problems(folder)
    assert found.pop("good.png") == found.pop("folder.png/inside.jpg") == found.pop("whole.tar#z.png") == ""
    assert found.pop("cut.tar").startswith("not a readable tar (unexpected end of data); copy it again")
    assert found.pop("none.tar").startswith("no images")
    assert found == {
        "dangling.png": "is a link to nothing",
        "dangling.tar": "is a link to nothing",
        "itself.png": "is a link to itself",
        "linked.png": "is no regular file",
        "folder.png": "is a folder; what lies in it is taken by itself",
        "pipe.png": "is no regular file",
        "pipe.tar": "is no regular file",
        "a.png": "a.txt is no regular file",
        "b.png": "b.txt is a link to nothing",
        "c.png": "c.detail_mask.png is no regular file",
    }
    draft = draft_samples(config_at(tmp_path, images=str(folder)))
    assert (len(draft.samples), len(draft.rejected)) == (3, 12)


def test_what_happens_between_the_listing_and_the_reading_costs_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 200)
    folder = write(tmp_path / "in", **{f"{name}.png": image(n) for n, name in enumerate("abcde")})
    reader = find_images(str(folder))
    assert next(reader).problem == ""
    (folder / "b.png").unlink()
    (folder / "c.png").unlink()
    os.mkfifo(folder / "c.png")
    (folder / "d.png").write_bytes(image(3) + bytes(1000))
    assert [each.problem for each in reader] == ["is gone", "is no regular file", "has more than 200 bytes", ""]
    for name, reason in {"b": "is gone", "c": "is no regular file", "d": "has more than"}.items():
        with pytest.raises(SampleError, match=rf"gone or cannot be read \({reason}"):
            read_image(str(folder / f"{name}.png"))
    shutil.rmtree(folder)
    folder.write_bytes(b"a file where the folder was")
    with pytest.raises(SampleError, match="gone or cannot be read"):
        read_image(str(folder / "a.png"))


def test_what_may_not_be_read_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", **{"a.png": image(1), "b.png": image(2), "b.txt": b"b", "bad.png": image(3)})
    write(folder / "locked", **{"x.png": image(4)})
    tar_of(folder / "t.tar", {"x.png": image(5)})
    scan, look = os.scandir, os.stat

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if path.rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    def stat(path: str, **options: object) -> os.stat_result:
        if str(path).endswith(("a.png", "b.txt", "t.tar")):
            raise PermissionError(13, "Permission denied", path)
        if str(path).endswith("bad.png"):
            raise OSError(5, "Input/output error", path)
        return look(path, **options)

    monkeypatch.setattr(listings.os, "scandir", scandir)
    monkeypatch.setattr(filesystem.os, "stat", stat)
    assert problems(folder) == {
        "a.png": "cannot be read: permission denied",
        "b.png": "b.txt cannot be read: permission denied",
        "bad.png": "cannot be read: Input/output error",
        "locked": "cannot be read: permission denied; what lies in it is not taken",
        "t.tar": "cannot be read: permission denied",
    }


def test_an_error_of_the_store_is_no_property_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_root("memory://outage/in")
    place.write("a.png", image(1))
    (found,) = find_images(place.url)
    for error, raised in ((ConnectionError("down"), ConnectionError), (PermissionError("no"), UserError)):

        def fail(*args: object, error: OSError = error, **options: object) -> bytes:
            raise error

        monkeypatch.setattr(type(place.fs), "cat_file", fail)
        for read in (lambda: list(find_images(place.url)), lambda: read_image(found.source)):
            with pytest.raises(raised):
                read()
    monkeypatch.undo()
    reader = find_images(place.url)
    place.write("b.png", image(2))
    assert [each.problem for each in reader] == ["", ""]
    place.remove("a.png")
    with pytest.raises(SampleError, match=r"gone or cannot be read \(is gone"):
        read_image(found.source)


def test_names_in_a_store_that_are_no_paths_cost_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_root("memory://astray/in")
    place.write("a.png", image(1))
    for name in ("../b.png", "/c.png", "d/../e.png"):
        place.fs.pipe_file(f"{place.path}/{name}", image(2))
    found = list(find_images(place.url))
    assert [each.problem for each in found].count("") == 1
    assert {each.problem for each in found} == {"", "its name leads out of the folder; rename it"}


def test_links_to_folders_are_named_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", **{"in.png": image(1), "in.txt": b"SECRET"})
    folder = write(tmp_path / "in", **{"here.png": image(2)})
    write(folder / "sub", **{"s.png": image(3)})
    write(folder / ".cache", **{"c.png": image(4)})
    (folder / "album").symlink_to("../elsewhere")
    (folder / "again").symlink_to("sub")
    (folder / "sub" / "loop").symlink_to("..")
    (folder / "cached").symlink_to(".cache")
    found = problems(folder)
    assert found.pop("here.png") == found.pop("sub/s.png") == ""
    assert found.pop("album").startswith("is a link to a folder elsewhere; put that folder itself here")
    assert found.pop("cached").startswith("is a link to a folder elsewhere")
    assert found.pop("again").startswith("is a link to a folder of the same source")
    assert found.pop("sub/loop").startswith("is a link to a folder of the same source")
    assert found == {}
    (tmp_path / "link").symlink_to("in")
    assert {Path(each.source).name for each in find_images(str(tmp_path / "link")) if not each.problem} == {
        "here.png",
        "s.png",
    }


@pytest.mark.parametrize("damage", ["header", "no end", "joined"])
def test_a_tar_that_would_end_early_is_not_taken_for_a_shorter_one(tmp_path: Path, damage: str) -> None:
    whole = raw_tar(tmp_path / "in.tar", *[(member(f"{n}.png", size=len(image(n))), image(n)) for n in range(3)])
    data = bytearray(whole.read_bytes())
    if damage == "header":
        data[1024 + 100] ^= 255
    elif damage == "no end":
        data = data[:-1024]
    else:
        data = data + data
    whole.write_bytes(data)
    with pytest.raises(PlanError, match=r"in\.tar: not a readable tar"):
        list(find_images(str(whole)))


def test_the_text_of_an_image_by_every_usual_name(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "ü")
    files = {
        "UP.JPG": image(1),
        "UP.TXT": b"upper",
        "k.png": image(2),
        "k.caption": b"from caption",
        "x.png": image(3),
        "x.png.txt": b"whole name",
        "x.txt": b"stem",
        "x.webp": image(4),
        "j.png": image(5),
        "j.json": b'{"text": "from json"}',
        f"{composed}.png": image(6),
        f"{unicodedata.normalize('NFD', composed)}.txt": b"apart",
        f"{apart}.png": image(7),
        f"{unicodedata.normalize('NFC', apart)}.txt": b"composed",
        "bom.png": image(8),
        "bom.txt": "\ufeffbom".encode(),
    }
    expected = {
        **{"UP.JPG": "upper", "k.png": "from caption", "x.png": "whole name", "x.webp": "stem", "j.png": "from json"},
        **{f"{composed}.png": "apart", f"{apart}.png": "composed", "bom.png": "bom"},
    }
    assert prompts(write(tmp_path / "in", **files)) == prompts(tar_of(tmp_path / "in.tar", files)) == expected


def test_masks_are_found_by_the_spellings_that_texts_have(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    files = {
        "UP.JPG": image(1),
        "UP.DETAIL_MASK.PNG": image(2),
        f"{apart}.png": image(3),
        f"{composed}.detail_mask.PNG": image(4),
        f"{composed}ö.png": image(5),
        f"{unicodedata.normalize('NFD', composed + 'ö')}.detail_mask.png": image(6),
        "two.png": image(7),
        "two.detail_mask.png": image(8),
        "two.DETAIL_MASK.PNG": image(9),
    }
    masked = {"UP.JPG": image(2), f"{apart}.png": image(4), f"{composed}ö.png": image(6), "two.png": image(8)}
    for place in (write(tmp_path / apart, **files), tar_of(tmp_path / f"{apart}.tar", files)):
        found = list(find_images(str(place)))
        usable = {name: each for each in found for name in masked if each.source.endswith(name) and not each.problem}
        assert {name: each.mask for name, each in usable.items()} == masked
        assert all(masks.read_mask_beside(each.source) == each.mask for each in usable.values())
        (lost,) = (each for each in found if each.problem)
        assert lost.source.endswith("two.DETAIL_MASK.PNG")
        assert lost.problem.startswith("a detail mask without its image")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.json": b'{"prompt": null, "caption": "c"}'}, "c"),
        ({"a.json": b'{"caption": null}'}, ""),
        ({"a.json": b'{"prompt": NaN, "text": "t"}'}, "t"),
        ({"a.json": b'{"prompt": " ", "caption": "c"}'}, "c"),
        ({"a.json": b'{"prompt": 5, "caption": "c"}'}, "c"),
        ({"a.json": b'{"prompt": 5}'}, 5),
        ({"a.json": b'{"prompt": ["a"], "caption": NaN}'}, ["a"]),
        ({"a.json": b"null"}, ""),
        ({"a.json": b""}, ""),
        ({"a.json": b'"a"'}, ""),
        ({"a.json": b'{"width": 3}'}, ""),
        ({"a.json": b'{"id": ' + b"9" * 5000 + b', "prompt": "t"}'}, "t"),
        ({"a.json": b'{"x": {"prompt": 1}, "x": 2, "prompt": "t"}'}, "t"),
        ({"a.txt": b"", "a.json": b'{"caption": "c"}'}, "c"),
        ({"a.txt": b" \n", "a.caption": b"k", "a.json": b'{"caption": "c"}'}, "k"),
        ({"a.txt": b"t", "a.json": b"["}, "t"),
        ({"a.json": b'{"prompt": 5}', "a.png.json": b'{"caption": "c"}'}, "c"),
    ],
)
def test_absence_has_many_spellings(tmp_path: Path, files: dict[str, bytes], expected: object) -> None:
    files = {"a.png": image(1), **files}
    assert prompts(write(tmp_path / "in", **files)) == {"a.png": expected}
    assert prompts(tar_of(tmp_path / "in.tar", files)) == {"a.png": expected}
    draft = draft_samples(config_at(tmp_path, images=str(tmp_path))) if isinstance(expected, str) else None
    assert draft is None or [sample.prompt for sample in draft.samples] == [expected]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.txt", "a house".encode("utf-16"), "a.txt: not UTF-8 text; save the file as UTF-8 (it looks like UTF-16)"),
        (
            "a.txt",
            "a house".encode("utf-16-le"),
            "a.txt: not UTF-8 text; save the file as UTF-8 (it looks like UTF-16)",
        ),
        (
            "a.caption",
            "café".encode("cp1252"),
            "a.caption: not UTF-8 text; save the file as UTF-8 (it looks like Windows-1252)",
        ),
        ("a.json", b'{"prompt": ', "a.json: not valid JSON; mend it, or write the prompt into a .txt file"),
        ("a.json", b'{"prompt": "a", "prompt": "b"}', "a.json: has 'prompt' 2 times; keep one"),
        ("a.json", b'{"prompt": "caf\xe9"}', "a.json: not valid JSON; mend it, or write the prompt into a .txt file"),
    ],
)
def test_texts_that_cannot_be_read_say_what_to_do(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    files = {"a.png": image(1), name: data, "b.png": image(2)}
    write(tmp_path / "in", **files)
    assert problems(tmp_path / "in") == {"a.png": problem, "b.png": ""}
    assert problems(tar_of(tmp_path / "in.tar", files)) == {"a.png": problem, "b.png": ""}
    (rejected,) = draft_samples(config_at(tmp_path, images=str(tmp_path / "in"))).rejected
    assert rejected.reason == problem


def test_texts_that_belong_to_no_image_are_counted_and_said(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", **{"a.png": image(1), "a.txt": b"a", "b.heic": b"", "b.txt": b"b", "lost.caption": b"c"}
    )
    tar_of(folder / "t.tar", {"x.png": image(2), "y.json": b"{}", "u.txt": b"", "v.txt": b""})
    lone = LoneTexts()
    assert len(list(find_images(str(folder), lone))) == 3
    assert str(lone) == "4 texts belong to no image: lost.caption, u.txt, v.txt, ..."
    config = config_at(tmp_path, images=str(folder), model={"id": "picturebook"})
    assert "1 rejected; 4 texts belong to no image: lost.caption, u.txt, v.txt, ..." in preview(config).headline()


def test_a_source_that_is_no_folder_and_no_tar_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, **{"a.png": image(1), "b.HEIC": b"", "c.tar.gz": b"", "notes.md": b""})
    tar_of(tmp_path / "X.TAR", {"a.png": image(1)})
    os.mkfifo(tmp_path / "pipe.tar")
    write(tmp_path / "folder.png", **{"a.png": image(1)})
    write(tmp_path / "folder.tar", **{"a.png": image(1)})
    for name, message in {
        "a.png": "is one image; give its folder, or enlarge it alone with `resmaster upscale`",
        "b.HEIC": "is one image",
        "gone.png": "no such file",
        "c.tar.gz": "is an archive, which is not read; unpack it",
        "notes.md": "is a file; give a folder of images, or WebDataset .tar files",
        "pipe.tar": "is no regular file",
    }.items():
        with pytest.raises(PlanError, match=f"{name}: {message}"):
            list(find_images(str(tmp_path / name)))
    for name in ("X.TAR", "folder.png", "folder.tar"):
        assert [each.data for each in find_images(str(tmp_path / name))] == [image(1)]
