"""Adapters in PEFT's layout: `peft` with factors and ranks as they are, `peft-portable` so that every loader agrees.

Loaders disagree on the scale (PEFT alpha / rank with patterns and rsLoRA, vLLM and SGLang one alpha / r, TGI the
config's, llama.cpp alpha / rank of the tensor). In the portable profile they are all the same: one rank, padded with
zeros, alpha equal to it, no patterns, no rsLoRA, the scale in B; and A and B for every layer that the names of
`target_modules` mean, zeros where nothing was trained, as TGI drops a kind of which a layer is missing.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import peft_config, safetensors_file
from lora_engine.adapter_folder import load_module
from lora_engine.adapter_header import CONFIG, FACTORS, PREFIX, WEIGHTS, ModuleHeader
from lora_engine.exporting.deltas import Deltas, FactoredDelta
from lora_engine.merging.arrays import Array
from lora_engine.target_modules import Module

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def write_native(deltas: Deltas, folder: Path, base_name: str, dtype: str) -> None:
    """Config and weights; every module keeps its rank. PEFT alone reads the patterns that this may take.

    A single adapter of weight 1 keeps its factors and its alphas; what several or other weights multiply lies in B.

    Raises:
        AdapterError: a value that `dtype` cannot hold, or that is not finite.
    """
    single = deltas.headers[0] if _untouched(deltas) else None
    shapes = {name: single.modules[name] if single else _folded(deltas, name) for name in deltas.modules}
    rslora = single is not None and single.settings.use_rslora
    (rank, alpha), _ = Counter((item.rank, item.alpha) for item in shapes.values()).most_common(1)[0]
    config = peft_config.portable(rank, 1, base_name, _names(deltas))
    config["lora_alpha"] = _number(alpha)
    config["use_rslora"] = rslora
    config["rank_pattern"] = {_exactly(name): item.rank for name, item in shapes.items() if item.rank != rank}
    config["alpha_pattern"] = {
        _exactly(name): _number(item.alpha) for name, item in shapes.items() if item.alpha != alpha
    }
    weights = {name: load_module(single, name) if single else _arrays(deltas.factors(name)) for name in deltas.modules}
    _write(folder, config, weights, dtype)


def write_portable(deltas: Deltas, modules: tuple[Module, ...], folder: Path, base_name: str, dtype: str) -> None:
    """Config and weights; `modules` are the base model's linear layers.

    Raises:
        AdapterError: as `write_native`.
    """
    rank = max(deltas.rank(name) for name in deltas.modules)
    names = sorted({name.rpartition(".")[2] for name in deltas.modules})
    filled = {}
    for module in modules:
        if module.name.rpartition(".")[2] in names:
            filled[module.name] = padded(deltas, module, rank)
    _write(folder, peft_config.portable(rank, rank, base_name, names), filled, dtype)


def _untouched(deltas: Deltas) -> bool:
    """Whether there is one adapter, of weight 1 everywhere."""
    parts = {(part.digest, part.weight) for item in deltas.plan.modules.values() for part in item.parts}
    return len(parts) == 1 and len(deltas.headers) == 1 and next(iter(parts))[1] == 1


def _folded(deltas: Deltas, name: str) -> ModuleHeader:
    rank = deltas.rank(name)
    outputs, inputs = deltas.shapes[name]
    return ModuleHeader(rank, inputs, outputs, float(rank), 1.0)


def _names(deltas: Deltas) -> list[str]:
    """As the sources name their targets, where nothing that they mean is missing; else full names."""
    complete = set(deltas.modules) == set(deltas.plan.modules)
    return list(deltas.plan.target_modules) if complete else sorted(deltas.modules)


def padded(deltas: Deltas, module: Module, rank: int) -> tuple[Array, Array]:
    """A (rank × in) and B (out × rank, the scale in it), with zeros where the adapters have nothing."""
    A, B = np.zeros((rank, module.inputs), np.float32), np.zeros((module.outputs, rank), np.float32)
    if module.name in deltas.shapes:
        weights = deltas.factors(module.name)
        A[: len(weights.A)], B[:, : len(weights.A)] = weights.A.numpy(), weights.B.numpy()
    return A, B


def _arrays(weights: FactoredDelta) -> tuple[Array, Array]:
    return weights.A.numpy(), weights.B.numpy()


def _write(folder: Path, config: dict[str, Any], weights: dict[str, tuple[Array, Array]], dtype: str) -> None:
    arrays = {
        f"{PREFIX}{name}{factor}": array
        for name, pair in weights.items()
        for factor, array in zip(FACTORS, pair, strict=True)
    }
    safetensors_file.write(folder / WEIGHTS, arrays, {"format": "pt"}, TYPES[dtype])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _exactly(name: str) -> str:
    """A pattern that this module alone fits."""
    return f"^{re.escape(name)}"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
