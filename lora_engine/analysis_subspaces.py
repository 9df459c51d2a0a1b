"""Principal angles between the column and the row spaces of deltas, from the factors alone (Björck and Golub 1973)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lora_engine.merging.arrays import Wide
from lora_engine.merging.factors import Factors

_NEGLIGIBLE = 1e-6  # of the largest singular value: below, what fp32 factors cannot tell from zero


@dataclass(frozen=True, slots=True)
class Spaces:
    """Orthonormal bases of what a delta can give (outputs × r) and of what it looks at (inputs × r)."""

    columns: Wide
    rows: Wide


def spaces(factors: Factors, block: slice) -> Spaces:
    """Of one part of a module; directions of negligible size do not count."""
    Q, R = np.linalg.qr(factors.B[:, block].astype(np.float64) * factors.scale[block])
    P, S = np.linalg.qr(factors.A[block].astype(np.float64).T)
    left, values, right = np.linalg.svd(R @ S.T)
    rank = int((values > _NEGLIGIBLE * values[:1].max(initial=0)).sum())
    return Spaces(Q @ left[:, :rank], P @ right[:rank].T)


def angles(first: Wide, second: Wide) -> Wide:
    """Principal angles between the ranges of two orthonormal bases, in degrees, the smallest first.

    As many as the smaller space has dimensions. Small ones come from sines: near 1 a cosine tells them no more.
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    products = first.T @ second
    cosines = np.linalg.svd(products, compute_uv=False)
    sines = np.linalg.svd(second - first @ products, compute_uv=False)[::-1]
    by_sine, by_cosine = np.arcsin(np.clip(sines, 0, 1)), np.arccos(np.clip(cosines, 0, 1))
    found: Wide = np.degrees(np.where(cosines > np.sqrt(0.5), by_sine, by_cosine))
    return found


def compare(found: Sequence[Spaces], names: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Of every two: smallest, median and largest angle in degrees, and overlap, the mean of the cosines' squares."""
    return {
        side: [
            {"pair": [names[i], names[j]], **_summary(angles(getattr(found[i], side), getattr(found[j], side)))}
            for i, j in combinations(range(len(found)), 2)
        ]
        for side in ("columns", "rows")
    }


def _summary(degrees: Wide) -> dict[str, float | None]:
    if not len(degrees):  # a delta of zeros has no directions
        return dict.fromkeys(("smallest", "median", "largest", "overlap"))
    return {
        "smallest": float(degrees[0]),
        "median": float(np.median(degrees)),
        "largest": float(degrees[-1]),
        "overlap": float(np.mean(np.cos(np.radians(degrees)) ** 2)),
    }
