"""Lists of samples: keys, beginnings of keys, files of keys, tables of choices; what is wrong is one clear line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.key_lists import Finder, KeyList, planned_keys, read_key_list
from tests.fake_stages import planned

FULL = ["00112233445566778899aabb", "0011ffffffffffffffffffff", "cc0000000000000000000000"]


def read(text: object) -> KeyList:
    return read_key_list(str(text), "--redo")


def test_keys_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(f" {FULL[0].upper()} ,CC,, {FULL[0]}").keys == (FULL[0], "cc")
    for text, message in (
        ("", "--redo: holds no key"),
        (" , ", "holds no key; give keys"),
        ("00112233445566778899aabbc", "is no key: give up to 24 hex digits"),
        ("aa,xyz,uvw", "'xyz' is no key"),
        ("x" * 1000, r"\.\.\.' is no key"),
        ("keys.json", "--redo keys.json: unknown kind of list"),
        ("s3://bucket/keys", "unknown kind of list"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(text)
        assert "\n" not in str(caught.value)


def test_files_of_keys_in_each_form_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "k.txt").write_text("\ufeff" + "\r\n\n".join(FULL) + "\n")
    (tmp_path / "k.csv").write_text("note,key\n" + "".join(f'"a, b",{key}\n' for key in FULL) + ",\n")
    pq.write_table(pa.table({"key": [*FULL, None], "note": [1, 2, 3, 4]}), tmp_path / "k.parquet")
    for name in ("k.txt", "k.csv", "k.parquet"):
        assert read(tmp_path / name) == KeyList("--redo", name, tuple(FULL))


def test_of_choices_the_rejected_ones_are_meant_by_the_last_word_on_each(tmp_path: Path) -> None:
    rows = [
        (FULL[0], "rejected", "2026-11-29T10:00:00.000001+00:00"),
        (FULL[0], "none", "2026-11-29T10:00:00.000002+00:00"),
        (FULL[1], "rejected", "2026-11-29T10:00:00.000003+00:00"),
        (FULL[1], "kept", "2026-11-29T10:00:00.000002+00:00"),
        (FULL[2], None, "2026-11-29T10:00:00.000002+00:00"),
    ]
    names = ("key", "verdict", "when")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows))))), tmp_path / "c.parquet")
    (tmp_path / "c.csv").write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]))
    for name in ("c.parquet", "c.csv"):
        assert read(tmp_path / name) == KeyList("--redo", name, (FULL[1],), {FULL[1]: rows[2][2]})
    pq.write_table(pa.table({"key": FULL, "verdict": ["kept"] * 3}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="none of its choices is 'rejected'"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("k.txt", b"", "k.txt: holds no key"),
        ("k.txt", b"aa\nnot a key\n", "'not a key' is no key"),
        ("k.txt", b"\xff", "not UTF-8 text"),
        ("k.csv", b"keys\naa\n", "has no column 'key'"),
        ("k.csv", b'key\n"aa\n', "not valid CSV .unexpected end of data.; write it again"),
        ("k.csv", b"", "has no column 'key'"),
        ("k.parquet", b"PAR1", "not a readable Parquet file"),
        ("k.json", b"[]", "unknown kind of list; known: .txt, .csv, .parquet"),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("gone.txt", "folder.txt"):
        with pytest.raises(UserError, match="no such file; check the path"):
            read(tmp_path / name)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return planned(tmp_path / "out", [f"prompt {number}" for number in range(40)], tmp_path)


def test_planned_samples_are_found_with_their_shards(dataset: Dataset) -> None:
    keys = list(dataset.plan.keys())
    assert planned_keys(dataset, read(f"{keys[7]},{keys[0]}")) == {keys[0]: 0, keys[7]: 3}
    assert planned_keys(dataset, read(",".join(keys))) == {key: place // 2 for place, key in enumerate(keys)}
    assert planned_keys(dataset, read(f"{keys[5][:12]},{keys[5]}")) == {keys[5]: 2}


def test_the_first_key_that_is_unknown_or_ambiguous_is_named(dataset: Dataset) -> None:
    keys = list(dataset.plan.keys())
    first = next(key[0] for key in keys if sum(other[0] == key[0] for other in keys) > 1)
    with pytest.raises(UserError, match=f"--redo: several keys begin with {first} .*give more digits"):
        planned_keys(dataset, read(f"{keys[0]},{first}"))
    with pytest.raises(
        UserError, match=f"no sample has a key that begins with {FULL[2]} .nor with 1 others of the list.; resmaster ex"
    ):
        planned_keys(dataset, read(f"{keys[0]},{FULL[2]},{FULL[0]}"))


def test_a_long_list_is_found_in_one_pass() -> None:
    keys = [f"{number:024x}" for number in range(20_000)]
    finder = Finder(KeyList("--redo", "long", tuple(keys[::2])))
    assert [key for key in keys if finder.means(key)] == keys[::2]
    finder.require("no sample", "")
