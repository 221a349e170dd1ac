"""What grows with a dataset and what does not: listings, requests, what is held at a time. Counts, never seconds."""

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import scale
from resmaster_stages import publish, supplements
from resmaster_stages.config import Weights
from resmaster_stages.gallery import write_report
from resmaster_stages.publish import write_manifest
from resmaster_stages.stage import run_stage
from resmaster_stages.standing import pending, status
from resmaster_stages.storage.dataset import Dataset
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.plan import read_plan
from tests.fake_stages import FAKES, planned

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def built(root: Path, shards: int) -> Dataset:
    prompts = [f"prompt {number}" for number in range(2 * shards)]
    prompts[1] = "bad high_res"
    root.mkdir()
    dataset = planned(root, prompts, root)
    for shard in range(read_plan(dataset.folder).shards):
        for stage in dataset.config.stages():
            run_stage(dataset, dataset.config, stage, shard, process=FAKES[stage])
    return dataset


class Calls:
    """Counts what is asked of folders, and the most that is asked for at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        self.most = 0
        for name in ("names", "read", "read_many", "open", "exists", "download"):
            monkeypatch.setattr(Folder, name, self._counted(name, getattr(Folder, name)))

    def _counted(self, name, call):
        def counted(folder: Folder, asked, *arguments):
            self.count[name] += 1
            if name == "read_many":
                self.most = max(self.most, len(asked))
            return call(folder, asked, *arguments)

        return counted

    def of(self, act, *arguments) -> Counter[str]:
        self.count, self.most = Counter(), 0
        act(*arguments)
        return self.count


def test_looking_costs_the_same_calls_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = built(tmp_path / "small", 2), built(tmp_path / "large", 9)
    calls = Calls(monkeypatch)
    for look, names in ((pending, 8), (status, 6)):
        assert calls.of(look, small) == calls.of(look, large)
        assert calls.count["names"] == names, "one listing of records per stage, besides those of damage"
    assert calls.of(pending, large)["read_many"] == 0, "names are enough"


def test_records_are_held_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = built(tmp_path / "large", 9)
    names = ("manifest.parquet", "index.json", "README.md", "report/index.html")

    def all_of_it() -> tuple[object, ...]:
        published = write_manifest(dataset)
        write_report(dataset)
        return published, status(dataset), [dataset.folder.read(name) for name in names]

    at_once = all_of_it()
    assert at_once[0].samples == 17
    for module in (supplements, publish):
        monkeypatch.setattr(module, "CHUNK_SHARDS", 2)
    calls = Calls(monkeypatch)
    assert all_of_it() == at_once
    write_manifest(dataset)
    assert 0 < calls.most <= 8, "commits of 4 stages, or requests for them"
    calls.of(status, dataset)
    assert calls.most == 2
    calls.of(write_manifest, dataset)
    assert calls.most == 2


def test_a_tar_is_opened_equally_often_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, **rest: opened.append(path.suffix) or real(path, *mode, **rest)
    )
    counts = []
    for samples in (2, 7):
        folder = tmp_path / str(samples)
        folder.mkdir()
        dataset = planned(folder, [f"prompt {number}" for number in range(samples)], folder, samples_per_shard=samples)
        opened.clear()
        for stage in dataset.config.stages():
            run_stage(dataset, dataset.config, stage, 0, process=FAKES[stage])
        counts.append(opened.count(".tar"))
    assert counts[0] == counts[1] > 0


def test_the_commands_of_the_page_are_right() -> None:
    """Their options and steps; run they are at a small size below, and `make soak` in test_soak.py."""
    page = (ROOT / "docs" / "scale.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
            continue
        assert words[:3] == ["python", "-m", "benchmarks.scale"]
        assert set(scale.parser().parse_args(words[3:]).steps.split(",")) <= set(scale.STEPS)


@pytest.mark.slow
def test_the_benchmark_runs_at_any_size(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--shards",
        "2,4",
        "--samples",
        "3",
        "--keep",
        str(tmp_path / "kept"),
    ]
    words += ["--steps", "plan,commit,manifest", "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "Ratios for 2 times the shards:" in done.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for shards in (2, 4):
        rows = pq.read_table(tmp_path / "kept" / "root" / str(shards) / "scale" / "manifest.parquet").num_rows
        assert rows == 3 * shards
        assert all(step["requests"] > 0 for step in numbers[str(shards)].values())
    commits = [numbers[shards]["commit"]["requests"] for shards in ("2", "4")]
    assert 1.5 < commits[1] / commits[0] < 2.5
