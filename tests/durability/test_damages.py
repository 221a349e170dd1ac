"""One damage anywhere in a finished dataset: `verify` says it, no command breaks, `repair` mends it to the byte or says
what to do, and `gc` removes nothing.

RESMASTER_SOAK=1 tries every damage of every file; without it, some of each kind.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import record_failure
from resmaster_stages.dataset.damage import drop_unreadable_records
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset
from resmaster_stages.dataset.lost_plan import restore_plan
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.errors import SampleError
from resmaster_stages.inspection.status import pending
from resmaster_stages.models import identity
from resmaster_stages.models.identity import Weights
from resmaster_stages.planning.redoing import asked
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from tests.durability.damages import FOLDER_GONE, GONE, apply, clear, damages_of, folders, kind_of, objects
from tests.durability.injection import everything, good_later
from tests.fake_stages import FAKES, planned

SOAK = os.environ.get("RESMASTER_SOAK") == "1"
SOME = (
    "halved",
    "flip in the middle",
    "last byte lost",
    GONE,
    "another's",
    "folder",
    "pipe",
    "link in a circle",
    "deep",
)
"""The damages of each kind of file that are always tried."""
HANG_SECONDS = 60
"""A command on so small a dataset that takes longer waits for ever."""
CONFIG = """
name: demo
root: {root}
prompts: {prompts}
low_res: {{height: 16, width: 16}}
samples_per_shard: 2
max_failure_ratio: 0.6
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a whole dataset: two generations of the plan, duplicates, two configurations, a sample that failed,
    a shard with two attempts, a shard without samples, a sample that was asked for again, and the record of an attempt
    that failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "weights_of", lambda config: Weights(config.model.id))
        place = tmp_path_factory.mktemp("finished")
        dataset = planned(place / "out", ["a", "bad high_res", "a", "bad low_res"], place)
        (place / "prompts.txt").write_text("a\nbad high_res\nbad low_res\nc\nd\nc\n")
        dataset = ingest(create_or_open(dataset.config.model_copy(update={"max_failure_ratio": 0.6})).config)
        record_failure(dataset.commits("captions"), 0, "0" * 8, SampleError("the server is down"), {})
        asked(dataset, list(dataset.plan.keys())[-1])
        dataset = open_dataset(dataset.url)
        build(dataset)
        build(dataset)
        publish(dataset)
        assert main(["gc", dataset.url, "--older-than", "0"]) == 0, "the objects of the attempt that was replaced"
        (place / "config.yaml").write_text(CONFIG.format(root=place / "out", prompts=place / "prompts.txt"))
        shutil.copytree(place / "out", place / "whole")
        yield place


@pytest.fixture
def place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished dataset, whole again after the last test."""
    monkeypatch.setattr(identity, "weights_of", lambda config: Weights(config.model.id))
    put_back(finished)
    return finished


def put_back(place: Path) -> None:
    shutil.rmtree(place / "out")
    shutil.copytree(place / "whole", place / "out", copy_function=shutil.copy2)


def build(dataset: Dataset) -> None:
    """What a build and `repair --retry-errors` do, without Prefect."""
    todo = pending(dataset)
    retries, _ = retries_of(dataset, [0], ["high_res"])
    for shard in sorted({0, *(shard for shards in todo.values() for shard in shards)}):
        for stage in FAKES:
            later = (stage, shard) == ("high_res", 0)
            process = good_later(dataset, stage, shard) if later else FAKES[stage]
            run_stage(dataset, stage, shard, process=process, number=number_of(retries, stage, shard))


def repair(url: str) -> None:
    """What `repair` does, without Prefect, and another attempt at the sample that failed at first."""
    dataset = open_dataset(url)
    restore_plan(dataset.folder)
    drop_unreadable_records(dataset)
    if any(pending(dataset).values()) or retries_of(dataset, [0], ["high_res"])[1]:
        build(dataset)
        build(dataset)  # if the first attempt was lost too
        publish(dataset)
    else:
        assert main(["repair", url]) == 0


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail where a command waits for ever."""

    def wake(number: int, frame: FrameType | None) -> None:
        raise AssertionError("a command hangs")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file, but for marks."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: (folder / name).read_bytes() for name in names if not name.startswith("damaged/")}


KINDS = [
    *("config.json", "configs/#", "redo/#", "plan/gen-#/_PLAN.json", "plan/gen-#/part", "plan/gen-#/duplicates"),
    *("commits/low_res", "commits/captions", "commits/high_res-#/#.json", "commits/high_res-#/#.#.json"),
    *("commits/quality", "low_res/", "captions/", "high_res/", "quality/", "errors/high_res", "errors/low_res"),
    *("attempts/", "manifest", "index", "README", "publication", "report/index", "report/contact"),
]
BY_HAND = (
    "config.json",
    "configs/",
    "redo",
    *(f"plan/gen-000{number}/{name}" for number in (0, 1) for name in ("part", "dupl")),
)
"""What only a copy brings back."""
NOTES = ("attempts", "errors/high_res")
"""What no data depends on: `errors/high_res` is the ledger of an attempt that was replaced."""


KNOWN_BY = {"publication.json": "the publication is missing"}
"""What is said where the name is not."""


def damage_and_look(place: Path, damage: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage one file or folder, and check all that is promised."""
    url = str(place / "out" / "demo")
    folder, before, seen = open_root(url), contents(place / "out" / "demo"), everything(str(place / "out"))
    apply(folder, damage, name)
    case, left = f"{name}: {damage}", contents(place / "out" / "demo")
    with no_hang():
        for words in (
            ["status", url],
            ["status", url, "--openmetrics"],
            ["explain", url, "0"],
            ["gc", url, "--dry-run", "--older-than", "0"],
            ["plan", str(place / "config.yaml")],
            ["verify", url, "--json"],
        ):
            assert main(words) in (0, 1, 2), case
        capsys.readouterr()
        assert main(["gc", url, "--older-than", "0"]) in (0, 2), case
        assert contents(place / "out" / "demo") == left, f"{case}: gc removed something"
        capsys.readouterr()
        status = main(["verify", url])
    shown = capsys.readouterr()
    if name.startswith(NOTES):
        assert status == 0, case
        return
    assert status in (1, 2), f"{case}: {shown.err}"
    known_by = KNOWN_BY.get(name, name)
    if name.endswith(".2.json"):  # the attempt before counts again, and the objects of both are told
        known_by = f"{name.removeprefix('commits/').partition('-')[0]}/{name[-13:-7]}-"
    said = [line for line in (shown.out + shown.err).splitlines() if name in line or known_by in line]
    assert said, f"{case}: {shown}"
    assert all(any(word in line for word in ("restore", "repair", "publish")) for line in said), f"{case}: {said}"
    by_hand = name.startswith(BY_HAND) or (damage == FOLDER_GONE and name.startswith(("plan", "configs")))
    if by_hand:
        assert any("restore" in line for line in said), f"{case}: {said}"
        bring_back(place, damage, name, before)
    else:
        if damage.endswith("folder"):  # as the message asks, which names it
            clear(folder, name)
        with no_hang():
            repair(url)
    capsys.readouterr()
    assert main(["verify", url]) == 0, f"{case}: {capsys.readouterr()}"
    assert everything(str(place / "out")) == seen, case
    after = contents(place / "out" / "demo")
    lost = {file for file in before if file not in after and not file.startswith(NOTES)}
    changed = {file for file in before if file in after and after[file] != before[file]}
    if name.startswith("commits"):  # a new attempt has new names
        assert all(file.endswith(".2.json") for file in lost), case  # one attempt makes what two made before
        assert all(file.startswith(("commits/", "manifest", "index", "README", "publication")) for file in changed), (
            case
        )
    else:
        assert (lost, changed) == (set(), set()), case


def bring_back(place: Path, damage: str, name: str, before: dict[str, bytes]) -> None:
    """Restore from a copy."""
    target = place / "out" / "demo"
    if damage != FOLDER_GONE:
        clear(open_root(str(target)), name)
    for file, data in before.items():
        if file == name or file.startswith(f"{name}/"):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).write_bytes(data)


def test_a_whole_dataset_is_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(place / "out" / "demo")
    assert main(["verify", url]) == 0
    assert "everything is as recorded" in capsys.readouterr().err
    assert main(["gc", url, "--older-than", "0", "--dry-run"]) == 0
    assert "0 leftovers" in capsys.readouterr().out
    names = objects(open_root(url))
    for kind in KINDS:
        assert any(kind_of(name).startswith(kind) for name in names), f"no file is a {kind}"
    assert all(any(kind_of(name).startswith(kind) for kind in KINDS) for name in names), "every file is of a kind"


@pytest.mark.parametrize("kind", KINDS)
def test_one_damaged_file(place: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = open_root(str(place / "whole" / "demo"))
    names = [name for name in objects(whole) if kind_of(name).startswith(kind)]
    for name in names if SOAK else names[:1]:
        for damage in damages_of(whole, name):
            if SOAK or damage in SOME:
                damage_and_look(place, damage, name, capsys)
                put_back(place)


def test_one_folder_that_is_gone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in folders(open_root(str(place / "whole" / "demo"))):
        damage_and_look(place, FOLDER_GONE, name, capsys)
        put_back(place)


@pytest.mark.parametrize(
    ("lost", "other", "damage"),
    [
        ("commits/high_res-#/#.#.json", "manifest.parquet", GONE),
        ("commits/high_res-#/#.#.json", "publication.json", GONE),
        ("commits/high_res-#/#.#.json", "publication.json", "halved"),
        ("commits/high_res-#/#.#.json", "report/index.html", "longer"),
        ("plan/gen-#/_PLAN.json", "plan/gen-#/part", GONE),
    ],
)
def test_gc_keeps_what_a_lost_record_names_whatever_else_is_damaged(
    place: Path, lost: str, other: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(place / "out" / "demo")
    folder, before = open_root(url), contents(place / "out" / "demo")
    for kind, harm in ((lost, GONE), (other, damage)):
        apply(folder, harm, [name for name in objects(folder) if kind_of(name).startswith(kind) or name == kind][-1])
    left = contents(place / "out" / "demo")
    assert main(["gc", url, "--older-than", "0"]) == 0
    assert contents(place / "out" / "demo") == left
    for name in before.keys() - left.keys() | {other} & before.keys():
        bring_back(place, damage, name, before)
    assert main(["verify", url]) == 0, capsys.readouterr()


def test_verify_says_what_next_where_repair_cannot_mend(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(place / "out" / "demo")
    apply(open_root(url), FOLDER_GONE, "configs")
    assert main(["verify", url]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "repair cannot mend them" in last
    assert last.endswith(f"next: resmaster verify {url}")


def test_times_that_no_calendar_has_end_no_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(place / "out" / "demo")
    manifest, real = str(place / "out" / "demo" / "manifest.parquet"), os.stat

    def broken(path: str, **options: bool) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((*found[:8], 2**60, *found[9:10])) if path == manifest else found

    monkeypatch.setattr(os, "stat", broken)
    monkeypatch.setattr(os, "lstat", lambda path: broken(path, follow_symlinks=False))
    apply(open_root(url), GONE, "report/index.html")
    for words in (["gc", url, "--older-than", "0"], ["status", url]):
        assert main(words) == 0


def test_a_record_of_an_attempt_at_no_time_ends_no_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(place / "out" / "demo")
    dataset = open_dataset(url)
    commits = dataset.commits("quality")
    commits.drop([2])
    folder = layout.attempts_folder("quality", commits.stage_hash)
    dataset.folder.write(f"{folder}/000002-99999999T999999999999-{'0' * 8}-SampleError.json", b"{}")
    for words in (["status", url], ["status", url, "--openmetrics"], ["explain", url, "2"]):
        assert main(words) == 0, capsys.readouterr()
    assert "99999999T999999999999" in capsys.readouterr().out
