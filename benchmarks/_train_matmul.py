"""The machine's matmul rate, measured in the same turns as the contenders."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._train_gate import Gate


def train(config: dict[str, Any], gate: Gate) -> None:
    """Operations per second of square matrix products, the best of several sizes; each order is answered with both."""
    gate.imported()
    torch.set_num_threads(config["threads"])
    clock = time.process_time if config["cpu_clock"] else time.perf_counter
    gate.loaded()
    while True:
        gate.rates(bf16=_matmul_rate(torch.bfloat16, clock), fp32=_matmul_rate(torch.float32, clock))


@torch.no_grad()
def _matmul_rate(dtype: torch.dtype, clock: Callable[[], float], seconds: float = 0.3) -> float:
    best = 0.0
    for size in (1024, 1536, 2048):
        A, B, C = (torch.randn(size, size).to(dtype) for _ in range(3))
        torch.mm(A, B, out=C)
        count, started = 0, clock()
        while (elapsed := clock() - started) < seconds:
            torch.mm(A, B, out=C)
            count += 1
        best = max(best, 2 * size**3 * count / elapsed)
    return best
