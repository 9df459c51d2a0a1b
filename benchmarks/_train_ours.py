"""Luthier as a contender, through its public engine alone."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks._train_gate import Gate
from lora_engine import base_model, data
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.train import Training


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    batches = [
        (sum(len(document["ids"]) for document in batch), sum(sum(document["trained"]) for document in batch))
        for batch in config["batches"]
    ]
    # The file holds the examples in the order of the benchmark's batches; the engine would shuffle them.
    data.epoch_order = in_file_order
    spec = train_spec(config)
    base = base_model.load(
        Path(spec.base_model),
        quantization=spec.training.quantization,
        compute_dtype=spec.training.compute_dtype,
        device="cpu",
    )
    with Training(spec, base) as training:
        gate.loaded(plan=_plain(training.plan))
        for step, expected in zip(training.steps(), batches, strict=True):
            if (step.tokens, step.trained_tokens) != expected:
                raise SystemExit(f"step {step.step} is not of the benchmark's batch: {step}, expected {expected}")
            gate.step(step.loss, **{name: value for name, value in _plain(step).items() if name in REPORTED})


def in_file_order(digest: str, seed: int, epoch: int, count: int) -> list[int]:  # noqa: ARG001
    return list(range(count))


# What the engine says of a step, where it says it.
REPORTED = ("grad_norm", "limit_fraction", "recompute_share", "peak_bytes", "computed_tokens")


def train_spec(config: dict[str, Any]) -> TrainSpec:
    """The benchmark's work as a job: one epoch over its file, no evaluation, no checkpoint."""
    return TrainSpec(
        base_model=config["model"],
        dataset=config["dataset"],
        output=config["output"],
        device="cpu",
        lora=LoraConfig(rank=config["rank"], alpha=config["alpha"]),
        training=TrainingConfig(
            quantization=config["quantization"],
            compute_dtype=config["compute_dtype"],
            global_batch=config["examples"],
            sequence_length=config["sequence_length"],
            learning_rate=config["learning_rate"],
            schedule="constant",
            warmup_ratio=0.0,
            max_grad_norm=config["max_grad_norm"],
            validation_fraction=0.0,
            checkpoint_every=10_000_000,
            seed=config["seed"],
        ),
    )


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are plain numbers."""
    fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return {name: field for name, field in fields.items() if isinstance(field, bool | int | float)}
