"""Choices: each session has a file of its own, the latest choice counts, nothing is lost."""

import uuid
from pathlib import Path

import pytest

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import Choice, Session, digest_of_choices, encode_choices, now, read_choices
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder, open_root


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return open_root(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_two_sessions_lose_nothing(folder: Folder) -> None:
    one, two = Session(folder), Session(folder)
    one.add([Choice("a", "rejected", reason="hands", who="ann", when=now())])
    two.add([Choice("b", "kept", 5, who="bob", when=now())])
    one.add([Choice("c", rating=1, who="ann", when=now())])
    found = read_choices(folder)
    assert list(found) == ["a", "b", "c"]
    assert (found["a"].reason, found["b"].rating, found["c"].verdict) == ("hands", 5, "none")
    assert len(folder.names(layout.CURATION)) == 2, "a session rewrites its own file"


def test_the_latest_choice_counts_whoever_made_it(folder: Folder) -> None:
    one, two = Session(folder), Session(folder)
    one.add([Choice("a", "rejected", when="2026-01-02T00:00:00.000000+00:00")])
    two.add([Choice("a", "kept", 3, when="2026-01-01T00:00:00.000000+00:00")])
    assert read_choices(folder)["a"] == Choice("a", "rejected", when="2026-01-02T00:00:00.000000+00:00")
    two.add([Choice("a", when="2026-01-03T00:00:00.000000+00:00")])
    assert not read_choices(folder), "the choice was taken back"


def test_the_published_table_counts_too_but_not_above_later_choices(folder: Folder) -> None:
    folder.write(
        layout.CURATION_TABLE, encode_choices([Choice("a", "rejected", when="2026-01-01"), Choice("b", "kept")])
    )
    assert set(read_choices(folder)) == {"a", "b"}
    Session(folder).add([Choice("a", "none", when="2026-01-02")])
    assert set(read_choices(folder)) == {"b"}


def test_other_files_in_the_folder_are_no_choices(folder: Folder) -> None:
    folder.write("curation/notes.txt", b"mine")
    folder.write("curation/copy of 20260101T000000-00000000.parquet", b"mine")
    assert read_choices(folder) == {}


@pytest.mark.parametrize("choice", [{"verdict": "maybe"}, {"rating": 0}, {"rating": 6}])
def test_unknown_values(choice: dict) -> None:
    with pytest.raises(ValueError, match=r"is none of kept, rejected, none|no number from 1 to 5"):
        Choice("a", **choice)


def test_a_file_that_cannot_be_read_is_an_error_and_stays(folder: Folder) -> None:
    name = layout.choices("20260101T000000", "00000000")
    folder.write(name, b"damaged")
    with pytest.raises(ShardError, match="not a readable Parquet file"):
        read_choices(folder)
    Session(folder).add([Choice("a", "kept")])
    assert folder.read(name) == b"damaged"


def test_a_session_that_cannot_write_keeps_its_state(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(folder)
    session.add([Choice("a", "kept", when="1")])
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            session.add([Choice("b", "rejected", when="2")])
    session.add([Choice("c", "kept", when="3")])
    assert set(read_choices(folder)) == {"a", "c"}


def test_equal_choices_have_equal_digests(folder: Folder) -> None:
    a, b = Choice("a", "kept", when="1"), Choice("b", "rejected", when="2")
    assert digest_of_choices({"a": a, "b": b}) == digest_of_choices({"b": b, "a": a}) != digest_of_choices({"a": a})
    assert digest_of_choices({}) == ""


def test_long_reasons_are_cut() -> None:
    assert len(Choice("a", reason="x" * 5000).reason) == 1000
