"""gc removes what nobody needs, and nothing else; also while a build is at work."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.inspection.leftovers import find_leftovers, remove_leftovers
from resmaster_stages.inspection.status import pending
from resmaster_stages.inspection.verify import verify
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.probe import probe_name
from tests.durability.injection import PROMPTS, build, everything, killed
from tests.fake_stages import FAKES, config_at, files_of, planned

HOUR = timedelta(hours=1)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_root") if request.param == "s3" else str(tmp_path / "out")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return str(tmp_path / "prompts.txt")


def dataset_at(root: str, prompts: str) -> Dataset:
    return create_or_open(config_at(root, prompts=prompts, allow_overwriting_store=True))


def litter(dataset: Dataset) -> set[str]:
    """What interrupted runs leave behind, of every kind."""
    hashes = dataset.hashes
    names = {
        layout.shard_object("high_res", 0, "0" * 8),
        layout.shard_object("captions", 1, "0" * 8),
        layout.features_object("quality", 1, "0" * 8),
        layout.plan_part(0, 0, "0" * 8),
        layout.plan_rejected(1, "0" * 8),
        layout.plan_duplicates(1, "0" * 8),
        probe_name("0" * 8),
        "high_res/.000000-00000000.tar.12345678.tmp",
        ".config.json.12345678.tmp",
        layout.spill(layout.spill_folder("high_res", hashes["high_res"], 0), "ab"),
        layout.breadcrumb("high_res", "f" * 64, 1),  # of an older configuration
    }
    for name in names:
        dataset.folder.write(name, b"litter")
    return names


def test_leftovers_go_and_all_else_stays(root: str, prompts: str) -> None:
    build(root, prompts)
    dataset = dataset_at(root, prompts)
    publish(dataset)
    before = everything(root)
    for stranger in ("notes.txt", "high_res/notes.txt", "low_res/000000.tar", "archive/000000-00000000.tar", ".hidden"):
        dataset.folder.write(stranger, b"the user's")
    kept = {file.name for file in dataset.folder.files()}
    names = litter(dataset)
    assert find_leftovers(dataset, HOUR) == [], "all are young"
    later = datetime.now(UTC) + 2 * HOUR
    found = find_leftovers(dataset, HOUR, later)
    assert {leftover.file.name for leftover in found} == names
    assert {leftover.kind for leftover in found} == {"object", "plan file", "probe", "temporary file", "cache"}
    remove_leftovers(dataset.folder, found)
    assert {file.name for file in dataset.folder.files()} == kept
    assert everything(root) == before


def test_caches_of_unfinished_shards_stay(root: str, prompts: str) -> None:
    build(root, prompts)
    dataset, later = dataset_at(root, prompts), datetime.now(UTC) + 2 * HOUR
    hashes = dataset.hashes
    names = [
        layout.spill(layout.spill_folder("quality", hashes["quality"], 1), "ab"),
        layout.breadcrumb("quality", hashes["quality"], 1),
    ]
    for name in names:
        dataset.folder.write(name, b"x")
    record = layout.commit("quality", hashes["quality"], 1)
    data = dataset.folder.read(record)
    dataset.folder.remove(record)
    found = {leftover.file.name for leftover in find_leftovers(dataset, HOUR, later)}
    assert found.isdisjoint(names)
    dataset.folder.create(record, data)
    found = {leftover.file.name for leftover in find_leftovers(dataset, HOUR, later)}
    assert found == set(names)


def test_objects_of_other_configurations_stay(tmp_path: Path, prompts: str) -> None:
    root = str(tmp_path / "out")
    build(root, prompts)
    config = config_at(root, prompts=prompts, allow_overwriting_store=True, webp_quality=90)
    changed = create_or_open(config)
    later = datetime.now(UTC) + 2 * HOUR
    assert find_leftovers(changed, HOUR, later) == []


def test_objects_of_an_attempt_go_when_no_reader_can_know_of_them_any_more(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "bad low_res", "b"], tmp_path, samples_per_shard=3)
    first = {stage: run_stage(dataset, stage, 0, process=FAKES[stage]) for stage in FAKES}
    write_manifest(dataset)
    retries, _ = retries_of(dataset)
    mended = {**FAKES, "low_res": without_failures}
    for stage in FAKES:
        run_stage(dataset, stage, 0, process=mended[stage], number=number_of(retries, stage, 0))

    def found(after: timedelta = 3 * HOUR) -> set[str]:
        return {leftover.file.name for leftover in find_leftovers(dataset, HOUR, datetime.now(UTC) + after)}

    assert found() == set(), "the manifest still leads to them"
    write_manifest(dataset)
    assert found(timedelta(minutes=59)) == set(), "somebody may still read by the manifest before"
    own = Path(dataset.folder.full(layout.commit("captions", dataset.hashes["captions"], 0, 2)))
    manifest = Path(dataset.folder.full(layout.MANIFEST))
    for at in (0, 1_000_000_000):
        moment = manifest.stat().st_mtime_ns + at
        os.utime(own, ns=(moment, moment))
        assert found() == {receipt.objects[0].name for stage, receipt in first.items() if stage != "captions"}, (
            "it may have been written before the record"
        )
    os.utime(own, (1, 1))
    assert found() == {receipt.objects[0].name for receipt in first.values()}

    read = everything(dataset.config.root)
    kept = {file.name for file in dataset.folder.files()} - found()
    assert main(["gc", dataset.url, "--older-than", "0"]) == 0
    assert {file.name for file in dataset.folder.files()} == kept
    assert first["low_res"].ledger in kept
    assert layout.commit("low_res", dataset.hashes["low_res"], 0) in kept, "a record never goes"
    assert everything(dataset.config.root) == read
    assert verify(dataset).damage == ()
    assert not any(pending(dataset).values())


def without_failures(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The stage low_res, where nothing fails any more."""
    for sample in samples:
        yield Output(sample.key, files=files_of(sample, 16))


@pytest.mark.s3
def test_unfinished_uploads_are_ended(s3_root: str, prompts: str) -> None:
    build(s3_root, prompts)
    dataset = dataset_at(s3_root, prompts)
    folder = dataset.folder
    bucket, _, prefix = folder.path.partition("/")
    for place in (f"{prefix}/high_res/000000-00000000.tar", f"{prefix}-other/high_res/000000-00000000.tar"):
        folder.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=place)
    assert find_leftovers(dataset, HOUR) == []
    found = find_leftovers(dataset, HOUR, datetime.now(UTC) + 2 * HOUR)
    assert [(leftover.kind, leftover.file.name) for leftover in found] == [
        ("unfinished upload", "high_res/000000-00000000.tar")
    ]
    remove_leftovers(folder, found)
    assert folder.unfinished_uploads() == []
    assert len(open_root(f"s3://{bucket}/{prefix}-other").unfinished_uploads()) == 1, "another dataset's"
    remove_leftovers(folder, found)  # once more: no error


def test_what_a_killed_build_leaves_goes_and_the_build_ends_as_if_undisturbed(tmp_path: Path, prompts: str) -> None:
    build(str(tmp_path / "reference"), prompts)
    expected = everything(str(tmp_path / "reference"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.injection", "s3fs"])
    root, swept = str(tmp_path / "out"), 0
    for at in (45, 90, 100, 110):
        child = context.Process(target=killed, args=(build, root, prompts, {}, at))
        child.start()
        child.join(120)
        assert child.exitcode == -9
        dataset = dataset_at(root, prompts)
        found = find_leftovers(dataset, HOUR, datetime.now(UTC) + 2 * HOUR)
        remove_leftovers(dataset.folder, found)
        swept += len(found)
    assert swept > 0
    build(root, prompts)
    assert everything(root) == expected


def test_gc_beside_a_running_build(tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Over and over while shards are made: old litter goes, the build does not notice."""
    (tmp_path / "many.txt").write_text("\n".join(f"prompt {number}" for number in range(24)))
    many, root = str(tmp_path / "many.txt"), str(tmp_path / "out")
    build(str(tmp_path / "reference"), many)
    dataset = dataset_at(root, many)
    names = litter(dataset)
    for name in names:
        os.utime(Path(root) / "demo" / name, (0, 0))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            build(root, many)
        except BaseException as error:
            errors.append(error)

    builder = threading.Thread(target=work)
    builder.start()
    rounds = 0
    while builder.is_alive() or not rounds:
        assert main(["gc", root, "--older-than", "1"]) == 0
        rounds += 1
    builder.join()
    assert errors == []
    assert everything(root) == everything(str(tmp_path / "reference"))
    assert names.isdisjoint(file.name for file in dataset.folder.files())
    assert "0 leftovers removed" in capsys.readouterr().out


def test_the_command_line(tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "out")
    build(root, prompts)
    dataset = dataset_at(root, prompts)
    publish(dataset)
    names = litter(dataset)
    assert main(["gc", root, "--older-than", "0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{len(names)} leftovers would be removed" in out
    assert all(name in out for name in names)
    assert names <= {file.name for file in dataset.folder.files()}
    assert main(["gc", root]) == 0
    assert "0 leftovers removed" in capsys.readouterr().out
    assert main(["gc", root, "--older-than", "0"]) == 0
    assert f"{len(names)} leftovers removed" in capsys.readouterr().out
    for wrong in ("-1", "nan", "inf"):
        assert main(["gc", root, f"--older-than={wrong}"]) == 2
    record = layout.commit("low_res", dataset.hashes["low_res"], 0)
    dataset.folder.write(record, b"{")
    capsys.readouterr()
    assert main(["gc", root, "--older-than", "0"]) == 2, "what an unreadable record names would look like a leftover"
    assert "resmaster verify" in capsys.readouterr().err


def test_ledgers_of_failed_attempts_stay(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("bad low_res 1\nbad low_res 2\n")
    dataset = dataset_at(str(tmp_path / "out"), str(tmp_path / "prompts.txt"))
    from resmaster_stages.errors import ShardError

    ingest(dataset.config)
    with pytest.raises(ShardError):
        run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    later = datetime.now(UTC) + 2 * HOUR
    found = find_leftovers(dataset, HOUR, later)
    assert not any(leftover.file.name.startswith("errors/") for leftover in found)
    assert dataset.folder.names("errors/low_res")


def test_a_bucket_that_is_being_restored_loses_nothing(tmp_path: Path) -> None:
    """Commits come first, as docs/operating.md advises; gc runs between any two files, with no grace period."""
    dataset = planned(tmp_path / "out", ["a", "b", "c", "bad low_res"], tmp_path)
    for shard in (0, 1):
        for stage in FAKES:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    publish(dataset)
    order = ("commits/", "config.json", "publication.json", "manifest", "high_res/", "plan/gen-0000/part", "")
    names = sorted((file.name for file in dataset.folder.files()), key=lambda name: not name.startswith("commits/"))
    names.sort(key=lambda name: next(place for place, begin in enumerate(order) if name.startswith(begin)))
    restored = open_root(str(tmp_path / "restored" / "demo"))
    for number, name in enumerate(names):
        restored.write(name, dataset.folder.read(name))
        assert main(["gc", restored.url, "--older-than", "0"]) in (0, 2)
        assert {file.name for file in restored.files()} == set(names[: number + 1]), name
    assert main(["verify", restored.url]) == 0


def test_leftovers_of_a_shard_go_once_it_is_committed(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "b"], tmp_path)
    name = layout.shard_object("low_res", 0, "0" * 8)
    dataset.folder.write(name, b"of an attempt that was killed, or of one whose record is lost")
    later = datetime.now(UTC) + 2 * HOUR
    assert find_leftovers(dataset, HOUR, later) == []
    run_stage(dataset, "low_res", 0, process=FAKES["low_res"])
    assert [leftover.file.name for leftover in find_leftovers(dataset, HOUR, later)] == [name]


def test_files_of_a_generation_of_the_plan_stay_while_its_record_may_be_lost(tmp_path: Path) -> None:
    """Nothing is committed of it, so nobody knows whether a planner was killed before it wrote the record."""
    config = planned(tmp_path / "out", ["a", "b"], tmp_path).config
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nc\n")
    dataset = ingest(config)
    record, files = layout.plan_record(1), dataset.folder.names(layout.generation(1))
    assert len(files) == 3, "record, samples and duplicates"
    dataset.folder.remove(record)
    assert find_leftovers(open_dataset(dataset.url), HOUR, datetime.now(UTC) + 2 * HOUR) == []
