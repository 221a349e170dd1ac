"""What grows with a dataset and what does not: listings, requests, what is held at a time. Counts, never seconds."""

import json
import re
import shlex
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from benchmarks import scale
from resmaster_stages.dataset import chain, layout, plan
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.inspection import leftovers
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models.identity import Weights
from resmaster_stages.planning.preview import preview
from resmaster_stages.publish import manifest
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder, Listed
from tests import s3_server as s3
from tests.checkout import ROOT
from tests.fake_stages import FAKES, planned


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def built(root: Path, shards: int) -> Dataset:
    prompts = [f"prompt {number}" for number in range(2 * shards)]
    prompts[1] = "bad high_res"
    root.mkdir()
    dataset = planned(root, prompts, root)
    for shard in range(read_plan(dataset.folder).shards):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    return dataset


class Calls:
    """Counts what is asked of folders, and the most that is asked for at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        self.most = 0
        for name in ("names", "read", "read_many", "open", "exists", "download"):
            monkeypatch.setattr(Folder, name, self._counted(name, getattr(Folder, name)))

    def _counted(self, name, call):
        def counted(folder: Folder, asked, *arguments, **options):
            self.count[name] += 1
            if name == "read_many":
                self.most = max(self.most, len(asked))
            return call(folder, asked, *arguments, **options)

        return counted

    def of(self, act, *arguments) -> Counter[str]:
        self.count, self.most = Counter(), 0
        act(*arguments)
        return self.count


def test_looking_costs_the_same_calls_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = built(tmp_path / "small", 2), built(tmp_path / "large", 9)
    calls = Calls(monkeypatch)
    for look, names in ((pending, 8), (status, 12)):
        assert calls.of(look, small) == calls.of(look, large)
        assert calls.count["names"] == names, (
            "one listing of records per stage, besides those of damage and of what it cost"
        )
    assert calls.of(pending, large)["read_many"] == 0, "names are enough"
    run_stage(large, "high_res", 0, number=2, process=FAKES["high_res"])
    run_stage(large, "high_res", 1, number=2, process=FAKES["high_res"])
    assert calls.of(pending, large)["read_many"] == 4
    assert calls.most == 2, "of shards that have several attempts, records too"


def test_a_stage_reads_nothing_twice_and_one_record_where_nothing_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = planned(tmp_path, ["a", "bad low_res", "b", "c"], tmp_path)
    asked: list[str] = []
    read, read_many = Folder.read, Folder.read_many
    monkeypatch.setattr(Folder, "read", lambda folder, name: asked.append(name) or read(folder, name))
    monkeypatch.setattr(
        Folder,
        "read_many",
        lambda folder, names, **options: asked.extend(names) or read_many(folder, list(names), **options),
    )

    def reads(shard: int) -> dict[str, list[str]]:
        """Stage -> what is read where the stages run one after the other, as a flow runs them."""
        found, known = {}, {}
        for stage in dataset.hashes:
            asked.clear()
            known[stage] = run_stage(dataset, stage, shard, known=known, process=FAKES[stage])
            found[stage] = list(asked)
        return found

    def records(shard: int, *numbers: int) -> dict[str, list[str]]:
        return {
            stage: [layout.commit(stage, own, shard, each) for each in numbers] for stage, own in dataset.hashes.items()
        }

    first = reads(0)
    plan = [layout.plan_record(0), layout.plan_record(1)]
    assert first.pop("low_res") == [*plan, *records(0, 1)["low_res"], find_part(dataset)], "the plan once"
    assert first == {stage: own for stage, own in records(0, 1).items() if stage != "low_res"}
    assert reads(1) == records(1, 1), "its own: those before it are known, and there is no breadcrumb"
    marks = {stage: [layout.damage(stage, own, 1)] for stage, own in dataset.hashes.items()}
    assert reads(1) == {stage: own + marks[stage] for stage, own in records(1, 1).items()}, "where it is committed"
    for number, stage in enumerate(dataset.hashes, start=1):
        asked.clear()
        run_stage(dataset, stage, 1, process=FAKES[stage])
        earlier = [own for before in records(1, 1).values() for own in before][:number]
        assert asked == earlier + marks[stage], "where none is known"
    marks = {stage: [layout.damage(stage, own, 0)] for stage, own in dataset.hashes.items()}
    asked_again = {stage: own + marks[stage] for stage, own in records(0, 1, 2).items()}
    assert reads(0) == asked_again, "only where a sample was lost there may be another attempt"


def find_part(dataset: Dataset) -> str:
    """Name of the one file of the plan."""
    return read_plan(dataset.folder).generations[0].parts[0].stored.name


def test_planning_and_gc_hold_few_bytes_of_each_sample_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PART_ROWS", 500)

    def peak(act: Callable[..., object], *arguments: object) -> int:
        tracemalloc.start()
        try:
            act(*arguments)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def planning(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        scale.write_prompts(folder / "prompts.txt", count)
        peaks = [peak(scale.plan, folder, str(folder), 100) for _ in range(2)]  # the second time all are known
        config = scale.config_of(folder, str(folder), 100)
        assert read_plan(open_dataset(str(folder)).folder).samples == count
        return max(*peaks, peak(preview, config))

    few, many = 1_000, 5_000
    planning(few)
    assert planning(many) - planning(few + 1) < 80 * (many - few)

    names = [f"high_res/{number:06d}-{number:08x}.tar" for number in range(many)]
    monkeypatch.setattr(
        Folder, "files", lambda folder: (Listed(name, 1, datetime.min.replace(tzinfo=UTC)) for name in names)
    )
    monkeypatch.setattr(leftovers, "_named", lambda folder, limit: iter(names))
    dataset = open_dataset(str(tmp_path / str(few)))

    def gc() -> None:
        assert leftovers.find_leftovers(dataset, timedelta(0)) == []

    assert peak(gc) < 60 * many


def test_records_are_held_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = built(tmp_path / "large", 9)
    names = ("manifest.parquet", "index.json", "README.md", "report/index.html")

    def all_of_it() -> tuple[object, ...]:
        published = write_manifest(dataset)
        write_report(dataset)
        return published, status(dataset), [dataset.folder.read(name) for name in names]

    at_once = all_of_it()
    assert at_once[0].samples == 17
    for module in (chain, manifest):
        monkeypatch.setattr(module, "CHUNK_SHARDS", 2)
    calls = Calls(monkeypatch)
    assert all_of_it() == at_once
    write_manifest(dataset)
    assert calls.most == 2
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
        for stage in dataset.hashes:
            run_stage(dataset, stage, 0, process=FAKES[stage])
        counts.append(opened.count(".tar"))
    assert counts[0] == counts[1] > 0


def test_the_commands_of_the_page_are_right() -> None:
    """Their options and steps; run they are at a small size below, and `make soak` in test_soak.py."""
    page = (ROOT / "docs" / "scale.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
            continue
        assert words[:3] == ["python", "-m", "benchmarks.scale"]
        assert set(scale.parser().parse_args(words[3:]).steps.split(",")) <= set(scale.STEPS)


@pytest.mark.s3
def test_a_server_may_have_its_bucket_already(s3_server: s3.S3Server) -> None:
    """As with `--keep` the second time."""
    running = SimpleNamespace(poll=lambda: None)
    assert s3._make_bucket(s3_server, running)


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
