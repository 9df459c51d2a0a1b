"""Training jobs on a tiny model, and what they leave behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_engine.base_model import BaseModel
from lora_engine.config import TrainSpec
from lora_engine.step import Step
from lora_engine.train import Training

Spec = Callable[..., TrainSpec]


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def train(spec: TrainSpec, base: BaseModel) -> tuple[list[Step], dict[str, Any]]:
    with Training(spec, base) as training:
        steps = list(training.steps())
        return steps, training.finish()


def adapter_bytes(spec: TrainSpec) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(spec.output) / "adapter").iterdir())}
