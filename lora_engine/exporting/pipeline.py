"""Pieces of work spread over threads, and the files that they read from and write to, at places known beforehand."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
_FLUSH_BYTES = 64 << 20
PAGE = 4096


def spread(
    items: Iterable[Item], work: Callable[[Item], Result], done: Callable[[Item, Result], None], threads: int
) -> None:
    """`done(item, work(item))` for every item, in their order; `done` and the items' iterator run in this thread.

    While one thread waits for the disk, another computes. The first error ends it, and is raised here once no thread
    is at work any more.
    """
    under_way: deque[tuple[Item, Future[Result]]] = deque()

    def finish() -> None:
        item, future = under_way.popleft()
        done(item, future.result())

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                under_way.append((item, pool.submit(work, item)))
                if len(under_way) > threads:
                    finish()
            while under_way:
                finish()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Buffers(threading.local):
    """Memory of this thread, used again: fresh memory costs as much as what is done with it."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, size: int, place: int = 0) -> Tensor:
        """`size` bytes (uint8) that are valid until the next call with this name.

        They lie within pages as bytes from `place` of a file do, which lets the disk reach them without a copy.
        """
        if name not in self._memory or len(self._memory[name]) < size + PAGE:
            self._memory[name] = torch.empty(size + PAGE, dtype=torch.uint8)
        memory = self._memory[name]
        first = (place - memory.data_ptr()) % PAGE
        return memory[first : first + size]


class _File:
    """Open twice: whole pages go between memory and disk without a copy in the page cache, where that can be.

    Copying into fresh pages of the cache takes as much of a processor as computing what they hold does.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self._name = path.name
        self.descriptor = os.open(path, flags, 0o600)
        try:
            self._direct: int | None = os.open(path, flags | os.O_DIRECT)
        except (OSError, AttributeError):  # file systems in memory, and other systems, have no such thing
            self._direct = None

    def read(self, data: Tensor, start: int) -> None:
        """Fill `data` with what the file has from byte `start`; raises OSError where it ends before."""
        self._move(data, start, _preadv)

    def write(self, data: Tensor, start: int) -> None:
        self._move(data, start, os.pwritev)

    def close(self) -> None:
        for descriptor in (self.descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _move(self, data: Tensor, start: int, move: Callable[[int, list[memoryview], int], int]) -> None:
        view = memoryview(data.numpy().data)
        first, last = self._pages(data, start)
        plain, direct = self.descriptor, self.descriptor if self._direct is None else self._direct
        for descriptor, begin, end in ((plain, 0, first), (direct, first, last), (plain, last, len(data))):
            while begin < end:
                count = move(descriptor, [view[begin:end]], start + begin)
                if not count:
                    raise OSError(f"{self._name} has become shorter")
                begin += count

    def _pages(self, data: Tensor, start: int) -> tuple[int, int]:
        """Which bytes of `data`, from byte `start` of the file on, are whole pages of both."""
        first = -start % PAGE
        last = first + (len(data) - first) // PAGE * PAGE
        whole = self._direct is not None and last > first and (data.data_ptr() + first) % PAGE == 0
        return (first, last) if whole else (0, 0)


class Files:
    """Files open for reading at places, by any thread, for as long as the context lasts."""

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, path: Path, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Bytes [start, stop) of a file (uint8), in memory that is given or new.

        Raises:
            OSError: it cannot be read, or ends before.
        """
        result = torch.empty(stop - start, dtype=torch.uint8) if into is None else into
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, os.O_RDONLY)
        self._files[path].read(result, start)
        return result


class Output:
    """A file of a size known beforehand, written at places by any thread; what is not written is zeros.

    Its room is taken at once, which makes writing cheaper and finds a full disk first. It goes to the disk while it
    grows, so that little is left to be done when it must be there.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Keeps what the file has; raises OSError where there is no room."""
        self._file = _File(path, os.O_RDWR | os.O_CREAT)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._lock = threading.Lock()
        self._waiting = 0
        try:
            if size:
                os.posix_fallocate(self._file.descriptor, 0, size)
        except OSError:
            self.close()
            raise

    def write(self, data: Tensor, start: int) -> None:
        """A contiguous tensor's bytes, from byte `start` of the file.

        Raises:
            OSError: the disk is gone, or full where it cannot keep room.
        """
        if data.numel():
            self._file.write(data.reshape(-1).view(torch.uint8), start)
        with self._lock:
            self._waiting += data.nbytes
            if self._waiting >= _FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
                self._settle()
                self._flushed, self._waiting = self._flusher.submit(os.fdatasync, self._file.descriptor), 0

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Raises OSError where what was written did not reach the disk."""
        try:
            self._settle()
        finally:
            self._flusher.shutdown()
            self._file.close()

    def _settle(self) -> None:
        if self._flushed is not None:
            self._flushed.result()


def _preadv(descriptor: int, views: list[memoryview], start: int) -> int:
    return os.preadv(descriptor, views, start)
