"""What is whose fault: out of memory, poison, a lost device, and what passes through."""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from resmaster_stages.config.dataset import STAGES, DatasetConfig, Stage
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import ConfigError, GpuLost, OutOfMemory, SampleError, ShardError
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models.identity import Weights
from resmaster_stages.runner.compute import half_batch, plan_runs, with_batch
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, files_of, planned

Process = Callable[[DatasetConfig, Sequence[Sample]], Iterator[Output]]

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


def run(dataset: Dataset, stage: Stage, process: Process | None = None) -> Receipt:
    return run_stage(dataset, dataset.config, stage, 0, process=process or FAKES[stage])


def tar_bytes(dataset: Dataset, receipt: Receipt) -> bytes:
    return dataset.folder.read(receipt.objects[0].name)


class Batches:
    """A low_res stage in slots, as the real one; it notes them and raises `error` where `when` says so."""

    def __init__(self, error: Exception, when: Callable[[list[str]], bool]) -> None:
        self.error, self.when = error, when
        self.tried: list[list[str]] = []

    def __call__(self, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        size = config.low_res.batch_size
        for start in range(0, len(samples), size):
            slot = samples[start : start + size]
            self.tried.append([sample.prompt for sample in slot])
            if self.when(self.tried[-1]):
                raise self.error
            for sample in slot:
                yield Output(sample.key, files=files_of(sample, 16))


@pytest.mark.parametrize(
    "error", [CUDA, CPU, PYTHON, KERNEL, OutOfMemory("too large")], ids=lambda error: type(error).__name__
)
def test_out_of_memory_halves_the_batch_and_goes_on_where_it_was(dataset: Dataset, error: Exception) -> None:
    stage = Batches(error, when=lambda slot: len(slot) > 2 and "d" in slot)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"], ["d", "e", "f"], ["d", "e"], ["f"]]
    assert (receipt.samples_ok, receipt.samples_failed) == (7, 0)


def test_out_of_memory_with_a_batch_of_one_costs_the_sample(dataset: Dataset) -> None:
    stage = Batches(CUDA, when=lambda slot: "poison" in slot)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [
        ["a", "b", "c", "poison"],
        ["a", "b"],
        ["c", "poison"],
        ["c"],
        ["poison"],
        ["d"],
        ["e"],
        ["f"],
    ]
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 1)
    (row,) = ledger_rows(dataset.folder, "low_res")
    assert (row["error_class"], row["message"]) == ("OutOfMemory", "out of memory; lower low_res.batch_size")


def test_memory_that_is_never_enough_fails_the_shard_at_once_and_says_so(dataset: Dataset) -> None:
    stage = Batches(CUDA, when=lambda slot: True)
    with pytest.raises(
        ShardError, match=r"(?s)2 of 7 samples failed.*\nOutOfMemory +2 +[0-9a-f]+ +out of memory; lower"
    ):
        run(dataset, "low_res", stage)
    assert [len(slot) for slot in stage.tried] == [4, 2, 1, 1]
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
    assert sizes == [16, 8, 4] * 2


def test_what_is_halved_is_the_batch_that_did_not_fit(dataset: Dataset) -> None:
    config = with_batch(dataset.config, "high_res", 16)
    assert (
        half_batch(OutOfMemory("full", batch=7), config, "high_res") == 3
    )  # 49 views in calls of at most 16 are calls of 7
    assert half_batch(OutOfMemory("full"), config, "high_res") == 8
    assert half_batch(OutOfMemory("full", batch=49), dataset.config, "high_res") == 24
    assert half_batch(OutOfMemory("full", batch=1), dataset.config, "high_res") == 0
    assert half_batch(OutOfMemory("full"), dataset.config, "high_res") == 1
    assert half_batch(OutOfMemory("full"), with_batch(config, "high_res", 1), "high_res") == 0


def test_the_halved_batch_does_not_change_the_identity(dataset: Dataset) -> None:
    from resmaster_stages.dataset.stages import stage_hashes

    for stage in STAGES:
        assert stage_hashes(with_batch(dataset.config, stage, 1)) == stage_hashes(dataset.config)


def test_an_error_that_nobody_foresaw_costs_the_one_sample_that_raises_it(dataset: Dataset) -> None:
    stage = Batches(ZeroDivisionError("tokens / 0"), when=lambda slot: "poison" in slot)
    receipt = run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"], ["a"], ["b"], ["c"], ["poison"], ["d", "e", "f"]]
    assert (receipt.samples_ok, receipt.samples_failed) == (6, 1)
    (row,) = ledger_rows(dataset.folder, "low_res")
    assert row["error_class"] == "ZeroDivisionError"
    assert row["message"].startswith("tokens / 0 (test_compute.py:")
    key = read_plan(dataset.folder).read(0)[3].key
    assert row["key"] == key
    assert receipt.failed_keys == (key,)


def test_the_neighbours_of_a_failing_sample_keep_their_bytes(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, "low_res", Batches(ValueError(), when=lambda slot: "poison" in slot))
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
    """The real picture reader, on bytes that are no picture."""

    def low_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            files = files_of(sample, 16)
            yield Output(sample.key, files={**files, "png": b"no picture"} if sample.prompt == "poison" else files)

    def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            assert sample.low_res is not None
            sample.low_res.open()
            yield from FAKES["captions"](config, [sample])

    assert run(dataset, "low_res", low_res).samples_ok == 7
    assert run(dataset, "captions", captions).samples_failed == 1
    (row,) = ledger_rows(dataset.folder, "captions")
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
    stage = Batches(error, when=lambda slot: "poison" in slot)
    with pytest.raises(kind):
        run(dataset, "low_res", stage)
    assert stage.tried == [["a", "b", "c", "poison"]], "it is not tried again here"
    assert status(dataset).stages[0].committed == 0
    assert ledger_rows(dataset.folder, "low_res") == []


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
    (row,) = ledger_rows(dataset.folder, "high_res")
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
    assert len(alive) == 4


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


def test_runs_keep_the_slots_of_an_uninterrupted_run(dataset: Dataset) -> None:
    keys = list("abcdefghij")
    config = dataset.config

    def places(ready: str, strikes: dict[str, int]) -> list[tuple[int, tuple[int, ...]]]:
        outputs = {key: Output(key) for key in ready}
        runs = plan_runs(config, "low_res", keys, outputs, strikes)
        return [(run.config.low_res.batch_size, run.places) for run in runs]

    assert places("", {}) == [(4, tuple(range(10)))]
    assert places("abcd", {}) == [(4, (4, 5, 6, 7, 8, 9))]
    assert places("abef", {}) == [(4, tuple(range(10)))], "half a slot is computed again, with its neighbours"
    assert places("abcdij", {"f": 1}) == [(4, (4, 5, 6, 7))]
    assert places("abcd", {"f": 2}) == [(1, (4,)), (1, (5,)), (1, (6,)), (1, (7,)), (4, (8, 9))]
    assert places("abcdf", {"e": 2}) == [(1, (4,)), (1, (6,)), (1, (7,)), (4, (8, 9))]
    single = plan_runs(config, "high_res", keys, {"c": Output("c")}, {"d": 2})
    assert [run.places for run in single] == [(0, 1, 3, 4, 5, 6, 7, 8, 9)]


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
    assert ledger_rows(dataset.folder, "captions")[0]["error_class"] == "OutOfMemory"
