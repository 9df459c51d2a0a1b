"""Work is spread over threads in order and within bounds, its first error is passed on; files are read and written."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_engine.exporting import pipeline
from lora_engine.exporting.pipeline import Buffers, Files, Output, spread

THREADS = 3


def test_order_and_bound() -> None:
    taken = 0
    finished: list[int] = []
    ahead: list[int] = []

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(100):
            taken += 1
            ahead.append(taken - len(finished))
            yield item

    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))  # later ones are ready first
        return 2 * item

    def done(item: int, result: int) -> None:
        assert result == 2 * item
        finished.append(item)

    spread(items(), work, done, THREADS)
    assert finished == list(range(100))
    assert max(ahead) <= THREADS + 2


def test_as_many_work_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(THREADS, timeout=10)  # broken, and an error, unless all of them come
    spread(range(2 * THREADS), lambda _: together.wait(), lambda *_: None, THREADS)


@pytest.mark.parametrize("place", ["items", "work", "done"])
def test_the_first_error_ends_it(place: str) -> None:
    worked: list[int] = []
    finished: list[int] = []

    def fail(where: str, item: int) -> None:
        if where == place and item >= 5:
            raise ValueError(f"{where} {item}")

    def items() -> Iterator[int]:
        for item in range(1000):
            fail("items", item)
            yield item

    def work(item: int) -> int:
        fail("work", item)
        worked.append(item)
        return item

    def done(item: int, _: int) -> None:
        fail("done", item)
        finished.append(item)

    before = threading.active_count()
    with pytest.raises(ValueError, match=f"{place} 5"):
        spread(items(), work, done, THREADS)
    assert finished == list(range(len(finished)))
    assert len(finished) <= 5
    assert len(worked) < 20
    assert threading.active_count() == before


def test_buffers_are_used_again_by_their_own_thread_alone() -> None:
    buffers = Buffers()
    first = buffers.get("a", 100).data_ptr()
    assert buffers.get("a", 60).data_ptr() == first
    assert len(buffers.get("a", 60)) == 60
    assert buffers.get("b", 60).data_ptr() != first
    assert len(buffers.get("a", 200)) == 200
    mine, other = buffers.get("a", 200).data_ptr(), []
    thread = threading.Thread(target=lambda: other.append(buffers.get("a", 200)))
    thread.start()
    thread.join()
    assert other[0].data_ptr() != mine


def test_files_and_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_FLUSH_BYTES", 8)
    data = torch.arange(100, dtype=torch.int16)
    (tmp_path / "file").write_bytes(b"kept")
    with Output(tmp_path / "file", 256) as output:
        for start in reversed(range(0, 100, 10)):
            output.write(data[start : start + 10], 16 + 2 * start)
    assert (tmp_path / "file").read_bytes() == b"kept" + bytes(12) + data.numpy().tobytes() + bytes(40)
    with Files() as files:
        assert torch.equal(files.read(tmp_path / "file", 36, 216).view(torch.int16), data[10:])
        into = torch.empty(4, dtype=torch.uint8)
        assert files.read(tmp_path / "file", 0, 4, into) is into
        assert bytes(into) == b"kept"
        with pytest.raises(OSError, match="shorter"):
            files.read(tmp_path / "file", 250, 300)


def test_an_output_for_which_there_is_no_room_is_closed_again(tmp_path: Path) -> None:
    before, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    with pytest.raises(OSError, match=r"No space left|too large"):
        Output(tmp_path / "file", 1 << 62)
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == (before, threads)


def test_what_does_not_reach_the_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(pipeline, "_FLUSH_BYTES", 8)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="gone"), Output(tmp_path / "file", 100) as output:
        output.write(torch.zeros(50), 0)


@pytest.mark.parametrize("start", [0, 1, 100, 4095, 4096])
@pytest.mark.parametrize("size", [1, 4095, 4097, 20_000])
def test_pages_that_go_past_the_cache_join_with_those_that_do_not(tmp_path: Path, start: int, size: int) -> None:
    buffers, data = Buffers(), (torch.arange(size) % 251).to(torch.uint8)
    placed = buffers.get("written", size, start).copy_(data)
    assert placed.data_ptr() % pipeline.PAGE == start % pipeline.PAGE
    with Output(tmp_path / "file", 30_000) as output:
        output.write(placed, start)
        output.write(data, 0 if start >= size else start)  # in memory of any other alignment
    with Files() as files:
        read = files.read(tmp_path / "file", start, start + size, buffers.get("stored", size, start))
        assert torch.equal(read, data)
    assert (tmp_path / "file").stat().st_size == 30_000
