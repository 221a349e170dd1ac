import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, create_or_open
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.reading import shard_samples
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES, stage_hashes
from resmaster_stages.errors import GpuLost, PlanError, SampleError, ShardError
from resmaster_stages.inspection.status import pending, pending_samples, status
from resmaster_stages.inspection.verify import note, verify
from resmaster_stages.models.identity import Weights
from resmaster_stages.progress import Event, Glance, SampleDone, ShardDone, ShardStarted, listening
from resmaster_stages.runner.run import run_stage
from tests.checkout import ROOT
from tests.fake_stages import FAKES, config_at, low_res, planned


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture(params=["local", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    root = str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return planned(root, ["a", "b", "c", "bad high_res", "d"], tmp_path)


def run(dataset: Dataset, stage: str, shard: int, **options) -> Receipt:
    return run_stage(dataset, stage, shard, **{"process": FAKES[stage], **options})


def run_all(dataset: Dataset) -> dict[tuple[str, int], Receipt]:
    shards = range(read_plan(dataset.folder).shards)
    return {(stage, shard): run(dataset, stage, shard) for shard in shards for stage in dataset.hashes}


def test_all_stages(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    receipts = run_all(dataset)
    assert os.listdir(scratch) == []
    assert {place: (r.samples_ok, r.samples_failed) for place, r in receipts.items() if place[1] == 1} == {
        ("low_res", 1): (2, 0),
        ("captions", 1): (2, 0),
        ("high_res", 1): (1, 1),
        ("quality", 1): (1, 0),
    }
    assert receipts["high_res", 1].upstream == {
        "low_res": receipts["low_res", 1].attempt,
        "captions": receipts["captions", 1].attempt,
    }
    (row,) = ledger_rows(dataset.commits("high_res"))
    planned_key = read_plan(dataset.folder).read(1)[1].key
    assert (row["key"], row["error_class"], row["message"]) == (planned_key, "SampleError", "told to fail")
    found = status(dataset)
    assert (found.shards, found.samples) == (3, 5)
    assert [(s.committed, s.pending, s.failed, s.samples_ok, s.samples_failed) for s in found.stages] == [
        (3, 0, 0, 5, 0),
        (3, 0, 0, 5, 0),
        (3, 0, 0, 4, 1),
        (3, 0, 0, 4, 0),
    ]
    assert json.loads(json.dumps(found.to_json()))["stages"][2]["samples_failed"] == 1
    with shard_samples(dataset, 1, list(dataset.hashes)) as samples:
        assert [sample.prompt for sample in samples] == ["c"]
        assert samples[0].high_res is not None
        assert samples[0].high_res.open().size == (64, 64)
        assert samples.rows("quality", samples[0].key)[0]["width"] == 64


def test_what_is_committed_is_not_computed_again(dataset: Dataset) -> None:
    first = run(dataset, "low_res", 0)

    def never(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        raise AssertionError("computed again")

    assert run(dataset, "low_res", 0, process=never) == first


def test_a_second_dataset_has_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        dataset = planned(tmp_path / name, ["a", "b"], tmp_path)
        run_all(dataset)
        folder = tmp_path / name / "demo"
        files = [path for path in folder.rglob("*") if path.suffix in (".tar", ".parquet") and "plan" not in path.parts]
        contents.append({(path.parent.name, path.name.split("-")[0]): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_plain_readers_read_tar_and_table(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a", "b"], tmp_path)
    receipts = run_all(dataset)
    keys = [sample.key for sample in read_plan(dataset.folder).read(0)]
    with tarfile.open(tmp_path / "demo" / receipts["high_res", 0].objects[0].name) as tar:
        assert tar.getnames() == [f"{key}.{extension}" for key in keys for extension in ("png", "json", "txt")]
    table = pq.read_table(tmp_path / "demo" / receipts["captions", 0].objects[0].name)
    assert table["key"].to_pylist() == [key for key in keys for _ in range(4)]
    assert table.schema.metadata[b"stage_hash"].decode() == receipts["captions", 0].stage_hash


def test_upstream_must_be_committed(dataset: Dataset) -> None:
    with pytest.raises(PlanError, match="shard 000000 has no commit of stage low_res"):
        run(dataset, "captions", 0)
    with pytest.raises(PlanError, match="shard 9 is not in the plan"):
        run(dataset, "low_res", 9)


def test_captions_are_skipped_where_nothing_uses_them(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a"], tmp_path, upscale={"method": "multidiffusion"})
    assert list(pending(dataset)) == ["low_res", "high_res", "quality"]
    with pytest.raises(PlanError, match="needs no stage 'captions'"):
        run(dataset, "captions", 0)
    run(dataset, "low_res", 0)

    def sees_no_captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        assert [sample.captions for sample in samples] == [()]
        yield from low_res(config, samples)

    assert run(dataset, "high_res", 0, process=sees_no_captions).samples_ok == 1


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))


@pytest.mark.parametrize(("harm", "message"), [(damage, "is damaged"), (Path.unlink, "is gone")])
def test_damaged_upstream_is_named_and_can_be_mended(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    dataset = planned(tmp_path, ["a"], tmp_path)
    done = run(dataset, "low_res", 0)
    harm(tmp_path / "demo" / done.objects[0].name)
    with pytest.raises(ShardError, match=f"{done.objects[0].name} {message}") as caught:
        run(dataset, "captions", 0)
    assert f"resmaster verify {dataset.url}, then: resmaster repair {dataset.url}" in str(caught.value)
    note(dataset, verify(dataset))  # what the message says
    assert run(dataset, "low_res", 0) == done
    assert run(dataset, "captions", 0).samples_ok == 1


def test_too_many_failures_commit_nothing_but_are_written_down(dataset: Dataset) -> None:
    dataset = planned(dataset.config.root, ["bad low_res 1", "bad low_res 2"], Path(tempfile.mkdtemp()))
    shard = read_plan(dataset.folder).shards - 1
    for attempt in (1, 2):
        with pytest.raises(
            ShardError, match=r"(?s)2 of 2 samples failed .tolerated: 1.*SampleError +2 +[0-9a-f]+ +told to fail"
        ):
            run(dataset, "low_res", shard)
        rows = ledger_rows(dataset.commits("low_res"))
        assert sorted(row["attempt_number"] for row in rows) == sorted([*range(1, attempt + 1)] * 2)
    found = status(dataset).stages[0]
    assert (found.committed, found.pending, found.failed, found.failed_shards) == (0, shard, 1, (shard,))
    assert found.samples_failed == 2
    assert dataset.folder.names("low_res") == []
    assert pending(dataset, stages=["low_res"]) == {"low_res": list(range(shard + 1))}
    changed = create_or_open(dataset.config.model_copy(update={"image_format": "png"}))
    assert status(changed).stages[0].failed == 0, "failures of another configuration do not count"


def test_the_tolerated_share(tmp_path: Path) -> None:
    prompts = [f"bad low_res {number}" for number in range(3)] + [f"good {number}" for number in range(7)]
    strict = planned(tmp_path / "a", prompts, tmp_path, samples_per_shard=10, max_failure_ratio=0.29)
    with pytest.raises(ShardError, match=r"3 of 10 samples failed .tolerated: 2"):
        run(strict, "low_res", 0)
    loose = planned(tmp_path / "b", prompts, tmp_path, samples_per_shard=10, max_failure_ratio=0.3)
    assert run(loose, "low_res", 0).samples_failed == 3
    prompts = [f"bad low_res {number}" for number in range(29)] + [f"good {number}" for number in range(71)]
    exact = planned(tmp_path / "c", prompts, tmp_path, samples_per_shard=100, max_failure_ratio=0.29)
    assert run(exact, "low_res", 0).samples_failed == 29


def test_a_shard_that_lost_all_its_samples_goes_through(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["bad low_res"], tmp_path)
    receipts = run_all(dataset)
    assert [(r.samples_ok, r.samples_failed) for r in receipts.values()] == [(0, 1), (0, 0), (0, 0), (0, 0)]


def broken(kind: str) -> Callable[[DatasetConfig, Sequence[Sample]], Iterator[Output]]:
    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        outputs = list(low_res(config, samples))
        if kind == "swapped":
            outputs.reverse()
        elif kind == "short":
            outputs.pop()
        elif kind == "long":
            outputs.append(outputs[-1])
        elif kind == "no json":
            outputs[0] = replace(outputs[0], files={"png": b"x"})
        elif kind == "nothing":
            outputs[0] = Output(outputs[0].key)
        yield from outputs

    return process


@pytest.mark.parametrize("kind", ["swapped", "short", "long", "no json", "nothing"])
def test_a_stage_that_breaks_its_contract_commits_nothing(tmp_path: Path, kind: str) -> None:
    dataset = planned(tmp_path, ["a", "b"], tmp_path)
    with pytest.raises((ShardError, ValueError)):
        run(dataset, "low_res", 0, process=broken(kind))
    assert pending(dataset)["low_res"] == [0]
    assert dataset.folder.names("low_res") == []


def test_rows_that_do_not_fit_commit_nothing(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a"], tmp_path)
    run(dataset, "low_res", 0)
    for rows in ([], [{"latency": 1}]):

        def process(config: DatasetConfig, samples: Sequence[Sample], rows=rows) -> Iterator[Output]:
            yield Output(samples[0].key, rows=rows)

        with pytest.raises((ShardError, ValueError)):
            run(dataset, "captions", 0, process=process)
    assert pending(dataset)["captions"] == [0]


@pytest.mark.parametrize("error", [GpuLost("gone"), KeyboardInterrupt()])
def test_what_is_not_a_samples_fault_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    dataset = planned(tmp_path, ["a", "b"], tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield next(low_res(config, samples))
        raise error

    with pytest.raises(type(error)):
        run(dataset, "low_res", 0, process=process)
    assert os.listdir(scratch) == []
    assert pending(dataset)["low_res"] == [0]


def test_progress_hears_everything_once(tmp_path: Path) -> None:
    heard: list[Event] = []
    dataset = planned(tmp_path, ["a", "bad low_res"], tmp_path)
    with listening(heard.append):
        run(dataset, "low_res", 0)
        run(dataset, "low_res", 0)
    good, bad = (sample.key for sample in dataset.plan.read(0))
    assert heard == [
        ShardStarted("low_res", 0, 2),
        SampleDone("low_res", 0, True, good),
        SampleDone("low_res", 0, False, bad, "told to fail"),
        ShardDone("low_res", 0, 2, cached=False),
        ShardDone("low_res", 0, 2, cached=True),
    ]


def test_who_hears_of_a_sample_may_look_at_its_images(tmp_path: Path) -> None:
    seen: dict[tuple[str, str], Glance] = {}
    dataset = planned(tmp_path, ["a", "bad high_res"], tmp_path)

    def hear(event: Event) -> None:
        if isinstance(event, SampleDone):
            glance = event.glance()
            seen[event.stage, glance.prompt] = glance

    with listening(hear):
        run_all(dataset)
    images = {place: {stage: image_size(data) for stage, data in each.images.items()} for place, each in seen.items()}
    assert images == {
        ("low_res", "a"): {"low_res": 16},
        ("low_res", "bad high_res"): {"low_res": 16},
        ("captions", "a"): {"low_res": 16},
        ("captions", "bad high_res"): {"low_res": 16},
        ("high_res", "a"): {"low_res": 16, "high_res": 64},
        ("high_res", "bad high_res"): {"low_res": 16},
        ("quality", "a"): {"low_res": 16, "high_res": 64},
    }


def image_size(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).width


def test_pending_and_its_sample_counts(dataset: Dataset) -> None:
    run(dataset, "low_res", 1)
    todo = pending(dataset, shards=[2, 1], stages=["low_res", "quality"])
    assert todo == {"low_res": [2], "quality": [1, 2]}
    assert pending_samples(dataset, todo) == {"low_res": 1, "quality": 3}
    with pytest.raises(PlanError, match="shard 7 is not in the plan"):
        pending(dataset, shards=[7])


def test_a_changed_stage_reuses_what_is_upstream(dataset: Dataset) -> None:
    run_all(dataset)
    changed = create_or_open(
        dataset.config.model_copy(update={"captions": dataset.config.captions.model_copy(update={"style": "oil"})})
    )
    assert pending(changed) == {"low_res": [], "captions": [0, 1, 2], "high_res": [0, 1, 2], "quality": [0, 1, 2]}
    run_all(changed)
    assert not any(pending(changed).values())
    assert not any(pending(create_or_open(dataset.config)).values()), "going back finds the earlier commits"
    assert stage_hashes(changed.config)["low_res"] == stage_hashes(dataset.config)["low_res"]


def test_racing_workers_on_one_shard(dataset: Dataset) -> None:
    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda _: run(dataset, "low_res", 0), range(4)))
    assert len({receipt.attempt for receipt in receipts}) == 1
    assert dataset.folder.names("low_res") == [receipts[0].objects[0].name]


def test_provenance_is_volatile_facts_only(dataset: Dataset) -> None:
    receipt = run(dataset, "low_res", 0, provenance={"flow_run": "x"})
    assert receipt.provenance["flow_run"] == "x"
    assert receipt.provenance["versions"]["pyarrow"]
    assert receipt.provenance["exactness"] == "bytes"
    assert receipt.finished_at.endswith("+00:00")


def test_images_of_the_user_reach_the_stage_by_their_source(tmp_path: Path) -> None:
    from resmaster_stages.prompts import ingest
    from resmaster_stages.storage.sources import read_image
    from tests.fake_stages import png

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png((1, 2, 3)))
    config = config_at(tmp_path, images=str(tmp_path / "in"))
    dataset = ingest(config)

    def copy(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            assert sample.source
            try:
                yield Output(sample.key, files={"png": read_image(sample.source), "json": b"{}", "txt": b""})
            except SampleError as error:
                yield Output(sample.key, error=error)

    assert run(dataset, "low_res", 0, process=copy).samples_ok == 1


KILLED = """
import os, signal, sys
from pathlib import Path

import resmaster_stages.models.identity
from resmaster_stages.runner.run import run_stage
from resmaster_stages.inspection.status import pending
from resmaster_stages.storage import filesystem
from resmaster_stages.dataset.dataset import open_dataset
from tests.fake_stages import FAKES, planned

resmaster_stages.models.identity.weights_of = lambda config: resmaster_stages.models.identity.Weights("fake")
folder = Path(sys.argv[1])
sys.stdout.reconfigure(line_buffering=True)


def build(root):
    dataset = planned(root, ["a", "bad low_res"], folder)
    for stage, shards in pending(dataset).items():
        for shard in shards:
            run_stage(dataset, stage, shard, process=FAKES[stage])


def die_at(count):
    # every system call that makes something visible or durable is a step; die just before and just after each
    left = [count]

    def deadly(call):
        def wrapped(*arguments, **options):
            for act in (None, call):
                result = act(*arguments, **options) if act else None
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped

    for name in ("replace", "link", "unlink", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))


for count in range(1, 1000, int(sys.argv[2])):
    root = folder / f"run-{count}"
    child = os.fork()
    if not child:
        die_at(count)
        build(root)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    child = os.fork()
    if not child:
        build(root)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, count
    print(root)
    if not killed:
        break
"""


def test_killed_at_any_step_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is killed before and after every durable step; run again, it ends as if nothing had happened."""
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights("fake"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "5"], capture_output=True, text=True, cwd=ROOT, timeout=150
    )
    assert done.returncode == 0, done.stderr
    roots = done.stdout.split()
    assert len(roots) > 15
    reference = None
    for root in roots:
        dataset = create_or_open(config_at(root))
        found = status(dataset)
        assert [(s.committed, s.pending, s.failed, s.samples_ok) for s in found.stages] == [(1, 0, 0, 1)] * 4
        contents = {}
        for stage, own_hash in stage_hashes(dataset.config).items():
            for name in dataset.folder.names(f"commits/{stage}-{own_hash[:8]}"):
                if Path(name).name.startswith("."):
                    continue
                (stored,) = json.loads(dataset.folder.read(name))["objects"]
                contents[stage, name] = dataset.folder.read(stored["name"])
        reference = reference or contents
        assert contents == reference
        assert len(contents) == 4
        visible = [name for stage in STAGES for name in dataset.folder.names(stage) if "/." not in name]
        assert len(visible) <= 5, "at most one attempt more than was committed"
