"""A measuring process: ``python -m benchmarks.gpu.worker TASK CONFIG READER WRITER``, started by `child.Child`.

TASK is MODULE.FUNCTION of this package. Its function is called with the config and either a `tell` for rows as they
come (its module says STREAMS), or a gate, which lets it train in turns with others.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._train_gate import Gate


class DeviceGate(Gate):
    """Tells the device's memory instead of the host's, and waits for the device before the clock is read."""

    def imported(self) -> None:
        """The device holds nothing yet: its floor is zero."""

    def loaded(self, **facts: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.rates(**facts)

    def step(self, loss: float, **facts: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            facts |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        self._steps.append({"loss": loss, "seconds": time.perf_counter() - self._wall, **facts})
        self._left -= 1
        if self._left:
            self._start()
        else:
            made, self._steps = self._steps, []
            self.rates(steps=made)


class Teller:
    """Writes rows."""

    def __init__(self, writer: int) -> None:
        self._stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115 (a descriptor, for the whole process)

    def __call__(self, **row: Any) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()


def main() -> None:
    task, config, reader, writer = sys.argv[1:]
    module_name, _, name = task.partition(".")
    values: dict[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
    module = importlib.import_module(f"benchmarks.gpu.{module_name}")
    function = getattr(module, name)
    if not getattr(module, "STREAMS", False):
        function(values, DeviceGate(int(reader), int(writer)))
        return
    tell = Teller(int(writer))
    function(values, tell)
    tell(end=True)


if __name__ == "__main__":
    main()
