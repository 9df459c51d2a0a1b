"""Sections of figures as Markdown and as JSON."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any


@dataclass(slots=True)
class Section:
    """A table: cells as text, and the figures that they come from."""

    title: str
    note: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def take_turns(rounds: int, **contenders: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of every contender in every round; each round is begun by another. A first round is not timed.

    A contender that has a clock of its own returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = perf_counter()
            own = contenders[name]()
            if number >= 0:
                seconds[name].append(own if isinstance(own, float) else perf_counter() - started)
    return seconds


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of their time by ours."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def clock(seconds: Sequence[float]) -> str:
    """The median, with three digits."""
    value = statistics.median(seconds)
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def markdown(sections: Sequence[Section], options: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "peft", "transformers"))
    head = f"""# Merging and exporting adapters

{_processor()}, {os.cpu_count()} cores, {options.threads} thread(s) for torch and numpy alike; {packages};
{options.rounds} rounds, medians.
"""
    return "\n".join([head, *map(_section, sections)])


def write(folder: Path, suffix: str, sections: Sequence[Section], text: str) -> None:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    stem = f"{day}-merge-cpu{f'-{suffix}' if suffix else ''}"
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    figures = [dataclasses.asdict(section) for section in sections]
    (folder / f"{stem}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _section(section: Section) -> str:
    lines = [f"## {section.title}", "", section.note, "", _row(section.head), _row(["---"] * len(section.head))]
    return "\n".join([*lines, *map(_row, section.rows), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
