"""What `doctor` finds, on stores that are fit for builds and on stores that are not."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.dataset import create_or_open
from resmaster_stages.errors import UserError
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage import filesystem, probe
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.fake_stages import FAKES, config_at, planned
from tests.faulty_proxy import Rule, faulty, seeded
from tests.s3_server import S3Server


class Overwriting(MemoryFileSystem):
    """Takes no notice of the condition, as some S3 servers do: every writer is told that it won."""

    protocol = ("overwriting",)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **options)


class Hasty:
    """Looks, then writes: one writer after the other is served well, racing ones are not. All else is a real
    store's."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and self.fs.exists(path):
            raise FileExistsError(path)
        time.sleep(0.05)
        self.fs.pipe_file(path, value)


class Forgetful(MemoryFileSystem):
    """Lists late, and does not delete."""

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        return [entry for entry in super().ls(path, detail=detail, **options) if ".probe-" not in str(entry)]

    def rm_file(self, path: str) -> None:
        return


class Lying(MemoryFileSystem):
    """Refuses the second create of a name, and replaces the content all the same."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        there = self.exists(path)
        super().pipe_file(path, value, mode="overwrite", **options)
        if mode == "create" and there:
            raise FileExistsError(path)


@pytest.fixture
def overwriting_root(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("overwriting", Overwriting, clobber=True)
    monkeypatch.setattr(filesystem, "ROOTS", (*filesystem.ROOTS, "overwriting"))
    return f"overwriting://{uuid.uuid4().hex}/root"


@pytest.fixture
def overwriting_s3(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real S3 server that never hears the condition, which is what a server that ignores it looks like."""
    from s3fs import S3FileSystem

    real = S3FileSystem._call_s3

    async def deaf(self: Any, method: str, *arguments: Any, IfNoneMatch: str | None = None, **options: Any) -> Any:
        return await real(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", deaf)
    return s3_root


def states(folder: Folder) -> dict[str, str]:
    return {finding.check: finding.state for finding in probe.examine(folder)}


def everything(folder: Folder) -> list[str]:
    return [file.name for file in folder.files()]


def test_a_fit_store_passes_and_keeps_nothing(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ROUNDS", 1)  # SeaweedFS lets losers wait for seconds
    found = states(folder)
    checks = ["write, read back", "list", "create once", "create once, racing", "delete", "unfinished uploads"]
    assert found == dict.fromkeys(checks, "ok")
    assert everything(folder) == []
    assert not (tmp_path / "root").exists(), "nor a folder that it made"
    probe.require_one_winner(folder)
    assert everything(folder) == []


def test_a_store_that_refuses_and_yet_replaces_is_found_out() -> None:
    folder = Folder(Lying(), f"/{uuid.uuid4().hex}")
    found = states(folder)
    assert (found["create once"], found["create once, racing"]) == ("failed", "failed")
    with pytest.raises(OSError, match="is not that of the one writer that was told to have created it"):
        probe.require_one_winner(folder)


def test_two_winners_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe._Probe, "race", lambda self, writers: 2)
    with pytest.raises(UserError, match="lets two writers both win"):
        probe.require_one_winner(open_root(str(tmp_path)))
    assert states(open_root(str(tmp_path)))["create once, racing"] == "failed"


def test_a_store_that_overwrites_is_found_out_and_refused(
    overwriting_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_refusal(overwriting_root, tmp_path, capsys)


@pytest.mark.s3
def test_an_s3_server_that_ignores_the_condition_is_found_out_and_refused(
    overwriting_s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_refusal(overwriting_s3, tmp_path, capsys)


def _check_refusal(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_root(root)
    assert main(["doctor", root, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    failed = {finding["check"] for finding in answer["findings"] if finding["state"] == "failed"}
    assert failed == {"create once", "create once, racing"}
    assert main(["doctor", root]) == 1
    assert "not fit for builds" in capsys.readouterr().out

    (tmp_path / "prompts.txt").write_text("a house\n")
    (tmp_path / "tiny.yaml").write_text(f"name: demo\nroot: {root}\nprompts: prompts.txt\n")
    with pytest.raises(UserError, match=r"two writers both win.*--allow-overwriting-store") as caught:
        create_or_open(config_at(root))
    assert "\n" not in str(caught.value)
    assert everything(folder) == [], "a refused build leaves nothing"
    allowed = config_at(root, allow_overwriting_store=True)
    assert create_or_open(allowed).config.allow_overwriting_store


def test_the_command_line_refuses_in_one_line(
    overwriting_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmaster_flows.cli.run.execute", lambda console, build: 0)
    (tmp_path / "prompts.txt").write_text("a house\n")
    (tmp_path / "tiny.yaml").write_text("name: demo\nprompts: prompts.txt\n")
    command = ["run", str(tmp_path / "tiny.yaml"), "--root", overwriting_root]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("resmaster: ")
    assert "--allow-overwriting-store" in last
    assert main([*command, "--allow-overwriting-store"]) == 0


def test_a_store_that_looks_before_it_writes_fails_only_in_a_race() -> None:
    folder = Folder(Hasty(MemoryFileSystem()), f"/{uuid.uuid4().hex}")
    found = states(folder)
    assert (found["create once"], found["create once, racing"]) == ("ok", "failed")
    with pytest.raises(UserError, match="both win"):
        probe.require_one_winner(folder)


def test_what_a_store_cannot_do_is_told_apart() -> None:
    folder = Folder(Forgetful(), f"/{uuid.uuid4().hex}")
    found = states(folder)
    assert {check for check, state in found.items() if state == "failed"} == {"list", "delete"}


def test_a_store_out_of_reach_fails_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = states(Folder(open_root(str(tmp_path)).fs, str(tmp_path / "file" / "below")))
    assert found["write, read back"] == "failed"
    assert [found[check] for check in ("list", "create once", "delete")] == ["untested"] * 3


@pytest.mark.s3
def test_without_permission(s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    findings = probe.examine(open_root(s3_root))
    assert findings[0].state == "failed"
    assert "SignatureDoesNotMatch" in findings[0].detail


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["not implemented", "not allowed", "access denied"])
def test_a_store_that_does_not_list_unfinished_uploads_is_fit_and_gc_does_the_rest(
    fault: str, s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(probe, "ROUNDS", 1)
    with faulty(s3_server.endpoint, seeded([Rule(fault, methods="GET", key=r"\?(.*&)?uploads")])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        filesystem.fsspec.get_filesystem_class("s3").clear_instance_cache()
        dataset = planned(s3_root, ["a"], tmp_path)
        run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
        dataset.folder.write("low_res/000000-00000000.tar", b"left")
        assert main(["doctor", s3_root]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "fit for builds" in told
        assert "lacking" in told
        for options, left in ((["--dry-run"], True), ([], False)):
            assert main(["gc", dataset.url, "--older-than", "0", *options]) == 0
            told = " ".join(capsys.readouterr().out.split())
            assert "unfinished uploads are left" in told
            assert "1 leftovers" in told
            assert dataset.folder.exists("low_res/000000-00000000.tar") == left


def test_doctor_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "new" / "root")]) == 0
    out = capsys.readouterr().out
    assert "create once, racing" in out
    assert list(tmp_path.iterdir()) == []
