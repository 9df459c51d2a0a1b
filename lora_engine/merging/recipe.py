"""What a merge's result depends on, and nothing else: the same recipe gives the same adapter. No torch.

The order of the sources counts for no method but "project_out", and an adapter that is named twice gets both weights;
recipes that say the same in another way are equal. That makes their digest an address of the result.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import Any, TypeAlias

from lora_engine.merging.config import MergeConfig

# To be raised when the same recipe comes to mean other bytes.
CODE_VERSION = 1

# Digest, weight, and weights of modules by pattern, whose order counts.
WeightedDigest: TypeAlias = tuple[str, float, Mapping[str, float]]


def recipe(config: MergeConfig, sources: Sequence[WeightedDigest], base_digest: str | None) -> dict[str, Any]:
    """The canonical form of a merge, as plain JSON."""
    return {
        "code_version": CODE_VERSION,
        "method": config.method,
        "options": dict(sorted(config.options.items())),
        "base_digest": base_digest,
        "sources": _canonical(sources, ordered=config.method == "project_out"),
    }


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe, in hexadecimal."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def total(weights: Iterable[float]) -> float:
    """The sum, the same in any order; never the 0 that has a sign."""
    return fsum(weights) + 0.0


def _canonical(sources: Sequence[WeightedDigest], *, ordered: bool) -> list[dict[str, Any]]:
    """One entry for every adapter and set of patterns, with the sums of their weights."""
    together: dict[tuple[str, tuple[str, ...]], list[WeightedDigest]] = defaultdict(list)
    for source in sources:
        together[source[0], tuple(source[2])].append(source)
    keys = list(together) if ordered else sorted(together)
    return [
        {
            "digest": key[0],
            "weight": total(source[1] for source in together[key]),
            "weights": [[name, total(source[2][name] for source in together[key])] for name in key[1]],
        }
        for key in keys
    ]
