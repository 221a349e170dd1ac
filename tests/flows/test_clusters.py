"""Builds on a Dask or Ray cluster that is there already: real processes, real models, each loaded once."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from resmaster_flows import clusters
from resmaster_flows.build import repair
from resmaster_flows.cli.main import main
from resmaster_flows.clusters import ADDRESSES, check
from resmaster_flows.outcome import INCOMPLETE, LIMITED, outcome
from resmaster_flows.watch.events import Dispatched
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import Dataset, reconfigured
from resmaster_stages.dataset.retry import Retries
from resmaster_stages.errors import ConfigError, GpuLost, ShardError, UserError
from resmaster_stages.progress import Event, Note, listening
from resmaster_stages.prompts import ingest
from tests.checkout import PYTHONPATH


def planned(tmp_path: Path, executor: str, prompts: list[str]) -> Dataset:
    """Picturebook, a step per image, an image per shard."""
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    config: DatasetConfig = parse_config(
        {
            "name": "demo",
            "root": str(tmp_path / "out"),
            "prompts": str(tmp_path / "prompts.txt"),
            "samples_per_shard": 1,
            "low_res": {"steps": 1},
            "dispatch": {"where": executor, "window": 3},
        }
    )
    dataset = ingest(config)
    return dataset


def counter() -> Callable[[], tuple[int, int]]:
    """A function that tells a process's id and how often it loaded models; it travels by value to any process."""

    def loads() -> tuple[int, int]:
        import os

        from resmaster_stages.models.load import load_models

        return os.getpid(), load_models.cache_info().misses

    return loads


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a cluster need this project."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


@pytest.mark.slow
@pytest.mark.server
def test_a_build_on_dask_loads_models_once_per_process(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads in a process, which must not use the models at the same time; more shards than the window."""
    import distributed

    prompts = [f"a {color} house" for color in ("red", "blue", "green", "yellow", "white", "black")]
    dataset = planned(tmp_path, "dask", prompts)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, memory_limit=0, host="127.0.0.1"
    ) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        result = outcome(repair(dataset.url, stages=["low_res"], return_state=True))
        with distributed.Client(cluster) as client:
            counted = dict(client.run(counter()).values())
    assert result.errors == {}
    assert len(list(Path(dataset.folder.full("commits")).glob("low_res-*/*.json"))) == len(prompts)
    assert list(counted.values()) == [1]
    assert os.getpid() not in counted


@pytest.mark.slow
@pytest.mark.server
def test_a_build_on_ray_loads_models_once_per_process(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("prefect_ray") is None:
        pytest.skip("ray is an extra of its own, too large for every test run: pip install -e '.[ray]'")
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    dataset = planned(tmp_path, "ray", ["a red house", "a blue house", "a green house", "a white house"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        result = outcome(repair(dataset.url, stages=["low_res"], return_state=True))
        asked = [ray.remote(counter()).remote() for _ in range(20)]
        counted = dict(ray.get(asked))
    finally:
        ray.shutdown()
    assert result.errors == {}
    assert len(list(Path(dataset.folder.full("commits")).glob("low_res-*/*.json"))) == 4
    assert set(counted.values()) <= {0, 1}, "at most one load per process"
    assert sum(counted.values()) >= 1


@pytest.mark.parametrize("executor", list(ADDRESSES))
def test_what_is_missing_is_said_in_one_line(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'resmaster-pipeline\[{executor}\]'"):
        check(executor)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"set (DASK_SCHEDULER|RAY)_ADDRESS to the address of your cluster"):
        check(executor)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:8786")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UserError, match="set PREFECT_API_URL to a server"),
    ):
        check(executor)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert check(executor)


def test_the_command_line_finds_it_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "demo.yaml"
    (tmp_path / "prompts.txt").write_text("a red house\n")
    config.write_text(f"name: demo\nroot: {tmp_path / 'out'}\nprompts: prompts.txt\n")
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    assert main(["run", str(config), "--executor", "dask"]) == 2
    assert "set DASK_SCHEDULER_ADDRESS" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_does_not_answer_is_found_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resmaster_flows.clusters.CONNECT_SECONDS", 0.5)
    monkeypatch.setattr("resmaster_flows.server.require_answer", lambda: None)
    monkeypatch.setattr("resmaster_flows.server.require_result_storage", lambda: None)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    (tmp_path / "prompts.txt").write_text("a red house\n")
    (tmp_path / "demo.yaml").write_text("name: demo\nroot: out\nprompts: prompts.txt\n")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        for verb in ("plan", "run"):
            assert main([verb, str(tmp_path / "demo.yaml"), "--executor", "dask"]) == 2
            assert "=tcp://127.0.0.1:1: no Dask scheduler answers there (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


UNTIL = "2026-11-30T12:00:00.000+00:00"


class Cluster:
    """Stands in for a cluster: notes what is handed to it, and does nothing but end as it is told."""

    def __init__(self, ends: dict[int, Exception], limit: int = 1000) -> None:
        """limit: the shard from which on a limit of the build is reached."""
        self.ends, self.handed, self.under_way, self.most = ends, [], 0, 0  # type: ignore[var-annotated]
        self.limit, self.untils = limit, set()  # type: ignore[var-annotated]

    def submit(self, url: str, shard: int, stages: list[str], retries: Retries | None, until: str | None) -> Any:
        self.untils.add(until)
        self.handed.append((shard, stages, retries))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return SimpleNamespace(result=lambda: self.end(shard))

    def end(self, shard: int) -> str:
        self.under_way -= 1
        if shard in self.ends:
            raise self.ends[shard]
        return "the budget is spent" if shard >= self.limit else ""


def handed_to(cluster: Cluster, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(clusters, "process_shard", cluster)
    retries = {"quality": {str(shard): 2 for shard in range(8)}}
    return clusters._process.fn(dataset.url, list(range(8)), ["quality", "low_res"], retries, "dask", UNTIL)


def test_a_cluster_gets_few_shards_at_a_time_and_lists_those_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = planned(tmp_path, "dask", [f"prompt {number}" for number in range(8)])
    cluster = Cluster({})
    assert handed_to(cluster, dataset, monkeypatch) == {}
    assert cluster.most == 3, "dispatch.window"
    assert cluster.handed == [(shard, ["low_res", "quality"], {"quality": {str(shard): 2}}) for shard in range(8)]
    cluster = Cluster({1: ShardError("too many samples failed"), 6: OSError("the store is down")})
    state = handed_to(cluster, dataset, monkeypatch)
    assert state.name == INCOMPLETE
    assert outcome(state) == {"1": "too many samples failed", "6": "OSError: the store is down"}
    assert len(cluster.handed) == 8


def test_a_cluster_gets_no_further_shard_once_a_limit_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it has already say for themselves that they were not begun."""
    dataset = planned(tmp_path, "dask", [f"prompt {number}" for number in range(8)])
    cluster = Cluster({}, limit=2)
    notes: list[Event] = []
    with listening(notes.append):
        state = handed_to(cluster, dataset, monkeypatch)
    assert state.name == LIMITED
    assert outcome(state) == {}
    assert [shard for shard, *_ in cluster.handed] == [0, 1, 2, 3, 4], "two were done, and three were with the cluster"
    assert cluster.untils == {UNTIL}
    assert [each for each in notes if isinstance(each, Note)] == [
        Note("the budget is spent; no further shard is begun")
    ]
    assert [each.done for each in notes if isinstance(each, Dispatched)][-1] == 2


@pytest.mark.slow
@pytest.mark.server
def test_a_budget_on_dask(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process does one shard at a time, so the first one spends the budget, and no other one is begun."""
    import distributed

    dataset = planned(tmp_path, "dask", ["a red house", "a blue house", "a green house"])
    dispatch = dataset.config.dispatch.model_copy(update={"price": 1e6, "max_cost": 1e-6})
    dataset = reconfigured(dataset, dispatch=dispatch)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, memory_limit=0, host="127.0.0.1"
    ) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        result = outcome(repair(dataset.url, stages=["low_res"], return_state=True))
    assert result.errors == {}
    assert "2 of 3 shards are left" in result.limit
    assert len(list(Path(dataset.folder.full("commits")).glob("low_res-*/*.json"))) == 1


@pytest.mark.parametrize("error", [GpuLost("ECC"), ConfigError("model.device: no cuda")])
def test_a_cluster_that_would_fail_at_each_shard_gets_no_further_one(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = planned(tmp_path, "dask", [f"prompt {number}" for number in range(8)])
    cluster = Cluster({0: error})
    with pytest.raises(type(error)):
        handed_to(cluster, dataset, monkeypatch)
    assert [shard for shard, _, _ in cluster.handed] == [0, 1, 2]
