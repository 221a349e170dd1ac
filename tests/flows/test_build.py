"""The flows, on a real Prefect server, with stand-in stages: order, retries, repair, failing shards, S3."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import fsspec
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import yaml
from aiobotocore.client import AioBaseClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import ArtifactSort
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Suspended

from resmaster_flows import build
from resmaster_flows.build import BuildResult
from resmaster_flows.cli.main import main
from resmaster_flows.outcome import INCOMPLETE, outcome
from resmaster_flows.process import process_shards
from resmaster_flows.watch.artifacts import key_of
from resmaster_flows.watch.events import WorkFound
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.errors import ConfigError, GpuLost, PlanError, UserError
from resmaster_stages.inspection.published import Published
from resmaster_stages.inspection.status import status
from resmaster_stages.models.identity import Weights
from resmaster_stages.progress import Event, ShardDone, ShardStarted, listening
from resmaster_stages.prompts import ingest
from resmaster_stages.publish import report
from resmaster_stages.runner import run
from resmaster_tasks.policy import worth_retrying
from resmaster_tasks.stages import stage_task
from tests.fake_stages import FAKES, config_at, png
from tests.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("server")


class Stages:
    """Stand-in stage modules that count calls and fail on request."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.trouble: dict[str, list[Exception]] = {}

    def process(self, stage: str) -> Process:
        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            self.calls[stage] += 1
            if self.trouble.get(stage):
                raise self.trouble[stage].pop(0)
            yield from FAKES[stage](config, samples)

        return process


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fakes = Stages()
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, process=fakes.process(name)))
    monkeypatch.setattr(run, "own_provenance", dict)
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    for task in map(stage_task, STAGES):
        monkeypatch.setattr(task, "retry_delay_seconds", 0)
    return fakes


def config_for(tmp_path: Path, prompts: list[str]) -> DatasetConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return config_at(tmp_path / "out", prompts=str(tmp_path / "prompts.txt"), dispatch={"where": "here"})


def build_dataset(config: DatasetConfig) -> BuildResult:
    return outcome(build.build_dataset(config, return_state=True))


def repair(dataset_url: str, **arguments: object) -> BuildResult:
    return outcome(build.repair(dataset_url, **arguments, return_state=True))


def commits(url: str) -> dict[str, set[int]]:
    dataset = open_dataset(url)
    return {name: set(dataset.commits(name).numbers()) for name in dataset.hashes}


def test_a_build_runs_every_stage_once_per_shard_and_publishes(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["a", "b", "c"])
    heard: list[Event] = []
    with listening(heard.append):
        result = build_dataset(config)
    assert (result.samples, result.samples_failed, result.errors) == (3, 0, {})
    assert stages.calls == {"low_res": 2, "captions": 3, "high_res": 3, "quality": 3}, "a call a slot"
    (found,) = [event for event in heard if isinstance(event, WorkFound)]
    assert found == WorkFound(dict.fromkeys(FAKES, 3), [0, 1]), "told once, before the work"
    assert heard.index(found) < min(n for n, event in enumerate(heard) if isinstance(event, ShardStarted))
    done = [(event.stage, event.shard) for event in heard if isinstance(event, ShardDone)]
    assert done == [(name, shard) for shard in (0, 1) for name in FAKES], "shard by shard, stage by stage"
    folder = tmp_path / "out" / "demo"
    assert pq.read_table(folder / "manifest.parquet").num_rows == 3
    for name in ("report/index.html", "report/contact-000.png", "index.json", "README.md", "config.json"):
        assert (folder / name).stat().st_size > 0, name
    assert result.report_url == str(folder / "report" / "index.html")
    record = json.loads(next(folder.glob("commits/high_res-*/000000.json")).read_text())
    assert {"flow_run", "flow_run_name", "task_run"} <= {name for name, value in record["provenance"].items() if value}

    assert build_dataset(config) == result
    assert stages.calls.total() == 11, "nothing was done twice"


def test_a_failing_shard_does_not_stop_the_others_and_repair_does_only_it(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["bad high_res 1", "bad high_res 2", "c", "d"])
    result = build_dataset(config)
    assert set(result.errors) == {"0"}
    assert "2 of 2 samples failed" in result.errors["0"]
    assert result.samples == 2
    assert commits(result.dataset_url) == {"low_res": {0, 1}, "captions": {0, 1}, "high_res": {1}, "quality": {1}}
    page = (tmp_path / "out" / "demo" / "report" / "index.html").read_text()
    assert "told to fail" in page
    state = build.build_dataset(config, return_state=True)
    assert (state.type.value, state.name) == ("FAILED", INCOMPLETE)
    assert state.message is not None
    assert state.message.startswith("shards 0 not finished; first: high_res")

    stages.calls.clear()
    again = repair(result.dataset_url)
    assert set(again.errors) == {"0"}
    assert stages.calls == {"high_res": 2}, "a call a sample"

    stages.calls.clear()
    assert repair(result.dataset_url, shards="1").errors == {}
    assert stages.calls == {}


def test_a_hiccup_is_retried_and_a_mistake_is_not(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["a"])
    stages.trouble = {"high_res": [OSError("503 slow down"), TimeoutError("timed out")]}
    assert build_dataset(config).errors == {}
    assert stages.calls["high_res"] == 3


def test_an_outage_is_told_by_class_message_time_and_run(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every try of a task is an attempt; the third shard was luckier."""
    config = config_for(tmp_path, ["a", "b", "c", "d", "e"])
    down = [ConnectionError("caption server did not answer") for _ in range(8)]
    stages.trouble = {"captions": [*down, UserError("model x: cannot load")]}
    result = build_dataset(config)
    assert set(result.errors) == {"0", "1", "2"}
    found = {stage.stage: stage for stage in status(open_dataset(result.dataset_url)).stages}["captions"]
    assert (found.committed, found.pending, found.failed_shards) == (0, 0, (0, 1, 2))
    assert [(error.error_class, error.shards) for error in found.errors] == [
        ("ConnectionError", (0, 1)),
        ("UserError", (2,)),
    ]
    last = found.errors[0].last
    assert last.flow_run_name == "demo: shards 0-2"

    assert main(["status", result.dataset_url]) == 0
    told = (
        f"ConnectionError: caption server did not answer (last {last.failed_at} in run demo: shards 0-2 on {last.host})"
    )
    assert f"failed: captions of 2 shards (0-1): {told}" in capsys.readouterr().out
    assert main(["status", result.dataset_url, "--openmetrics"]) == 0
    out = capsys.readouterr().out
    root = f'root="{tmp_path}/out"'
    assert f'resmaster_shards{{dataset="demo",{root},stage="captions",state="failed"}} 3.0' in out
    labels = f'dataset="demo",error_class="ConnectionError",{root},stage="captions"'
    assert f"resmaster_failed_attempts_total{{{labels}}} 8.0" in out
    assert main(["explain", result.dataset_url, "1"]) == 0
    assert capsys.readouterr().out.count("ConnectionError: caption server did not answer (run demo: shards 0-2 on") == 4
    with get_client(sync_client=True) as client:
        like = ArtifactFilter(key=ArtifactFilterKey(any_=[key_of(open_dataset(result.dataset_url), "summary")]))
        (page, *_) = client.read_artifacts(artifact_filter=like, sort=ArtifactSort.CREATED_DESC)
    row = f"| captions | 2 | ConnectionError | caption server did not answer | {last.failed_at} | demo: shards 0-2 |"
    assert row.replace("_", "\\_") in str(page.data)
    assert repair(result.dataset_url).errors == {}


def test_a_build_that_ends_before_it_publishes_is_published_by_the_next_command(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Suspend, which ends the process of a build, or after a kill."""
    config = config_for(tmp_path, ["a", "b"])
    with monkeypatch.context() as patch:
        patch.setattr(build, "publish_dataset", lambda dataset, **options: raise_(Gone()))
        with pytest.raises(Gone):
            build.build_dataset(config)
    folder = tmp_path / "out" / "demo"
    assert commits(str(folder))["quality"] == {0}
    assert not (folder / "manifest.parquet").exists()
    stages.calls.clear()
    assert main(["repair", str(folder)]) == 0
    assert pq.read_table(folder / "manifest.parquet").num_rows == 2
    for name in ("manifest.parquet", "publication.json"):
        (folder / name).unlink()
    assert build_dataset(config).samples == 2
    assert stages.calls == {}, "nothing was done twice"
    assert status(open_dataset(str(folder))).published == Published()


class Gone(BaseException):
    """The end of a process."""


def raise_(error: BaseException) -> NoReturn:
    raise error


def test_the_result_counts_what_is_published(stages: Stages, tmp_path: Path) -> None:
    """A damaged shard that cannot be put back is committed, and not published."""
    config = config_for(tmp_path, ["a", "b", "c", "d"])
    url = build_dataset(config).dataset_url
    (tar,) = (tmp_path / "out" / "demo" / "low_res").glob("000001-*.tar")
    tar.unlink()
    assert main(["verify", url]) == 1
    stages.trouble = {"low_res": [UserError("model x: cannot load")]}
    result = repair(url)
    assert set(result.errors) == {"1"}
    assert result.samples == pq.read_table(tmp_path / "out" / "demo" / "manifest.parquet").num_rows == 2


@pytest.mark.parametrize("error", [ConfigError("wrong model"), GpuLost("ECC")])
def test_what_would_end_every_shard_ends_the_flow(stages: Stages, tmp_path: Path, error: Exception) -> None:
    config = config_for(tmp_path, ["a", "b", "c"])
    stages.trouble = {"high_res": [error]}
    with pytest.raises(type(error), match=str(error)):
        build_dataset(config)
    assert stages.calls["high_res"] == 1
    assert commits(str(tmp_path / "out"))["low_res"] == {0}, "what was done stays done"
    (told,) = status(open_dataset(str(tmp_path / "out"))).stages[2].errors
    assert (told.error_class, told.shards, told.last.message) == (type(error).__name__, (0,), str(error))
    assert build_dataset(config).samples == 3


def test_repair_of_one_stage(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["a"])
    result = build_dataset(config)
    for path in (tmp_path / "out" / "demo" / "commits").glob("quality-*/*.json"):
        path.unlink()
    stages.calls.clear()
    assert repair(result.dataset_url, stages=["low_res"]).samples == 0
    assert stages.calls == {}
    assert repair(result.dataset_url, stages=["quality"]).samples == 1
    assert stages.calls == {"quality": 1}


def test_every_stage_task_uses_the_retry_policy() -> None:
    for task in map(stage_task, STAGES):
        assert task.retry_condition_fn is worth_retrying
        assert task.retries == 3
        assert task.retry_jitter_factor == 0.5


def test_the_report_lists_only_the_last_attempt_of_a_failed_sample(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["bad low_res 1", "bad low_res 2"])
    url = build_dataset(config).dataset_url
    repair(url)
    rows = report.failures(open_dataset(url))
    assert [row["attempt_number"] for row in rows] == [2, 2]


def contents(url: str) -> dict[tuple[str, int, int], str]:
    """(stage, shard, number of the object) -> sha256 of what lies there."""
    dataset = open_dataset(url)
    return {
        (name, shard, number): hashlib.sha256(dataset.folder.read(stored.name)).hexdigest()
        for name in dataset.hashes
        for shard, receipt in dataset.commits(name).read_all().items()
        for number, stored in enumerate(receipt.objects)
    }


@pytest.mark.s3
def test_a_build_on_s3_is_the_same_as_on_a_folder_and_plain_libraries_read_it(
    stages: Stages, tmp_path: Path, s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "b", "bad low_res", "c", "d"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    low_res = {"height": 16, "width": 16}
    config = {
        "name": "demo",
        "prompts": "prompts.txt",
        "low_res": low_res,
        "samples_per_shard": 2,
        "max_failure_ratio": 0.5,
        "dispatch": {"where": "here"},
    }
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config))
    for root in (str(tmp_path / "out"), s3_root):
        assert main(["run", str(tmp_path / "demo.yaml"), "--root", root]) == 0
    local, remote = f"{tmp_path}/out/demo", f"{s3_root}/demo"
    assert contents(remote) == contents(local)
    assert len(contents(local)) == 4 * 3

    # plain webdataset, with an opener for s3://
    monkeypatch.setitem(wds.gopen_schemes, "s3", lambda url, mode, bufsize, **more: fsspec.open(url, mode).open())
    index = json.loads(fsspec.open(f"{remote}/index.json").open().read())
    shards = [f"{remote}/{shard['url']}" for shard in index["shardlist"]]
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["txt"] for sample in samples] == ["a", "b", "c", "d"]
    assert {sample["png"].size for sample in samples} == {(64, 64)}

    # plain pyarrow, with Arrow's own S3 client
    arrow = pyarrow.fs.S3FileSystem(
        access_key=s3_server.key, secret_key=s3_server.secret, endpoint_override=s3_server.endpoint
    )
    table = pq.read_table(f"{remote.removeprefix('s3://')}/manifest.parquet", filesystem=arrow)
    objects = ("high_res_object", "low_res_object", "captions_object")  # their names hold the attempt
    assert table.drop(objects).equals(pq.read_table(f"{local}/manifest.parquet").drop(objects))
    first = table.slice(0, 1).to_pylist()[0]
    with arrow.open_input_file(f"{remote.removeprefix('s3://')}/{first['high_res_object']}") as file:
        file.seek(first["high_res_offset"])
        data = file.read(first["high_res_bytes"])
    with Path(local, "index.json").open() as file:
        tar = json.load(file)["shardlist"][0]["url"]
    assert data == next(iter(wds.WebDataset(f"{local}/{tar}", shardshuffle=False)))["png"]

    # nothing is done twice
    stages.calls.clear()
    assert main(["run", str(tmp_path / "demo.yaml"), "--root", s3_root]) == 0
    assert main(["status", s3_root]) == 0
    assert stages.calls == {}


@pytest.mark.s3
def test_a_shard_costs_29_requests_through_its_tasks(
    stages: Stages, tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/scale.md says, of four stages. What a run asks once does not grow with its shards."""
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefgh"))
    dataset = ingest(config_at(s3_root, prompts=str(tmp_path / "prompts.txt")))
    dataset.plan.read(0)  # a file of the plan is held once it is read
    asked: Counter[str] = Counter()
    call = AioBaseClient._make_api_call

    async def counted(client: AioBaseClient, operation: str, parameters: object) -> object:
        asked[operation] += 1
        return await call(client, operation, parameters)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)

    def requests(*shards: int) -> Counter[str]:
        asked.clear()
        assert outcome(process_shards(dataset.url, list(shards), return_state=True)) == {}
        return Counter(asked)

    one, three = requests(0), requests(1, 2, 3)
    more = three - one
    assert more.total() == 2 * 29, more
    assert more == {"GetObject": 2 * 9, "ListObjectsV2": 2 * 4, "PutObject": 2 * 12, "DeleteObject": 2 * 4}
    assert (one - more).total() < 15, "to open the dataset"


def test_a_run_reads_its_input_and_asks_what_is_pending_once(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(png((number, 0, 0)))
    config = {"name": "demo", "root": str(tmp_path / "out"), "images": "images", "dispatch": {"where": "here"}}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config))
    calls: Counter[str] = Counter()

    def count(place: str) -> None:
        module, name = place.rsplit(".", 1)
        call = getattr(sys.modules[module], name)

        def counted(*arguments: object, **named: object) -> object:
            calls[name] += 1
            return call(*arguments, **named)

        monkeypatch.setattr(place, counted)

    for place in (
        "resmaster_stages.prompts.DraftReader",
        "resmaster_flows.build.pending",
        "resmaster_flows.build.status",
        "resmaster_stages.planning.drafts.image_size",
    ):
        count(place)
    assert main(["run", str(tmp_path / "demo.yaml")]) == 0
    assert calls == {"DraftReader": 1, "image_size": 3, "pending": 1, "status": 1}
    for _ in range(2):
        build.build_dataset(load_config(tmp_path / "demo.yaml"))  # as a deployment starts it
    assert calls == {"DraftReader": 3, "image_size": 9, "pending": 3, "status": 3}
    (images / "3.png").write_bytes(png((3, 0, 0)))
    build.build_dataset(load_config(tmp_path / "demo.yaml"), read_input=False)
    assert calls == {"DraftReader": 3, "image_size": 9, "pending": 4, "status": 4}
    assert open_dataset(str(tmp_path / "out")).plan.samples == 3, "what is planned is built, and no more"


def test_without_its_input_only_what_is_planned_is_built(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no plan yet; start with"):
        build.build_dataset(config_for(tmp_path, ["a"]), read_input=False)
    assert not (tmp_path / "out").exists()


def test_repair_gives_failed_samples_another_attempt_if_asked(stages: Stages, tmp_path: Path) -> None:
    url = build_dataset(config_for(tmp_path, ["a", "bad high_res"])).dataset_url
    stages.calls.clear()
    assert repair(url).samples_failed == 1
    assert stages.calls == {}
    mended = repair(url, retry_errors=True)
    assert (mended.samples, mended.samples_failed) == (1, 1)
    assert stages.calls == {"high_res": 1}, "it failed again"
    page = (tmp_path / "out" / "demo" / "report" / "index.html").read_text()
    assert "told to fail" in page


def test_repair_makes_samples_again_if_asked(stages: Stages, tmp_path: Path) -> None:
    """As the form of the deployment does, which has no command line before it."""
    url = build_dataset(config_for(tmp_path, ["a", "b", "c"])).dataset_url
    dataset = open_dataset(url)
    (a, b), (c,) = dataset.plan.keys_of(0), dataset.plan.keys_of(1)
    stages.calls.clear()
    assert repair(url, redo=f"{b},{c[:12]}").samples == 3
    takes = {stage: {s: r.takes for s, r in dataset.commits(stage).read_all().items()} for stage in dataset.hashes}
    assert takes == {stage: {0: {b: 1}, 1: {c: 1}} for stage in dataset.hashes}
    assert repair(url, redo=a, redo_from="high_res").samples == 3
    assert dataset.commits("high_res").read(0).takes == {a: 1, b: 1}
    assert dataset.commits("low_res").read(0).takes == {b: 1}
    with pytest.raises(UserError, match="no sample has a key"):
        repair(url, redo="0" * 24)


def test_a_dataset_that_lacks_too_many_samples_is_incomplete(stages: Stages, tmp_path: Path) -> None:
    """Though all its shards are committed, because a shard may always lose one sample."""
    config = config_for(tmp_path, ["bad low_res", "bad high_res", "c"]).model_copy(update={"samples_per_shard": 1})
    state = build.build_dataset(config, return_state=True)
    result = outcome(state)
    assert (state.name, state.message) == (INCOMPLETE, result.shortfall)
    assert result.shortfall.startswith("2 of 3 samples failed (tolerated: 1); to see why: resmaster explain ")
    assert (result.samples, result.errors, result.finished) == (1, {}, False)
    again = build.repair(result.dataset_url, return_state=True)
    assert (again.name, again.message) == (state.name, state.message)
    published = build.publish(result.dataset_url, return_state=True)
    assert (published.name, outcome(published)) == (INCOMPLETE, result.report_url)
    assert build.build_dataset(config.model_copy(update={"max_failure_ratio": 0.7}), return_state=True).is_completed()


def test_verify_and_repair_put_the_same_bytes_back(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, ["a", "b", "c"])
    url = build_dataset(config).dataset_url
    before = contents(url)
    (tar,) = (tmp_path / "out" / "demo" / "high_res").glob("000001-*.tar")
    tar.write_bytes(tar.read_bytes()[:700])
    (captions,) = (tmp_path / "out" / "demo" / "captions").glob("000000-*.parquet")
    captions.unlink()
    stages.calls.clear()
    assert main(["verify", url]) == 1
    assert main(["repair", url]) == 0
    assert stages.calls == {"high_res": 1, "captions": 2}, "just these: a call a sample"
    assert contents(url) == before
    assert main(["verify", url]) == 0
    assert main(["repair", url]) == 0
    assert stages.calls == {"high_res": 1, "captions": 2}

    # where other bytes come out, the user decides
    monkeypatch.setitem(FAKES, "high_res", FAKES["low_res"])
    tar.unlink()
    capsys.readouterr()
    assert main(["verify", url]) == 1
    assert main(["repair", url]) == 1
    assert "--replace" in " ".join(capsys.readouterr().err.split())
    assert main(["repair", url, "--replace"]) == 0
    assert main(["verify", url]) == 0
    assert {place for place, sha in contents(url).items() if before[place] != sha} >= {("high_res", 1, 0)}


def states(url: str, shard: int, retry: bool = False) -> dict[str, str]:
    dataset, known, names = open_dataset(url), dict[str, Receipt](), dict[str, str]()
    retries = retries_of(dataset)[0] if retry else None
    for name in dataset.hashes:
        state = stage_task(name)(dataset, shard, known, number_of(retries, name, shard), return_state=True)
        known[name], names[name] = state.result(), state.name
    return names


def test_what_is_committed_shows_as_cached_and_nothing_else_does(stages: Stages, tmp_path: Path) -> None:
    url = build_dataset(config_for(tmp_path, ["a", "b", "c"])).dataset_url
    stages.calls.clear()
    assert states(url, 0) == dict.fromkeys(FAKES, "Cached")
    dataset = open_dataset(url)
    receipt = stage_task("high_res")(dataset, 0, {}, 1, return_state=True).result()
    assert receipt == dataset.commits("high_res").read(0)
    (record,) = (Path(url) / "commits").glob("high_res-*/000000.json")
    record.unlink()
    assert states(url, 0) == {**dict.fromkeys(FAKES, "Cached"), "high_res": "Completed"}, "no record, no result"
    assert stages.calls == {"high_res": 2}
    assert states(url, 0) == dict.fromkeys(FAKES, "Cached")
    storage = get_current_settings().results.local_storage_path
    assert not [path for path in storage.rglob("*") if "high_res" in str(path)], "the dataset alone is asked"


def test_a_server_shows_what_is_committed_as_cached(stages: Stages, tmp_path: Path) -> None:
    """By its own records of the task runs, as the UI reads them."""
    config = config_for(tmp_path, ["a", "b", "c"])
    build_dataset(config)
    build_dataset(config.model_copy(update={"limit": 2}))  # all is there
    url = repair(str(tmp_path / "out" / "demo")).dataset_url
    flow_run = process_shards(url, [0], return_state=True).state_details.flow_run_id
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
    assert {run.name: (run.state_name, run.state_type.value) for run in runs} == {
        f"{stage} 000000": ("Cached", "COMPLETED") for stage in FAKES
    }


def test_another_attempt_that_is_asked_for_is_made_once(stages: Stages, tmp_path: Path) -> None:
    url = build_dataset(config_for(tmp_path, ["a", "bad high_res"])).dataset_url
    assert states(url, 0)["high_res"] == "Cached"
    assert states(url, 0, retry=True)["high_res"] == "Completed"
    assert states(url, 0)["high_res"] == "Cached"


def test_a_suspended_build_of_the_command_line_ends_with_one_line(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's UI suspends any run, but resumes only those of deployments."""
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config_for(tmp_path, ["a", "b", "c"]).model_dump(mode="json")))
    original = FAKES["quality"]

    def suspend(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.parent_flow_run_id, Suspended(), force=True)
        yield from original(config, samples)

    monkeypatch.setitem(FAKES, "quality", suspend)
    capsys.readouterr()
    assert main(["run", str(tmp_path / "demo.yaml")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "resmaster: suspended on the Prefect server, which cannot resume a run that was started by hand;" in told
    assert told.endswith("what is done is kept: run the same command again to go on")
    assert "Traceback" not in told
    monkeypatch.setitem(FAKES, "quality", original)
    assert main(["run", str(tmp_path / "demo.yaml")]) == 0
    assert (tmp_path / "out" / "demo" / "manifest.parquet").exists()
