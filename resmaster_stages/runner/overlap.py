"""Two threads beside the one that computes: one reads the slot that comes next, one finishes the samples before.

Knows nothing about stages, nor about what goes wrong in them.

Invariants:
- One slot at most is read ahead, and no more outputs wait to be finished than the caller leaves there, and one.
- Outputs are finished, and handed on, in the order in which they came.
- An error is raised where its sample is asked for. At the end of the block what waits is finished, then the threads
  end.
- Both threads work in the context of their caller: who counts and who hears of progress is the same there.
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
    """A thread beside the caller's, from its first task to the end of the block."""

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
    """The samples of a shard. The slot that is said to follow is read, and its images are decoded, in the thread."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self._samples = samples
        self._ahead: tuple[range, Future[list[Sample]]] | None = None

    def read(self, slot: range, then: range | None = None) -> list[Sample]:
        """The samples of `slot`, after which those of `then` will be asked for; again, if need be."""
        if self._ahead and self._ahead[0] == slot:
            (_, coming), self._ahead = self._ahead, None
            samples = coming.result()
        else:
            samples = [self._samples[place] for place in slot]
        if then is not None and self._ahead is None:
            self._ahead = then, self._start(lambda: self._decoded(then))
        return samples

    def _decoded(self, slot: range) -> list[Sample]:
        samples = [self._samples[place] for place in slot]
        for sample in samples:
            for image in (sample.low_res, sample.detail_mask, sample.high_res):
                if image is not None:
                    image.decode_ahead()
        return samples


class Finishing(_Beside):
    """Outputs on their way from a stage to its shard, each of which passes through `finish` in the thread.

    finish: an output, and whether it is the last one of its slot -> the output finished, or as it came if there is not
    the memory for it beside the computing; then it is asked once more, with True, when nothing is computed.
    """

    def __init__(self, finish: Callable[[Output, bool, bool], Output]) -> None:
        super().__init__()
        self._finish = finish
        self._waiting: deque[tuple[str, Future[Output]]] = deque()

    def keys(self) -> list[str]:
        """What is not finished yet."""
        return [key for key, future in self._waiting if not future.done()]

    def put(self, output: Output, last: bool) -> None:
        """Take an output in."""
        self._waiting.append((output.key, self._start(lambda: self._finish(output, last, False))))

    def take(self, leave: int) -> Iterator[Output]:
        """Hand on the first ones, finished, until `leave` are left. To be called while nothing is computed."""
        while len(self._waiting) > leave:
            output = self._waiting.popleft()[1].result()
            if output.finish is not None:
                output = self._once_more(output)
            yield output

    def _once_more(self, output: Output) -> Output:
        release_memory()
        return self._start(lambda: self._finish(output, False, True)).result()
