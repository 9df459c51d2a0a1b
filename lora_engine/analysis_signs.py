"""What TIES (arXiv 2306.01708) would find in a module: entries that trimming drops, and signs that conflict.

The dense deltas are computed in blocks of rows, of every adapter at once, and never kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.merging.arrays import Wide
from lora_engine.merging.cutoffs import cutoffs
from lora_engine.merging.factors import Factors

_BLOCK = 1 << 20  # entries of one adapter; their counts stay exact in fp32


@dataclass(slots=True)
class Signs:
    """Sums over a module's entries that add up over modules, for k adapters.

    Attributes:
        both: places where two adapters keep an entry (k × k).
        conflicts: those of them where the signs differ (k × k).
        energy: Σ x² of all entries (k).
        kept: Σ x² of those that trimming keeps (k).
        elected: Σ x² of those that have the elected sign too (k).
    """

    both: Wide
    conflicts: Wide
    energy: Wide
    kept: Wide
    elected: Wide


def count(factors: Factors, density: float) -> Signs:
    """Of the deltas of one module, each trimmed to the share `density` of its entries with the largest magnitudes."""
    left, right = _tensors(factors)
    parts = len(left)
    keys = [str(place) for place in range(parts)]
    low = cutoffs("ties", {"density": density}, lambda: ((keys, X) for X in _blocks(left, right))).low
    least = torch.tensor([low[key] for key in keys])[:, None, None]
    found = torch.zeros(2, parts, parts, dtype=torch.float64)
    sums = torch.zeros(3, parts, dtype=torch.float64)
    for X in _blocks(left, right):
        mask = (X.abs() >= least) & (X != 0)
        trimmed = X * mask
        agree = trimmed.sign() == torch.where(trimmed.sum(dim=0) >= 0, 1.0, -1.0)
        signs, kept_places = trimmed.sign().flatten(1), mask.float().flatten(1)
        found += torch.stack([kept_places @ kept_places.T, signs @ signs.T])
        sums += torch.stack([_energy(X), _energy(trimmed), _energy(trimmed * agree)])
    both, difference = found.numpy()
    energy, energy_kept, elected = sums.numpy()
    return Signs(both, (both - difference) / 2, energy, energy_kept, elected)


def _tensors(factors: Factors) -> tuple[list[Tensor], list[Tensor]]:
    """scale·B and A of each part, fp32."""
    left = [torch.from_numpy(factors.B[:, block] * factors.scale[block]).float() for block in factors.blocks]
    return left, [torch.from_numpy(factors.A[block]).float() for block in factors.blocks]


def _blocks(left: list[Tensor], right: list[Tensor]) -> Iterator[Tensor]:
    """X (k × rows × columns), fp32."""
    for rows in zip(*(item.split(_rows(right[0])) for item in left), strict=True):
        yield torch.stack([part @ A for part, A in zip(rows, right, strict=True)])


def _rows(right: Tensor) -> int:
    return max(1, _BLOCK // right.shape[1])


def _energy(X: Tensor) -> Tensor:
    return X.double().square().sum(dim=(1, 2))
