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

    def get(self, name: str, size: int) -> Tensor:
        """`size` bytes (uint8) that are valid until the next call with this name."""
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
        return self._memory[name][:size]


class Files:
    """Files open for reading at places, by any thread, for as long as the context lasts."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, path: Path, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Bytes [start, stop) of a file (uint8), in memory that is given or new.

        Raises:
            OSError: it cannot be read, or ends before.
        """
        result = torch.empty(stop - start, dtype=torch.uint8) if into is None else into
        view = memoryview(result.numpy().data)
        descriptor = self._descriptor(path)
        while view:
            count = os.preadv(descriptor, [view], stop - len(view))
            if not count:
                raise OSError(f"{path.name} has become shorter")
            view = view[count:]
        return result

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]


class Output:
    """A file of a size known beforehand, written at places by any thread; what is not written is zeros.

    Its room is taken at once, which makes writing cheaper and finds a full disk first. It goes to the disk while it
    grows, so that little is left to be done when it must be there.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Keeps what the file has; raises OSError where there is no room."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._lock = threading.Lock()
        self._waiting = 0
        try:
            if size:
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError:
            self.close()
            raise

    def write(self, data: Tensor, start: int) -> None:
        """A contiguous tensor's bytes, from byte `start` of the file.

        Raises:
            OSError: the disk is gone, or full where it cannot keep room.
        """
        view = memoryview(data.view(torch.uint8).numpy().reshape(-1).data) if data.numel() else memoryview(b"")
        stop = start + len(view)
        while view:
            view = view[os.pwrite(self._descriptor, view, stop - len(view)) :]
        with self._lock:
            self._waiting += data.nbytes
            if self._waiting >= _FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
                self._settle()
                self._flushed, self._waiting = self._flusher.submit(os.fdatasync, self._descriptor), 0

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
            os.close(self._descriptor)

    def _settle(self) -> None:
        if self._flushed is not None:
            self._flushed.result()
