"""Several adapters into one whose delta is exactly the weighted sum of theirs.

With c_i = weight_i · scaling_i, and for every module

    B = [c_1·B_1 | … | c_k·B_k],  A = [A_1; …; A_k]   ⇒   B·A = Σ weight_i · scaling_i · B_i·A_i

so any mix of ranks, alphas, rsLoRA, patterns, target modules and signs is one plain adapter of rank R = Σ rank_i with
alpha = R. The only error is the rounding of c_i·B_i to fp32.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import torch

from lora_engine import adapter
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.adapter_header import Header, inspect, targets
from lora_engine.config import MAX_STACK_RANK, MergeSpec
from lora_engine.errors import AdapterError, SpecError


@dataclass(frozen=True, slots=True)
class _Source:
    header: Header
    digest: str
    weight: float


def stack(spec: MergeSpec) -> dict[str, Any]:
    """Write the stacked adapter to `spec.output` and return its metrics: rank, modules, ranks before.

    Everything is checked from configs and headers before a tensor is read. The same adapter named twice counts once
    with the sum of its weights; weight 0 adds nothing. The bytes depend on the sources and their weights alone, not on
    their order. Memory: the result, and one module of one source.

    Raises:
        SpecError: no adapter has a weight other than 0.
        AdapterError: an adapter cannot be read, or they are not of one base model, or shapes differ.
    """
    sources = _sources(spec)
    used = [source for source in sources if source.weight]
    if not used:
        raise SpecError("adapters: every weight is 0, or weights of the same adapter cancel out", field="adapters")
    modules = _modules(used)
    rank = max(sum(source.header.modules[module].rank for source in parts) for module, parts in modules.items())
    if rank > MAX_STACK_RANK:
        raise SpecError(f"adapters: the ranks add up to {rank}; a stack has at most {MAX_STACK_RANK}", field="adapters")
    stacked = Adapter(
        weights={module: _stacked(module, parts, rank) for module, parts in modules.items()},
        rank=rank,
        alpha=rank,
        base_model_name=next((name for source in sources if (name := source.header.settings.base_model_name)), ""),
        base_digest=next((source.header.base_digest for source in sources if source.header.base_digest), None),
        target_modules=_target_modules(used),
    )
    parents = [{"digest": source.digest, "weight": source.weight} for source in sources]
    adapter.write(stacked, Path(spec.output), lineage={"method": spec.method, "parents": parents})
    return {
        "method": spec.method,
        "rank": rank,
        "ranks_before": [max(module.rank for module in source.header.modules.values()) for source in sources],
        "modules": len(modules),
        "parents": parents,
    }


def _sources(spec: MergeSpec) -> list[_Source]:
    """One source for every different adapter, in the order of their digests."""
    headers = [inspect(Path(item.path)) for item in spec.adapters]
    _check_base(headers)
    distinct: dict[str, Header] = {}
    weights: dict[str, list[float]] = defaultdict(list)
    for header, item in zip(headers, spec.adapters, strict=True):
        key = adapter.digest(header.folder)
        distinct.setdefault(key, header)
        weights[key].append(item.weight)
    return [_Source(distinct[key], key, fsum(weights[key])) for key in sorted(distinct)]


def _check_base(headers: Sequence[Header]) -> None:
    """One base model for all: by digest where every digest is known, else by name too; and shapes that agree."""
    digests = {header.base_digest for header in headers}
    names = {header.settings.base_model_name for header in headers} - {""}
    if len(digests - {None}) > 1 or (None in digests and len(names) > 1):
        listed = ", ".join(sorted({f"{item.settings.base_model_name} ({item.base_digest})" for item in headers}))
        raise AdapterError(f"the adapters are of different base models: {listed}")
    shapes: dict[str, tuple[int, int]] = {}
    for header in headers:
        for module, item in header.modules.items():
            shape = shapes.setdefault(module, (item.outputs, item.inputs))
            if shape != (item.outputs, item.inputs):
                raise AdapterError(f"{module}: {shape} in one adapter, {(item.outputs, item.inputs)} in another")


def _modules(sources: Sequence[_Source]) -> dict[str, list[_Source]]:
    """Which sources have something to add to which module."""
    modules: dict[str, list[_Source]] = defaultdict(list)
    for source in sources:
        for module in source.header.modules:
            modules[module].append(source)
    return dict(sorted(modules.items()))


def _stacked(module: str, sources: Sequence[_Source], rank: int) -> LoraWeights:
    """A (rank × in) and B (out × rank); zeros where the sources do not fill the rank."""
    shape = sources[0].header.modules[module]
    A, B = torch.zeros(rank, shape.inputs), torch.zeros(shape.outputs, rank)
    start = 0
    for source in sources:
        header = source.header.modules[module]
        weights = adapter.load_module(source.header, module)
        end = start + header.rank
        A[start:end] = weights.A
        B[:, start:end] = weights.B * (source.weight * header.scaling)
        start = end
    return LoraWeights(A, B)


def _target_modules(sources: Sequence[_Source]) -> list[str]:
    """The union, without full names that a last name covers."""
    names = {name for source in sources for name in source.header.target_modules}
    return sorted(name for name in names if not any(other != name and targets(other, name) for other in names))
