"""The singular values of a delta and its best approximation of fewer ranks, from its factors. No torch.

Eckart and Young (1936), Mirsky (1960): cutting the singular value decomposition after rank r is optimal in every
unitarily invariant norm, and leaves ‖D - D_r‖_F = √Σ_{j>r} S_j² and ‖D - D_r‖₂ = S_{r+1}. The dense delta is never
formed: with D = B·A (out × R, R × in), R × R matrices say everything, and B and A are read twice.

Products alone are quick, so orthogonal bases come from Cholesky's decomposition of BᵀB and A·Aᵀ in fp64, with columns
scaled to one length first. That squares the condition, so where it is bad the bases come from Householder's QR.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np

from lora_engine.merging.arrays import Array, Wide
from lora_engine.merging.certificate import NOISE, Norms, of_singular_values
from lora_engine.merging.config import VLLM_RANKS, MergeConfig
from lora_engine.merging.sources import Plan, header_bytes, rank_bytes

# Beyond it Cholesky's bases are orthogonal to fewer than 8 digits: the loss is its square times fp64's 1e-16.
_WORST_CONDITION = 1e4
_ROWS = 1024  # to work on at a time, in the processor's cache


@dataclass(frozen=True, slots=True)
class Decomposition:
    """D = Σ_j S_j · u_j·v_jᵀ, with the singular vectors still as products.

    Attributes:
        values: S, descending.
        left, to_left: left (out × R) · to_left (R × p) = U·√S.
        to_right, right: to_right (p × R) · right (R × in) = √S·Vᵀ.
    """

    values: Wide
    left: Wide | Array
    to_left: Wide
    to_right: Wide
    right: Wide | Array

    def factors(self, rank: int) -> tuple[Wide, Wide]:
        """B (out × rank) and A (rank × in) of the best approximation, with √S on both sides."""
        return _times(self.left, self.to_left[:, :rank]), _times(self.right.T, self.to_right[:rank].T).T

    def beyond(self, rank: int) -> Norms:
        """What the best approximation of this rank leaves out."""
        return of_singular_values(self.values[rank:])


def decompose(B: Wide | Array, A: Wide | Array, scale: Wide) -> Decomposition:
    """Of B · diag(scale) · A, with B (out × R) and A (R × in), without what is nothing but rounding of its terms."""
    columns, rows = _products(B), _products(A.T)
    lengths = np.sqrt(np.diagonal(columns)) * np.abs(scale) * np.sqrt(np.diagonal(rows))
    used = lengths > 0  # without the zeros that ranks are padded with
    found = _decompose(B, A, scale, columns, rows, used)
    kept = int((found.values > NOISE * lengths.sum()).sum())
    return replace(found, values=found.values[:kept], to_left=found.to_left[:, :kept], to_right=found.to_right[:kept])


def _decompose(
    B: Wide | Array, A: Wide | Array, scale: Wide, columns: Wide, rows: Wide, used: Any
) -> Decomposition:  # fmt: skip
    left, right = (_orthogonal(products[np.ix_(used, used)]) for products in (columns, rows))
    if left is None or right is None:
        return _householder((B[:, used] * scale[used]).astype(np.float64), A[used].astype(np.float64))
    U, values, Vt = np.linalg.svd(left.triangle.T @ (scale[used, None] * right.triangle))
    root = np.sqrt(values)
    to_left, to_right = np.zeros((len(used), values.size)), np.zeros((values.size, len(used)))
    to_left[used], to_right[:, used] = left.inverse.T @ (U * root), (root[:, None] * Vt) @ right.inverse
    return Decomposition(values, B, to_left, to_right, A)


def _blocks(tall: Wide | Array) -> Iterator[tuple[slice, Wide]]:
    """Rows of a matrix in fp64, a few at a time: fresh memory for all of them costs more than their products."""
    order: Any = "F" if tall.flags.f_contiguous else "C"
    memory = np.empty((min(_ROWS, len(tall)), tall.shape[1]), order=order)
    for start in range(0, len(tall), _ROWS):
        rows = slice(start, min(start + _ROWS, len(tall)))
        part = memory[: rows.stop - start]
        part[...] = tall[rows]
        yield rows, part


def _products(tall: Wide | Array) -> Wide:
    """tallᵀ · tall, in fp64."""
    total = np.zeros((tall.shape[1], tall.shape[1]))
    for _, part in _blocks(tall):
        total += part.T @ part
    return total


def _times(tall: Wide | Array, small: Wide) -> Wide:
    """tall · small, in fp64, lying in memory as `tall` does."""
    result = np.empty((len(tall), small.shape[1]), order="F" if tall.flags.f_contiguous else "C")
    for rows, part in _blocks(tall):
        result[rows] = part @ small
    return result


@dataclass(frozen=True, slots=True)
class _Triangle:
    """L with L·Lᵀ = M·Mᵀ, and its inverse: the rows of L⁻¹·M are orthonormal."""

    triangle: Wide
    inverse: Wide


def _orthogonal(products: Wide) -> _Triangle | None:
    """The lower triangle of products of rows that are not 0; none where it would be inaccurate."""
    lengths = np.sqrt(np.diagonal(products))
    try:
        triangle = np.linalg.cholesky(products / np.outer(lengths, lengths)).astype(np.float64)
    except np.linalg.LinAlgError:
        return None
    inverse = np.linalg.inv(triangle).astype(np.float64)
    if np.linalg.norm(triangle) * np.linalg.norm(inverse) > _WORST_CONDITION:
        return None
    return _Triangle(lengths[:, None] * triangle, inverse / lengths)


def _householder(B: Wide, A: Wide) -> Decomposition:
    columns, left = np.linalg.qr(B)
    rows, right = np.linalg.qr(A.T)
    U, values, Vt = np.linalg.svd(left @ right.T, full_matrices=False)
    root = np.sqrt(values)
    return Decomposition(values, columns, U * root, root[:, None] * Vt, rows.T)


def rounding_in_fp32(values: Wide, B: Wide, A: Wide, written_B: Array, written_A: Array) -> Norms:
    """Norms of what writing B and A as fp32 changes in B·A, where BᵀB and A·Aᵀ are diag(values).

    To first order, ‖ΔB·A + B·ΔA‖_F² = Σ_j S_j·(‖ΔB_j‖² + ‖ΔA_j‖²): the two are independent, and 1e-8 of D. The
    spectral norm is at most as large.
    """
    squares = ((written_B - B) ** 2).sum(axis=0) + ((written_A - A) ** 2).sum(axis=1)
    size = sqrt(float(values @ squares))
    return Norms(size, size)


def rank_of(config: MergeConfig, values: Wide, largest_source: int) -> int:
    """To how many ranks a module is cut, where that depends on its own singular values alone."""
    if config.energy is not None:
        left_over = np.cumsum(values[::-1] ** 2)[::-1]
        return int((left_over > (1 - config.energy) * left_over[0] * (1 + 1e-12)).sum()) if values.size else 0
    rank = config.rank
    if rank is None and config.method == "linear":
        rank = largest_source
    limit = VLLM_RANKS[-1] if config.fit else values.size
    return min(values.size, limit, values.size if rank is None else rank)


def ranks_within(plan: Plan, values: Mapping[str, Wide]) -> dict[str, int]:
    """Ranks of all modules for a file of at most `max_bytes`: each goes where it keeps most of ‖D‖² per byte.

    Optimal up to the last rank that fits (the fractional knapsack's greedy order), and needs no training.
    """
    left = plan.config.max_bytes or 0
    costs = {name: rank_bytes(plan.config, item) for name, item in plan.modules.items()}
    first = {name: header_bytes(name) for name in plan.modules}
    offers = sorted(
        (-(value**2) / costs[name], name, index) for name in values for index, value in enumerate(values[name]) if value
    )
    ranks = dict.fromkeys(plan.modules, 0)
    for _, name, index in offers:
        cost = costs[name] + (first[name] if index == 0 else 0)
        if ranks[name] == index and cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks
