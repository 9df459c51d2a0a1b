"""What the nonlinear methods must know of whole adapters before they can merge a block: magnitudes and energies.

A magnitude is found exactly and in memory of one block, by counting the upper and then the lower bits of fp32 numbers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

_LOW_BITS = 15  # of 31: the sign is not counted

# Blocks of rows with the digests of their adapters: X (k × rows × columns). Called as often as they are read.
Blocks: TypeAlias = Callable[[], Iterable[tuple[Sequence[str], Tensor]]]
Magnitudes: TypeAlias = Callable[[], Iterable[tuple[str, Tensor]]]


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
    def magnitudes() -> Iterator[tuple[str, Tensor]]:
        for digests, X in blocks():
            yield from zip(digests, X.abs(), strict=True)

    def places(size: int, _: int) -> list[int]:
        left_out = int(gamma * size)
        return [min(size, left_out + max(1, int(density * size))), *([left_out] if left_out else [])]

    found = nth_largest(magnitudes, places)
    high = {digest: values[1] if len(values) > 1 else float("inf") for digest, values in found.items()}
    return Cutoffs(low={digest: values[0] for digest, values in found.items()}, high=high)


def _spread(density: float, blocks: Blocks) -> Cutoffs:
    def variances() -> Iterator[tuple[str, Tensor]]:
        # Alone, an adapter differs from nothing, and is kept whole.
        yield from (("", variance(X)) for _, X in blocks() if len(X) > 1)

    spread = 0.0
    if density < 1:
        found = nth_largest(variances, lambda _, nonzero: [int(density * nonzero)] if int(density * nonzero) else [])
        spread = (found[""] or [float("inf")])[0] if found else 0.0
    energy: dict[str, float] = defaultdict(float)
    for digests, X in blocks():
        selected = X * chosen(X, spread)
        for digest, values in zip(digests, selected, strict=True):
            energy[digest] += float(values.double().square().sum())
    return Cutoffs(energy=energy, spread=spread)


def chosen(X: Tensor, spread: float) -> Tensor:
    """The places (rows × columns) where the adapters differ enough; all of an adapter that is alone."""
    return variance(X) >= spread if len(X) > 1 else torch.ones_like(X[0], dtype=torch.bool)


def variance(X: Tensor) -> Tensor:
    """Of every place over the k adapters, fp32 (rows × columns)."""
    return X.var(dim=0, unbiased=False).float()


def nth_largest(magnitudes: Magnitudes, places: Callable[[int, int], Sequence[int]]) -> dict[str, list[float]]:
    """For every key, the n-th largest of its numbers, which are not negative; exact for fp32, in two passes.

    Args:
        magnitudes: blocks of numbers with their keys, each time anew.
        places: every n (from 1) for a key that has so many numbers, and so many that are not 0.
    """
    upper: dict[str, Tensor] = {}
    nonzero: dict[str, int] = defaultdict(int)
    for key, values in magnitudes():
        counts = torch.bincount(_bits(values) >> _LOW_BITS, minlength=1 << (31 - _LOW_BITS))
        upper[key] = upper[key] + counts if key in upper else counts
        nonzero[key] += int(values.count_nonzero())
    buckets = {
        key: [_bucket(counts, place) for place in places(int(counts.sum()), nonzero[key])]
        for key, counts in upper.items()
    }
    lower = {
        (key, bucket): torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for key in buckets for bucket, _ in buckets[key]
    }
    for key, values in magnitudes():
        bits = _bits(values)
        for bucket in {bucket for bucket, _ in buckets[key]}:
            within = bits[(bits >> _LOW_BITS) == bucket] & ((1 << _LOW_BITS) - 1)
            lower[key, bucket] += torch.bincount(within, minlength=1 << _LOW_BITS)
    return {
        key: [_number(bucket << _LOW_BITS | _bucket(lower[key, bucket], rest)[0]) for bucket, rest in buckets[key]]
        for key in buckets
    }


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    """fp32 numbers that are not negative are ordered as their bits are."""
    return values.float().contiguous().view(torch.int32).flatten()


def _bucket(histogram: Tensor, count: int) -> tuple[int, int]:
    """Which bucket, from the top, holds the number of this place, and its place within."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    before = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - before
