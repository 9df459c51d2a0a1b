"""Random adapters for measurements: PEFT's own on a small model, and ours on layers of any shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_engine import adapter
from lora_engine.adapter import Adapter, LoraWeights

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**sizes: int) -> Any:
    """A small Llama with random weights."""
    settings = {"vocab_size": 256, "num_hidden_layers": 2, **sizes}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def save_peft(folder: Path, seed: int, base: Any, **settings: Any) -> Path:
    """An adapter with random factors, made and saved by PEFT on `base`, which is as it was afterwards."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    model.save_pretrained(str(folder), save_embedding_layers=False)
    model.unload()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "benchmark"}))
    return folder


def loaded(base: Any, folders: list[Path]) -> Any:
    """PEFT's model with the adapters, named as their folders."""
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model


def save_ours(folder: Path, seed: int, shapes: Mapping[str, tuple[int, int]], rank: int) -> Path:
    """An adapter with random factors on layers of these shapes (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: LoraWeights(
            torch.randn(rank, inputs, generator=generator) * 0.02,
            torch.randn(outputs, rank, generator=generator) * 0.02,
        )
        for name, (outputs, inputs) in shapes.items()
    }
    names = sorted({name.rpartition(".")[2] for name in shapes})
    made = Adapter(weights, rank=rank, alpha=2 * rank, base_model_name="benchmark", target_modules=names)
    adapter.write(made, folder, lineage={})
    return folder


def seven_billion(layers: int, size: int = 4096) -> dict[str, tuple[int, int]]:
    """The linear layers (out, in) of so many layers of Llama 7B, whose hidden size is 4096."""
    wide = size * 11008 // 4096
    shapes = {}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{attention}.{name}": (size, size) for name in ALL_LINEAR[:4]}
        shapes |= {f"{mlp}.gate_proj": (wide, size), f"{mlp}.up_proj": (wide, size), f"{mlp}.down_proj": (size, wide)}
    return shapes


def dense(sources: list[Path], weights: tuple[float, ...]) -> dict[str, Tensor]:
    """Σ weight · scaling · B·A by module, in fp64."""
    total: dict[str, Tensor] = {}
    for path, weight in zip(sources, weights, strict=True):
        source = adapter.read(path)
        for module in source.weights:
            total[module] = total.get(module, torch.tensor(0.0)) + weight * adapter.delta(source, module)
    return total


def error(result: Path, wanted: Mapping[str, Tensor]) -> float:
    """The largest relative Frobenius distance of a module's delta."""
    found = adapter.read(result)
    return max(float((adapter.delta(found, name) - value).norm() / value.norm()) for name, value in wanted.items())
