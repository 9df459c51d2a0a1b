"""Read, compute and write at the same time, each in a thread of its own, with a few blocks under way between them."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
_UNDER_WAY = 2  # blocks read ahead, and as many not yet written
_FLUSH_BYTES = 64 << 20


def pipelined(
    items: Iterable[Item],
    read: Callable[[Item], Tensor],
    compute: Callable[[Item, Tensor], Tensor],
    write: Callable[[Item, Tensor], None],
) -> None:
    """`write(item, compute(item, read(item)))` for every item, in their order; `compute` runs in the caller's thread.

    The first error of any of the three ends it, and is raised here once no thread is at work any more.
    """
    reads: deque[tuple[Item, Future[Tensor]]] = deque()
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def step() -> None:
            item, future = reads.popleft()
            writes.append(writer.submit(write, item, compute(item, future.result())))
            if len(writes) > _UNDER_WAY:
                writes.popleft().result()

        for item in items:
            reads.append((item, reader.submit(read, item)))
            if len(reads) > _UNDER_WAY:
                step()
        while reads:
            step()
        while writes:
            writes.popleft().result()


class Files:
    """Files open for reading at places, for as long as the context lasts."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, path: Path, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of a file (uint8).

        Raises:
            OSError: it cannot be read, or ends before.
        """
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        result = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(result.numpy().data)
        while view:
            count = os.preadv(self._descriptors[path], [view], stop - len(view))
            if not count:
                raise OSError(f"{path.name} has become shorter")
            view = view[count:]
        return result


class Output:
    """A file that goes to the disk while it grows, so that little is left to be done when it must be there."""

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self._file: Any = path.open("ab" if append else "wb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._waiting = 0

    def write(self, data: Tensor) -> None:
        """Append a contiguous tensor's bytes.

        Raises:
            OSError: the disk is full, or gone.
        """
        write_all(self._file, data)
        self._waiting += data.nbytes
        if self._waiting >= _FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            self._settle()
            self._flushed, self._waiting = self._flusher.submit(os.fdatasync, self._file.fileno()), 0

    def pad(self, alignment: int) -> None:
        """Zeros up to a multiple of `alignment`."""
        write_all(self._file, torch.zeros(-self._file.seek(0, os.SEEK_END) % alignment, dtype=torch.uint8))

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


def write_all(file: Any, data: Tensor) -> None:
    """Write a contiguous tensor's bytes to an unbuffered file.

    Raises:
        OSError: the disk is full, or gone.
    """
    view = memoryview(data.view(torch.uint8).numpy().reshape(-1).data) if data.numel() else memoryview(b"")
    while view:
        view = view[file.write(view) :]
