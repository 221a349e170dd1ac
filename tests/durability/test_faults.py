"""A fault at any step of a build, of another attempt or of another draw: run again, and nothing shows.

By exception or by kill -9, on a folder and on S3.

RESMASTER_SOAK=1 strikes at every step in every way; without it the steps are thinned out.
"""

import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from resmaster_stages.dataset.commit import Receipt, new_attempt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.errors import UserError
from resmaster_stages.storage import filesystem
from resmaster_stages.storage.filesystem import open_root
from tests.durability.injection import (
    PROMPTS,
    Steps,
    Work,
    attempts,
    build,
    everything,
    fail,
    injected,
    interrupt,
    killed,
    redo,
    retry,
)
from tests.fake_stages import FAKES

SOAK = os.environ.get("RESMASTER_SOAK") == "1"
STORES = ["local", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.fixture(scope="module", params=STORES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Place"]:
    """A store to build in."""
    folder = tmp_path_factory.mktemp("faults")
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        environment = {}
        base = str(folder)
        if request.param == "s3":
            from s3fs import S3FileSystem

            server = request.getfixturevalue("s3_server")
            environment, base = server.environment, f"s3://{server.bucket}/faults"
            for name, value in environment.items():
                patch.setenv(name, value)
            S3FileSystem.clear_instance_cache()
        found = Place(base, str(prompts), environment)
        yield found
        if request.param == "s3":
            S3FileSystem.clear_instance_cache()


@dataclass(frozen=True)
class Undisturbed:
    """Work of which nothing is known but that it went well."""

    steps: list[str]
    result: dict[object, object]


@dataclass
class Place:
    base: str
    prompts: str
    environment: dict[str, str]

    @property
    def strikes(self) -> tuple[Callable[[], None], ...]:
        """S3 calls run in the event loop's thread, where nobody presses a key."""
        return (fail,) if self.environment else (fail, interrupt)

    def root_for(self, work: Work) -> str:
        """A new root, with what is there before `work` begins."""
        root = f"{self.base}/{uuid.uuid4().hex[:8]}"
        if work is not build:
            build(root, self.prompts)
        return root

    def undisturbed(self, work: Work) -> Undisturbed:
        steps, root = Steps(), self.root_for(work)
        with injected(steps, root):
            work(root, self.prompts)
        return Undisturbed(steps.seen, everything(root) | attempts(root))


def test_the_undisturbed_build_is_whole(place: Place) -> None:
    undisturbed = place.undisturbed(build)
    assert len(undisturbed.result["keys"]) == 2
    for stage in ("low_res", "captions", "high_res", "quality"):
        assert {(stage, 0, 0), (stage, 1, 0)} <= undisturbed.result.keys()
    kinds = {step.split()[1] for step in undisturbed.steps if step.startswith("before")}
    on_disk = {"open", "replace", "link", "fsync", "unlink", "makedirs"}
    assert kinds == ({"put_object", "delete_object"} if place.environment else on_disk)
    for name in (
        "config",
        "plan/",
        "errors/low_res/",
        "low_res/",
        "captions/",
        "high_res/",
        "quality/",
        "commits/",
        "index",
    ):
        for moment in ("before", "after"):
            assert any(step.startswith(moment) and f"/{name}" in step for step in undisturbed.steps), (moment, name)


def test_the_undisturbed_retry_adds_attempts_and_leaves_what_was_there(place: Place) -> None:
    before, after = place.undisturbed(build).result, place.undisturbed(retry).result
    assert len(after["keys"]) == 3
    assert {key for key in after if key not in before} == {(stage, 0, "attempt 2") for stage in FAKES}
    kept = [key for key in before if "attempt 1" in str(key)]
    assert len(kept) == 2 * len(FAKES)
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


def test_the_undisturbed_redo_adds_attempts_and_changes_one_sample(place: Place) -> None:
    before, after = place.undisturbed(build).result, place.undisturbed(redo)
    assert any("/redo/0001.json" in step for step in after.steps)
    assert {key for key in after.result if key not in before} == {(stage, 0, "attempt 2") for stage in FAKES}
    for stage in FAKES:
        kept, made = after.result[stage, 0, "attempt 1"], after.result[stage, 0, "attempt 2"]
        assert kept == before[stage, 0, "attempt 1"]
        assert (made[:4], made[-1] != kept[-1]) == (kept[:4], True), "the same samples, other bytes"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("work", [build, retry, redo])
def test_an_exception_at_any_step(place: Place, work: Work) -> None:
    struck = 0
    undisturbed = place.undisturbed(work)
    thin = 1 if SOAK else 3 if place.environment else 7
    for at in range(0, len(undisturbed.steps), thin):
        for strike in place.strikes if SOAK else (place.strikes[at % len(place.strikes)],):
            root, steps = place.root_for(work), Steps(at, strike)
            try:
                with injected(steps, root):
                    work(root, place.prompts)
            except (OSError, UserError, KeyboardInterrupt):
                struck += 1
            else:
                # What may fail unseen: the answer of a create that is found to have succeeded, and what is done for
                # later runs.
                assert strike is fail, steps.seen[at]
                assert any(part in steps.seen[at] for part in ("/commits/", "/cache/", "unlink")), steps.seen[at]
            work(root, place.prompts)
            assert everything(root) | attempts(root) == undisturbed.result, undisturbed.steps[at]
    assert struck > len(undisturbed.steps) // thin // 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("work", [build, retry, redo])
def test_kill_9_at_any_step(place: Place, work: Work) -> None:
    """It is done in a process of its own, which is killed at one step, and the next one goes on where it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.injection", "s3fs"])
    undisturbed = place.undisturbed(work)
    thin = 1 if SOAK else 11 if place.environment else 31
    for at in range(thin // 2, len(undisturbed.steps), thin):
        root = place.root_for(work)
        child = context.Process(target=killed, args=(work, root, place.prompts, place.environment, at))
        child.start()
        child.join(120)
        assert child.exitcode == -9, undisturbed.steps[at]
        work(root, place.prompts)
        assert everything(root) | attempts(root) == undisturbed.result, undisturbed.steps[at]


@pytest.mark.s3
def test_a_fault_at_any_step_of_an_upload_in_parts(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "PART_BYTES", 5 << 20)
    folder = open_root(s3_root)
    commits = Commits(folder, "low_res", "ab" * 32)
    source = tmp_path / "large"
    source.write_bytes(os.urandom((10 << 20) + 1))

    def attempt(shard: int) -> Receipt:
        own = new_attempt()
        receipt = Receipt("low_res", "ab" * 32, shard, own, 0, 1, 0, (), "0" * 64, {}, "2026-11-28T12:00:00+00:00")
        return commits.create(receipt, [(f"low_res/{shard:06d}-{own}.tar", source)])

    steps = Steps()
    with injected(steps, s3_root):
        attempt(0)
    assert [step.split()[1] for step in steps.seen if step.startswith("before")] == [
        "create_multipart_upload",
        *["upload_part"] * 3,
        "complete_multipart_upload",
        "put_object",
    ]
    for at in range(len(steps.seen)):
        with injected(Steps(at, fail), s3_root):
            try:
                attempt(at + 1)
            except OSError:
                assert commits.read(at + 1) is None
        receipt = attempt(at + 1)
        found = [file.name for file in folder.files("low_res") if f"/{at + 1:06d}-" in file.name]
        if not steps.seen[at].startswith("before put_object"):  # there the outcome was unknown, so nothing was deleted
            assert found == [receipt.objects[0].name], steps.seen[at]
        path, digest = folder.download(receipt.objects[0].name, tmp_path)
        assert digest == receipt.objects[0].sha256
        path.unlink()
