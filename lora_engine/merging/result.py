"""A merged adapter as it is written: weights, config, lineage, certificate and card, all of it or nothing. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import adapter_folder, peft_config, strict_json
from lora_engine.adapter_header import FACTORS, LINEAGE, PREFIX
from lora_engine.errors import AdapterError
from lora_engine.merging import card, certificate
from lora_engine.merging.arrays import Array, Wide
from lora_engine.merging.certificate import ModuleCertificate
from lora_engine.merging.config import VLLM_RANKS
from lora_engine.merging.recipe import digest
from lora_engine.merging.sources import Plan

_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_BF16_DROPS = 45  # bits of fp64's 52 that bf16's fraction of 7 has not


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """A (rank × in) and B (out × rank), fp32 with values that the file's type holds; B·A is the module's delta."""

    A: Array
    B: Array
    certificate: ModuleCertificate


def rounded(array: Wide | Array, dtype: str, module: str) -> Array:
    """The nearest values that "fp32", "fp16" or "bf16" holds, ties to even, in one rounding; as fp32.

    Raises:
        AdapterError: a value is beyond the type's range.
    """
    with np.errstate(over="ignore"):
        if dtype == "bf16":
            bits = np.asarray(array, np.float64).view(np.uint64)
            half = np.uint64((1 << (_BF16_DROPS - 1)) - 1) + ((bits >> np.uint64(_BF16_DROPS)) & np.uint64(1))
            kept = (bits + half) >> np.uint64(_BF16_DROPS) << np.uint64(_BF16_DROPS)
            result = kept.view(np.float64).astype(np.float32)
        else:
            result = array.astype(np.float16 if dtype == "fp16" else np.float32).astype(np.float32)
    if not np.isfinite(result).all():
        raise AdapterError(f"{module}: values beyond what {dtype} holds; use {'fp32' if dtype != 'fp32' else 'less'}")
    return result


def publish(
    plan: Plan,
    results: Mapping[str, ModuleResult],
    folder: Path,
    *,
    lineage: Mapping[str, Any],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Write the adapter and return its metrics: method, rank, ranks before, modules, parents, recipe, certificate.

    One rank for all modules (smaller ones are padded with zeros), alpha equal to it and no patterns, so that every
    loader computes the same; where energy or bytes were asked for, every module has a rank of its own, which PEFT
    alone reads.

    Raises:
        AdapterError: the result is zero in every module.
    """
    if not any(item.certificate.exact.frobenius for item in results.values()):
        raise AdapterError(f"nothing is left: {plan.config.method} gives zero; choose other weights or another scope")
    native = plan.config.energy is not None or plan.config.max_bytes is not None
    rank = _rank(plan, results)
    config, arrays = _native(plan, results) if native else _portable(plan, results, rank)
    recipe = plan.recipe
    facts = {
        "method": plan.config.method,
        "parents": _parents(recipe),
        "recipe": recipe,
        "recipe_digest": digest(recipe),
        **_training(plan),
        **lineage,
        "base_model": plan.base_model_name,
        "base_digest": plan.base_digest,
    }
    certified = certificate.document(
        {name: item.certificate for name, item in results.items()},
        {"method": plan.config.method, "recipe_digest": facts["recipe_digest"]},
    )
    texts = {
        certificate.FILE: adapter_folder.dump_json(certified),
        "README.md": card.text(plan, rank, certified["totals"], native=native),
        **files,
    }
    dtype = _TYPES[plan.config.options["dtype"]]
    adapter_folder.publish(folder, config, arrays, dtype=dtype, lineage=facts, files=texts)
    return {
        "method": plan.config.method,
        "rank": rank,
        "ranks_before": [max(item.rank for item in source.header.modules.values()) for source in plan.sources],
        "modules": sum(1 for item in plan.modules.values() if item.parts),
        "parents": facts["parents"],
        "recipe_digest": facts["recipe_digest"],
        "certificate": certified["totals"],
    }


def _training(plan: Plan) -> dict[str, Any]:
    """What the base model's weights were quantised to while the sources were trained, where all say the same.

    An export has to know which base the adapter was trained on.
    """
    found = {_quantization(source.header.folder / LINEAGE) for source in plan.sources}
    quantization = found.pop() if len(found) == 1 else None
    return {"training": {"quantization": quantization}} if quantization else {}


def _quantization(path: Path) -> str | None:
    if not path.exists():
        return None
    lineage = strict_json.loads(path.read_bytes())
    training = lineage.get("training") if isinstance(lineage, dict) else None
    found = training.get("quantization") if isinstance(training, dict) else None
    return found if isinstance(found, str) else None


def _rank(plan: Plan, results: Mapping[str, ModuleResult]) -> int:
    rank = max(1, *(item.A.shape[0] for item in results.values()), 1)
    return next(item for item in VLLM_RANKS if item >= rank) if plan.config.fit else rank


def _parents(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"digest": source["digest"], "weight": source["weight"]}
        | ({"weights": dict(source["weights"])} if source["weights"] else {})
        for source in recipe["sources"]
    ]


def _portable(plan: Plan, results: Mapping[str, ModuleResult], rank: int) -> tuple[dict[str, Any], dict[str, Array]]:
    arrays: dict[str, Array] = {}
    for module, item in results.items():
        missing = rank - item.A.shape[0]
        pair = (item.A, item.B)
        if missing:
            pair = (np.pad(item.A, ((0, missing), (0, 0))), np.pad(item.B, ((0, 0), (0, missing))))
        arrays |= {f"{PREFIX}{module}{factor}": array for factor, array in zip(FACTORS, pair, strict=True)}
    return peft_config.portable(rank, rank, plan.base_model_name, list(plan.target_modules)), arrays


def _native(plan: Plan, results: Mapping[str, ModuleResult]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Full names everywhere, and a rank and an alpha of its own for every module that has any rank left."""
    kept = {module: item for module, item in results.items() if item.A.shape[0]}
    ranks = {f"^{re.escape(module)}": item.A.shape[0] for module, item in kept.items()}
    rank = max(ranks.values())
    config = peft_config.portable(rank, rank, plan.base_model_name, sorted(kept))
    patterns = {name: value for name, value in ranks.items() if value != rank}
    arrays = {
        f"{PREFIX}{module}{factor}": array
        for module, item in kept.items()
        for factor, array in zip(FACTORS, (item.A, item.B), strict=True)
    }
    return {**config, "rank_pattern": patterns, "alpha_pattern": patterns}, arrays
