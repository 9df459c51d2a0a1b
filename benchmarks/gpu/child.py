"""The parent's end of a measuring process. A process that fails or is too late costs its own rows and no others."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._train_processes import ROOT, Failed, _bind


class Child:
    """``python -m benchmarks.gpu.worker TASK``; `answers` and orders are lines of JSON."""

    def __init__(self, task: str, config: dict[str, Any], folder: Path, sites: Sequence[Path] = ()) -> None:
        self.name = str(config.get("name", task))
        stem = f"{self.name.replace('/', '-')}-{time.monotonic_ns()}"
        path, self._log = folder / f"{stem}.json", folder / f"{stem}.log"
        path.write_text(json.dumps(config), encoding="utf-8")
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        settings = {
            "PYTHONPATH": os.pathsep.join([*map(str, sites), str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Deterministic products need it before the device is first used; it costs the others nothing.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", task, str(path), str(orders), str(answers)],
                cwd=ROOT,
                env=os.environ | settings,
                pass_fds=(orders, answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: _bind(sorted(os.sched_getaffinity(0))),
            )
        os.close(orders)
        os.close(answers)
        self._rest = b""

    def rows(self, deadline: float) -> Iterator[dict[str, Any]]:
        """What it tells until it says that it is done.

        Raises:
            Failed: it ended before, or `deadline` (of time.monotonic) came.
        """
        while not (answer := self.answer(deadline)).get("end"):
            yield answer

    def run(self, steps: int, deadline: float) -> dict[str, Any]:
        """Let a contender make its next steps; its answer."""
        os.write(self._orders, (json.dumps({"run": steps}) + "\n").encode())
        return self.answer(deadline)

    def answer(self, deadline: float) -> dict[str, Any]:
        """Raises Failed."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Failed("the part's time was used up")
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                self._process.wait()
                raise Failed(f"ended with {self._process.returncode}: {self._tail()}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """It has no state that is missed: it is killed, which frees the device's memory at once."""
        self._process.kill()
        self._process.wait()
        os.close(self._orders)
        os.close(self._answers)

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line.strip() for line in lines if line.strip(" ^~")]
        return " | ".join(said[-2:])[-400:]
