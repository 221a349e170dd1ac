"""A store that throttles, resets, times out, tears bodies and loses answers: the dataset has the same bytes."""

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.status import pending
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import S3_ATTEMPTS, open_root
from tests.fake_stages import FAKES, planned
from tests.faulty_proxy import ANSWERS, FAULTS, Rule, faulty, seeded
from tests.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses between retries, and time-outs as the user may set them for s3fs."""
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1, "connect_timeout": 5}})
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def build(root: str, folder: Path) -> Dataset:
    folder.mkdir()
    dataset = planned(root, ["a", "b", "bad high_res"], folder, samples_per_shard=3, spill_seconds=0)
    for stage in dataset.hashes:
        for shard in pending(dataset)[stage]:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    write_manifest(dataset)
    return dataset


def contents(dataset: Dataset) -> dict[str, str]:
    """Kind of object -> sha256 of what the commits name, and what readers see."""
    found = {}
    for folder in dataset.folder.names("commits"):
        for record in dataset.folder.names(folder):
            receipt = json.loads(dataset.folder.read(record))
            for stored in receipt["objects"]:
                data = dataset.folder.read(stored["name"])
                assert hashlib.sha256(data).hexdigest() == stored["sha256"]
                found[record] = stored["sha256"]
    return found


def files(dataset: Dataset, folder: str) -> list[str]:
    found: dict[str, dict[str, int]] = dataset.folder.fs.find(dataset.folder.full(folder), refresh=True, detail=True)
    return [name for name, facts in found.items() if facts["size"]]  # this server shows emptied folders as objects


@pytest.mark.parametrize(("faults", "every"), [(tuple(set(FAULTS) - {"time-out"}), 1), (("time-out",), 17)])
def test_a_build_through_a_store_that_fails_has_the_same_bytes(
    faults: tuple[str, ...],
    every: int,
    s3_root: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request of the build fails twice, each time in another way; or every 17th gets no answer (that takes a
    second)."""
    reference = contents(build(f"{s3_root}/reference", tmp_path / "reference"))
    number = itertools.count()

    def choose(method: str, path: str, before: int) -> str | None:
        turn = next(number)
        fault = faults[turn % len(faults)]
        if before >= 2 or turn % every or (fault == "torn" and method != "GET"):
            return None
        return fault

    with faulty(s3_server.endpoint, choose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        dataset = build(f"{s3_root}/faulty", tmp_path / "faulty")
        assert {fault for fault, _ in proxy.faults} == set(faults)
        assert {method for _, method in proxy.faults} >= {"GET", "PUT"}
        assert sum(proxy.faults.values()) >= 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    again = open_dataset(dataset.url)
    assert contents(again) == reference
    assert len(reference) == 4
    assert files(again, layout.CACHE) == []
    tars = [name.rpartition("/")[2] for name in files(again, "high_res")]
    assert len(tars) == 1, "a retried upload or commit is no second one"


def test_a_store_that_throttles_for_longer_fails_the_task_which_is_worth_another_try(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    dataset = planned(s3_root, ["a"], folder)
    storm = [True]

    def choose(method: str, path: str, before: int) -> str | None:
        return "slow down" if storm[0] and "low_res" in path else None

    with faulty(s3_server.endpoint, choose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        dataset = open_dataset(dataset.url)
        with pytest.raises(OSError, match=r"(?i)slow ?down|reduce your request rate|unavailable"):
            run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
        storm[0] = False
        assert pending(dataset)["low_res"] == [0]
        assert run_stage(dataset, "low_res", 0, process=FAKES["low_res"]).samples_ok == 1


def test_the_users_own_settings_of_s3_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(root: str) -> dict[str, object]:
        s3fs.S3FileSystem.clear_instance_cache()
        return dict(open_root(root).fs.config_kwargs)

    retries = {"mode": "standard", "total_max_attempts": S3_ATTEMPTS}
    assert config("s3://bucket") == {"read_timeout": 1, "connect_timeout": 5, "retries": retries}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    assert "retries" not in config("s3://bucket")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"mode": "adaptive"}}})
    assert config("s3://bucket") == {"retries": {"mode": "adaptive"}}


@pytest.mark.parametrize(
    "fault", ["access denied", "no such bucket", "expired token", "internal error", "unknown refusal"]
)
@pytest.mark.parametrize("key", ["low_res/", "captions/", "high_res/", "quality/", "commits/high_res", "manifest"])
def test_a_store_that_fails_for_good_in_the_middle_is_one_line_and_loses_nothing(
    fault: str, key: str, s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before is kept, and the same build ends whole once the store is mended."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    pause = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds, *rest: pause(min(seconds, 0.001), *rest))
    with faulty(s3_server.endpoint, seeded([Rule(fault, methods="PUT POST", key=key)])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises((UserError, ConnectionError), match="; ") as caught:
            build(s3_root, tmp_path / "first")
        assert isinstance(caught.value, UserError) == (fault != "internal error")
        assert "\n" not in str(caught.value)
        assert key.partition("/")[0] in str(caught.value)
        proxy.choose = seeded([])
        assert len(contents(build(s3_root, tmp_path / "second"))) == 4


@pytest.mark.parametrize("fault", ["expired token", "clock skew", "unknown key", "not allowed"])
@pytest.mark.parametrize("key", ["/commits/low_res-", "/low_res/"])
def test_credentials_that_fail_in_the_middle_are_no_damage_of_what_is_read_then(
    fault: str,
    key: str,
    s3_root: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else a manifest would leave out all shards, and a repair would compute them again."""
    dataset = build(s3_root, tmp_path / "build")
    with faulty(s3_server.endpoint, seeded([Rule(fault, methods="GET HEAD", key=key)])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        for verb in ("verify", "status")[: 2 if "commits" in key else 1]:
            assert main([verb, dataset.url]) == 2
            (said,) = capsys.readouterr().err.splitlines()
            status, code = ANSWERS[fault]
            assert code in said or f"{status}: " in said, "an answer to HEAD names no code"
    assert dataset.folder.names("damaged") == []
