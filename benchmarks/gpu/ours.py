"""Luthier as a contender on a GPU, through its engine."""

from pathlib import Path
from typing import Any

import torch

from benchmarks._train_gate import Gate
from benchmarks.gpu import bases
from benchmarks.gpu.documents import documents
from benchmarks.gpu.jobs import arranged, in_order, spec
from lora_engine import data
from lora_engine.train import Training


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    base = bases.ours(Path(config["model"]), config["quantization"], torch.device(config["device"]))
    lengths = [tuple(pair) for pair in config["lengths"]]
    count = config["examples"] * config["steps"]
    found = documents(config["length"], count, base.model.config.vocab_size, lengths)  # type: ignore[arg-type]
    settings = {
        "global_batch": config["examples"],
        "learning_rate": config["learning_rate"],
        "max_grad_norm": config["max_grad_norm"],
        "sequence_length": max(map(len, found)),
    }
    data.epoch_order = in_order
    with arranged(base, found, config["variant"].get("once"), config.get("memory")):
        job = Training(
            spec(base, Path(config["output"]), {"rank": config["rank"], "alpha": config["alpha"]}, settings), base
        )
    with job:
        # Whether there was less memory than it would have used.
        gate.loaded(limited=job.plan.recomputed_layers > 0)
        for step in job.steps():
            gate.step(step.loss)
