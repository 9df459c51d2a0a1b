"""What an adapter came from, and whether a checkpoint belongs to a job."""

import dataclasses
import hashlib
import json
from importlib.metadata import version
from typing import Any

from lora_engine.base_model import BaseModel
from lora_engine.config import TrainSpec, to_mapping
from lora_engine.lora import Adapted


def lineage(spec: TrainSpec, dataset_digest: str, validation_digest: str | None) -> dict[str, Any]:
    """What `lineage.json` says of a trained adapter, beside its base model."""
    return {
        "dataset_sha256": dataset_digest,
        "validation_dataset_sha256": validation_digest,
        "lora": to_mapping(spec.lora),
        "training": to_mapping(spec.training),
        "seed": spec.training.seed,
        "engine": version("luthier"),
    }


def fingerprint(facts: dict[str, Any], spec: TrainSpec, base: BaseModel, adapted: Adapted) -> str:
    """Of everything that decides the result; paths do not, as a job may resume on another machine.

    Neither does the engine's version: a job that was running goes on after an upgrade.
    """
    decisive = {name: value for name, value in facts.items() if name != "engine"}
    decisive |= {"base_model": spec.base_model_name, "base_digest": base.digest}
    decisive["compute_dtype"] = str(base.compute_dtype)
    decisive["modules"] = [[name, *dataclasses.astuple(shape)] for name, shape in adapted.shapes.items()]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
