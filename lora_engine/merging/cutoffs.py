"""What the nonlinear methods must know of whole adapters before they can merge a block: magnitudes and energies.

A magnitude is found exactly and in memory of one block, by counting the upper and then the lower bits of fp32 numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

_LOW_BITS = 15  # of 31: the sign is not counted

# Blocks of rows with the digests of their adapters: X (k × rows × columns). Called as often as they are read.
Blocks: TypeAlias = Callable[[], Iterable[tuple[Sequence[str], Tensor]]]
Magnitudes: TypeAlias = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class Cutoffs:
    """Of the entries x of each adapter, by its digest.

    Attributes:
        low: |x| below it is left out.
        high: |x| from it on is left out.
        energy: Σ x² of those that `spread` leaves.
        spread: a place whose variance over the adapters is below it is left out.
    """

    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0


def cutoffs(method: str, options: Mapping[str, Any], blocks: Blocks) -> Cutoffs:
    """What `nonlinear.combine` needs to know of all entries that `blocks` yields."""
    if method in ("ties", "magnitude_prune", "breadcrumbs"):
        return _magnitudes(options["density"], options.get("gamma", 0.0), blocks)
    return _spread(options["density"], blocks) if method == "sce" else Cutoffs()


def _magnitudes(density: float, gamma: float, blocks: Blocks) -> Cutoffs:
    sizes: dict[str, int] = defaultdict(int)
    for digests, X in blocks():
        for digest, values in zip(digests, X, strict=True):
            sizes[digest] += values.numel()
    low, high = {}, {}
    for digest, size in sizes.items():
        left_out = int(gamma * size)
        kept = min(size, left_out + max(1, int(density * size)))
        found = nth_largest(_of(blocks, digest), [kept, left_out] if left_out else [kept])
        low[digest], high[digest] = found[0], found[1] if left_out else float("inf")
    return Cutoffs(low=low, high=high)


def _of(blocks: Blocks, wanted: str) -> Magnitudes:
    return lambda: (
        values.abs() for digests, X in blocks() for d, values in zip(digests, X, strict=True) if d == wanted
    )


def _spread(density: float, blocks: Blocks) -> Cutoffs:
    count, alone = 0, True
    for digests, X in blocks():
        alone = alone and len(digests) == 1
        count += int(variance(X).count_nonzero())
    spread = 0.0
    if density < 1 and not alone:  # alone, an adapter differs from nothing
        kept = int(density * count)
        spread = nth_largest(lambda: (variance(X) for _, X in blocks()), [kept])[0] if kept else float("inf")
    energy: dict[str, float] = defaultdict(float)
    for digests, X in blocks():
        selected = X * (variance(X) >= spread)
        for digest, values in zip(digests, selected, strict=True):
            energy[digest] += float(values.double().square().sum())
    return Cutoffs(energy=energy, spread=spread)


def variance(X: Tensor) -> Tensor:
    """Of every place over the k adapters, fp32 (rows × columns)."""
    return X.var(dim=0, unbiased=False).float()


def nth_largest(magnitudes: Magnitudes, counts: Sequence[int]) -> list[float]:
    """The n-th largest of numbers that are not negative, for every n (from 1) in `counts`; exact for fp32."""
    upper = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64)
    for values in magnitudes():
        upper += torch.bincount(_bits(values) >> _LOW_BITS, minlength=len(upper))
    prefixes, rests = zip(*(_bucket(upper, count) for count in counts), strict=True)
    lower = {prefix: torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for prefix in prefixes}
    for values in magnitudes():
        bits = _bits(values)
        for prefix, histogram in lower.items():
            chosen = bits[(bits >> _LOW_BITS) == prefix]
            histogram += torch.bincount(chosen & ((1 << _LOW_BITS) - 1), minlength=len(histogram))
    found = [
        (prefix << _LOW_BITS) | _bucket(lower[prefix], rest)[0] for prefix, rest in zip(prefixes, rests, strict=True)
    ]
    return [float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) for bits in found]


def _bits(values: Tensor) -> Tensor:
    """fp32 numbers that are not negative are ordered as their bits are."""
    return values.float().contiguous().view(torch.int32).flatten()


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """Which bucket, from the top, holds the number of this place, and its place within."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    before = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - before
