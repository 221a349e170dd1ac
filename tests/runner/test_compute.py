"""What is whose fault: out of memory, poison, a lost device, and what passes through."""

import errno
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.batches import Batch
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.reading import ShardSamples
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.errors import ConfigError, GpuLost, OutOfMemory, SampleError, ShardError
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models.identity import Weights
from resmaster_stages.runner import compute as compute_module
from resmaster_stages.runner.compute import compute, half_batch, with_batch
from resmaster_stages.runner.quarantine import Breadcrumbs
from resmaster_stages.runner.resume import Spill, encode
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, files_of, planned

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)
PYTHON = MemoryError()
KERNEL = OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One shard of seven samples."""
    prompts = ["a", "b", "c", "poison", "d", "e", "f"]
    return planned(
        tmp_path, prompts, tmp_path, samples_per_shard=10, low_res={"height": 16, "width": 16, "batch_size": 4}
    )


def run(dataset: Dataset, stage: str, process: Process | None = None) -> Receipt:
    return run_stage(dataset, stage, 0, process=process or FAKES[stage])


class Batches:
    """A low_res stage in batches, as the real one; it notes them and raises `error` where `when` says so."""

    def __init__(self, error: Exception, when: Callable[[list[str]], bool]) -> None:
        self.error, self.when = error, when
        self.tried: list[list[str]] = []

    def __call__(self, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        size = config.low_res.batch_size
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            self.tried.append([sample.prompt for sample in batch])
            if self.when(self.tried[-1]):
                raise self.error
            for sample in batch:
                yield Output(sample.key, files=files_of(sample, 16))


def test_memory_is_released_before_the_next_try(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(compute_module, "release_memory", lambda: done.append("released"))

    def stage(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        done.append(f"tried {config.low_res.batch_size}")
        if config.low_res.batch_size > 1:
            raise CUDA
        yield from FAKES["low_res"](config, samples)

    run(dataset, "low_res", stage)
    assert done[:5] == ["tried 4", "released", "tried 2", "released", "tried 1"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: [made[1], made[0], *made[2:]],
        lambda made: [made[0], made[0], *made[2:]],
        lambda made: [*made[:-1], Output("0" * 32, files=made[-1].files)],
        lambda made: made[:-1],
        lambda made: [*made, made[0]],
        lambda made: [],
    ],
    ids=["swapped", "twice", "a stranger", "too few", "too many", "none"],
)
def test_a_stage_that_gives_other_samples_than_it_got_is_named(
    dataset: Dataset, spoil: Callable[[list[Output]], list[Output]]
) -> None:
    def stage(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        yield from spoil(list(FAKES["low_res"](config, samples)))

    with pytest.raises(ShardError, match=r"the stage low_res gave samples .* where .* were due"):
        run(dataset, "low_res", stage)
    assert dataset.commits("low_res").read(0) is None


@pytest.mark.parametrize(
    "error", [CUDA, CPU, PYTHON, KERNEL, OutOfMemory("too large")], ids=lambda error: type(error).__name__
)
def test_out_of_memory_halves_the_batch_and_goes_on_with_the_same_slot(dataset: Dataset, error: Exception) -> None:
    stage = Batches(error, when=lambda batch: len(batch) > 2 and "d" in batch)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"], ["d", "e", "f"], ["d", "e"], ["f"]]
    assert (receipt.samples_ok, receipt.samples_failed) == (7, 0)


def test_out_of_memory_with_a_batch_of_one_costs_the_sample(dataset: Dataset) -> None:
    stage = Batches(CUDA, when=lambda batch: "poison" in batch)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [
        ["a", "b", "c", "poison"],
        ["a", "b"],
        ["c", "poison"],
        *([each] for each in ["a", "b", "c", "poison"]),  # all at a batch of one
        *([each] for each in ["a", "b", "c", "poison"]),  # each by itself
        ["d"],
        ["e"],
        ["f"],
    ]
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 1)
    (row,) = ledger_rows(dataset.commits("low_res"))
    assert (row["error_class"], row["message"]) == ("OutOfMemory", "out of memory; lower low_res.batch_size")


def test_memory_that_is_never_enough_fails_the_shard_at_once_and_says_so(dataset: Dataset) -> None:
    stage = Batches(CUDA, when=lambda batch: True)
    with pytest.raises(
        ShardError, match=r"(?s)2 of 7 samples failed.*\nOutOfMemory +2 +[0-9a-f]+ +out of memory; lower"
    ):
        run(dataset, "low_res", stage)
    assert [len(batch) for batch in stage.tried] == [4, 2, 1, 1, 1]
    assert pending(dataset)["low_res"] == [0]


def test_views_and_patches_are_halved_within_a_sample(dataset: Dataset) -> None:
    run(dataset, "low_res")
    sizes: list[int] = []

    def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        sizes.append(config.captions.batch_size)
        if config.captions.batch_size > 4:
            raise CUDA
        yield from FAKES["captions"](config, samples)

    def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        views = config.upscale.view_batch or 16  # where nothing is set, the device's memory decides
        sizes.append(views)
        if views > 4:
            raise OutOfMemory("full", batch=views)
        yield from FAKES["high_res"](config, samples)

    assert run(dataset, "captions", captions).samples_ok == 7
    assert run(dataset, "high_res", high_res).samples_ok == 7
    assert sizes == [16, 8, *[4] * 7] * 2


def test_what_is_halved_is_the_batch_that_did_not_fit(dataset: Dataset) -> None:
    stage = STAGES["high_res"]
    config = with_batch(dataset.config, stage, 16)
    # 49 views in calls of at most 16 are calls of 7
    assert half_batch(OutOfMemory("full", batch=7), config, stage) == 3
    assert half_batch(OutOfMemory("full"), config, stage) == 8
    assert half_batch(OutOfMemory("full", batch=49), dataset.config, stage) == 24
    assert half_batch(OutOfMemory("full", batch=1), dataset.config, stage) == 0
    assert half_batch(OutOfMemory("full"), dataset.config, stage) == 1
    assert half_batch(OutOfMemory("full"), with_batch(config, stage, 1), stage) == 0


def test_the_halved_batch_does_not_change_the_identity(dataset: Dataset) -> None:
    from resmaster_stages.dataset.stages import stage_hashes

    for stage in STAGES.values():
        assert stage_hashes(with_batch(dataset.config, stage, 1)) == stage_hashes(dataset.config)


def test_an_error_that_nobody_foresaw_costs_the_one_sample_that_raises_it(dataset: Dataset) -> None:
    stage = Batches(ZeroDivisionError("tokens / 0"), when=lambda batch: "poison" in batch)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"], ["a"], ["b"], ["c"], ["poison"], ["d", "e", "f"]]
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 1)
    (row,) = ledger_rows(dataset.commits("low_res"))
    assert row["error_class"] == "ZeroDivisionError"
    assert row["message"].startswith("tokens / 0 (test_compute.py:")
    key = read_plan(dataset.folder).read(0)[3].key
    assert row["key"] == key
    assert receipt.failed_keys == (key,)


def test_the_neighbours_of_a_failing_sample_keep_their_bytes(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, "low_res", Batches(ValueError(), when=lambda batch: "poison" in batch))
    (tmp_path / "other").mkdir()
    other = planned(
        tmp_path / "other",
        ["a", "b", "c", "poison bad low_res", "d", "e", "f"],
        tmp_path / "other",
        samples_per_shard=10,
    )
    assert run(other, "low_res").samples_failed == 1
    tars = [
        dataset.folder.read(dataset.folder.names("low_res")[0]),
        other.folder.read(other.folder.names("low_res")[0]),
    ]
    assert tars[0] == tars[1]


def test_a_poison_image_costs_one_row_in_every_stage_that_opens_it(dataset: Dataset) -> None:
    """The real image reader, on bytes that are no image."""

    def low_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            files = files_of(sample, 16)
            yield Output(sample.key, files={**files, "png": b"no image"} if sample.prompt == "poison" else files)

    def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            assert sample.low_res is not None
            sample.low_res.open()
            yield from FAKES["captions"](config, [sample])

    assert run(dataset, "low_res", low_res).samples_ok == 7
    assert run(dataset, "captions", captions).samples_failed == 1
    (row,) = ledger_rows(dataset.commits("captions"))
    assert row["error_class"] == "SampleError"
    assert run(dataset, "high_res").samples_ok == 6, "what failed does not come back"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), GpuLost),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), GpuLost),
        (GpuLost("gone"), GpuLost),
        (ConfigError("wrong"), ConfigError),
        (OSError("503 slow down"), OSError),
        (TimeoutError("timed out"), TimeoutError),
        (ConnectionResetError("reset"), ConnectionResetError),
    ],
)  # fmt: skip
def test_what_is_nobodys_fault_passes(dataset: Dataset, error: Exception, kind: type[Exception]) -> None:
    stage = Batches(error, when=lambda batch: "poison" in batch)
    with pytest.raises(kind):
        run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"]], "it is not tried again here"
    assert status(dataset).stages[0].committed == 0
    assert ledger_rows(dataset.commits("low_res")) == []


def test_a_lost_device_accuses_the_samples_at_work(dataset: Dataset) -> None:
    tried: list[str] = []

    def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            tried.append(sample.prompt)
            if sample.prompt == "poison":
                raise GpuLost("illegal memory access")
            yield Output(sample.key, files=files_of(sample, 64))

    run(dataset, "low_res")
    run(dataset, "captions")
    for _ in range(3):
        with pytest.raises(GpuLost):
            run(dataset, "high_res", high_res)
    tried.clear()
    assert run(dataset, "high_res", high_res).samples_failed == 1
    assert tried == ["a", "b", "c", "d", "e", "f"]
    (row,) = ledger_rows(dataset.commits("high_res"))
    assert row["error_class"] == "Quarantined"


def test_errors_do_not_keep_tensors_alive(dataset: Dataset) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        assert [ref for ref in alive if ref() is not None] == []
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        for sample in samples:
            views = config.upscale.view_batch or 16
            if views > 2:
                try:
                    raise CUDA
                except RuntimeError as error:
                    raise OutOfMemory("full", batch=views) from error
            yield Output(sample.key, files=files_of(sample, 64))

    run(dataset, "low_res")
    run(dataset, "captions")
    gc.disable()
    try:
        assert run(dataset, "high_res", high_res).samples_ok == 7
    finally:
        gc.enable()
    assert len(alive) == 3 + 7


def test_the_table_of_first_errors_counts_by_class(dataset: Dataset) -> None:
    def low_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for number, sample in enumerate(samples):
            yield Output(
                sample.key, error=SampleError(f"{number}\nblack") if number % 4 else OutOfMemory(f"{number} full")
            )

    with pytest.raises(ShardError) as caught:
        run(dataset, "low_res", low_res)
    head, *table = str(caught.value).splitlines()
    keys = [sample.key for sample in read_plan(dataset.folder).read(0)]
    assert "nothing committed; all in errors/low_res/000000-" in head
    assert [line.split() for line in table] == [
        ["error", "samples", "first", "key", "first", "message"],
        ["SampleError", "3", keys[1], "1", "black"],
        ["OutOfMemory", "2", keys[0], "0", "full"],
    ]


@pytest.mark.parametrize(
    ("stage", "ready", "strikes", "called"),
    [
        ("low_res", "", {}, "abcd efgh ij"),
        ("low_res", "abcd", {}, "efgh ij"),
        ("low_res", "abef", {}, "abcd efgh ij"),  # half a slot is computed again, with its neighbours
        ("low_res", "abcdij", {"f": 1}, "efgh"),
        ("low_res", "abcd", {"f": 2}, "e f g h ij"),
        ("low_res", "abcdf", {"e": 2}, "e g h ij"),
        ("low_res", "abcdefgh", {"a": 2}, "ij"),
        ("high_res", "c", {"d": 2}, "a b d e f g h i j"),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["resumed", "another attempt"])
def test_calls_keep_the_slots_of_an_uninterrupted_run(
    tmp_path: Path, stage: str, ready: str, strikes: dict[str, int], called: str, again: bool
) -> None:
    """What is ready was spilled by a run that was killed, or is committed by an earlier attempt."""
    low_res = {"height": 16, "width": 16, "batch_size": 4}
    dataset = planned(tmp_path, list("abcdefghij"), tmp_path, samples_per_shard=10, low_res=low_res, spill_seconds=0)
    samples, commits = ShardSamples(dataset.plan.read(0), {}), dataset.commits(stage)
    key_of = {sample.prompt: sample.key for sample in samples.planned}
    batch = Batch(slot=4, size=4)
    made = {key_of[prompt]: Output(key_of[prompt], files={"txt": b"ready"}, batch=batch) for prompt in ready}
    place = layout.spill_folder(stage, commits.stage_hash, 0)
    if not again:
        for key, output in made.items():
            dataset.folder.write(layout.spill(place, key), encode(output, commits.stage_hash))
    struck = {key_of[prompt]: count for prompt, count in strikes.items()}
    crumb = {"process": "elsewhere 1 1", "attempt": 1, "at": [], "strikes": struck}
    dataset.folder.write(layout.breadcrumb(stage, commits.stage_hash, 0), json.dumps(crumb).encode())
    calls: list[tuple[str, int]] = []

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        calls.append(("".join(sample.prompt for sample in samples), config.low_res.batch_size))
        yield from (Output(sample.key, files={"txt": b"computed"}) for sample in samples)

    cache = dataset.folder.names(place)
    spill = Spill(commits, 0, 0.0, cache)
    breadcrumbs = Breadcrumbs(commits, 0, samples.keys(), cache)
    outputs = list(compute(process, dataset.config, STAGES[stage], samples, made if again else {}, spill, breadcrumbs))
    assert [slot for slot, _ in calls] == called.split()
    if stage == "low_res":
        assert [batch for _, batch in calls] == [1 if len(slot) == 1 else 4 for slot in called.split()]
    assert [output.key for output in outputs] == samples.keys()
    assert {output.key for output in outputs if output.files["txt"] == b"ready"} == set(made)


def test_a_suspect_is_finished_before_the_next_one_is_computed(tmp_path: Path) -> None:
    """Alone, so that a death while it is finished, too, has one suspect."""
    low_res = {"height": 16, "width": 16, "batch_size": 4}
    dataset = planned(tmp_path, list("abcd"), tmp_path, samples_per_shard=10, low_res=low_res, spill_seconds=0)
    commits = dataset.commits("low_res")
    crumb = {"process": "elsewhere 1 1", "attempt": 1, "at": [], "strikes": {dataset.plan.read(0)[1].key: 2}}
    name = layout.breadcrumb("low_res", commits.stage_hash, 0)
    dataset.folder.write(name, json.dumps(crumb).encode())
    log: list[str] = []

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            log.append(sample.prompt)
            yield Output(sample.key, finish=lambda sample=sample: finish(sample))

    def finish(sample: Sample) -> dict[str, bytes]:
        assert json.loads(dataset.folder.read(name))["at"] == [sample.key]
        log.append(f"{sample.prompt} finishes")
        return files_of(sample, 16)

    assert run(dataset, "low_res", process).samples_failed == 0
    assert log == [line for prompt in "abcd" for line in (prompt, f"{prompt} finishes")]


def test_a_shard_in_which_all_fail_is_given_up_at_once(dataset: Dataset) -> None:
    run(dataset, "low_res")
    tried: list[str] = []

    def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        tried.extend(sample.prompt for sample in samples)
        raise ZeroDivisionError
        yield

    with pytest.raises(ShardError, match="2 of 7 samples failed"):
        run(dataset, "captions", captions)
    assert tried == ["a", "b"]


def test_pillow_running_out_of_memory_is_no_poison(dataset: Dataset) -> None:
    """A MemoryError from a library on the way is out of memory, whatever raised it."""
    run(dataset, "low_res")

    def quality(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            assert sample.low_res is not None
            Image.open(io.BytesIO(sample.low_res.data)).load()
            if sample.prompt == "poison":
                raise MemoryError
            yield from FAKES["captions"](config, [sample])

    assert run(dataset, "captions", quality).samples_failed == 1
    assert ledger_rows(dataset.commits("captions"))[0]["error_class"] == "OutOfMemory"
