"""Adapters as files: PEFT's LoRA layout, written so that every loader computes the same delta.

    adapter_config.json         PEFT's config, in the portable profile of `peft_config.portable`
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank × in) and .lora_B.weight (out × rank)
    README.md                   the model card
    lineage.json                base model's name and digest, and how the adapter came to be

Same adapter, same bytes: no time stamps, keys in a fixed order.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_engine import peft_config
from lora_engine.adapter_header import CONFIG, FACTORS, LINEAGE, PREFIX, WEIGHTS, Header, inspect
from lora_engine.errors import AdapterError
from lora_engine.folders import published


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


def digest(folder: Path) -> str:
    """SHA-256 over what the adapter computes with: its config and its weights, by name and content."""
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def load_module(header: Header, module: str) -> LoraWeights:
    """The factors of one module, fp32, in memory of their own.

    Raises:
        AdapterError: a value that is not finite.
    """
    with safe_open(header.folder / WEIGHTS, framework="pt") as file:
        # `clone` lets go of the mapped file, whose pages would otherwise stay resident.
        A, B = (file.get_tensor(f"{PREFIX}{module}{factor}").to(torch.float32).clone() for factor in FACTORS)
    _check_finite(module, A, B)
    return LoraWeights(A, B)


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
    adapter: Adapter, folder: Path, *, lineage: Mapping[str, Any], files: Mapping[str, str] | None = None
) -> None:
    """Write the `portable` form of an adapter, and `files` (texts by name) beside it; all of it appears, or nothing.

    Raises:
        AdapterError: no weights, factors that do not fit each other, values that are not finite.
    """
    if not adapter.weights:
        raise AdapterError("the adapter holds no weights")
    for module, weights in adapter.weights.items():
        if weights.A.ndim != 2 or weights.B.ndim != 2 or weights.A.shape[0] != weights.B.shape[1]:
            raise AdapterError(f"{module}: A {tuple(weights.A.shape)} and B {tuple(weights.B.shape)} do not fit")
        _check_finite(module, weights.A, weights.B)
    name, uniform = adapter.base_model_name, portable(adapter)
    rank, alpha = uniform.rank, int(uniform.alpha)
    config = peft_config.portable(rank, alpha, name, sorted(set(adapter.target_modules) or adapter.weights))
    facts = {"base_model": name, "base_digest": adapter.base_digest, **lineage}
    tensors = {
        f"{PREFIX}{module}{factor}": tensor.contiguous()
        for module, weights in uniform.weights.items()
        for factor, tensor in zip(FACTORS, (weights.A, weights.B), strict=True)
    }
    with published(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(_dump_json(config), encoding="utf-8")
        (temporary / LINEAGE).write_text(_dump_json(dict(sorted(facts.items()))), encoding="utf-8")
        for extra, text in (files or {}).items():
            (temporary / extra).write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(_card(name, rank, alpha, config), encoding="utf-8")


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


def _check_finite(module: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise AdapterError(f"{module}: weights are not finite")


def _dump_json(value: Any) -> str:
    # Not sorted: of several entries of a rank pattern the last one counts.
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _card(base_model: str, rank: int, alpha: int, config: Mapping[str, Any]) -> str:
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# A LoRA adapter for {base_model}

Rank {rank}, alpha {alpha}, on {", ".join(config["target_modules"][:8])}{" …" if config["target_modules"][8:] else ""}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base_model)})
model = PeftModel.from_pretrained(base, "this folder")
```

`lineage.json` says how it came to be.
"""
