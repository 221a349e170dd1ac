"""Two threads beside the computing thread: one reads the next slot, the other finishes the samples before.

Invariants:
- At most one slot is read ahead. `Finishing.take(leave)` limits the outputs that wait to be finished to `leave`.
- Outputs are finished and passed on in the order in which they came.
- An error is raised where its sample is taken. At the end of the block, waiting outputs are finished, and then the
  threads end.
- Both threads run in a copy of their caller's context, so counters and progress listeners are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Self, TypeVar

from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.models.faults import release_memory

T = TypeVar("T")


class _Beside:
    """A thread beside the caller's thread, from its first task to the end of the block."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, type(self).__name__)

    def _start(self, task: Callable[[], T]) -> Future[T]:
        return self._pool.submit(copy_context().run, task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


class Reading(_Beside):
    """Reads the samples of a shard. The thread reads the following slot and decodes its images."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self._samples = samples
        self._ahead: tuple[Sequence[int], Future[list[Sample]]] | None = None

    def read(self, slot: Sequence[int], then: Sequence[int] | None = None) -> list[Sample]:
        """The samples at the places `slot`. The thread begins to read the slot `then`, which should be asked for
        next."""
        if self._ahead and self._ahead[0] == slot:
            (_, coming), self._ahead = self._ahead, None
            samples = coming.result()
        else:
            samples = [self._samples[place] for place in slot]
        if then is not None and self._ahead is None:
            self._ahead = then, self._start(lambda: self._decoded(then))
        return samples

    def _decoded(self, slot: Sequence[int]) -> list[Sample]:
        samples = [self._samples[place] for place in slot]
        for sample in samples:
            for image in (sample.low_res, sample.detail_mask, sample.high_res):
                if image is not None:
                    image.decode_ahead()
        return samples


class Finishing(_Beside):
    """Outputs on their way from a stage to its shard. The thread calls `finish` on each of them.

    finish: (output, whether it is the last of its slot, whether nothing is computed meanwhile) -> the finished output,
    or the same output if memory ran out beside the computing. Such an output is finished once more, with (False, True),
    while nothing is computed.
    """

    def __init__(self, finish: Callable[[Output, bool, bool], Output]) -> None:
        super().__init__()
        self._finish = finish
        self._waiting: deque[tuple[str, Future[Output]]] = deque()

    def keys(self) -> list[str]:
        """The keys of outputs that are not finished yet."""
        return [key for key, future in self._waiting if not future.done()]

    def put(self, output: Output, last: bool) -> None:
        """Add an output to be finished."""
        self._waiting.append((output.key, self._start(lambda: self._finish(output, last, False))))

    def take(self, leave: int) -> Iterator[Output]:
        """Yield finished outputs, in order, until `leave` are left. To be called while nothing is computed."""
        while len(self._waiting) > leave:
            output = self._waiting.popleft()[1].result()
            if output.finish is not None:
                output = self._once_more(output)
            yield output

    def _once_more(self, output: Output) -> Output:
        release_memory()
        return self._start(lambda: self._finish(output, False, True)).result()
