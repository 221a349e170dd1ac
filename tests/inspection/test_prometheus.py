"""The files in infra/prometheus and infra/grafana, in a real Prometheus that scrapes a real exporter.

There is no Grafana here. The dashboard's expressions are asked of Prometheus, and its form is checked against what
Grafana documents of its JSON model.
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import ShardError
from resmaster_stages.inspection.exporter import serving_metrics
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from tests.checkout import ROOT
from tests.fake_stages import FAKES, files_of
from tests.inspection.several import made, several, work
from tests.s3_server import die_with_parent, free_ports

INFRA = ROOT / "infra" / "prometheus"
DASHBOARD = json.loads((ROOT / "infra" / "grafana" / "datasets.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((INFRA / "rules.yml").read_text(encoding="utf-8"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="there is no Prometheus here; on Debian: apt-get install prometheus",
)


@needs_prometheus
@pytest.mark.parametrize(
    "words",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)
def test_promtool_takes_the_files(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=INFRA, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr


def test_every_alert_is_tested_with_its_waiting_time() -> None:
    tests = yaml.safe_load((INFRA / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [(case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test["alert_rule_test"]]
    for alert in ALERTS:
        assert {fires for name, fires in cases if name == alert} == {True, False}, alert
    assert {name for name, _ in cases} == set(ALERTS)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}{query}", timeout=60) as answer:
            return json.load(answer)["data"]

    def ask(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def firing(self) -> set[tuple[str, str]]:
        """(alert, dataset)."""
        alerts = self.get("alerts")["alerts"]
        return {
            (each["labels"]["alertname"], each["labels"].get("dataset", ""))
            for each in alerts
            if each["state"] == "firing"
        }


def until(condition: Callable[[], bool], told: Callable[[], Any] = lambda: "") -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus with our rules and scrape configuration, that looks every second and whose alerts do not wait (their
    waiting times are promtool's part)."""
    config = yaml.safe_load((INFRA / "prometheus.yml").read_text(encoding="utf-8"))
    rules = yaml.safe_load(yaml.safe_dump(RULES))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    port = free_ports(1, 0)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
    found = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return bool(found.ask("resmaster_complete"))
        except (urllib.error.URLError, ConnectionError):
            return False

    try:
        until(ready)
        yield found
    finally:
        process.terminate()
        process.wait(timeout=60)


def willing(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    yield from (Output(sample.key, files=files_of(sample, 16)) for sample in samples)


def datasets_in(folder: Path) -> dict[str, Dataset]:
    """Those of `several`, and one for each further alert."""
    root = folder / "out"
    datasets = several(root, folder)
    datasets["stalled"] = made(root, folder, "stalled", "abcd", 1, dispatch={"stall_seconds": 0.001})
    datasets["dear"] = made(root, folder, "dear", "abcd", 1, dispatch={"price": 1e6, "max_cost": 1e-6})
    datasets["lost"] = made(root, folder, "lost", "ab")
    Path(datasets["lost"].folder.full("config.json")).rename(folder / "config.json")
    return datasets


@needs_prometheus
@pytest.mark.slow
def test_each_alert_fires_and_ends_and_the_dashboard_has_data(tmp_path: Path) -> None:
    datasets = datasets_in(tmp_path)
    root = open_root(str(tmp_path / "out"))
    with ExitStack() as exporter:
        address = exporter.enter_context(serving_metrics(root, "127.0.0.1", 0, 1.0))
        with prometheus(tmp_path, urllib.parse.urlsplit(address).netloc) as found:
            incomplete = {"half", "new", "failing", "damaged", "stalled", "dear"}
            expected = {
                *(("ResMasterBuildIncomplete", name) for name in incomplete),
                ("ResMasterNoCommit", "stalled"),
                ("ResMasterShardsFailed", "failing"),
                ("ResMasterDamaged", "damaged"),
                ("ResMasterCostAbovePlan", "dear"),
                ("ResMasterUnreadable", "lost"),
            }
            until(lambda: found.firing() == expected, lambda: found.firing() ^ expected)
            for alert, rule in ALERTS.items():
                names = {each["metric"].get("dataset", "") for each in found.ask(rule["expr"])}
                assert names == {dataset for name, dataset in expected if name == alert}, alert
            dashboard_has_data(found)

            for _ in range(15):
                with pytest.raises(ShardError):
                    run_stage(datasets["failing"], "low_res", 2, process=FAKES["low_res"])
            until(lambda: ("ResMasterAttemptsFail", "failing") in found.firing(), found.firing)

            mend(tmp_path, datasets)
            left = {
                ("ResMasterBuildIncomplete", "half"),
                ("ResMasterCostAbovePlan", "dear"),
                ("ResMasterAttemptsFail", "failing"),
            }
            until(lambda: found.firing() == left, lambda: found.firing() ^ left)
            exporter.close()
            until(lambda: ("ResMasterNotWatched", "") in found.firing(), found.firing)


def mend(folder: Path, datasets: dict[str, Dataset]) -> None:
    """Put everything right but for `half`, and `dear`, whose money is spent."""
    Path(folder / "config.json").rename(datasets["lost"].folder.full("config.json"))
    datasets["damaged"].commits("high_res").unmark(0)
    work(datasets["stalled"], [1])
    work(datasets["dear"], [1])
    work(datasets["new"], [0])
    run_stage(datasets["failing"], "low_res", 2, process=willing)
    for stage in list(FAKES)[1:]:
        run_stage(datasets["failing"], stage, 2, process=FAKES[stage])


def dashboard_has_data(found: Prometheus) -> None:
    """Each expression of the dashboard, with its variables as Grafana fills them in for "All"."""
    for panel in DASHBOARD["panels"]:
        for each in panel["targets"]:
            expression = filled(each["expr"])
            until(lambda expression=expression: bool(found.ask(expression)), lambda e=expression: f"no data: {e}")
    for variable in DASHBOARD["templating"]["list"][1:]:
        series, _, label = filled(variable["definition"]).removeprefix("label_values(").rstrip(")").rpartition(", ")
        assert found.get(f"label/{label}/values", **{"match[]": series}), variable["name"]


def filled(text: str) -> str:
    return text.replace("$root", ".*").replace("$dataset", ".*").replace("$__rate_interval", "1m")


def test_the_dashboard_has_the_form_that_grafana_documents() -> None:
    """https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/"""
    assert DASHBOARD["id"] is None, "or else an import would look for that one"
    assert {"uid", "title", "tags", "timezone", "editable", "graphTooltip", "time", "timepicker", "templating"} <= set(
        DASHBOARD
    )
    assert {"annotations", "refresh", "schemaVersion", "version", "links", "panels"} <= set(DASHBOARD)
    assert DASHBOARD["time"] == {"from": "now-6h", "to": "now"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert {"id", "type", "title", "datasource", "gridPos", "fieldConfig", "options", "targets"} <= set(panel)
        assert panel["type"] in {"stat", "bargauge", "timeseries"}
        assert set(panel["fieldConfig"]) == {"defaults", "overrides"}
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert all(0 <= x < 24 for x, _ in cells)
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert [each["refId"] for each in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
        for each in [panel, *panel["targets"]]:
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "root", "dataset"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("root", "dataset"):
        assert variables[name]["type"] == "query"
        assert variables[name]["query"]["query"] == variables[name]["definition"]
