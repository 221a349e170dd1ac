"""The exporter of metrics: what a scrape gets, what it asks of the store, and what happens when a dataset is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.dataset import dataset_or_root
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.exporter import Exporter, serving_metrics
from resmaster_stages.inspection.openmetrics import openmetrics
from resmaster_stages.storage.filesystem import Folder, open_root
from tests.checkout import PYTHONPATH
from tests.inspection.several import made, several, work

Scrape = dict[tuple[str, ...], float]


def parsed(text: str) -> Scrape:
    """(name, dataset, further labels by name) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            rest = [value for name, value in sorted(sample.labels.items()) if name not in ("dataset", "root")]
            found[sample.name, sample.labels.get("dataset", ""), *rest] = sample.value
    return found


def scraped(exporter: Exporter) -> Scrape:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(exporter)
    return parsed(generate_latest(registry).decode())


def test_a_scrape_has_all_datasets_and_asks_nothing_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several(tmp_path / "out", tmp_path)
    exporter = Exporter(open_root(str(tmp_path / "out")))
    assert scraped(exporter) == {}, "nobody has looked yet"
    exporter.look()
    for name in ("names", "read", "read_many", "open", "files", "exists"):
        monkeypatch.setattr(Folder, name, lambda *_, **__: pytest.fail("a scrape asks the store"))
    found = scraped(exporter)
    complete = {dataset: value for (name, dataset), value in _pairs(found) if name == "resmaster_complete"}
    assert complete == {"done": 1, "half": 0, "new": 0, "failing": 0, "damaged": 0}
    assert found["resmaster_cost", "half"] == pytest.approx(
        sum(value for key, value in found.items() if key[:2] == ("resmaster_compute_seconds_total", "half")), rel=1e-3
    )
    assert ("resmaster_cost", "done") not in found, "it has no price"
    assert found["resmaster_max_cost", "half"] == 1e8
    assert found["resmaster_stall_seconds", "half"] == 7200
    assert found["resmaster_flagged_samples", "done"] == 0
    assert found["resmaster_look_timestamp_seconds", ""] > 1.7e9


def _pairs(found: Scrape) -> list[tuple[tuple[str, str], float]]:
    return [((key[0], key[1]), value) for key, value in found.items() if len(key) == 2]


def test_it_says_the_same_as_the_command(tmp_path: Path) -> None:
    several(tmp_path / "out", tmp_path)
    root = open_root(str(tmp_path / "out"))
    exporter = Exporter(root)
    exporter.look()
    told = {key: value for key, value in scraped(exporter).items() if "look" not in key[0]}
    text = openmetrics(root).replace("# EOF\n", "")
    assert parsed(text) == told


def test_a_dataset_that_is_lost_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = several(tmp_path / "out", tmp_path)
    exporter = Exporter(open_root(str(tmp_path / "out")))
    exporter.look()
    config = Path(datasets["half"].folder.full("config.json"))
    text = config.read_text()
    config.write_text("{")
    for _ in range(3):
        exporter.look()
    found = scraped(exporter)
    assert found["resmaster_dataset_readable", "half"] == 0
    assert ("resmaster_planned_shards", "half") not in found
    assert found["resmaster_dataset_readable", "done"] == 1
    assert capsys.readouterr().err.count("config.json: damaged") == 1, "said once, not at each look"
    config.write_text(text)
    exporter.look()
    assert scraped(exporter)["resmaster_dataset_readable", "half"] == 1
    config.parent.rename(tmp_path / "moved")
    exporter.look()
    assert ("resmaster_dataset_readable", "half") not in scraped(exporter)


def test_a_store_that_does_not_answer_leaves_the_last_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several(tmp_path / "out", tmp_path)
    exporter = Exporter(open_root(str(tmp_path / "out")))
    exporter.look()
    before = scraped(exporter)

    def down(*_: Any) -> list[str]:
        raise ConnectionError("the store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "names", down)
        exporter.look()
    assert scraped(exporter) == before, "and the time of the last look tells of it"
    assert "metrics: the store does not answer" in capsys.readouterr().err
    exporter.look()
    after = scraped(exporter)
    assert after["resmaster_look_timestamp_seconds", ""] > before["resmaster_look_timestamp_seconds", ""]


def test_one_dataset_can_be_watched_too(tmp_path: Path) -> None:
    dataset = made(tmp_path / "out", tmp_path, "alone", "abcd", 1)
    with serving_metrics(dataset_or_root(dataset.url), "127.0.0.1", 0, 0.1) as address:
        until(lambda: ("resmaster_planned_shards", "alone") in get(address))
        assert get(address)["resmaster_complete", "alone"] == 0
        work(dataset, [1])
        until(lambda: get(address)["resmaster_complete", "alone"] == 1)


def get(address: str) -> Scrape:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return parsed(answer.read().decode())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_address_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    with serving_metrics(open_root(root), "127.0.0.1", 0, 60) as address:
        port = int(address.split(":")[2].split("/")[0])
        taken = pytest.raises(UserError, match=f"--serve 127.0.0.1:{port} cannot be used .*choose another port")
        with taken, serving_metrics(open_root(root), "127.0.0.1", port, 60):
            pass
    for value, line in (
        ("0", "give a port from 1 to 65535"),
        ("x:y", "give a port"),
        ("no.such.host.invalid:9843", "cannot be used"),
    ):
        assert main(["status", root, "--serve", value]) == 2
        assert line in capsys.readouterr().err.replace("\n", " ")
    assert main(["status", root, "--serve", "9843", "--every", "0.1"]) == 2
    assert "at least 1 second" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nothing"), "--serve"]) == 2


def test_the_command_runs_until_a_signal(tmp_path: Path) -> None:
    several(tmp_path / "out", tmp_path)
    port = _free_port()
    command = ["-m", "resmaster_flows.cli.main", "status", str(tmp_path / "out"), "--serve", str(port)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("metrics: ").strip()
        assert address == f"http://127.0.0.1:{port}/metrics"
        until(lambda: ("resmaster_complete", "done") in get(address))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err == "interrupted; nothing was written\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
