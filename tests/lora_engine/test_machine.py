import mmap
from pathlib import Path

import pytest
import torch

from lora_engine import machine

CPU = torch.device("cpu")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for name, content in (
        ("memory.max", "5000\n"),
        ("memory.current", "3000\n"),
        ("memory.stat", "inactive_file 700\n"),
    ):
        (tmp_path / name).write_text(content)
    assert machine.available_bytes(CPU) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(CPU) > 10**7
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "nothing")
    assert machine.available_bytes(CPU) > 10**7


def test_the_machine_says_how_much_memory_is_available() -> None:
    assert 10**7 < machine.available_bytes(CPU) < 10**15


def test_the_peak_grows_with_what_is_held_and_can_be_forgotten() -> None:
    machine.forget_peak(CPU)
    before = machine.peak_bytes(CPU)
    # Mapped, not allocated: a heap may have room from before, and keep what is freed.
    size = 40 << 20
    held = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    assert machine.resident_bytes(CPU) >= size
    grown = machine.peak_bytes(CPU)
    assert grown >= before + size // 2
    held.close()
    machine.forget_peak(CPU)
    assert machine.peak_bytes(CPU) < grown


def test_where_the_kernel_has_no_table_the_peak_is_the_process_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "nothing")
    assert machine.resident_bytes(CPU) == machine.peak_bytes(CPU) > 10**6


def test_matrix_products_have_a_rate() -> None:
    assert 10**8 < machine.matmul_rate(CPU, torch.float32) < 10**15


def test_threads_are_chosen_among_those_allowed_and_given_back() -> None:
    allowed = torch.get_num_threads()
    assert 1 <= machine.quickest_threads() <= allowed
    assert torch.get_num_threads() == allowed


def test_more_threads_have_to_earn_their_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for seconds, expected in (({4: 1.0, 2: 1.0, 1: 1.0}, 1), ({4: 4.0, 2: 3.0, 1: 6.0}, 2)):
            monkeypatch.setattr(machine, "_seconds", lambda *_, by=seconds: by[torch.get_num_threads()])
            assert machine.quickest_threads() == expected
    finally:
        torch.set_num_threads(allowed)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_running_out_of_memory_is_told_apart(error: BaseException, expected: bool) -> None:
    assert machine.is_out_of_memory(error) == expected


def test_freed_memory_is_kept_without_complaint() -> None:
    machine.keep_freed_memory()
    assert torch.ones(1000).sum() == 1000


def test_a_heap_that_has_outgrown_its_beginning_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([1000, 1001, 1019, 1021, 1000])
    monkeypatch.setattr(machine, "resident_bytes", lambda _: next(resident))
    given_back: list[bool] = []
    monkeypatch.setattr(machine, "give_back_freed_memory", lambda: given_back.append(True))
    heap, counts = machine.Heap(CPU), []
    for _ in range(4):
        heap.tidy()
        counts.append(len(given_back))
    assert counts == [0, 0, 1, 1]
