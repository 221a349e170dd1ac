import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.errors import ShardError
from resmaster_stages.storage.shards import ShardWriter, read_index, read_member, validate
from tests.fake_stages import png

FILES = {"txt": "façade".encode(), "json": b'{"a":1}', "png": png((1, 2, 3))}


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with ShardWriter(path) as writer:
        for key, files in samples.items():
            writer.write(key, files)
    return path


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.text("0123456789abcdef", min_size=1, max_size=24),
        st.dictionaries(st.sampled_from(["webp", "json", "txt", "cls"]), st.binary(max_size=2000), min_size=1),
        max_size=4,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, dict[str, bytes]]) -> None:
    folder = tmp_path_factory.mktemp("tar")
    path = write(folder / "a.tar", samples)
    assert path.read_bytes() == write(folder / "b.tar", samples).read_bytes()
    with path.open("rb") as file:
        entries = read_index(file, "a.tar")
        found = {
            entry.key: {extension: read_member(file, member) for extension, member in entry.members.items()}
            for entry in entries
        }
    assert found == samples
    assert [entry.key for entry in entries] == list(samples)


def test_members_have_one_order_and_no_volatile_facts(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "a.tar", {"00": FILES})) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["00.png", "00.json", "00.txt"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"00": FILES, "01": FILES})
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == ["00", "01"]
    assert samples[0]["txt"] == "façade"
    assert samples[0]["json"] == {"a": 1}
    assert samples[0]["png"].getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_keys_that_webdataset_would_split(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match="key"):
        writer.write(key, FILES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"png": b"x"}, "no json"),
        ({"json": b"{}"}, "exactly one image"),
        ({**FILES, "webp": b"x"}, "exactly one image"),
        ({**FILES, "png": b""}, "empty"),
        ({**FILES, "json": b"{"}, "not JSON"),
    ],
)
def test_incomplete_samples_are_found(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        validate(write(tmp_path / "a.tar", {"00": files}), ["00"])


def test_missing_and_disordered_samples_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"00": FILES, "01": FILES})
    assert len(validate(path, ["00", "01"])) == 2
    for keys in (["00"], ["01", "00"], ["00", "01", "02"]):
        with pytest.raises(ShardError, match="expected"):
            validate(path, keys)


def test_no_cut_tar_passes_for_a_short_one(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tar", {"00": FILES, "01": FILES}).read_bytes()
    last = data.rstrip(b"\0")
    for size in range(0, len(last) + 1, 256):
        with pytest.raises(ShardError, match=r"a\.tar"):
            read_index(io.BytesIO(data[:size]), "a.tar")


def test_a_key_that_comes_twice_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        for key in ("00", "01", "00"):
            writer.write(key, FILES)
    with path.open("rb") as file, pytest.raises(ShardError, match="twice"):
        read_index(file, "a.tar")


def test_an_empty_tar_is_a_tar(tmp_path: Path) -> None:
    assert validate(write(tmp_path / "a.tar", {}), []) == []
