"""The pipeline keeps the order, bounds what is under way, and passes on the first error of any of its threads."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_engine.exporting import pipeline
from lora_engine.exporting.pipeline import Files, Output, pipelined


def number(item: int) -> Tensor:
    return torch.tensor(item)


def test_order_and_bound() -> None:
    written: list[int] = []
    under_way: list[int] = []
    reads = 0

    def read(item: int) -> Tensor:
        nonlocal reads
        reads += 1
        under_way.append(reads - len(written))
        return number(item)

    def write(item: int, data: Tensor) -> None:
        assert int(data) == 2 * item
        written.append(item)

    pipelined(range(100), read, lambda _, data: data * 2, write)
    assert written == list(range(100))
    assert max(under_way) <= 8


@pytest.mark.parametrize("place", ["read", "compute", "write"])
def test_the_first_error_ends_it(place: str) -> None:
    written: list[int] = []

    def fail(where: str, item: int) -> None:
        if where == place and item == 5:
            raise ValueError(where)

    def read(item: int) -> Tensor:
        fail("read", item)
        return number(item)

    def compute(item: int, data: Tensor) -> Tensor:
        fail("compute", item)
        return data

    def write(item: int, data: Tensor) -> None:
        fail("write", item)
        written.append(item)

    before = threading.active_count()
    with pytest.raises(ValueError, match=place):
        pipelined(range(1000), read, compute, write)
    assert written[:5] == [0, 1, 2, 3, 4]
    assert len(written) < 20
    assert threading.active_count() == before


def test_files_and_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_FLUSH_BYTES", 8)
    data = torch.arange(100, dtype=torch.int16)
    with Output(tmp_path / "file") as output:
        for start in range(0, 100, 10):
            output.write(data[start : start + 10])
        output.pad(64)
    assert (tmp_path / "file").stat().st_size == 256
    with Files() as files:
        assert torch.equal(files.read(tmp_path / "file", 20, 200).view(torch.int16), data[10:])
        with pytest.raises(OSError, match="shorter"):
            files.read(tmp_path / "file", 250, 300)
