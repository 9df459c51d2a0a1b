"""Methods whose result is a sum of the deltas with weights that follow from lengths and angles between them.

All of them are told by the k × k Gram matrix ⟨D_i, D_j⟩ = s_i·s_j·Σ((B_iᵀB_j) ∘ (A_i·A_jᵀ)), without a dense delta, and
the result is a stack: exact. No torch.
"""

from collections.abc import Callable, Mapping
from math import acos, cos, sin, sqrt

import numpy as np

from lora_engine.errors import AdapterError
from lora_engine.merging.arrays import Wide
from lora_engine.merging.certificate import gram
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.recipe import total
from lora_engine.merging.sources import Plan

_PARALLEL = 1e-6  # below it sines are no longer told from angles
_CONVERGED = 1e-13
_MOST_STEPS = 1000


def exact(plan: Plan, beat: Callable[[], None]) -> Callable[[str], Factors]:
    """The result of every module that has parts, as factors.

    With scope "module" each module has its own angles, and where only some of the adapters change it, they alone count.
    With scope "adapter" the adapters are compared as a whole; what one lacks is zero there.
    """
    if plan.config.options.get("scope") == "adapter":
        whole = _whole(plan, beat)
        return lambda module: _weighted(plan, module, [whole[part.digest] for part in plan.modules[module].parts])
    return lambda module: _of_module(plan, module)


def products(factors: Factors) -> Wide:
    """⟨D_i, D_j⟩ of the parts of a module (k × k)."""
    full = gram((factors.B * factors.scale).T) * gram(factors.A)
    return np.array([[full[left, right].sum() for right in factors.blocks] for left in factors.blocks])


def coefficients(method: str, inner: Wide, weights: Wide) -> Wide:
    """The k numbers by which "slerp", "karcher" or "model_stock" multiplies the deltas, from their inner products.

    "slerp" (Shoemake 1985): from one to the other by the share that the second has of the weights, along the arc.
    "karcher": the mean of the directions on the sphere, weighted, with the weighted mean of the lengths.
    "model_stock" (arXiv 2403.19522): the mean of the weighted deltas, times t = k·cosθ / (1 + (k - 1)·cosθ) with the
    mean cosine between them, which is where the base model and the mean are in balance.
    """
    found = np.zeros(len(weights))
    given = np.flatnonzero(np.diagonal(inner))  # a delta of zeros has no direction, and takes no part
    inner, weights = inner[np.ix_(given, given)], weights[given]
    if len(given) == 1:
        found[given] = weights if method == "model_stock" else 1.0
    elif len(given):
        found[given] = {"slerp": _slerp, "karcher": _karcher, "model_stock": _model_stock}[method](inner, weights)
    return found


def _of_module(plan: Plan, module: str) -> Factors:
    factors = load(module, plan.modules[module], weighted=False)
    parts = plan.modules[module].parts
    weights = np.array([part.weight for part in parts])
    try:
        found = coefficients(plan.config.method, products(factors), weights)
    except AdapterError as error:
        raise AdapterError(f"{module}: {error.message}") from None
    return weighted(factors, found)


def weighted(factors: Factors, weights: Wide) -> Factors:
    """The factors with the scale of each part multiplied by a weight."""
    scale = factors.scale.copy()
    for block, weight in zip(factors.blocks, weights, strict=True):
        scale[block] *= weight
    return Factors(factors.B, factors.A, scale, factors.blocks)


def _weighted(plan: Plan, module: str, weights: list[float]) -> Factors:
    return weighted(load(module, plan.modules[module], weighted=False), np.array(weights))


def _whole(plan: Plan, beat: Callable[[], None]) -> Mapping[str, float]:
    """One coefficient for every adapter, from its inner products over all modules."""
    weights = {
        digest: total(source.weight for source in plan.sources if source.digest == digest)
        for digest in sorted({source.digest for source in plan.sources})
    }
    digests = [digest for digest, weight in weights.items() if weight]
    inner = np.zeros((len(digests), len(digests)))
    for module, item in plan.modules.items():
        beat()
        if item.parts:
            places = [digests.index(part.digest) for part in item.parts]
            inner[np.ix_(places, places)] += products(load(module, item, weighted=False))
    found = coefficients(plan.config.method, inner, np.array([weights[digest] for digest in digests]))
    return dict(zip(digests, (float(value) for value in found), strict=True))


def _cosines(inner: Wide) -> Wide:
    lengths = np.sqrt(np.diagonal(inner))
    cosines: Wide = np.clip(inner / np.outer(lengths, lengths), -1, 1)
    return cosines


def _slerp(inner: Wide, weights: Wide) -> Wide:
    share = weights[1] / weights.sum()
    angle = acos(_cosines(inner)[0, 1])
    if sin(angle) < _PARALLEL:  # on one line: the arc is the line, or undefined
        return np.array([1 - share, share])
    return np.array([sin((1 - share) * angle) / sin(angle), sin(share * angle) / sin(angle)])


def _model_stock(inner: Wide, weights: Wide) -> Wide:
    count = len(weights)
    cosines = _cosines(inner) * np.outer(np.sign(weights), np.sign(weights))
    mean = (cosines.sum() - np.trace(cosines)) / (count * (count - 1))
    mean = max(float(mean), 0.0)  # beyond a right angle the base model itself is the best guess
    found: Wide = weights * (mean / (1 + (count - 1) * mean))
    return found


def _karcher(inner: Wide, weights: Wide) -> Wide:
    lengths: Wide = np.sqrt(np.diagonal(inner))
    length = float(weights @ lengths / weights.sum())
    shares, cosines = weights / weights.sum(), _cosines(inner)
    mean = _on_sphere(shares, cosines)
    for _ in range(_MOST_STEPS):
        angles: Wide = np.arccos(np.clip(cosines @ mean, -1, 1))
        pulls: Wide = shares * np.where(angles > _PARALLEL, angles / np.maximum(np.sin(angles), _PARALLEL), 1.0)
        tangent = pulls - float(pulls @ (cosines @ mean)) * mean
        size = sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if size < _CONVERGED:
            found: Wide = length * mean / lengths
            return found
        mean = _on_sphere(cos(size) * mean + sin(size) / size * tangent, cosines)
    raise AdapterError("the adapters point in opposite directions, which have no mean on the sphere; use linear")


def _on_sphere(point: Wide, cosines: Wide) -> Wide:
    size = sqrt(max(float(point @ cosines @ point), 0.0))
    if size < _PARALLEL:
        raise AdapterError("the adapters point in opposite directions, which have no mean on the sphere; use linear")
    return point / size
