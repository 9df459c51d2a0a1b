"""The result as Markdown and as JSON."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks._train_contenders import Row
from benchmarks._train_figures import Compared, Measured, Operations, Spread, compared, limit_shares

GB = 1e9


@dataclass(slots=True)
class Result:
    """All that was measured.

    Attributes:
        measured: by group of rows and contender. `peers`: by row, the contender that was taken.
        matmul: by group and dtype: operations per second, of each round.
        cold: by kind and contender: seconds of each round.
        failures: what did not run, and what it said.
    """

    day: str
    steps: int
    data: str
    threads: int
    cpu_clock: bool
    thread_rates: dict[int, float]
    operations: Operations
    works: dict[str, str]
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    matmul: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    cold: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        options: argparse.Namespace,
        threads: int,
        rates: dict[int, float],
        operations: Operations,
        works: dict[str, tuple[str, int, int | None]],
    ) -> "Result":
        return cls(
            day=datetime.datetime.now(datetime.UTC).date().isoformat(),
            steps=options.steps,
            data=options.data.name if options.data else "generated rows",
            threads=threads,
            cpu_clock=threads == 1,
            thread_rates=rates,
            operations=operations,
            works={name: title for name, (title, _, _) in works.items()},
        )

    def comparison(self, name: str, row: Row) -> tuple[Measured, Measured, Compared] | None:
        ours, peer = (self.measured.get((row.group, key)) for key in (row.ours.name, self.peers.get(name, "")))
        return (ours, peer, compared(ours, peer)) if ours and peer else None


def markdown(result: Result, rows: dict[str, Row]) -> str:
    parts = [
        _head(result),
        _comparisons(result, rows),
        _contenders(result),
        _limits(result),
        _cold(result),
        _failures(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(result: Result) -> str:
    clock = "CPU time" if result.cpu_clock else "wall clock"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    calibrated = ", ".join(f"{threads}: {rate / 1e9:.0f}" for threads, rate in result.thread_rates.items())
    return (
        f"# Training on a CPU, {result.day}\n\n"
        f"{_processor()}, {os.cpu_count()} cores; {result.threads} thread{'s' * (result.threads > 1)} each, {clock} "
        f"(bf16 matmul by threads, GFLOP/s: {calibrated}); Python {platform.python_version()}, {packages}.\n"
        f"SmolLM2-135M, r=8 on all linear layers, AdamW; {result.steps} timed steps in turns of 4 after a turn of "
        f"warm-up; rows: {result.data}. Medians [quartiles] of the turns. Tokens are those of the documents, without "
        f"padding. {'; '.join(f'*{name}*: {title}' for name, title in result.works.items())}."
    )


def _comparisons(result: Result, rows: dict[str, Row]) -> str:
    lines = [
        "| work | ours, tokens/s | peer, tokens/s | peer's time by ours | must / aim | memory, ours / peer, GB "
        "| by the peer's | must | loss: largest / mean difference | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        found = result.comparison(name, row)
        if found is None:
            lines.append(f"| {row.title} | – | – | not run | {_demand(row)} | – | – | – | – | |")
            continue
        ours, peer, both = found
        lines.append(
            f"| {row.title} (`{peer.name}`) | {_spread(Spread.of(ours.rates), 0)} "
            f"| {_spread(Spread.of(peer.rates), 0)} "
            f"| **{_spread(both.speed, 2)}×** (all steps {both.whole_speed:.2f}×) | {_demand(row)} "
            f"| {ours.training_bytes / GB:.2f} / {peer.training_bytes / GB:.2f} | **{both.memory:.2f}×** "
            f"(whole process {both.absolute:.2f}×) | {_optional(row.memory, '≤ {}×')} "
            f"| {both.loss:.1e} / {both.loss_mean:.1e} (≤ {row.tolerance:g}) "
            f"| {', '.join(_misses(row, both)) or 'met'} |"
        )
    return "\n".join(lines) if rows else ""


def _contenders(result: Result) -> str:
    lines = [
        "Each contender. Memory in GB: the floor after the imports, the peak of loading and of training, absolute. "
        "CPU/wall says how many cores were busy.\n",
        "| rows | contender | step, s | tokens/s | CPU/wall | floor | peak, loading | peak, training "
        "| loss, first → last 8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (group, name), item in result.measured.items():
        timed = slice(item.warm_up, None)
        lines.append(
            f"| {group} | {name} | {_spread(Spread.of(item.seconds[timed]), 3)} | {_spread(Spread.of(item.rates), 0)} "
            f"| {sum(item.cpu[timed]) / sum(item.wall[timed]):.2f} | {item.floor / GB:.2f} | {item.load_peak / GB:.2f} "
            f"| {item.peak / GB:.2f} "
            f"| {statistics.mean(item.losses[:8]):.4f} → {statistics.mean(item.losses[-8:]):.4f} |"
        )
    return "\n".join(lines) if result.measured else ""


def _limits(result: Result) -> str:
    if not result.matmul:
        return ""
    lines = [
        "Useful operations per second by the matmul rate of the same round (bf16, fp32 where that is computed): "
        "4·(N_linear + N_head) + 6·N_lora + 7·S·L·d a token, over the documents' own tokens, as if nothing were "
        "shared; padding and recomputation are no work. *Targets only* counts the output head where there is a target. "
        "*Computed* is what share of the documents' tokens the engine passed through the model, where it says so; "
        "*own* is the engine's own figure.\n",
        "| rows | contender | matmul, GFLOP/s | share of it | targets only | computed | own |",
        "|---|---|---|---|---|---|---|",
    ]
    for (group, name), item in result.measured.items():
        if group not in result.matmul:
            continue
        rates = result.matmul[group]["fp32" if "fp32" in name else "bf16"]
        shares = [
            _spread(limit_shares(item, result.operations, rates, head_everywhere=everywhere), 1, 100) + " %"
            for everywhere in (True, False)
        ]
        computed, own = (item.reported.get(key, [])[item.warm_up :] for key in ("computed_tokens", "limit_fraction"))
        documents = sum(item.work.tokens(step) for steps in item.runs for step in steps)
        lines.append(
            f"| {group} | {name} | {statistics.median(rates) / 1e9:.0f} | {' | '.join(shares)} "
            f"| {f'{sum(computed) / documents:.0%}' if computed else '–'} "
            f"| {f'{statistics.median(own):.0%}' if own else '–'} |"
        )
    return "\n".join(lines)


def _cold(result: Result) -> str:
    if not result.cold:
        return ""
    lines = [
        "Cold start, from the start of the process to the end of the first step, files in the page cache; the peer is "
        "PEFT + `transformers.Trainer` (must: ≤ 0.5×).\n",
        "| base | ours, s | peer, s | ours by the peer's |",
        "|---|---|---|---|",
    ]
    for kind, seconds in result.cold.items():
        pairs = zip(seconds["ours"], seconds["peer"], strict=True)
        shares = Spread.of([mine / other for mine, other in pairs])
        times = " | ".join(_spread(Spread.of(seconds[name]), 1) for name in ("ours", "peer"))
        lines.append(f"| {kind} | {times} | **{_spread(shares, 2)}×** |")
    return "\n".join(lines)


def _failures(result: Result) -> str:
    return "\n".join(f"Not run: {name}:\n\n```\n{text}\n```" for name, text in result.failures.items())


def _misses(row: Row, both: Compared) -> Iterator[str]:
    if row.must is not None and both.speed.median < row.must:
        yield "speed below"
    if row.memory is not None and both.memory > row.memory:
        yield "memory above"
    if both.loss > row.tolerance:
        yield "**losses differ**"


def exit_status(result: Result, rows: dict[str, Row]) -> int:
    """1 where contenders that should compute the same did not; a figure that misses its mark is no failure."""
    comparisons = [(row, result.comparison(name, row)) for name, row in rows.items()]
    return int(any(found is not None and found[2].loss > row.tolerance for row, found in comparisons))


def write(folder: Path, suffix: str, result: Result, text: str) -> None:
    stem = folder / f"{result.day}-train-cpu{'-1-thread' if result.cpu_clock else ''}{suffix}"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    values = {item.name: getattr(result, item.name) for item in dataclasses.fields(result)}
    values["operations"] = dataclasses.asdict(result.operations)
    values["measured"] = [_json(item) for item in result.measured.values()]
    stem.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _json(item: Measured) -> dict[str, Any]:
    values = {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item)}
    steps = range(len(item.seconds))
    tokens = {
        "tokens": [item.work.tokens(step) for step in steps],
        "targets": [item.work.targets(step) for step in steps],
    }
    return values | {"work": item.work.name} | tokens


def _demand(row: Row) -> str:
    return " / ".join(_optional(value, "≥ {:.3g}×") for value in (row.must, row.aim))


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _spread(spread: Spread, digits: int, factor: float = 1.0) -> str:
    median, low, high = (f"{value * factor:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} [{low}–{high}]"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
