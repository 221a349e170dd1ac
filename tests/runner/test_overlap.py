"""What goes on beside the computing of a sample: the next one is read, the ones before are finished and spilled.

Events show the order; no test depends on how long anything takes. Where nothing overlapped, a wait would run out and
fail its sample.
"""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import sample as sample_module
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.reading import ShardSamples
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.diffusion.cost import count_call
from resmaster_stages.errors import GpuLost, OutOfMemory, SampleError, ShardError
from resmaster_stages.models.busy import busy, timing
from resmaster_stages.models.identity import Weights
from resmaster_stages.progress import Event, Step, emit, listening
from resmaster_stages.runner.overlap import Finishing
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, files_of, planned, png
from tests.runner.test_resume import breadcrumbs, in_child, spilled

PATIENCE = 30.0
"""Seconds after which something that was waited for does not come any more."""
PROMPTS = list("abcdef")
ALL_BUT_LAST = "abcde"


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One shard of six samples with low-res images and captions; every finished sample is spilled."""
    made = planned(tmp_path, PROMPTS, tmp_path, samples_per_shard=10, spill_seconds=0, max_failure_ratio=0.5)
    for stage in ("low_res", "captions"):
        run_stage(made, stage, 0, process=FAKES[stage])
    return made


def high_res(dataset: Dataset, process: Process) -> Receipt:
    return run_stage(dataset, "high_res", 0, process=process)


def content(dataset: Dataset, receipt: Receipt) -> bytes:
    return dataset.folder.read(receipt.objects[0].name)


class Events(dict[str, threading.Event]):
    """An event per prompt."""

    def __missing__(self, prompt: str) -> threading.Event:
        return self.setdefault(prompt, threading.Event())

    def wait(self, prompt: str) -> None:
        if not self[prompt].wait(PATIENCE):
            raise TimeoutError(f"{prompt} did not come")


class Stage:
    """A high_res stage that notes what begins and what is finished; `computing` and `finishing` hear of each sample
    there.

    The finishing of those samples that are in `waits` waits until the next one is computed.
    """

    def __init__(
        self,
        computing: Callable[[DatasetConfig, str], None] = lambda config, prompt: None,
        finishing: Callable[[str], None] = lambda prompt: None,
        waits: str = ALL_BUT_LAST,
    ) -> None:
        self.computing, self.finishing, self.waits = computing, finishing, waits
        self.began, self.finished = Events(), Events()
        self.log: list[str] = []

    def __call__(self, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            self.log.append(sample.prompt)
            self.began[sample.prompt].set()
            self.computing(config, sample.prompt)
            yield Output(sample.key, finish=lambda sample=sample: self._finish(sample))

    def _finish(self, sample: Sample) -> dict[str, bytes]:
        assert threading.current_thread() is not threading.main_thread()
        if sample.prompt in self.waits:
            self.began.wait(chr(ord(sample.prompt) + 1))
        self.log.append(f"{sample.prompt} finishes")
        self.finishing(sample.prompt)
        self.finished[sample.prompt].set()
        return files_of(sample, 64)


# ----------------------------------------------------------------------------------------------------------------------
# what overlaps, and how far


def test_a_sample_is_read_and_another_one_finished_while_one_is_computed(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read b, compute a; then finish a, compute b, read c. Each waits for the other: it takes three threads to get
    through."""
    read = Events()
    decode = EncodedImage.decode_ahead

    def decoded(image: EncodedImage) -> None:
        decode(image)
        read[str(image.meta["key"])].set()

    monkeypatch.setattr(EncodedImage, "decode_ahead", decoded)
    keys = keys_of(dataset)

    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt in ALL_BUT_LAST:
            read.wait(keys[chr(ord(prompt) + 1)])

    receipt = high_res(dataset, Stage(computing))
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 0), ledger_rows(dataset.commits("high_res"))
    plain = planned(tmp_path / "plain", PROMPTS, tmp_path, samples_per_shard=10)
    for name in ("low_res", "captions"):
        run_stage(plain, name, 0, process=FAKES[name])
    assert content(dataset, receipt) == content(plain, high_res(plain, FAKES["high_res"])), "the same order and bytes"


def test_a_slot_is_finished_while_the_next_one_is_computed(tmp_path: Path) -> None:
    slots = {"height": 16, "width": 16, "batch_size": 2}
    dataset = planned(tmp_path, PROMPTS, tmp_path, samples_per_shard=10, low_res=slots)
    began = Events()

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for start in range(0, len(samples), 2):
            slot = samples[start : start + 2]
            began["".join(sample.prompt for sample in slot)].set()
            for sample in slot:
                yield Output(sample.key, finish=lambda sample=sample: finish(sample))

    def finish(sample: Sample) -> dict[str, bytes]:
        if sample.prompt in "abcd":
            began.wait("cd" if sample.prompt in "ab" else "ef")
        return files_of(sample, 16)

    receipt = run_stage(dataset, "low_res", 0, process=process)
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 0), ledger_rows(dataset.commits("low_res"))


def test_no_more_than_two_images_wait_to_be_encoded(dataset: Dataset) -> None:
    waiting: set[str] = set()
    most = 0

    def computing(config: DatasetConfig, prompt: str) -> None:
        nonlocal most
        waiting.add(prompt)  # made at the end of this
        most = max(most, len(waiting))

    def finishing(prompt: str) -> None:
        if prompt == "a":
            stage.began["c"].wait(0.5)  # it would come at once if nothing held it back
            assert not stage.began["c"].is_set()
        waiting.discard(prompt)

    stage = Stage(computing, finishing)
    assert high_res(dataset, stage).samples_failed == 0
    assert most <= 3, "one that is computed, two that are not encoded"


def test_images_are_decoded_once_and_errors_come_where_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = sample_module.decode_image
    monkeypatch.setattr(sample_module, "decode_image", lambda *a: calls.append(a) or decode(*a))
    image = EncodedImage(png((1, 2, 3)), "png", {"key": "k"})
    image.decode_ahead()
    first, second = image.open(), image.open()
    assert len(calls) == 2
    assert first is not second, "whoever opens an image may change it"
    assert first.tobytes() == second.tobytes()
    broken = EncodedImage(b"no image", "png", {"key": "k"})
    broken.decode_ahead()
    with pytest.raises(SampleError, match="k: not a readable"):
        broken.open()


def test_what_is_counted_and_reported_while_finishing_counts(dataset: Dataset) -> None:
    heard: list[Event] = []

    def finishing(prompt: str) -> None:
        count_call(2, 1.0)
        emit(Step(1, 1))

    with listening(heard.append):
        receipt = high_res(dataset, Stage(finishing=finishing))
    assert receipt.provenance["unet"]["rows"] == 12
    assert [event for event in heard if isinstance(event, Step)] == [Step(1, 1)] * 6


# ----------------------------------------------------------------------------------------------------------------------
# whose fault


@pytest.mark.parametrize(
    "error", [SampleError("too wide"), ZeroDivisionError("x")], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("prompt", ["a", "c", "f"])
def test_an_error_in_finishing_is_its_own_samples(dataset: Dataset, error: Exception, prompt: str) -> None:
    def finishing(at: str) -> None:
        if at == prompt:
            raise error

    stage = Stage(finishing=finishing)
    receipt = high_res(dataset, stage)
    assert (receipt.samples_ok, receipt.samples_failed) == (5, 1)
    (row,) = ledger_rows(dataset.commits("high_res"))
    assert row["error_class"] == type(error).__name__
    assert row["key"] == receipt.failed_keys[0]
    assert [each for each in stage.log if len(each) == 1] == PROMPTS, "nothing is computed twice"
    assert receipt.failed_keys == (keys_of(dataset)[prompt],)


def test_memory_that_runs_out_in_computing_does_not_lose_the_finished_sample(dataset: Dataset) -> None:
    batches: list[int] = []

    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt == "c":
            batches.append(config.upscale.view_batch or 16)  # where nothing is set, the device's memory decides
            if len(batches) < 3:
                raise OutOfMemory("full", batch=batches[-1])

    stage = Stage(computing)
    receipt = high_res(dataset, stage)
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 0)
    assert batches == [16, 8, 4]
    assert [each for each in stage.log if len(each) == 1] == list("abcccdef")


def test_an_error_in_computing_beside_a_finishing_one_is_not_the_finishing_ones(dataset: Dataset) -> None:
    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt == "c":
            raise ValueError("c")

    receipt = high_res(dataset, Stage(computing))
    assert receipt.failed_keys == (keys_of(dataset)["c"],)


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_in_finishing_is_asked_for_once_more_when_nothing_is_computed(
    dataset: Dataset, times: int
) -> None:
    tries: list[str] = []
    again = threading.Event()

    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt == "c":
            again.wait(0.5)  # it would come at once if nothing held it back
            assert not again.is_set()

    def finishing(prompt: str) -> None:
        if prompt == "b":
            tries.append(prompt)
            if len(tries) == 2:
                again.set()
            if len(tries) <= times:
                raise MemoryError

    stage = Stage(computing, finishing, waits="ab")
    receipt = high_res(dataset, stage)
    assert len(tries) == 2
    assert stage.log.count("b") == 1
    assert receipt.failed_keys == ((keys_of(dataset)["b"],) if times == 2 else ())
    assert [row["error_class"] for row in ledger_rows(dataset.commits("high_res"))] == ["OutOfMemory"] * (times - 1)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "503"), GpuLost("gone")], ids=["store", "gpu"])
def test_what_is_nobodys_fault_passes_through_finishing(dataset: Dataset, error: Exception) -> None:
    def finishing(prompt: str) -> None:
        if prompt == "b":
            raise error

    with pytest.raises(type(error)):
        high_res(dataset, Stage(finishing=finishing, waits="ab"))
    assert ledger_rows(dataset.commits("high_res")) == []
    assert spilled(dataset.config) >= 1


# ----------------------------------------------------------------------------------------------------------------------
# ends of all kinds


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), GpuLost("gone"), OSError("503")])
def test_what_is_computed_when_the_end_comes_is_finished_and_kept(dataset: Dataset, error: BaseException) -> None:
    """c is at work when the end comes, and b on its way."""

    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt == "c":
            raise error

    with pytest.raises(type(error)):
        high_res(dataset, Stage(computing))
    assert spilled(dataset.config) == 2
    left = breadcrumbs(dataset)
    accused = [json.loads(dataset.folder.read(name))["strikes"] for name in left]
    assert accused == ([{keys_of(dataset)["c"]: 1}] if isinstance(error, GpuLost) else []), "only a lost GPU accuses"
    again = Stage(waits="" if left else ALL_BUT_LAST)
    assert high_res(dataset, again).samples_ok == 6
    assert [each for each in again.log if len(each) == 1] == list("cdef")


def test_what_waits_behind_another_one_when_the_end_comes_is_kept(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while a is encoded, and b waits for that, made."""
    waiting = threading.Event()
    put = Finishing.put

    def noted(self: Finishing, output: Output, last: bool) -> None:
        put(self, output, last)
        if output.key == keys_of(dataset)["b"]:
            waiting.set()

    def finishing(prompt: str) -> None:
        if prompt == "a":
            assert waiting.wait(PATIENCE)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Finishing, "put", noted)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            high_res(dataset, stage := Stage(finishing=finishing, waits=""))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "c" not in stage.log
    assert spilled(dataset.config) == 2


def test_a_reader_that_stops_early_ends_the_threads(dataset: Dataset) -> None:
    """More errors than are tolerated: the shard is given up with a sample on its way."""

    def finishing(prompt: str) -> None:
        raise ZeroDivisionError

    dataset = replace(dataset, config=dataset.config.model_copy(update={"max_failure_ratio": 0.0}))
    stage = Stage(finishing=finishing, waits="ab")
    with pytest.raises(ShardError, match="nothing committed"):
        run_stage(dataset, "high_res", 0, process=stage)
    assert [each for each in stage.log if len(each) == 1] == list("abc")


# ----------------------------------------------------------------------------------------------------------------------
# deaths


def test_a_death_accuses_what_is_computed_and_what_is_finished_and_the_next_one_only_one(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c kills while it is finished, beside d: first both are accused, then nothing overlaps and c is alone."""
    monkeypatch.setattr("resmaster_stages.runner.quarantine.SLOW_SECONDS", 0.0)  # as if each took its time

    def finishing(prompt: str) -> None:
        if prompt == "c":
            os.kill(os.getpid(), signal.SIGKILL)

    keys = keys_of(dataset)
    assert in_child(dataset, "high_res", Stage(finishing=finishing)) == -9
    assert at_work(dataset) == [keys["c"], keys["d"]]
    assert spilled(dataset.config) == 2
    for strikes in (2, 3):
        assert in_child(dataset, "high_res", Stage(finishing=finishing, waits="")) == -9
        assert at_work(dataset) == [keys["c"]], strikes
    receipt = high_res(dataset, again := Stage(finishing=finishing, waits=""))
    assert receipt.failed_keys == (keys["c"],)
    assert [row["error_class"] for row in ledger_rows(dataset.commits("high_res"))] == ["Quarantined"]
    assert again.log == ["d", "d finishes", "e", "e finishes", "f", "f finishes"]


def test_a_sample_that_kills_when_it_is_read_is_found_out(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read ahead, c is not at work: the first death accuses b, which computes. Then nothing is read ahead."""
    monkeypatch.setattr("resmaster_stages.runner.quarantine.SLOW_SECONDS", 0.0)
    decode = EncodedImage.decode_ahead
    keys = keys_of(dataset)

    def deadly(image: EncodedImage) -> None:
        if image.meta["key"] == keys["c"]:
            os.kill(os.getpid(), signal.SIGKILL)
        decode(image)

    monkeypatch.setattr(EncodedImage, "decode_ahead", deadly)

    def computing(config: DatasetConfig, prompt: str) -> None:
        if prompt == "b" and not os.environ.get("NOT_AHEAD"):
            threading.Event().wait(PATIENCE)

    stage = Stage(computing, waits="")
    assert in_child(dataset, "high_res", stage) == -9
    assert keys["c"] not in at_work(dataset)
    assert keys["b"] in at_work(dataset)
    monkeypatch.setenv("NOT_AHEAD", "1")
    assert in_child(dataset, "high_res", stage) == 0
    assert ledger_rows(dataset.commits("high_res")) == []


def test_nothing_is_read_before_somebody_can_be_accused_of_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardSamples.__getitem__
    places: list[int] = []

    def watched(samples: ShardSamples, place: int) -> Sample:
        assert at_work(dataset)
        places.append(place)
        sample = read(samples, place)
        assert isinstance(sample, Sample)
        return sample

    monkeypatch.setattr(ShardSamples, "__getitem__", watched)
    assert high_res(dataset, FAKES["high_res"]).samples_ok == 6
    assert places == list(range(6)), "each once"


# ----------------------------------------------------------------------------------------------------------------------
# how long the device was at work


def test_a_commit_says_how_long_the_device_was_idle(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a look: four samples' worth of looks are busy, blocks in blocks count once."""
    looks = iter(range(0, 10_000, 10))
    monkeypatch.setattr("resmaster_stages.models.busy.time", SimpleNamespace(monotonic=lambda: float(next(looks))))
    whole = iter([0.0, 0.0, 240.0])  # of the attempt, and of computing
    monkeypatch.setattr("resmaster_stages.runner.attempt.time", SimpleNamespace(monotonic=lambda: next(whole)))

    def computing(config: DatasetConfig, prompt: str) -> None:
        with busy(), busy():
            pass

    receipt = high_res(dataset, Stage(computing))
    assert receipt.provenance["device"] == {"busy_seconds": 60.0, "idle_share": 0.75}


def test_time_that_is_broken_off_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([1.0, 3.0, 10.0, 15.0])
    monkeypatch.setattr("resmaster_stages.models.busy.time", SimpleNamespace(monotonic=lambda: next(looks)))
    with timing() as counted:
        for _ in range(2):
            with pytest.raises(MemoryError), busy(), busy():
                raise MemoryError
    with busy():
        pass  # nobody counts
    assert counted.seconds == 7.0


def keys_of(dataset: Dataset) -> dict[str, str]:
    """Prompt -> key of the one shard."""
    return {sample.prompt: sample.key for sample in dataset.plan.read(0)}


def at_work(dataset: Dataset) -> list[str]:
    """Whom the shard's breadcrumb names."""
    (name,) = breadcrumbs(dataset)
    found: list[str] = json.loads(dataset.folder.read(name))["at"]
    return found
