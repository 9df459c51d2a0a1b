"""Speed and memory of our jobs on one base model, cell by cell; the planner's grid; the article's job.

Every function is a task of `worker`: the base model stays on the device from one cell to the next, as in the product.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import bases
from benchmarks.gpu.documents import documents, examples_a_step
from benchmarks.gpu.jobs import GB, limit, measure
from benchmarks.gpu.shapes import ALPACA
from lora_engine import machine
from lora_engine.base_model import BaseModel
from lora_engine.errors import EngineError

STREAMS = True
Tell = Callable[..., None]


def grid(config: dict[str, Any], tell: Tell) -> None:
    """The cells of `config`, each a row; one that fails is a row too."""
    base = _base(config)
    for cell in config["cells"]:
        try:
            row = _cell(config, base, cell)
        except (EngineError, RuntimeError, MemoryError) as error:
            if "CUDA error" in str(error):  # the device's context is lost, and with it every later cell
                raise
            row = {"status": "failed", "why": _said(error)}
        tell(row={"name": cell["name"], **row})
        machine.forget_peak(base.device)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()


def article(config: dict[str, Any], tell: Tell) -> None:
    """7B QLoRA, r 256, alpha 512, one epoch of Alpaca's lengths: its first tenth, the rest extrapolated."""
    base, lengths = _base(config), config["lengths"]
    size, share, epoch = config["batch"], config["share"], config["epoch"]
    steps = -(-epoch // size)
    wanted = -(-round(share * epoch) // size)
    found = documents(ALPACA, epoch, base.model.config.vocab_size, lengths)
    rank = config["rank"]
    row = measure(
        base,
        found,
        {"rank": rank, "alpha": 2.0 * rank},
        {"global_batch": size, "max_steps": wanted + 3, "sequence_length": 2048},
        output=Path(config["output"]),
        memory_gb=config.get("memory"),
        seconds=config["seconds"],
    )
    # The measured tokens a second of the tenth, for the tokens of the whole.
    minutes = sum(map(len, found)) / row["tokens/s"] / 60
    trained = row["steps"] * size / epoch
    tell(
        row={
            "name": config["title"],
            "examples": epoch,
            "trained on": f"{trained:.1%}",
            "enough": trained >= min(share, wanted / steps) * 0.99,
            "minutes an epoch": round(minutes, 3),
            **row,
        }
    )


def rate(config: dict[str, Any], tell: Tell) -> None:
    """The limit that everything is measured by."""
    device = torch.device(config["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    memory = torch.cuda.get_device_properties(device).total_memory / GB if device.type == "cuda" else None
    rates = {
        str(dtype).removeprefix("torch."): round(machine.matmul_rate(device, dtype) / 1e12, 2)
        for dtype in (torch.bfloat16, torch.float32)
    }
    tell(row={"name": name, "memory GB": memory, **{f"{dtype} TFLOP/s": value for dtype, value in rates.items()}})


def _cell(config: dict[str, Any], base: BaseModel, cell: dict[str, Any]) -> dict[str, Any]:
    lengths = [tuple(pair) for pair in config["lengths"]]
    tokens, steps = cell.get("tokens", config["tokens"]), config["steps"] + 3
    size = examples_a_step(cell["length"], tokens, lengths)
    found = documents(cell["length"], size * steps, base.model.config.vocab_size, lengths)
    return measure(
        base,
        found,
        cell["lora"],
        {"global_batch": size, "max_steps": steps, "sequence_length": max(map(len, found))} | cell.get("training", {}),
        output=Path(config["output"]),
        dequantise_once=cell.get("once"),
        memory_gb=cell.get("memory"),
    )


def _base(config: dict[str, Any]) -> BaseModel:
    device = torch.device(config["device"])
    limit(device)  # before the base model takes the memory
    return bases.ours(Path(config["model"]), config["quantization"], device)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {json.dumps(str(error))[1:300]}"
