"""One step under PyTorch's profiler: how long the device works, on what, and how often the host waits for it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_TOP = 12
# What the host calls when it waits for the device; copies of pageable memory wait too.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def step(steps: Iterator[Any], device: torch.device, median_seconds: float) -> dict[str, Any]:
    """Make the next step; on a CPU nothing is told of it.

    Returns busy (the time in which at least one kernel ran, by the median step without a profiler), kernels started,
    waits by kind, and the kernels that took longest, in ms.
    """
    if device.type != "cuda":
        next(steps, None)
        return {"busy": None, "kernels": None, "waits": None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        next(steps, None)
        torch.cuda.synchronize()
    spans, longest, waits = [], Counter[str](), Counter[str]()
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            longest[event.name[:90]] += event.time_range.elapsed_us()
        elif event.name in _WAITS:
            waits[event.name] += 1
    return {
        "busy": round(covered(spans) / 1e6 / median_seconds, 3),
        "kernels": len(spans),
        "waits": sum(waits.values()),
        "details": {"waits": dict(waits), "kernels ms": {name: us / 1000 for name, us in longest.most_common(_TOP)}},
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
