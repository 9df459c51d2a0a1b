"""Contenders as processes that take turns: one runs, the others are stopped."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parent.parent
# glibc hands large blocks back to the kernel and faults them in anew at each allocation, unless told to keep them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What is started.

    Attributes:
        name: unique in its group.
        kind: the function of `_train_worker` that runs it.
        config: for that function, beside what all contenders of the group get.
        keep_memory: start it with glibc's thresholds raised.
        python: interpreter of another environment.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    keep_memory: bool = False
    python: Path | None = None


class Failed(Exception):
    """The contender's process ended; with the end of what it printed."""


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _bind(cpus: Sequence[int]) -> None:
    """In the child: run on `cpus` alone, and do not outlive the parent, which may end while the child is stopped."""
    os.sched_setaffinity(0, cpus)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A running contender. It is stopped (SIGSTOP) whenever it was not asked for anything."""

    def __init__(self, contender: Contender, config: dict[str, Any], folder: Path, cpus: Sequence[int]) -> None:
        self.contender = contender
        path = folder / f"{contender.name}.json"
        path.write_text(json.dumps(config | contender.config), encoding="utf-8")
        self._log = folder / f"{contender.name}.log"
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        command = [str(contender.python or sys.executable), "-m", "benchmarks._train_worker", contender.kind, str(path)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(orders), str(answers)],
                cwd=ROOT,
                env=environment(len(cpus), contender.keep_memory),
                pass_fds=(orders, answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: _bind(cpus),
            )
        os.close(orders)
        os.close(answers)
        self._reader = os.fdopen(self._answers, "r")
        self.facts = self._answer()

    def run(self, steps: int) -> dict[str, Any]:
        """Let it make `steps` steps (of a contender without steps: one measurement); its answer.

        Raises:
            Failed: it ended instead.
        """
        self._process.send_signal(signal.SIGCONT)
        os.write(self._orders, (json.dumps({"run": steps}) + "\n").encode())
        return self._answer()

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        os.close(self._orders)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.close()

    def _answer(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
            raise Failed(f"{self.contender.name} ended with {self._process.returncode}:\n" + "\n".join(tail))
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment(threads: int, keep_memory: bool) -> dict[str, str]:
    """Of every contender: so many threads, nothing from a hub, no thread that spins while another process runs."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    settings |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return settings | (KEEP_MEMORY if keep_memory else {})


@contextmanager
def started(
    contenders: Sequence[Contender], config: dict[str, Any], folder: Path, cpus: Sequence[int]
) -> Iterator[tuple[list[Process], dict[str, str]]]:
    """Start them one after the other; those that run, and what the others said when they did not start."""
    processes: list[Process] = []
    failures: dict[str, str] = {}
    try:
        for contender in contenders:
            try:
                processes.append(Process(contender, config, folder, cpus))
            except Failed as failure:
                failures[contender.name] = str(failure)
        yield processes, failures
    finally:
        for process in processes:
            process.close()


def interleave(
    processes: Sequence[Process], runs: int, steps: int, failures: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Answers by contender: `runs` rounds, in each of which every contender makes its next `steps` steps.

    Each round begins with another one, so that no contender always follows the same.
    """
    answers: dict[str, list[dict[str, Any]]] = {process.contender.name: [] for process in processes}
    for number in range(runs):
        start = number % len(processes)
        for process in (*processes[start:], *processes[:start]):
            name = process.contender.name
            if name in failures:
                continue
            try:
                answers[name].append(process.run(steps))
            except Failed as failure:
                failures[name] = str(failure)
    return answers
