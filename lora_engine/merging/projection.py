"""An adapter without what it shares with others, and the sum that PEFT calls linear: exact, as factors. No torch."""

from collections.abc import Callable

import numpy as np

from lora_engine.merging.arrays import Wide
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.geometry import products, weighted
from lora_engine.merging.sources import Plan

_NEGLIGIBLE = 1e-7  # of the largest singular value: what fp32 inputs cannot tell from zero


def projected_out(plan: Plan) -> Callable[[str], Factors]:
    """The first adapter's delta D without the part in the subspace of the others' deltas D_j, for every module.

    "span": D - Σ a_j·D_j, the nearest to zero (least squares on the Gram matrix). "column", "row", "both":
    (1 - U·Uᵀ)·D·(1 - V·Vᵀ) with the others' column space U, row space V, or both.
    """
    if plan.config.options["subspace"] == "span":
        return lambda module: _off_span(load(module, plan.modules[module]))
    return lambda module: _off_spaces(load(module, plan.modules[module]), plan.config.options["subspace"])


def peft_linear(plan: Plan) -> Callable[[str], Factors]:
    """PEFT's combination_type "linear": A = Σ ±√|c_i|·A_i, B = Σ √|c_i|·B_i, whose product has B_i·A_j too."""
    return lambda module: _peft_linear(load(module, plan.modules[module]))


def _off_span(factors: Factors) -> Factors:
    inner = products(factors)
    shares = np.linalg.pinv(inner[1:, 1:], rcond=_NEGLIGIBLE**2, hermitian=True) @ inner[1:, 0]
    left = inner[0, 0] - shares @ inner[1:, 0]
    kept = left > _NEGLIGIBLE**2 * inner[0, 0]
    return weighted(factors, np.concatenate([[1.0], -shares]) * kept)


def _off_spaces(factors: Factors, subspace: str) -> Factors:
    if len(factors.blocks) == 1:  # the others do not have this module
        return factors
    first = factors.blocks[0]
    others = slice(first.stop, factors.scale.size)
    B, A, scale = factors.B[:, first].astype(np.float64), factors.A[first].astype(np.float64), factors.scale[first]
    other_B, other_A = factors.B[:, others] * factors.scale[others], factors.A[others].astype(np.float64)
    blocks = [slice(block.start - first.stop, block.stop - first.stop) for block in factors.blocks[1:]]
    if subspace in ("column", "both"):
        U = _column_space(other_B, other_A, blocks)
        B = _without(B, U)
    if subspace in ("row", "both"):
        V = _column_space(other_A.T, other_B.T, blocks)
        A = _without(A.T, V).T
    return Factors(B, A, scale)


def _without(columns: Wide, basis: Wide) -> Wide:
    """(1 - U·Uᵀ)·columns; what is nothing but rounding is zero."""
    left: Wide = columns - basis @ (basis.T @ columns)
    kept = bool(np.linalg.norm(left) > _NEGLIGIBLE * np.linalg.norm(columns))
    return left if kept else np.zeros_like(left)


def _column_space(B: Wide, A: Wide, blocks: list[slice]) -> Wide:
    """An orthonormal basis of the columns of all B_j·A_j together."""
    columns, triangle = np.linalg.qr(B)
    # The rows of A_j weigh what the columns of B_j do; by Q of A_jᵀ they do so without the length of a row of W.
    side = np.concatenate([triangle[:, block] @ np.linalg.qr(A[block].T)[1].T for block in blocks], axis=1)
    U, values, _ = np.linalg.svd(side, full_matrices=False)
    basis: Wide = columns @ U[:, values > _NEGLIGIBLE * values.max(initial=0)]
    return basis


def _peft_linear(factors: Factors) -> Factors:
    sums: list[Wide] = []
    for side, signs in ((factors.A, np.sign(factors.scale)), (factors.B.T, np.ones_like(factors.scale))):
        scaled = side * (signs * np.sqrt(np.abs(factors.scale)))[:, None]
        sums.append(np.sum([scaled[block] for block in factors.blocks], axis=0))
    return Factors(sums[1].T, sums[0], np.ones(sums[0].shape[0]))
