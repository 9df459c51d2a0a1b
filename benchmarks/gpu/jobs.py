"""One training job of ours, measured: through the engine, with the planner's choice narrowed where asked."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks._train_figures import Operations
from benchmarks._train_rows import Work
from benchmarks.gpu import profiled
from benchmarks.gpu.documents import dataset
from lora_engine import data, machine, plan
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.data import Document
from lora_engine.train import Training

GB = 1e9
_WARM_UP = 2
Row = dict[str, Any]


def measure(
    base: BaseModel,
    documents: Sequence[Document],
    lora: dict[str, Any],
    training: dict[str, Any],
    *,
    output: Path,
    dequantise_once: bool | None = None,
    memory_gb: float | None = None,
    seconds: float | None = None,
) -> Row:
    """Figures of a job on `documents`: two steps to warm up, then timed ones, then one under the profiler.

    Args:
        dequantise_once: the only choice the planner has; None leaves it free.
        memory_gb: of the device, base model included, as the planner is told; None: what there is.
        seconds: end after so long; the row then tells how many steps there were.
    """
    started = time.perf_counter()
    with arranged(base, documents, dequantise_once, memory_gb):
        job = Training(spec(base, output, lora, training), base)
    with job:
        ready = time.perf_counter() - started
        memory = Peak(base.device)
        steps = []
        for step in islice(job.steps(), job.plan.steps - 1):
            steps.append(step)
            if seconds is not None and time.perf_counter() - started > seconds:
                break
        timed = steps[_WARM_UP:] or steps
        row = _row(base, documents, lora, training, timed)
        row |= {"ready s": round(ready, 2), "first step s": round(ready + steps[0].seconds, 2)} | memory.figures()
        row |= _planned(job.plan) | profiled.step(job.steps(), base.device, row["step ms p50"] / 1000)
    return row


def spec(base: BaseModel, output: Path, lora: dict[str, Any], training: dict[str, Any]) -> TrainSpec:
    settings: dict[str, Any] = {
        "quantization": base.quantization,
        "compute_dtype": "bf16",
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "validation_fraction": 0.0,
        "checkpoint_every": 10_000_000,
    }
    return TrainSpec(
        base_model=str(base.folder),
        dataset=str(base.folder / "config.json"),  # never read: `arranged` gives the documents
        output=str(output),
        device=str(base.device),
        lora=LoraConfig(**lora),
        training=TrainingConfig(**settings | training),
    )


@contextmanager
def arranged(
    base: BaseModel, documents: Sequence[Document], once: bool | None = None, memory_gb: float | None = None
) -> Iterator[None]:
    """Inside, a job is given these documents in their order, and the planner these choices and this memory."""
    before = data.read_once, plan._choices, machine.available_bytes
    data.read_once = lambda *_: dataset(documents)
    if once is not None:
        plan._choices = lambda job: [choice for choice in before[1](job) if choice.dequantize_once == once]
    if memory_gb is not None:
        # The planner adds what the job has on the device already.
        machine.available_bytes = lambda _: int(memory_gb * GB) - plan.base_bytes(base)
    data.epoch_order = in_order
    try:
        yield
    finally:
        data.read_once, plan._choices, machine.available_bytes = before


def in_order(digest: str, seed: int, epoch: int, count: int) -> list[int]:  # noqa: ARG001
    return list(range(count))


class Peak:
    """The device's memory from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        machine.forget_peak(device)

    def figures(self) -> Row:
        reserved = torch.cuda.max_memory_reserved(self._device) / GB if self._device.type == "cuda" else None
        return {
            "peak GB": round(machine.peak_bytes(self._device) / GB, 3),
            "reserved GB": None if reserved is None else round(reserved, 3),
        }


@cache
def operations(folder: Path, rank: int) -> Operations:
    return Operations.of(folder, rank)


@cache
def limit(device: torch.device) -> float:
    """bf16 operations a second of a square product on this device, measured."""
    return machine.matmul_rate(device, torch.bfloat16)


def useful(folder: Path, rank: int, documents: Sequence[Document]) -> float:
    """Operations of a step by the formula of `_train_figures.Operations`, the head counted at every token."""
    plain = [{"ids": list(range(len(item))), "trained": item.trained.int().tolist()} for item in documents]
    work = Work("", "", folder, [plain], folder, 0)
    return operations(folder, rank).step(work, 0, head_everywhere=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _row(base: BaseModel, documents: Sequence[Document], lora: Row, training: Row, timed: Sequence[Any]) -> Row:
    size, count = training["global_batch"], len(documents)
    seconds = [step.seconds for step in timed]
    total = sum(
        useful(base.folder, lora["rank"], [documents[index % count] for index in range(start, start + size)])
        for start in ((step.step - 1) * size for step in timed)
    )
    own = [step.limit_fraction for step in timed if step.limit_fraction is not None]
    return {
        "tokens/s": round(sum(step.tokens for step in timed) / sum(seconds)),
        "of limit": round(total / sum(seconds) / limit(base.device), 4),
        "engine's own": round(statistics.median(own), 4) if own else None,
        "tokens a step": round(statistics.mean(step.tokens for step in timed)),
        "steps": len(timed),
        "step ms p50": round(1000 * percentile(seconds, 0.5), 2),
        "p90": round(1000 * percentile(seconds, 0.9), 2),
        "p99": round(1000 * percentile(seconds, 0.99), 2),
        "loss": [round(step.loss, 4) for step in (timed[0], timed[-1])],
    }


def _planned(planned: plan.Plan) -> Row:
    return {
        "micro-batch": planned.micro_batch_tokens,
        "recomputed": planned.recomputed_layers,
        "once": planned.dequantize_once,
        "predicted GB": round(planned.predicted_peak_bytes / GB, 3),
        "predicted ms": round(1000 * (planned.predicted_step_seconds or 0), 2),
    }
