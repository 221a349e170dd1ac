import threading
from dataclasses import replace
from pathlib import Path

import pytest

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, new_attempt
from resmaster_stages.dataset.commits import Commits, all_records
from resmaster_stages.dataset.ledger import encode_failures, ledger_rows
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder

HASH = "ab" * 32


def receipt(attempt: str, shard: int = 0) -> Receipt:
    done = "2026-11-28T12:00:00+00:00"
    return Receipt("low_res", HASH, shard, attempt, 0, 2, 1, ("k3",), "0" * 64, {}, done, provenance={"host": "h"})


def commits(folder: Folder) -> Commits:
    return Commits(folder, "low_res", HASH)


def contend(folder: Folder, source: Path, attempt: str, number: int = 1) -> Receipt:
    name = layout.shard_object("low_res", 0, attempt)
    ledger = encode_failures(commits(folder), 0, attempt, [("k3", ValueError("no"))])
    return commits(folder).create(replace(receipt(attempt), number=number), [(name, source)], ledger)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(b"content")
    return tmp_path / "source"


def test_commit_and_read(folder: Folder, source: Path) -> None:
    assert commits(folder).read(0) is None
    assert commits(folder).read_all() == {}
    done = contend(folder, source, "0" * 8)
    assert done.objects[0].bytes == 7
    assert folder.read(done.objects[0].name) == b"content"
    assert commits(folder).read(0) == done
    assert parse_record(Receipt, record_text(done)) == done
    folder.write(f"{layout.commit_folder('low_res', HASH)}/.000001.json.1234.tmp", b"leftover")
    assert commits(folder).numbers() == {0: 1}
    assert commits(folder).read_all() == {0: done}
    assert Commits(folder, "low_res", "cd" * 32).read(0) is None, "another configuration"


def test_racing_attempts_have_one_winner_and_leave_nothing(folder: Folder, source: Path) -> None:
    barrier, receipts = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        receipts.append(contend(folder, source, new_attempt()))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receipts) == 8
    assert len({found.attempt for found in receipts}) == 1
    winner = receipts[0]
    assert folder.names("low_res") == [winner.objects[0].name]
    assert folder.names("errors/low_res") == [winner.ledger]
    assert [row["attempt"] for row in ledger_rows(commits(folder))] == [winner.attempt]


@pytest.mark.parametrize("error", [FileExistsError("the store's own retry"), ConnectionError("answer lost")])
def test_an_answer_lost_after_the_create_is_a_success(
    folder: Folder, source: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    real = Folder.create

    def ambiguous(self: Folder, name: str, data: bytes) -> None:
        real(self, name, data)
        raise error

    monkeypatch.setattr(Folder, "create", ambiguous)
    done = contend(folder, source, "0" * 8)
    assert done.attempt == "0" * 8
    assert folder.read(done.objects[0].name) == b"content"
    assert done.ledger
    assert folder.exists(done.ledger)


def test_while_the_outcome_is_unknown_nothing_is_deleted(
    folder: Folder, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Folder, name: str, data: bytes) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(Folder, "create", lost)
    with pytest.raises(ConnectionError):
        contend(folder, source, "0" * 8)
    assert folder.names("low_res") == ["low_res/000000-00000000.tar"]


def test_a_failed_upload_takes_its_files_away(folder: Folder, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Folder, name: str, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Folder, "upload", full)
    with pytest.raises(OSError, match="disk full"):
        contend(folder, source, "0" * 8)
    assert folder.names("errors/low_res") == []
    assert commits(folder).read(0) is None


@pytest.mark.parametrize("text", ["", '{"stage": "low', "[]", "{}"])
def test_a_damaged_record_is_named(folder: Folder, source: Path, text: str) -> None:
    contend(folder, source, "0" * 8)
    folder.write(layout.commit("low_res", HASH, 0), text.encode())
    for read in (lambda: commits(folder).read(0), lambda: commits(folder).read_all()):
        with pytest.raises(ShardError, match=r"000000\.json: damaged commit record"):
            read()


def test_a_record_of_another_configuration_is_found(folder: Folder, source: Path) -> None:
    contend(folder, source, "0" * 8)
    with pytest.raises(ShardError, match="another shard, stage or configuration"):
        Commits(folder, "low_res", HASH[:8] + "0" * 56).read(0)


def test_a_record_of_another_stage_is_found(folder: Folder, source: Path) -> None:
    made = contend(folder, source, "0" * 8)
    folder.write(layout.commit("low_res", HASH, 0), record_text(replace(made, stage="captions")))
    with pytest.raises(ShardError, match=r"000000\.json: damaged commit record .*another shard, stage"):
        commits(folder).read(0)


def test_ledger_numbers_the_attempts(folder: Folder) -> None:
    for number, attempt in enumerate(("0" * 8, "1" * 8), start=1):
        data = encode_failures(commits(folder), 3, attempt, [("k", ValueError("a\n\n b \ud800")), ("l", OSError())])
        folder.write(layout.ledger("low_res", 3, attempt), data)
        assert {row["attempt_number"] for row in ledger_rows(commits(folder)) if row["attempt"] == attempt} == {number}
    row = ledger_rows(commits(folder), {3})[0]
    assert (row["key"], row["error_class"], row["message"]) == ("k", "ValueError", "a b \\ud800")
    assert ledger_rows(commits(folder), {4}) == []
    assert ledger_rows(commits(folder), set()) == []


def test_the_highest_number_counts_and_of_two_that_go_on_from_one_attempt_one_wins(
    folder: Folder, source: Path
) -> None:
    first = contend(folder, source, "0" * 8)
    second, loser = contend(folder, source, "1" * 8, number=2), contend(folder, source, "2" * 8, number=2)
    assert loser == second
    assert commits(folder).numbers() == {0: 2}
    assert commits(folder).read(0) == second
    assert commits(folder).read_all() == {0: second}
    assert folder.names("low_res") == [first.objects[0].name, second.objects[0].name], "what is committed stays"
    assert [(record.receipt, record.successor) for record in all_records(folder)] == [
        (second, None),
        (first, layout.commit("low_res", HASH, 0, 2)),
    ]
    commits(folder).drop([0])
    assert commits(folder).read(0) is None
    assert commits(folder).numbers() == {}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("commits/low_res-abababab/000012.json", (12, 1)),
        ("commits/low_res-abababab/000012.2.json", (12, 2)),
        ("commits/low_res-abababab/000012.10.json", (12, 10)),
        ("commits/low_res-abababab/000012.1.json", None),
        ("commits/low_res-abababab/000012.02.json", None),
        ("commits/low_res-abababab/.000012.json.12345678.tmp", None),
        ("commits/low_res-abababab/12.json", None),
    ],
)
def test_names_of_records(name: str, place: tuple[int, int] | None) -> None:
    assert layout.attempt_of(name) == place
    if place:
        assert layout.commit("low_res", HASH, *place) == name
