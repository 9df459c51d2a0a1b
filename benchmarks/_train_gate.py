"""The contender's end of the pipe: it trains when told to and measures itself. Standard library only, as it runs in
the environments of other projects too.

A contender imports what it needs, calls `imported`, loads its model, calls `loaded`, and then `step` after each
optimizer step. `loaded` and `step` return when the next step may be made, so that contenders in processes of their own
take turns on a machine that is otherwise idle.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO


class Gate:
    """Answers on `writer` the orders on `reader`: ``{"run": steps}``; the end of the pipe ends the process."""

    def __init__(self, reader: int, writer: int) -> None:
        self._orders: TextIO = os.fdopen(reader, "r")
        self._answers: TextIO = os.fdopen(writer, "w")
        self._floor = self._load_peak = 0
        self._left = 0
        self._steps: list[dict[str, Any]] = []
        self._wall = self._cpu = 0.0

    def imported(self) -> None:
        """Everything is imported and nothing is loaded: the floor of the memory figures."""
        self._floor = memory("VmRSS")

    def loaded(self, **facts: Any) -> None:
        """The model is ready for its first step."""
        self._load_peak = memory("VmHWM")
        # The kernel's high-water mark starts anew, so that the peak of training is not that of loading.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._answer(floor=self._floor, load_peak=self._load_peak, resident=memory("VmRSS"), **facts)
        self._wait()

    def step(self, loss: float, **facts: Any) -> None:
        """A step was made; `loss` is the mean over its targets before the update."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._steps.append({"loss": loss, "seconds": wall, "cpu_seconds": cpu, **facts})
        self._left -= 1
        if self._left == 0:
            self._answer(steps=self._steps, peak=memory("VmHWM"), resident=memory("VmRSS"))
            self._steps = []
            self._wait()
        else:
            self._start()

    def rates(self, **facts: Any) -> None:
        """Answer an order with something else than steps."""
        self._answer(**facts)
        self._wait()

    def _answer(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        line = self._orders.readline()
        if not line:
            raise SystemExit(0)
        self._left = json.loads(line)["run"]
        self._start()

    def _start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def memory(field: str) -> int:
    """Bytes: "VmRSS", resident now, or "VmHWM", the most there were."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
