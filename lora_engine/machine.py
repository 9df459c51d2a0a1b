"""What this machine has and does: memory, threads, the rate of its matrix products."""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container it is the container's own
# glibc's mallopt: how much free memory at the heap's end is given back, and from which size on blocks are mapped.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = 2**31 - 1, 32 << 20
# Of what was resident when a job began: more is holes.
_SLACK = 1.02
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def available_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on `device` now, within the container's limit where there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = _table(_MEMINFO)
    if "MemAvailable:" not in meminfo:  # not Linux: all there is, as what is free is not told
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = meminfo["MemAvailable:"] * 1024
    limit = _CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        reclaimable = _table(_CGROUP / "memory.stat").get("inactive_file", 0)
        available = min(available, max(0, int(text) - used + reclaimable))
    return available


def resident_bytes(device: torch.device) -> int:
    """Bytes of memory in use now: of the device's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    table = _table(_STATUS)
    return table["VmRSS:"] * 1024 if table else peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most that `resident_bytes` was since `forget_peak`, or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    table = _table(_STATUS)
    if table:
        return table["VmHWM:"] * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5", encoding="ascii")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product in `dtype`, the best of five: the limit that is reckoned with."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _seconds(a, b)
    return 2 * size**3 / min(_seconds(a, b) for _ in range(5))


def quickest_threads() -> int:
    """The number of threads, up to those allowed now, with which small products run fastest on this machine as it is.

    On a machine whose processors are busy, two threads wait for each other and can be far slower than one.
    """
    allowed = torch.get_num_threads()
    candidates = sorted({allowed, max(1, allowed // 2), 1}, reverse=True)
    a, b = torch.randn(256, 576), torch.randn(576, 1536)
    timings = {}
    for threads in candidates:
        torch.set_num_threads(threads)
        _seconds(a, b)
        timings[threads] = sorted(sum(_seconds(a, b) for _ in range(4)) for _ in range(5))[2]
    torch.set_num_threads(allowed)
    # More threads have to earn their keep.
    return min(candidates, key=lambda threads: timings[threads] * (1 + 0.02 * threads))


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one, instead of having it mapped and cleared anew."""
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """Have glibc give back what is free now: loading, and steps of unlike sizes, leave holes that stay empty."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


class Heap:
    """The heap of a process that computes on a CPU, as a job finds it once its calibrating step is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._settled = resident_bytes(device)

    def tidy(self) -> None:
        """Close the holes, which grow with steps of unlike sizes, once they have outgrown what the job began with."""
        if self._device.type == "cpu" and resident_bytes(self._device) > _SLACK * self._settled:
            give_back_freed_memory()


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def within_memory(work: Callable[[], T], shrink: Callable[[], None]) -> T:
    """The result of `work`, which is done again after `shrink` as often as it runs out of memory.

    `shrink` is called when the error is over and done with: its frames hold on to what did not fit.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        shrink()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says with `error` that an allocation failed; on CPUs it does so in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _seconds(a: Tensor, b: Tensor) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them; empty where there is no such file."""
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
