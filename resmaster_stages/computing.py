"""Runs a stage's `process` over a shard's samples: one Output per sample, whatever goes wrong with some of them.

Knows nothing about where outputs end up, nor what is in them.

Invariants:
- Exactly one Output per sample, in the plan's order.
- What is at fault is found out: out of memory halves the batch, down to 1; any other error in a batch runs its samples one by
  one; in the end it costs the one sample, as its Output's error. A lost device, the user's mistakes and a store or network that
  fails are nobody's fault here: they pass.
- Samples are computed in the slots of an uninterrupted run wherever that is possible, so a resumed shard has the same bytes.
  Halved batches and suspects that run alone give the same pictures up to rounding.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from resmaster_stages.breadcrumbs import ALONE_STRIKES, OUT_STRIKES, Breadcrumbs
from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.errors import GpuLost, OutOfMemory, Quarantined, ResMasterError, SampleError, ShardError
from resmaster_stages.models.faults import fault_of, release_memory
from resmaster_stages.spill import Spill
from resmaster_stages.storage.dataset import Output, Sample

if TYPE_CHECKING:
    from resmaster_stages.reading import ShardSamples

Process = Callable[[DatasetConfig, Sequence[Sample]], Iterator[Output]]

BATCH_FIELDS: dict[Stage, tuple[str, str]] = {
    "low_res": ("low_res", "batch_size"),
    "captions": ("captions", "batch_size"),
    "high_res": ("upscale", "view_batch"),
}
"""Where the configuration says how much goes to the device at once. Quality goes picture by picture."""


def batch_of(config: DatasetConfig, stage: Stage) -> int | None:
    """How much of `stage` goes to the device at once; None where the device's memory decides."""
    if stage not in BATCH_FIELDS:
        return 1
    part, field = BATCH_FIELDS[stage]
    size: int | None = getattr(getattr(config, part), field)
    return size


def half_batch(error: OutOfMemory, config: DatasetConfig, stage: Stage) -> int:
    """Half of the batch for which memory ran out; 0 where nothing smaller can be tried."""
    sizes = [size for size in (error.batch, batch_of(config, stage)) if size is not None]
    return min(sizes, default=1) // 2


def with_batch(config: DatasetConfig, stage: Stage, size: int) -> DatasetConfig:
    """`config` with another batch: operational, so of the same identity."""
    if stage not in BATCH_FIELDS:
        return config
    part, field = BATCH_FIELDS[stage]
    return config.model_copy(update={part: getattr(config, part).model_copy(update={field: size})})


def slot_of(config: DatasetConfig, stage: Stage) -> int:
    """How many samples are computed together, counted from the shard's first: the unit that is lost, resumed and suspected."""
    return config.low_res.batch_size if stage == "low_res" and not config.images else 1


class Watched(Sequence[Sample]):
    """Some samples of a shard, read when asked for; `at` hears their keys before that."""

    def __init__(self, samples: ShardSamples, places: Sequence[int], at: Callable[[list[str]], None]) -> None:
        self._samples, self._places, self._at = samples, places, at

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, position: int) -> Sample: ...

    @overload
    def __getitem__(self, position: slice) -> list[Sample]: ...

    def __getitem__(self, position: int | slice) -> Sample | list[Sample]:
        keys = self._samples.keys()
        if isinstance(position, slice):
            self._at([keys[place] for place in self._places[position]])
            return [self._samples[place] for place in self._places[position]]
        place = self._places[position]
        self._at([keys[place]])
        return self._samples[place]


@dataclass(frozen=True)
class Run:
    """Samples (by their places in the shard) that one call of `process` makes."""

    config: DatasetConfig
    places: tuple[int, ...]


def plan_runs(
    config: DatasetConfig, stage: Stage, keys: Sequence[str], ready: dict[str, Output], strikes: dict[str, int]
) -> list[Run]:
    """What is left to compute, in order: whole slots together in as few runs as can be, suspects of a slot one by one.

    Takes samples out of `ready` whose slot has to be computed again.
    """
    size = slot_of(config, stage)
    runs: list[Run] = []
    together: list[int] = []
    for start in range(0, len(keys), size):
        slot = range(start, min(start + size, len(keys)))
        left = [place for place in slot if keys[place] not in ready]
        if not left:
            continue
        if size > 1 and any(strikes.get(keys[place], 0) >= ALONE_STRIKES for place in slot):
            if together:
                runs.append(Run(config, tuple(together)))
                together = []
            runs += [Run(with_batch(config, stage, 1), (place,)) for place in left]
            continue
        for place in slot:
            ready.pop(keys[place], None)
        together += slot
    if together:
        runs.append(Run(config, tuple(together)))
    return runs


def compute(
    process: Process,
    config: DatasetConfig,
    stage: Stage,
    samples: ShardSamples,
    spill: Spill,
    breadcrumbs: Breadcrumbs,
) -> Generator[Output, None, None]:
    """One Output per sample, in order. Raises ShardError if `process` breaks its contract, and what is nobody's fault."""
    keys = samples.keys()
    ready: dict[str, Output] = dict(spill.read(keys)) if keys else {}
    for key, strikes in breadcrumbs.strikes.items():
        if strikes >= OUT_STRIKES:
            error = Quarantined(f"the process died {strikes} times while this sample was at work; it is left out")
            ready[key] = Output(key, error=error)
    place = 0
    try:
        for output in _computed(process, config, stage, samples, spill, breadcrumbs, ready):
            while keys[place] != output.key:
                yield ready[keys[place]]
                place += 1
            yield output
            place += 1
        yield from (ready[key] for key in keys[place:])
    except GpuLost:
        breadcrumbs.blame()
        raise
    finally:
        breadcrumbs.leave()


def _computed(
    process: Process,
    config: DatasetConfig,
    stage: Stage,
    samples: ShardSamples,
    spill: Spill,
    breadcrumbs: Breadcrumbs,
    ready: dict[str, Output],
) -> Iterator[Output]:
    """The Outputs of all samples that are not `ready`, in order."""
    keys = samples.keys()
    runs = deque(plan_runs(config, stage, keys, ready, breadcrumbs.strikes))
    while runs:
        run = runs.popleft()
        size, done = slot_of(run.config, stage), 0
        outputs = process(run.config, Watched(samples, run.places, breadcrumbs.at))
        try:
            for place in run.places:
                output = _next(outputs, stage, keys[place])
                done += 1
                spill.keep(output)
                if done % size == 0 or done == len(run.places):
                    spill.flush()
                yield output
            if (extra := next(outputs, None)) is not None:
                raise ShardError(f"the stage {stage} gave sample {extra.key} where nothing more was due")
            continue
        except Exception as error:
            trouble = _without_frames(_whose(error, stage))
        left = run.places[done:]
        if not left:
            raise ShardError(f"the stage {stage} failed after its last sample: {trouble}") from trouble
        if isinstance(trouble, OutOfMemory) and (half := half_batch(trouble, run.config, stage)):
            release_memory()
            runs.appendleft(Run(with_batch(run.config, stage, half), left))
        elif size > 1:
            if left[size:]:
                runs.appendleft(Run(run.config, left[size:]))
            runs.extendleft(Run(with_batch(run.config, stage, 1), (place,)) for place in reversed(left[:size]))
        else:
            if isinstance(trouble, OutOfMemory):
                release_memory()
            if left[1:]:
                runs.appendleft(Run(run.config, left[1:]))
            yield Output(keys[left[0]], error=trouble)


def _next(outputs: Iterator[Output], stage: Stage, key: str) -> Output:
    """The next Output, which must be that of `key`."""
    output = next(outputs, None)
    if output is None:
        raise ShardError(f"the stage {stage} gave no sample where {key} was due")
    if output.key != key:
        raise ShardError(f"the stage {stage} gave sample {output.key} where {key} was due")
    return output


def _whose(error: Exception, stage: Stage) -> Exception:
    """The error of the sample at hand. Raises it, or what it means, if it is not the sample's."""
    if isinstance(error, (SampleError, OutOfMemory)):
        return error
    if isinstance(error, ResMasterError):
        raise error
    part, field = BATCH_FIELDS.get(stage, ("quality", "device"))
    fault = fault_of(error, f"lower {part}.{field}" if stage in BATCH_FIELDS else f"set {part}.{field}: cpu")
    if isinstance(fault, GpuLost):
        raise fault from error
    if fault is not None:
        return fault
    if isinstance(error, OSError):
        raise error
    return _located(error)


def _located(error: Exception) -> Exception:
    """An error that nobody foresaw, with a note of the place where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    error.add_note(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}")
    return error


def _without_frames(error: Exception) -> Exception:
    """`error` without its tracebacks, whose frames would keep tensors alive."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
