"""All rows as Markdown and JSON, with the machine, the versions, and the goals beside what was measured."""

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.run import Row, Run

_PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth", "trl",
    "torchtune", "torchao", "litgpt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to reach: `value` of the row of `part` whose name holds every word; at least or at most `bound`."""

    title: str
    part: str
    words: tuple[str, ...]
    value: Callable[[Row], float]
    bound: float
    at_least: bool = False


GOALS = (
    Goal("8B bf16 LoRA r16, share of the matmul limit", "speed", ("llama-3-8b, LoRA bf16, r 16, alpaca",),
         lambda row: row["of limit"], 0.6, True),
    Goal("the same, against tuned PEFT", "peers", ("LoRA bf16 r", "Trainer, tuned"),
         lambda row: row["peer's time by ours"], 2.0, True),
    Goal("the same, against Unsloth", "peers", ("LoRA bf16 r", "Unsloth"),
         lambda row: row["peer's time by ours"], 1.2, True),
    Goal("QLoRA's time by our own LoRA's", "peers-nf4", ("our own LoRA",),
         lambda row: 1 / row["peer's time by ours"], 1.05),
    Goal("7B QLoRA r 8, 1304 tokens, peak GB", "memory", ("QLoRA r 8",), lambda row: row["peak GB"], 5.5),
    Goal("7B QLoRA r 256, 2048 tokens, peak GB", "memory", ("QLoRA r 256",), lambda row: row["peak GB"], 16.0),
    Goal("the article's job, minutes an epoch", "article", ("QLoRA",), lambda row: row["minutes an epoch"], 6.0),
    Goal("the same, peak GB", "article", ("QLoRA",), lambda row: row["peak GB"], 16.0),
    Goal("next job on a warm base, seconds to its first step", "start", ("warm base",),
         lambda row: row["first step s"], 1.0),
    Goal("planner's largest memory error", "planner", (), lambda row: row["largest memory error"], 0.05),
    Goal("planner's largest time error", "planner", (), lambda row: row["largest time error"], 0.15),
)  # fmt: skip


def facts(run: Run, lengths: str) -> Row:
    """When, on what, with which versions."""
    found: Row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": run.device,
        "python": platform.python_version(),
        "lengths": lengths,
        "packages": {name: known for name in _PACKAGES if (known := _version(name))},
    }
    if run.device != "cpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found["card"] = done.stdout.strip() or done.stderr.strip()
    return found


def markdown(run: Run, found: Row) -> str:
    title = (
        "Training on a GPU" if run.device != "cpu" else "Dry run on a CPU at toy size: no figure here means anything"
    )
    packages = ", ".join(f"{name} {known}" for name, known in found["packages"].items())
    head = f"# {title}, {found['date']}\n\n{found.get('card', 'no GPU')}; Python {found['python']}, {packages}. "
    head += f"Alpaca's lengths: {found['lengths']}."
    tables = [f"## {part}\n\n{table(rows)}" for part, rows in run.rows.items()]
    return "\n\n".join([head, f"## goals\n\n{table(goals(run))}", *tables]) + "\n"


def goals(run: Run) -> list[Row]:
    return [_goal(run, goal) for goal in GOALS]


def _goal(run: Run, goal: Goal) -> Row:
    rows = _planner(run.rows.get("planner", [])) if goal.part == "planner" else run.rows.get(goal.part, [])
    good = [row for row in rows if row["status"] == "ok" and all(word in row["name"] for word in goal.words)]
    asked = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
    if not good or run.device == "cpu":
        return {"name": goal.title, "asked": asked, "measured": "–", "met": "not measured"}
    value = goal.value(good[0])
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    return {"name": goal.title, "asked": asked, "measured": f"{value:.3g}", "met": "met" if met else "missed"}


def _planner(rows: Sequence[Row]) -> list[Row]:
    """One row of the largest errors, where there is any."""
    good = [row for row in rows if row["status"] == "ok" and row.get("predicted ms")]
    if not good:
        return []
    pairs = (("memory", "predicted GB", "peak GB"), ("time", "predicted ms", "step ms p50"))
    largest = {f"largest {name} error": max(abs(row[one] / row[two] - 1) for row in good) for name, one, two in pairs}
    return [{"name": "planner", "status": "ok", **largest}]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table over all that any row tells, but for `details`."""
    names = list(dict.fromkeys(key for row in rows for key in row if key != "details"))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines)


def write(folder: Path, stem: str, run: Run, found: Row) -> str:
    """Write both files; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(run, found)
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    everything = {"facts": found, "goals": goals(run), "parts": run.rows}
    (folder / f"{stem}.json").write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return text


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " / ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return str(value).replace("|", "¦").replace("\n", " ")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
