"""Runs a stage's `process` over a shard's samples: one Output per sample, whatever goes wrong with some of them.

Knows nothing about where outputs end up, nor what is in them.

Invariants:
- Exactly one Output per sample, in the plan's order.
- What is at fault is found out: out of memory halves the batch, down to 1; any other error in a batch runs its samples
  one by one; in the end it costs the one sample, as its Output's error. A lost device, the user's mistakes and a store
  or network that fails are nobody's fault here: they pass.
- While a sample (or slot) is computed, the one before it is finished and spilled, and the next one is read (`overlap`).
  An error in finishing is its own sample's, whatever happens to the next one; memory that ran out there is asked for
  once more, alone.
- In a shard in which a process died before, each sample is finished before the next one begins, so the next death has
  one suspect.
- Samples are computed in the slots of an uninterrupted run wherever that is possible, so a resumed shard has the same
  bytes. Halved batches and suspects that run alone give the same pictures up to rounding.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, overload

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import GpuLost, OutOfMemory, Quarantined, ResMasterError, SampleError, ShardError
from resmaster_stages.models.faults import fault_of, release_memory
from resmaster_stages.runner.overlap import Finishing, Reading
from resmaster_stages.runner.quarantine import ALONE_STRIKES, OUT_STRIKES, Breadcrumbs
from resmaster_stages.runner.resume import Spill

if TYPE_CHECKING:
    from resmaster_stages.dataset.reading import ShardSamples

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
    """Half of the batch for which memory ran out, 1 if nobody knows it; 0 where nothing smaller can be tried."""
    sizes = [size for size in (error.batch, batch_of(config, stage)) if size is not None]
    return min(sizes, default=2) // 2


def with_batch(config: DatasetConfig, stage: Stage, size: int) -> DatasetConfig:
    """`config` with another batch: operational, so of the same identity."""
    if stage not in BATCH_FIELDS:
        return config
    part, field = BATCH_FIELDS[stage]
    return config.model_copy(update={part: getattr(config, part).model_copy(update={field: size})})


def slot_of(config: DatasetConfig, stage: Stage) -> int:
    """How many samples are computed together, counted from the shard's first: the unit that is lost, resumed and
    suspected."""
    return config.low_res.batch_size if stage == "low_res" and not config.images else 1


class Watched(Sequence[Sample]):
    """Some samples of a shard, read when asked for; `at` hears their keys before that. `ahead`: the next one is read
    meanwhile."""

    def __init__(
        self,
        samples: ShardSamples,
        reading: Reading,
        places: Sequence[int],
        at: Callable[[list[str]], None],
        ahead: bool,
    ) -> None:
        self._samples, self._reading, self._places, self._at, self._ahead = samples, reading, places, at, ahead

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
        place, following = self._places[position], position + 1
        self._at([keys[place]])
        more = self._ahead and 0 < following < len(self)
        return self._reading.read(place, self._places[following] if more else None)


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
    """One Output per sample, in order. Raises ShardError if `process` breaks its contract, and what is nobody's
    fault."""
    keys = samples.keys()
    ready: dict[str, Output] = dict(spill.read(keys)) if keys else {}
    for key, strikes in breadcrumbs.strikes.items():
        if strikes >= OUT_STRIKES:
            error = Quarantined(f"the process died {strikes} times while this sample was at work; it is left out")
            ready[key] = Output(key, error=error)
    place = 0
    try:
        with Reading(samples) as reading, Finishing(partial(_finished, stage, spill)) as finishing:
            work = _Work(process, stage, samples, breadcrumbs, reading, finishing)
            for output in _computed(work, plan_runs(config, stage, keys, ready, breadcrumbs.strikes)):
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


@dataclass(frozen=True)
class _Work:
    """One stage at work on one shard."""

    process: Process
    stage: Stage
    samples: ShardSamples
    breadcrumbs: Breadcrumbs
    reading: Reading
    finishing: Finishing

    @property
    def one_by_one(self) -> bool:
        """Whether nothing may overlap: a process died here, and the next death has to have one suspect."""
        return bool(self.breadcrumbs.strikes)

    def watched(self, places: Sequence[int]) -> Watched:
        """The samples at `places`, with a breadcrumb for each that `process` asks for."""

        def at(keys: list[str]) -> None:
            self.breadcrumbs.at(keys, self.finishing.keys())

        return Watched(self.samples, self.reading, places, at, ahead=not self.one_by_one)


def _computed(work: _Work, planned: Sequence[Run]) -> Iterator[Output]:
    """The Outputs of the samples of these runs, in order."""
    stage, keys, finishing = work.stage, work.samples.keys(), work.finishing
    runs = deque(planned)
    while runs:
        run = runs.popleft()
        size, done = slot_of(run.config, stage), 0
        trouble: Exception | None = None
        outputs = work.process(run.config, work.watched(run.places))
        while True:
            try:
                output = _next(outputs, stage, keys[run.places[done]] if done < len(run.places) else None)
            except Exception as error:
                trouble = _without_frames(_whose(error, stage))
                break
            if output is None:
                break
            done += 1
            finishing.put(output, last=done % size == 0 or done == len(run.places))
            del output  # its image may go as soon as it is encoded
            yield from finishing.take(leave=0 if work.one_by_one else size)
        if trouble is None:
            continue
        yield from finishing.take(leave=0)
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
    yield from finishing.take(leave=0)


def _next(outputs: Iterator[Output], stage: Stage, key: str | None) -> Output | None:
    """The next Output, which must be that of `key`; None: there must not be one."""
    output = next(outputs, None)
    found = output.key if output else None
    if found != key:
        raise ShardError(f"the stage {stage} gave sample {found or 'none'} where {key or 'none'} was due")
    return output


def _finished(stage: Stage, spill: Spill, output: Output, last: bool, alone: bool) -> Output:
    """`output` with its files made, or its error, and spilled if it is the `last` of its slot. Raises what is nobody's
    fault.

    `output` itself if it was not `alone` and memory ran out.
    """
    try:
        made = output.finished()
        spill.keep(made)
    except Exception as error:
        trouble = _whose(error, stage)
        if isinstance(trouble, OutOfMemory) and not alone and output.finish is not None:
            return output
        made = Output(output.key, error=trouble)
    if made.error is not None:
        _without_frames(made.error)
    if last:
        spill.flush()
    return made


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
