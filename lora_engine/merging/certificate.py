"""How far a merged adapter is from what it should be, measured from the factors alone. No torch.

For every module, with D the method's exact result and D' what the file holds:

    frobenius, spectral            ‖D' - D‖ / ‖D‖ in both norms; of a module that should be 0: 0, or null if it is not
    sum_frobenius, sum_spectral    the same against the exact weighted sum Σ weight_i · scaling_i · B_i·A_i
    rounding                       the part of `frobenius` that comes from writing 32 or 16 bit
    norm, ranks_before, rank       ‖D‖ in the Frobenius norm, the sources' ranks added up, and the result's rank

    dense_frobenius, dense_spectral   of nonlinear methods: the distance to what they give on the dense deltas

Totals are over all modules: the root of the summed squares, and the largest singular value of any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

import numpy as np

from lora_engine.merging.arrays import Array, Wide

FILE = "certificate.json"
NOISE = 1e-13  # of the terms of a sum: what fp64 leaves where they cancel
_CANCELLED = 1e-5  # of the terms: below it squares have too few digits left


@dataclass(frozen=True, slots=True)
class Norms:
    """Of one matrix: Frobenius and spectral."""

    frobenius: float
    spectral: float


ZERO = Norms(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ModuleCertificate:
    """Absolute norms of one module; the file has them relative.

    Attributes:
        exact: of the method's exact result.
        error: of its distance to what is written.
        weighted_sum, sum_error: the same for the exact weighted sum.
        rounding: Frobenius norm of what rounding to the file's type changed.
        dense: of a nonlinear method's result on the dense deltas, and of its distance to what is written.
    """

    exact: Norms
    error: Norms
    weighted_sum: Norms
    sum_error: Norms
    rounding: float
    ranks_before: int
    rank: int
    dense: tuple[Norms, Norms] | None = None

    def to_mapping(self) -> dict[str, Any]:
        return {
            **_relative(self.exact, self.error, self.weighted_sum, self.sum_error, self.rounding),
            **(_dense(*self.dense) if self.dense else {}),
            "norm": self.exact.frobenius,
            "ranks_before": self.ranks_before,
            "rank": self.rank,
        }


def totals(modules: Mapping[str, ModuleCertificate]) -> dict[str, Any]:
    """Of all modules together, as of one block-diagonal matrix; the ranks are the largest."""
    items = [modules[name] for name in sorted(modules)]
    exact, error = _together([item.exact for item in items]), _together([item.error for item in items])
    weighted_sum = _together([item.weighted_sum for item in items])
    sum_error = _together([item.sum_error for item in items])
    rounding = sqrt(fsum(item.rounding**2 for item in items))
    dense = [item.dense for item in items if item.dense]
    return {
        **_relative(exact, error, weighted_sum, sum_error, rounding),
        **(_dense(*(_together(list(side)) for side in zip(*dense, strict=True))) if dense else {}),
        "norm": exact.frobenius,
        "ranks_before": max(item.ranks_before for item in items),
        "rank": max(item.rank for item in items),
    }


def document(modules: Mapping[str, ModuleCertificate], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds, as plain JSON."""
    return {
        **facts,
        "totals": totals(modules),
        "modules": {name: modules[name].to_mapping() for name in sorted(modules)},
    }


def norms(B: Wide | Array, A: Wide | Array) -> Norms:
    """Of B·A (out × in), in fp64, without forming it: from R × R matrices alone where nothing much cancels."""
    columns, rows = gram(B.T), gram(A)
    found = gram_norms(columns, rows)
    scale = float(np.sqrt(np.diagonal(columns)) @ np.sqrt(np.diagonal(rows)))
    return found if found.frobenius > _CANCELLED * scale else exact_norms(B, A)


def gram(rows: Wide | Array) -> Wide:
    """rows · rowsᵀ in fp64, of rows of any length."""
    wide = np.asarray(rows, dtype=np.float64)
    product: Wide = wide @ wide.T
    return product


def gram_norms(columns: Wide, rows: Wide) -> Norms:
    """Of B·A from BᵀB and A·Aᵀ: ‖B·A‖_F² is the sum of their elementwise product."""
    if not columns.size:
        return ZERO
    values, vectors = np.linalg.eigh(columns)
    half = vectors * np.sqrt(np.clip(values, 0, None))
    largest = np.linalg.eigvalsh(half.T @ rows @ half)[-1]
    return Norms(sqrt(max(float((columns * rows).sum()), 0.0)), sqrt(max(float(largest), 0.0)))


def exact_norms(B: Wide | Array, A: Wide | Array) -> Norms:
    """As `norms`, from the singular values by QR in fp64: sound also where B·A almost cancels.

    What fp64 cannot tell from zero beside the terms that cancel is zero.
    """
    left, right = np.asarray(B, np.float64), np.asarray(A, np.float64)
    values: Wide = np.linalg.svd(_triangle(left) @ _triangle(right.T).T, compute_uv=False).astype(np.float64)
    found = of_singular_values(values)
    scale = float(np.linalg.norm(left, axis=0) @ np.linalg.norm(right, axis=1))
    return found if found.frobenius > NOISE * scale else ZERO


def of_singular_values(values: Wide) -> Norms:
    return Norms(float(np.sqrt((values**2).sum())), float(values[0])) if values.size else ZERO


def _triangle(matrix: Wide) -> Wide:
    qr: Any = np.linalg.qr  # the stubs forget what mode="r" returns
    triangle: Wide = qr(matrix, mode="r")
    return triangle


def _together(items: list[Norms]) -> Norms:
    return Norms(sqrt(fsum(item.frobenius**2 for item in items)), max(item.spectral for item in items))


def _relative(exact: Norms, error: Norms, weighted_sum: Norms, sum_error: Norms, rounding: float) -> dict[str, Any]:
    return {
        "frobenius": _ratio(error.frobenius, exact.frobenius),
        "spectral": _ratio(error.spectral, exact.spectral),
        "sum_frobenius": _ratio(sum_error.frobenius, weighted_sum.frobenius),
        "sum_spectral": _ratio(sum_error.spectral, weighted_sum.spectral),
        "rounding": _ratio(rounding, exact.frobenius),
    }


def _dense(exact: Norms, error: Norms) -> dict[str, Any]:
    return {
        "dense_frobenius": _ratio(error.frobenius, exact.frobenius),
        "dense_spectral": _ratio(error.spectral, exact.spectral),
    }


def _ratio(value: float, norm: float) -> float | None:
    if norm:
        return value / norm
    return None if value else 0.0
