"""Runs a stage's `process` over the samples of a shard, slot by slot, and finds the samples that cause errors.

This module does not write outputs and does not look inside them.

Invariants:
- There is exactly one Output per sample, in the plan's order, even if samples fail.
- An error is traced to its sample. If memory runs out, the batch is halved, down to 1. After any other error in a slot,
  the samples of the slot run one by one. The error of a single sample becomes its Output's error. A lost device, the
  user's mistakes and a failing store or network are not the fault of a sample: such errors are raised.
- While a slot is computed, the slot before it is finished and spilled, and the next slot is read (`overlap`). An error
  in finishing belongs to its own sample. If memory runs out in finishing, the sample is finished once more, while
  nothing is computed.
- In a shard in which a process died before, each sample is finished before the next one begins, so that there is one
  suspect if the process dies again.
- Slots are always those of an uninterrupted run. A slot is computed only if one of its samples is not ready; ready
  outputs are passed on unchanged.
- Every computed output says in which batch it was made (`Output.batch`), because halved batches, and samples that run
  alone, round differently. To make a commit again, each sample is computed in the batch that the record names, with all
  samples of its slot, the failed ones too. Nothing is halved or run alone then.
"""

from __future__ import annotations

import traceback
from collections import ChainMap
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.batches import Batch
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.stages import Process, Stage
from resmaster_stages.errors import GpuLost, OutOfMemory, Quarantined, ResMasterError, SampleError, ShardError
from resmaster_stages.models.faults import fault_of, release_memory
from resmaster_stages.runner.overlap import Finishing, Reading
from resmaster_stages.runner.quarantine import ALONE_STRIKES, OUT_STRIKES, Breadcrumbs
from resmaster_stages.runner.resume import Spill
from resmaster_stages.runner.threads import torch_threads, using_threads

if TYPE_CHECKING:
    from resmaster_stages.dataset.reading import ShardSamples


def batch_of(config: DatasetConfig, stage: Stage) -> int | None:
    """The batch size of `stage` on the device; None if the device's memory decides."""
    if stage.batch is None:
        return 1
    part, field = stage.batch
    size: int | None = getattr(getattr(config, part), field, 1)  # methods without base model have no such field
    return size


def usual_batch(config: DatasetConfig, stage: Stage, lost: Collection[str]) -> Batch:
    """The batch in which an undisturbed attempt computes samples, with the batch size in force.

    lost: planned samples that an earlier stage has lost.
    """
    slot = stage.slot(config)
    return Batch(slot, lost=tuple(sorted(lost)) if slot > 1 else ())


def half_batch(error: OutOfMemory, config: DatasetConfig, stage: Stage) -> int:
    """Half of the batch size for which memory ran out; 1 if that size is unknown, 0 if nothing smaller can be tried."""
    sizes = [size for size in (error.batch, batch_of(config, stage)) if size is not None]
    return min(sizes, default=2) // 2


def with_batch(config: DatasetConfig, stage: Stage, size: int) -> DatasetConfig:
    """`config` with another batch size. Batch sizes are operational, so the identity stays the same."""
    part, field = stage.batch or ("", "")
    if not hasattr(getattr(config, part, None), field):
        return config
    return config.model_copy(update={part: getattr(config, part).model_copy(update={field: size})})


@dataclass(frozen=True)
class _Slot:
    """Samples that are given to the stage together."""

    places: tuple[int, ...]
    """Their places in the shard."""
    batch: Batch
    """How they are computed. Where its size is None, the batch size in force counts."""
    wanted: frozenset[str]
    """The samples whose outputs are used."""


@dataclass
class _Work:
    """One stage at work on one shard."""

    process: Process
    config: DatasetConfig
    """The batch size in it is halved when memory runs out."""
    stage: Stage
    samples: ShardSamples
    breadcrumbs: Breadcrumbs
    reading: Reading
    finishing: Finishing
    as_recorded: bool
    """Whether a commit is made again, in the batches of its record."""

    @property
    def one_by_one(self) -> bool:
        """Whether nothing may overlap, because a process died in this shard and a further death needs one suspect."""
        return bool(self.breadcrumbs.strikes)


def compute(
    process: Process,
    config: DatasetConfig,
    stage: Stage,
    samples: ShardSamples,
    earlier: Mapping[str, Output],
    spill: Spill,
    breadcrumbs: Breadcrumbs,
    batches: Mapping[str, Batch] | None = None,
) -> Generator[Output, None, None]:
    """Yield one Output per sample, in order.

    earlier: outputs of an earlier attempt, which are passed on unchanged. batches: key -> the batch that a commit
    record names; then only these samples are made, in these batches. Raises ShardError if `process` does not give one
    Output per sample in order, and errors that are not the fault of a sample.
    """
    keys = [key for key in samples.keys() if batches is None or key in batches]  # noqa: SIM118
    ready = _resumed(spill, [key for key in keys if key not in earlier], batches)
    for key, strikes in breadcrumbs.strikes.items():
        if strikes >= OUT_STRIKES:
            error = Quarantined(f"the process died {strikes} times while this sample was at work; it is left out")
            ready.setdefault(key, Output(key, error=error))
    either = ChainMap(earlier, ready)  # type: ignore[arg-type]  # it is only read
    asked = batches or dict.fromkeys(keys, usual_batch(config, stage, samples.without))
    slots = _slots(samples.keys(), {key: batch for key, batch in asked.items() if key not in either})
    try:
        with Reading(samples) as reading, Finishing(partial(_finished, stage, spill)) as finishing:
            work = _Work(process, config, stage, samples, breadcrumbs, reading, finishing, batches is not None)
            yield from _in_order(keys, either, _computed(work, slots))
    except GpuLost:
        breadcrumbs.blame()
        raise
    finally:
        breadcrumbs.leave()


def _resumed(spill: Spill, keys: Sequence[str], batches: Mapping[str, Batch] | None) -> dict[str, Output]:
    """Key -> spilled output, for those of `keys` that were made in a known batch: in that of `batches`, if given."""
    found = spill.read(keys) if keys else {}
    return {key: out for key, out in found.items() if out.batch and (batches is None or out.batch == batches[key])}


def _slots(keys: Sequence[str], batches: Mapping[str, Batch]) -> list[_Slot]:
    """The slots that hold the samples in `batches`, in order. A slot is there once for each of its samples' batches."""
    slots = []
    for batch in dict.fromkeys(batches.values()):
        lost = {key for key in batch.lost if batches.get(key) != batch}
        places = [place for place, key in enumerate(keys) if key not in lost]
        for start in range(0, len(places), batch.slot):
            own = tuple(places[start : start + batch.slot])
            wanted = frozenset(keys[place] for place in own if batches.get(keys[place]) == batch)
            if wanted:
                slots.append(_Slot(own, batch, wanted))
    return sorted(slots, key=lambda slot: slot.places)


def _in_order(keys: Sequence[str], ready: Mapping[str, Output], computed: Iterator[Output]) -> Iterator[Output]:
    """One Output per key, in order: the ready one, or the computed one."""
    early: dict[str, Output] = {}
    for key in keys:
        if key in ready:
            yield ready[key]
            continue
        while key not in early:
            output = next(computed)
            early[output.key] = output
        yield early.pop(key)


def _computed(work: _Work, slots: Sequence[_Slot]) -> Iterator[Output]:
    """The wanted outputs of the slots, slot by slot."""
    after = dict(pairwise(slots))
    for slot in slots:
        following = None if work.one_by_one else after.get(slot)
        for outputs in _outputs_of(work, slot, following):
            wanted = [output for output in outputs if output.key in slot.wanted]
            failed = any(output.error is not None for output in outputs)
            alone = work.one_by_one or failed or len(outputs) < len(slot.places)
            for output in wanted:
                work.finishing.put(output, last=output is wanted[-1])
            del outputs, wanted, output  # so that their images are freed as soon as they are encoded
            yield from work.finishing.take(leave=0 if alone else len(slot.places))
    yield from work.finishing.take(leave=0)


def _outputs_of(work: _Work, slot: _Slot, following: _Slot | None) -> Iterator[list[Output]]:
    """The Outputs of one slot's samples, in order: computed together, or one by one after strikes or errors."""
    strikes = (work.breadcrumbs.strikes.get(key, 0) for key in _keys(work, slot))
    several = len(slot.places) > 1 and not work.as_recorded
    suspected = several and any(count >= ALONE_STRIKES for count in strikes)
    together = None if suspected else _together(work, slot, following)
    if together is not None:
        yield together
    else:
        yield from ([_alone(work, place)] for place, key in zip(slot.places, _keys(work, slot)) if key in slot.wanted)


def _together(work: _Work, slot: _Slot, following: _Slot | None) -> list[Output] | None:
    """The Outputs of one slot's samples, in order; None if an unknown one of several samples is at fault."""
    while True:
        try:
            return _called(work, slot, following)
        except Exception as error:
            trouble = _without_frames(_whose(error, work.stage))
        half = half_batch(trouble, work.config, work.stage) if isinstance(trouble, OutOfMemory) else 0
        if isinstance(trouble, OutOfMemory):
            release_memory()
        if work.as_recorded or (not half and len(slot.places) == 1):
            return [Output(key, error=trouble) for key in _keys(work, slot)]
        if not half:
            return None
        work.config = with_batch(work.config, work.stage, half)


def _alone(work: _Work, place: int) -> Output:
    """The Output of one sample, computed alone; used after strikes or errors in its slot."""
    key = work.samples.planned[place].key
    try:
        return _called(work, _Slot((place,), Batch(slot=1, size=1), frozenset([key])))[0]
    except Exception as error:
        trouble = _without_frames(_whose(error, work.stage))
    if isinstance(trouble, OutOfMemory):
        release_memory()
    return Output(key, error=trouble)


def _called(work: _Work, slot: _Slot, following: _Slot | None = None) -> list[Output]:
    """Call `process` on the samples of a slot, while the samples of the slot `following` are read.

    Raises ShardError unless `process` gives one Output per sample, in order.
    """
    due, batch, config = _keys(work, slot), slot.batch, work.config
    if batch.size is not None:
        config = with_batch(config, work.stage, batch.size)
    work.breadcrumbs.at(due, work.finishing.keys())  # before anything of the samples is read
    samples = work.reading.read(slot.places, following.places if following else None)
    with using_threads(batch.threads):
        outputs = list(work.process(config, samples))
        threads = torch_threads()
    found = [output.key for output in outputs]
    if found != due:
        raise ShardError(
            f"the stage {work.stage.name} gave samples {', '.join(found) or 'none'} where {', '.join(due)} were due"
        )
    size = batch_of(config, work.stage)
    return [
        replace(output, batch=replace(batch, size=output.batch_size or size, threads=threads)) for output in outputs
    ]


def _keys(work: _Work, slot: _Slot) -> list[str]:
    return [work.samples.planned[place].key for place in slot.places]


def _finished(stage: Stage, spill: Spill, output: Output, last: bool, alone: bool) -> Output:
    """Finish `output`: make its files, and spill the waiting outputs if it is the `last` of its slot.

    Returns the finished output, or one with the sample's error. If memory ran out and nothing says that the output is
    finished `alone`, returns `output` unchanged. Raises errors that are not the fault of the sample.
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
    """The error, if it is the fault of a sample. Otherwise raises it, or the error that it stands for."""
    if isinstance(error, (SampleError, OutOfMemory)):
        return error
    if isinstance(error, ResMasterError):
        raise error
    fault = fault_of(error, f"lower {'.'.join(stage.batch)}" if stage.batch else f"set {stage.name}.device: cpu")
    if isinstance(fault, GpuLost):
        raise fault from error
    if fault is not None:
        return fault
    if isinstance(error, OSError):
        raise error
    return _located(error)


def _located(error: Exception) -> Exception:
    """An unforeseen error, with a note of the file and line where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    error.add_note(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}")
    return error


def _without_frames(error: Exception) -> Exception:
    """`error` without tracebacks, because their frames would keep tensors alive."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
