"""Figures out of what the contenders answered."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._train_rows import Work
from lora_engine import base_model


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(*[values[0]] * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender on one work.

    Attributes:
        seconds: of each step, by the clock of the run; those of the warm-up come first.
        losses: of each step; `warm_up` steps of them were not timed, `run` steps make a run.
        floor: resident bytes after the imports; `load_peak` while loading, `peak` while training, both absolute.
    """

    name: str
    work: Work
    seconds: list[float]
    wall: list[float]
    cpu: list[float]
    losses: list[float]
    warm_up: int
    run: int
    floor: int
    load_peak: int
    peak: int
    facts: dict[str, Any]
    reported: dict[str, list[float]]

    @property
    def rates(self) -> list[float]:
        """Document tokens per second of each run, those of the warm-up left out."""
        return [
            sum(self.work.tokens(step) for step in steps) / sum(self.seconds[step] for step in steps)
            for steps in self.runs
        ]

    @property
    def runs(self) -> list[range]:
        return [range(start, start + self.run) for start in range(self.warm_up, len(self.seconds), self.run)]

    @property
    def training_bytes(self) -> int:
        """Peak of training above the floor."""
        return self.peak - self.floor

    @property
    def whole_bytes(self) -> int:
        """Peak of loading and training above the floor."""
        return max(self.peak, self.load_peak) - self.floor


def measured(
    name: str, work: Work, facts: dict[str, Any], answers: Sequence[dict[str, Any]], cpu_clock: bool, run: int
) -> Measured:
    steps = [step for answer in answers for step in answer["steps"]]
    wall, cpu = ([step[key] for step in steps] for key in ("seconds", "cpu_seconds"))
    others = {key for step in steps for key in step} - {"seconds", "cpu_seconds", "loss"}
    return Measured(
        name=name,
        work=work,
        seconds=cpu if cpu_clock else wall,
        wall=wall,
        cpu=cpu,
        losses=[step["loss"] for step in steps],
        warm_up=run,
        run=run,
        floor=facts["floor"],
        load_peak=facts["load_peak"],
        peak=max(answer["peak"] for answer in answers),
        facts=facts,
        reported={key: [step[key] for step in steps if step.get(key) is not None] for key in sorted(others)},
    )


@dataclass(frozen=True, slots=True)
class Compared:
    """Ours against one peer.

    Attributes:
        speed: the peer's time by ours, of the same steps, over the runs.
        whole_speed: the same of all timed steps together.
        memory: our peak by the peer's, of training above the floor; `absolute`: of the whole processes.
        loss: largest relative difference of any step's loss; `loss_mean` of the mean over all steps.
    """

    speed: Spread
    whole_speed: float
    memory: float
    absolute: float
    loss: float
    loss_mean: float


def compared(ours: Measured, peer: Measured) -> Compared:
    pairs = list(zip(ours.losses, peer.losses, strict=True))
    means = statistics.mean(ours.losses), statistics.mean(peer.losses)
    timed = slice(ours.warm_up, None)
    return Compared(
        speed=Spread.of([mine / other for mine, other in zip(ours.rates, peer.rates, strict=True)]),
        whole_speed=sum(peer.seconds[timed]) / sum(ours.seconds[timed]),
        memory=ours.training_bytes / peer.training_bytes,
        absolute=max(ours.peak, ours.load_peak) / max(peer.peak, peer.load_peak),
        loss=max(abs(mine - other) / other for mine, other in pairs),
        loss_mean=abs(means[0] - means[1]) / means[1],
    )


@dataclass(frozen=True, slots=True)
class Operations:
    """Useful floating-point operations of LoRA training; a frozen weight has no gradient, recomputation does not count.

    Per token ``4·(N_linear + N_head) + 6·N_lora + 7·S·L·d`` with S the tokens of its own document, L layers and d the
    width of all query heads: forward, the input's gradient, the adapter's three products, and causal attention.
    """

    linear: int
    head: int
    adapter: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: Path, rank: int) -> "Operations":
        modules = base_model.describe(model).modules
        sizes = [(module.inputs * module.outputs, module) for module in modules]
        trunk = [module for module in modules if not module.head]
        queries = [module for module in trunk if module.name.endswith("q_proj")]
        return cls(
            linear=sum(size for size, module in sizes if not module.head),
            head=sum(size for size, module in sizes if module.head),
            adapter=sum(rank * (module.inputs + module.outputs) for module in trunk),
            layers=len(queries),
            width=queries[0].outputs,
        )

    def step(self, work: Work, step: int, *, head_everywhere: bool) -> float:
        """Of one step, from the documents alone: nothing shared, nothing padded.

        Args:
            head_everywhere: count the output head at every token, as the formula has it, or at the targets alone, as
                the loss needs it.
        """
        tokens = work.tokens(step)
        squares = sum(len(document["ids"]) ** 2 for document in work.batches[step])
        heads = tokens if head_everywhere else work.targets(step)
        return (
            tokens * (4 * self.linear + 6 * self.adapter)
            + heads * 4 * self.head
            + 7 * squares * self.layers * self.width
        )


def limit_shares(item: Measured, operations: Operations, matmul: Sequence[float], *, head_everywhere: bool) -> Spread:
    """Useful operations per second by the matmul rate of the same round, over the runs.

    Args:
        matmul: operations per second, of each round, the warm-up's included.
    """
    rounds = matmul[item.warm_up // item.run :]
    return Spread.of(
        [
            sum(operations.step(item.work, step, head_everywhere=head_everywhere) for step in steps)
            / sum(item.seconds[step] for step in steps)
            / rate
            for steps, rate in zip(item.runs, rounds, strict=True)
        ]
    )
