"""The nonlinear methods as their papers and mergekit (0.1) define them, on whole dense tensors, with none of our code.

mergekit pins old versions of everything and cannot stand beside us, so its definitions are written down here:
`merge_methods/generalized_task_arithmetic.py`, `sparsify.py`, `merge_methods/sce.py`. Random masks are given.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_engine.merging.arrays import Wide


def magnitude(delta: Wide, density: float, gamma: float = 0.0) -> Wide:
    """The largest share of the entries, without the very largest (mergekit: magnitude, magnitude_outliers)."""
    flat = delta.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")
    top = int(gamma * flat.size)
    kept = np.zeros_like(flat)
    chosen = order[top : top + int(density * flat.size)]
    kept[chosen] = flat[chosen]
    return kept.reshape(delta.shape)


def elect(deltas: Wide, election: str) -> Any:
    """Which entries have the sign that the sum of the values, or of the signs, has."""
    votes = deltas if election == "mass" else np.sign(deltas)
    majority = np.where(votes.sum(axis=0) >= 0, 1, -1)
    return np.sign(deltas) == majority


def disjoint(deltas: Wide, weights: Sequence[float], election: str, normalize: str) -> Wide:
    """`deltas` are weighted. TIES' disjoint mean ("count"), mergekit's `normalize: true` ("weight") and `false`.

    With a negative weight mergekit divides by a negative number, which loses the sign that the weight has put in.
    """
    merged = np.zeros(deltas.shape[1:])
    agree = elect(deltas, election)
    for place in np.ndindex(*merged.shape):
        chosen = [index for index in range(len(deltas)) if agree[(index, *place)]]
        total = sum(deltas[(index, *place)] for index in chosen)
        divisor = {"count": len(chosen), "weight": sum(abs(weights[index]) for index in chosen), "none": 1}[normalize]
        merged[place] = total / divisor if abs(divisor) >= 1e-8 else total
    return merged


def ties(deltas: Sequence[Wide], weights: Sequence[float], density: float, election: str, normalize: str) -> Wide:
    trimmed = np.stack([weight * magnitude(delta, density) for weight, delta in zip(weights, deltas, strict=True)])
    return disjoint(trimmed, weights, election, normalize)


def sce(deltas: Wide, density: float) -> Wide:
    """`deltas` are weighted."""
    if density < 1:
        spread = deltas.var(axis=0)
        count = int(density * np.count_nonzero(spread))
        chosen = np.zeros(spread.size)
        chosen[np.argsort(-spread.reshape(-1), kind="stable")[:count]] = 1
        deltas = deltas * chosen.reshape(spread.shape)
    energy = np.array([(delta**2).sum() / delta.size for delta in deltas])
    shares = (energy / energy.sum())[:, None, None] * elect(deltas, "mass")
    divisor = shares.sum(axis=0)
    divisor[divisor == 0] = 1
    return np.asarray((deltas * shares).sum(axis=0) / divisor)


def magprune(delta: Wide, density: float, epsilon: float) -> Wide:
    """DELLA's probabilities of keeping: by rank within a row, the smallest first, from density ∓ epsilon / 2."""
    ranks = np.empty_like(delta)
    for row, values in enumerate(np.abs(delta)):
        for place, column in enumerate(np.argsort(values, kind="stable")):
            ranks[row, column] = place / (len(values) - 1)
    return density - epsilon / 2 + epsilon * ranks
