"""Random adapters for a tiny base model, the dense sum in fp64, and exports of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_engine import adapter, base_files, base_model
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.exporting.config import ExportConfig, ExportSpec
from lora_engine.exporting.export import export
from lora_engine.merging.config import WeightedAdapter

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    folder: Path, base: Path, seed: int, *, rank: int = 3, alpha: float | None = None, size: float = 0.1,
    targets: Sequence[str] | None = None, quantization: str | None = None, **settings: Any,
) -> WeightedAdapter:  # fmt: skip
    """Factors of random numbers for the linear layers with these last names (all but the head when left out)."""
    model = base_model.outline(base, quantization="none", compute_dtype="fp32").model
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for module in base_model.linear_modules(model):
        last = module.name.rpartition(".")[2]
        if last in targets if targets else not module.head:
            A = torch.randn(rank, module.inputs, generator=generator) * size
            weights[module.name] = LoraWeights(A, torch.randn(module.outputs, rank, generator=generator) * size)
    lineage = {} if quantization is None else {"training": {"quantization": quantization}}
    made = Adapter(
        weights, rank, rank if alpha is None else alpha, base_model_name="tests/tiny",
        base_digest=base_files.digest(base), **settings,
    )  # fmt: skip
    adapter.write(made, folder, lineage=lineage)
    return WeightedAdapter(path=str(folder))


def weighted(item: WeightedAdapter, weight: float, **weights: float) -> WeightedAdapter:
    return WeightedAdapter(path=item.path, weight=weight, weights=weights)


def dense(adapters: Sequence[WeightedAdapter]) -> dict[str, Tensor]:
    """Σ weight · scaling · B·A by module, in fp64."""
    result: dict[str, Tensor] = {}
    for item in adapters:
        found = adapter.read(Path(item.path))
        for module in found.weights:
            weight = item.weights.get(module.rpartition(".")[2], item.weight)
            result[module] = result.get(module, 0) + weight * adapter.delta(found, module)
    return result


def run(base: Path, adapters: Sequence[WeightedAdapter], output: Path, /, **options: Any) -> dict[str, Any]:
    """An export with these fields of `ExportConfig`; its metrics."""
    tell = options.pop("tell", None)
    spec = ExportSpec(base_model=str(base), adapters=adapters, output=str(output), export=ExportConfig(**options))
    return export(spec, tell)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def relative(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in fp64."""
    return float((got.double() - want.double()).norm() / want.double().norm())
