"""Keeps what was made, within a number of bytes: in memory or on this machine's disk. Threads may share a cache."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values in memory, of at most `limit` bytes together; what was used last stays longest.

    What several threads ask for at the same time is made once. A limit of 0 keeps nothing beyond that.
    """

    def __init__(self, limit: int, size: Callable[[Value], int] = lambda _: 1) -> None:
        self._limit, self._size = limit, size
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._under_way: dict[Hashable, Future[Value]] = {}
        self.bytes = 0

    def get(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `name`, made if it is not there. A value that is larger than the limit is kept alone."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
                return self._values[name]
            known = self._under_way.get(name)
            future = self._under_way[name] = known or Future()
        if known:
            return known.result()
        try:
            value = make()
            self.put(name, value)
            future.set_result(value)
            return value
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[name]

    def put(self, name: Hashable, value: Value) -> None:
        """Keep a value."""
        with self._lock:
            if name in self._values:
                self.bytes -= self._size(self._values.pop(name))
            self._values[name] = value
            self.bytes += self._size(value)
            while self.bytes > self._limit and len(self._values) > bool(self._limit):
                self.bytes -= self._size(self._values.popitem(last=False)[1])

    def peek(self, name: Hashable) -> Value | None:
        """The value of `name`, if it is there."""
        with self._lock:
            return self._values.get(name)


class KeptOnDisk:
    """Files in a folder, of at most `limit` bytes together; what was used last stays longest. The folder is ours."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._under_way: Kept[bytes] = Kept(0)
        self.bytes = 0

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The content of `name`, made if it is not there."""
        file = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        with self._lock:
            there = file in self._sizes
            if there:
                self._sizes.move_to_end(file)
        if there:
            with suppress(OSError):  # another thread has just deleted it
                return (self._folder / file).read_bytes()
        return self._under_way.get(file, lambda: self._made(file, make))

    def _made(self, file: str, make: Callable[[], bytes]) -> bytes:
        data = make()
        try:
            (self._folder / file).write_bytes(data)
        except OSError:  # the disk is full: what cannot be kept is made again
            (self._folder / file).unlink(missing_ok=True)
            return data
        with self._lock:
            self.bytes += len(data) - self._sizes.pop(file, 0)
            self._sizes[file] = len(data)
            while self.bytes > self._limit and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                (self._folder / oldest).unlink(missing_ok=True)
                self.bytes -= size
        return data


class Budget:
    """Lets threads hold at most `limit` bytes together. One that needs more than that waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Within the block, `size` bytes are held."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
