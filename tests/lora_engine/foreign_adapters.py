"""Adapters as stock PEFT saves them, what becomes of them when they are taken in, and their logits in stock PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_engine.ingest import ingest
from lora_engine.ingest_config import IngestSpec

IDS = torch.arange(5, 37)[None]
WEIGHTS = "adapter_model.safetensors"


def foreign(base: Path, folder: Path, change: Callable[[Any], None] | None = None, **settings: Any) -> Path:
    """An adapter of PEFT's with random weights; `change` may do more to the model before it is saved."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings})
    )
    randomize(model)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def randomize(model: Any, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * size


def logits(base: Path, folder: Path | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    return result


def taken(base: Path | None, source: Path, **settings: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of the adapter taken in, and its certificate."""
    output = source.parent / "taken"
    ingest(IngestSpec(folder=str(source), output=str(output), base_model=base and str(base), **settings))
    certificate: dict[str, Any] = json.loads((output / "ingest.json").read_text())
    return output, certificate


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
