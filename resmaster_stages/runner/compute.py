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
- Slots are always those of an uninterrupted run, so a resumed shard has the same bytes. A slot is computed only if one
  of its samples is not ready; ready outputs are passed on unchanged. Halved batches, and samples that run alone, give
  the same images up to rounding.
"""

from __future__ import annotations

import traceback
from collections import ChainMap
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.stages import Process, Stage
from resmaster_stages.errors import GpuLost, OutOfMemory, Quarantined, ResMasterError, SampleError, ShardError
from resmaster_stages.models.faults import fault_of, release_memory
from resmaster_stages.runner.overlap import Finishing, Reading
from resmaster_stages.runner.quarantine import ALONE_STRIKES, OUT_STRIKES, Breadcrumbs
from resmaster_stages.runner.resume import Spill

if TYPE_CHECKING:
    from resmaster_stages.dataset.reading import ShardSamples


def batch_of(config: DatasetConfig, stage: Stage) -> int | None:
    """The batch size of `stage` on the device; None if the device's memory decides."""
    if stage.batch is None:
        return 1
    part, field = stage.batch
    size: int | None = getattr(getattr(config, part), field)
    return size


def half_batch(error: OutOfMemory, config: DatasetConfig, stage: Stage) -> int:
    """Half of the batch size for which memory ran out; 1 if that size is unknown, 0 if nothing smaller can be tried."""
    sizes = [size for size in (error.batch, batch_of(config, stage)) if size is not None]
    return min(sizes, default=2) // 2


def with_batch(config: DatasetConfig, stage: Stage, size: int) -> DatasetConfig:
    """`config` with another batch size. Batch sizes are operational, so the identity stays the same."""
    if stage.batch is None:
        return config
    part, field = stage.batch
    return config.model_copy(update={part: getattr(config, part).model_copy(update={field: size})})


@dataclass
class _Work:
    """One stage at work on one shard."""

    process: Process
    config: DatasetConfig
    """The batch size in it is halved when memory runs out."""
    stage: Stage
    samples: ShardSamples
    ready: Mapping[str, Output]
    breadcrumbs: Breadcrumbs
    reading: Reading
    finishing: Finishing

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
) -> Generator[Output, None, None]:
    """Yield one Output per sample, in order.

    earlier: outputs of an earlier attempt, which are passed on unchanged. Raises ShardError if `process` does not give
    one Output per sample in order, and errors that are not the fault of a sample.
    """
    keys = samples.keys()
    ready: dict[str, Output] = spill.read(keys) if keys else {}
    for key, strikes in breadcrumbs.strikes.items():
        if strikes >= OUT_STRIKES:
            error = Quarantined(f"the process died {strikes} times while this sample was at work; it is left out")
            ready[key] = Output(key, error=error)
    try:
        with Reading(samples) as reading, Finishing(partial(_finished, stage, spill)) as finishing:
            either = ChainMap(ready, earlier)  # type: ignore[arg-type]  # it is only read
            work = _Work(process, config, stage, samples, either, breadcrumbs, reading, finishing)
            yield from _computed(work)
    except GpuLost:
        breadcrumbs.blame()
        raise
    finally:
        breadcrumbs.leave()


def _computed(work: _Work) -> Iterator[Output]:
    """The Outputs of all samples, in order."""
    keys, finishing, size = work.samples.keys(), work.finishing, work.stage.slot(work.config)
    slots = [range(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    due = [slot for slot in slots if any(keys[place] not in work.ready for place in slot)]
    after, unfinished = dict(pairwise(due)), set(due)
    for slot in slots:
        if slot not in unfinished:
            yield from finishing.take(leave=0)
            yield from (work.ready[keys[place]] for place in slot)
            continue
        following = None if work.one_by_one else after.get(slot)
        for outputs in _outputs_of(work, slot, following):
            fresh = [output.key for output in outputs if output.key not in work.ready]
            alone = work.one_by_one or len(outputs) < len(slot) or any(output.error is not None for output in outputs)
            for output in outputs:
                if output.key in fresh:
                    finishing.put(output, last=output.key == fresh[-1])
                else:
                    yield from finishing.take(leave=0)
                    yield work.ready[output.key]
            del outputs, output  # so that their images are freed as soon as they are encoded
            yield from finishing.take(leave=0 if alone else size)
    yield from finishing.take(leave=0)


def _outputs_of(work: _Work, slot: range, following: range | None) -> Iterator[list[Output]]:
    """The Outputs of one slot's samples, in order: computed together, or one by one after strikes or errors."""
    strikes = (work.breadcrumbs.strikes.get(key, 0) for key in _keys(work, slot))
    suspected = len(slot) > 1 and any(count >= ALONE_STRIKES for count in strikes)
    together = None if suspected else _together(work, slot, following)
    if together is not None:
        yield together
    else:
        yield from ([_alone(work, place)] for place in slot)


def _together(work: _Work, slot: range, following: range | None) -> list[Output] | None:
    """The Outputs of one slot's samples, in order; None if an unknown one of several samples is at fault."""
    while True:
        try:
            return _called(work, work.config, slot, following)
        except Exception as error:
            trouble = _without_frames(_whose(error, work.stage))
        half = half_batch(trouble, work.config, work.stage) if isinstance(trouble, OutOfMemory) else 0
        if isinstance(trouble, OutOfMemory):
            release_memory()
        if half:
            work.config = with_batch(work.config, work.stage, half)
        else:
            return [Output(_keys(work, slot)[0], error=trouble)] if len(slot) == 1 else None


def _alone(work: _Work, place: int) -> Output:
    """The Output of one sample, computed alone; used after strikes or errors in its slot."""
    slot = range(place, place + 1)
    (key,) = _keys(work, slot)
    if key in work.ready:
        return work.ready[key]
    try:
        return _called(work, with_batch(work.config, work.stage, 1), slot)[0]
    except Exception as error:
        trouble = _without_frames(_whose(error, work.stage))
    if isinstance(trouble, OutOfMemory):
        release_memory()
    return Output(key, error=trouble)


def _called(work: _Work, config: DatasetConfig, slot: range, following: range | None = None) -> list[Output]:
    """Call `process` on the samples of a slot, while the samples of the slot `following` are read.

    Raises ShardError unless `process` gives one Output per sample, in order.
    """
    due = _keys(work, slot)
    work.breadcrumbs.at(due, work.finishing.keys())  # before anything of the samples is read
    outputs = list(work.process(config, work.reading.read(slot, following)))
    found = [output.key for output in outputs]
    if found != due:
        raise ShardError(
            f"the stage {work.stage.name} gave samples {', '.join(found) or 'none'} where {', '.join(due)} were due"
        )
    return outputs


def _keys(work: _Work, slot: range) -> list[str]:
    return [work.samples.planned[place].key for place in slot]


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
