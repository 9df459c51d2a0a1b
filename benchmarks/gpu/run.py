"""What all parts of one run share: the device, the scale, the folders, the rows so far."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._train_processes import Failed
from benchmarks.gpu.child import Child
from benchmarks.gpu.documents import Lengths
from benchmarks.gpu.shapes import MODELS, Scale, write_config

Row = dict[str, Any]


@dataclass(slots=True)
class Run:
    """One call.

    Attributes:
        device: "cuda:0", or "cpu" for a dry run.
        lengths: of Alpaca's prompts and answers.
        text_model: a folder of SmolLM2-135M, where one was given.
        sites: by environment ("", "unsloth", "torchtune"), folders that come first on its path.
        rows: by part.
        deadline: of the part that runs, of time.monotonic.
    """

    device: str
    scale: Scale
    folder: Path
    lengths: Lengths
    text_model: Path | None
    data: Path | None
    sites: dict[str, list[Path]]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    part: str = ""
    deadline: float = 0.0

    @contextmanager
    def child(self, task: str, config: Row, environment: str = "") -> Iterator[Child]:
        child = Child(task, self.config() | config, self.folder, self.sites.get(environment, []))
        try:
            yield child
        finally:
            child.close()

    def stream(self, task: str, config: Row, expected: Sequence[str] = ()) -> None:
        """Rows of a task; what it was expected to tell and did not becomes a row that says why."""
        told = set()
        why = "it told nothing"
        with self.child(task, config) as child:
            try:
                for answer in child.rows(self.deadline):
                    self.add(answer["row"])
                    told.add(answer["row"]["name"])
            except Failed as failure:
                why = str(failure)
        prefix = config.get("prefix", "")
        for name in expected or ([config.get("title", task)] if not told else []):
            if name not in told:
                self.add({"name": name, "status": "not run", "why": why}, prefix)

    def add(self, row: Row, prefix: str = "") -> None:
        """Keep a row and show it; one without a status went well."""
        full = {"name": f"{prefix}{row['name']}", "status": row.get("status", "ok")} | {
            key: value for key, value in row.items() if key not in ("name", "status")
        }
        self.rows.setdefault(self.part, []).append(full)
        shown = ", ".join(f"{key} {value}" for key, value in full.items() if key not in ("name", "details"))
        print(f"[{self.part}] {full['name']}: {shown}", flush=True)

    def config(self) -> Row:
        return {
            "device": self.device,
            "output": str(self.folder / "output"),
            "lengths": self.lengths,
            "tokens": self.scale.tokens,
            "steps": self.scale.steps,
            "learning_rate": 2e-4,
            "max_grad_norm": 1.0,
            "spawned": time.time(),
        }

    def model(self, name: str) -> Path:
        """A folder with the config of `name`, and no weights."""
        return write_config(self.folder / name, name)

    def facts(self, name: str) -> Row:
        return MODELS[name]

    @property
    def left(self) -> float:
        """Seconds of this part."""
        return self.deadline - time.monotonic()
