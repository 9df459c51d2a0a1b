"""An adapter in memory: the factors of every module as tensors, and what scales them. Its files: `adapter_folder`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine import adapter_folder, peft_config
from lora_engine.adapter_header import Header, inspect
from lora_engine.adapter_header import digest as digest
from lora_engine.errors import AdapterError
from lora_engine.safetensors_file import Array


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The two factors of one module's delta, fp32 on the CPU: A (rank × in) and B (out × rank)."""

    A: Tensor
    B: Tensor


@dataclass(slots=True)
class Adapter:
    """Factors by full module name, and what scales them.

    Attributes:
        weights: module name in the base model ("model.layers.0.self_attn.q_proj") → factors.
        rank: of every module whose factors do not have another.
        alpha: numerator of the scaling.
        use_rslora: alpha is divided by √rank instead of rank.
        base_model_name: public name of the base model.
        base_digest: SHA-256 of the base model, where known.
        target_modules: last names ("q_proj") that stand for exactly these modules in the base; empty: the full names.
        alphas: modules whose alpha is not `alpha`.
    """

    weights: dict[str, LoraWeights]
    rank: int
    alpha: float
    use_rslora: bool = False
    base_model_name: str = ""
    base_digest: str | None = None
    target_modules: Sequence[str] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)


def scaling(adapter: Adapter, module: str) -> float:
    """What multiplies B·A of this module."""
    rank = adapter.weights[module].A.shape[0]
    return peft_config.scaling_of(rank, adapter.alphas.get(module, adapter.alpha), adapter.use_rslora)


def delta(adapter: Adapter, module: str) -> Tensor:
    """scaling · B · A (out × in), computed and returned in fp64."""
    weights = adapter.weights[module]
    return scaling(adapter, module) * (weights.B.double() @ weights.A.double())


def load_module(header: Header, module: str) -> LoraWeights:
    """The factors of one module, fp32, in memory of their own.

    Raises:
        AdapterError: a value that is not finite.
    """
    A, B = adapter_folder.load_module(header, module)
    return LoraWeights(torch.from_numpy(A), torch.from_numpy(B))


def read(folder: Path) -> Adapter:
    """An adapter written by `write` or by PEFT: rank and alpha patterns and rsLoRA keep their exact scaling.

    Raises:
        AdapterError: as `inspect` and `load_module` do.
    """
    header = inspect(folder)
    settings = header.settings
    return Adapter(
        weights={module: load_module(header, module) for module in header.modules},
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        base_model_name=settings.base_model_name,
        base_digest=header.base_digest,
        target_modules=settings.target_modules,
        alphas={name: item.alpha for name, item in header.modules.items() if item.alpha != settings.alpha},
    )


def write(
    adapter: Adapter,
    folder: Path,
    *,
    lineage: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    notes: str = "",
) -> None:
    """Write the `portable` form of an adapter, and `files` (texts by name) beside it; all of it appears, or nothing.

    The model card ends with `notes` (Markdown).

    Raises:
        AdapterError: no weights, factors that do not fit each other, values that are not finite.
    """
    if not adapter.weights:
        raise AdapterError("the adapter holds no weights")
    for module, weights in adapter.weights.items():
        if weights.A.ndim != 2 or weights.B.ndim != 2 or weights.A.shape[0] != weights.B.shape[1]:
            raise AdapterError(f"{module}: A {tuple(weights.A.shape)} and B {tuple(weights.B.shape)} do not fit")
    uniform = portable(adapter)
    adapter_folder.write(
        folder,
        {module: (_numpy(weights.A), _numpy(weights.B)) for module, weights in uniform.weights.items()},
        alpha=int(uniform.alpha),
        base_model_name=adapter.base_model_name,
        base_digest=adapter.base_digest,
        target_modules=adapter.target_modules,
        lineage=lineage,
        files=files,
        notes=notes,
    )


def portable(adapter: Adapter) -> Adapter:
    """The same deltas with one rank, one whole alpha and no rsLoRA, on which loaders agree.

    An adapter that is so already comes back unchanged. Otherwise the scaling is multiplied into B (rounded to fp32),
    smaller ranks are padded with zeros, and alpha equals the rank.
    """
    ranks = {weights.A.shape[0] for weights in adapter.weights.values()}
    rank = max(ranks)
    uniform = ranks == {adapter.rank} and not adapter.use_rslora and not adapter.alphas
    if uniform and adapter.alpha == int(adapter.alpha):
        return adapter
    weights = {module: _folded(adapter, module, rank) for module in adapter.weights}
    return replace(adapter, weights=weights, rank=rank, alpha=rank, use_rslora=False, alphas={})


def _folded(adapter: Adapter, module: str, rank: int) -> LoraWeights:
    weights = adapter.weights[module]
    missing = rank - weights.A.shape[0]
    A = torch.nn.functional.pad(weights.A, (0, 0, 0, missing))
    B = torch.nn.functional.pad(weights.B * scaling(adapter, module), (0, missing))
    return LoraWeights(A, B)


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
