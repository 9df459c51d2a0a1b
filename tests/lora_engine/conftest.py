"""A tiny base model, twenty conversations, and specs of jobs on them."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_engine import base_model
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from tests.lora_engine.jobs import Spec, conversation
from tests.tiny_model import make_tiny_model

LORA = LoraConfig(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return base_model.load(folder, digest="abc")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty conversations with answers of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [conversation(f"Question {index}?", f"Answer {index}." + " One more." * (index % 7)) for index in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def spec(folder: Path, dataset: Path, tmp_path: Path) -> Spec:
    def make(output: str = "out", lora: LoraConfig = LORA, **training: Any) -> TrainSpec:
        settings = {"global_batch": 4, "learning_rate": 1e-2, "epochs": 2, "checkpoint_every": 2, **training}
        return TrainSpec(
            base_model=str(folder),
            base_model_name="tiny",
            dataset=str(dataset),
            output=str(tmp_path / output),
            lora=lora,
            training=TrainingConfig(**settings),
        )

    return make
