"""A short soak (`make soak` is the long one): every scene once, and that the soak would notice what it looks for."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm.auto import tqdm

from benchmarks.soak import compare, harm, recipes
from benchmarks.soak.__main__ import main
from benchmarks.soak.processes import Crew, Difference, ask, fork
from benchmarks.soak.scenes import SCENES, Round, Scene
from benchmarks.soak.tally import Tally
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from tests import fake_stages
from tests.checkout import PYTHONPATH, ROOT


def soak(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, int]]]:
    """One round of a soak in a process of its own, and the counts of its scenes."""
    command = [sys.executable, "-m", "benchmarks.soak", "--rounds", "1", "--processes", "2", "--blows", "4"]
    done = subprocess.run(
        [*command, *words, "--json", str(folder / "soak.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads((folder / "soak.json").read_text())["scenes"]


ONCE = {
    "folder": ("tiny-model", "embedded-model", "verbs", "damages", "command-line"),
    "s3": ("stand-ins", "same-place", "proxy", "beside-gc"),
}
"""Place -> the scenes that are played there: each of them once."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_every_scene_ends_as_if_undisturbed(place: str, tmp_path: Path) -> None:
    done, counts = soak(tmp_path, "--seed", "7", "--on", place, "--scenes", ",".join(ONCE[place]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(counts) == {f"{name} on {place}" for name in ONCE[place]}
    for name, found in counts.items():
        assert found["rounds"] == found["builds"] == 1, name
    assert not list(tmp_path.glob("resmaster-soak-*")), "what went well leaves nothing behind"


def test_no_scene_is_left_out() -> None:
    assert {*ONCE["folder"], *ONCE["s3"], "server"} == set(SCENES)


@pytest.mark.server
@pytest.mark.slow
def test_a_deployed_build_survives_the_deaths_of_its_server_and_workers(tmp_path: Path) -> None:
    done, counts = soak(tmp_path, "--seed", "3", "--scenes", "server")
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts["server on folder"]["kills"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# that it would notice


@pytest.fixture
def calm(tmp_path: Path) -> tuple[recipes.Recipe, compare.Seen]:
    """A recipe and its undisturbed build."""
    made = recipes.small(tmp_path)
    ask(recipes.finish, made, str(tmp_path / "calm"))
    return made, ask(compare.seen, str(tmp_path / "calm"))


def lose_a_commit(dataset: Dataset) -> None:
    receipt = dataset.commits("quality").read(1)
    assert receipt is not None
    dataset.folder.remove(dataset.commits("quality")._name(1, receipt.number))


def change_a_byte(dataset: Dataset) -> None:
    receipt = dataset.commits("low_res").read(0)
    assert receipt is not None
    data = bytearray(dataset.folder.read(receipt.objects[0].name))
    data[700] ^= 1
    dataset.folder.write(receipt.objects[0].name, bytes(data))


def show_a_sample_twice(dataset: Dataset) -> None:
    path = dataset.folder.full("manifest.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lose_a_commit, r"\('quality', 1\): None where .* was due"),
        (change_a_byte, "AssertionError: low_res/"),
        (show_a_sample_twice, "a sample occurs twice"),
    ],
)
def test_a_wrong_result_is_noticed(
    harm: Callable[[Dataset], None], said: str, calm: tuple[recipes.Recipe, compare.Seen], tmp_path: Path
) -> None:
    made, expected = calm
    root = str(tmp_path / "other")
    ask(recipes.finish, made, root)
    ask(compare.check, made, root, expected)
    harm(open_dataset(root))
    with pytest.raises(Difference, match=said):
        ask(compare.check, made, root, expected)


def attempt_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in stages whose bytes depend on the process."""
    honest = fake_stages.files_of

    def files_of(sample: fake_stages.Sample, size: int) -> dict[str, bytes]:
        return {**honest(sample, size), "txt": str(os.getpid()).encode()}

    monkeypatch.setattr(fake_stages, "files_of", files_of)


def test_a_result_that_depends_on_the_attempt_is_noticed(
    calm: tuple[recipes.Recipe, compare.Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, expected = calm
    attempt_shows(monkeypatch)
    root = str(tmp_path / "other")
    ask(recipes.finish, made, root)
    with pytest.raises(Difference, match=r"differs from the undisturbed build\n\('low_res', 0, 0\): .* was due"):
        ask(compare.check, made, root, expected)


def test_other_batches_excuse_no_bytes_that_cannot_be_made_again(
    calm: tuple[recipes.Recipe, compare.Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, expected = calm
    root = str(tmp_path / "other")
    monkeypatch.setattr(compare, "made_otherwise", lambda found, expected: {("low_res", 0), ("high_res", 0)})
    ask(recipes.finish, made, root)
    counts = ask(compare.check, made, root, expected)
    assert (counts["identical"], counts["other batches, repaired"]) == (0, 1)
    attempt_shows(monkeypatch)
    with pytest.raises(Difference, match="came out with other bytes"):
        ask(compare.check, made, root, expected)


def test_a_damage_that_verify_does_not_say_is_noticed(
    calm: tuple[recipes.Recipe, compare.Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, expected = calm
    root = str(tmp_path / "calm")
    damage = ("low_res/#-#.tar", "halved", 0)
    assert ask(harm.harmed, made, root, damage, expected)["damages mended"] == 1
    monkeypatch.setattr(harm, "verdict", lambda root: (0, ""))
    with pytest.raises(Difference, match=r"halved: verify says nothing, and a reader ends by AssertionError"):
        ask(harm.harmed, made, root, damage, expected)


def test_an_error_that_nobody_foresaw_is_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("not foreseen")

    os.waitpid(fork(fail), 0)
    errors = tmp_path / "errors.log"
    errors.write_text(capfd.readouterr().err)
    assert Tally(0, tmp_path / "soak.json", errors).crashes() == {"ValueError: not foreseen": 1}


def test_a_process_that_never_ends_is_noticed_and_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.soak.processes.ROUND_SECONDS", 0.2)
    crew = Crew(lambda: fork(lambda: [random.random() for _ in iter(int, 1)]), random.Random(0))
    with pytest.raises(Difference, match=r"did not end within 0\.2 s"):
        crew.disturbed(1, 0)
    assert not crew.alive
    assert "most recent call first" in capfd.readouterr().err


def broken(each: Round) -> Counter[str]:
    """A scene that finds a difference."""
    raise Difference("one byte is another")


def crashing(each: Round) -> Counter[str]:
    """A scene in which all ends well but one process."""

    def fail() -> None:
        raise ValueError("not foreseen")

    os.waitpid(fork(fail), 0)
    return Counter(builds=1)


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (broken, "one byte is another\nto play it again: --seed 5 --first 0 --rounds 1 --scenes fake --on folder"),
        (crashing, "1 processes ended by ValueError: not foreseen"),
    ],
)
def test_what_goes_wrong_ends_with_status_1_and_keeps_the_files(
    scene: Callable[[Round], Counter[str]],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SCENES, "fake", Scene(scene))  # type: ignore[arg-type]  # it is a dictionary
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    numbers = tmp_path / "soak.json"
    words = ["--rounds", "1", "--seed", "5", "--scenes", "fake", "--on", "folder", "--json", str(numbers)]
    assert main(words) == 1
    assert said in capfd.readouterr().out
    assert len(list(tmp_path.glob("resmaster-soak-*/errors.log"))) == 1
    found = json.loads(numbers.read_text())
    assert (found["failure"] is not None, len(found["crashes"])) == ((True, 0) if scene is broken else (False, 1))


@pytest.mark.timeout(120)
def test_a_child_that_is_killed_while_it_draws_a_progress_bar_stops_no_other() -> None:
    tqdm.get_lock()  # all forks share this one

    def die() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(die), 0)
    with open(os.devnull, "w") as nowhere:
        assert ask(lambda: list(tqdm(range(2), file=nowhere))) == [0, 1]
