"""Merges that are not a weighted sum: what each adapter's entries decide for themselves, or against each other.

They work on a stack of blocks X (k × rows × columns), X_i = weight_i · (the block of adapter i's delta): in a basis
that the adapters share, or of the dense deltas, in blocks of any number of rows. Weights come before any decision, and
may be negative.

    magnitude_prune   the largest entries of each adapter, added up
    breadcrumbs       arXiv 2312.06795: without the smallest and the very largest entries, added up
    dare_linear       arXiv 2311.03099: a random share of the entries, divided by the share, added up
    ties              arXiv 2306.01708: the largest entries; of every place the mean of those with the elected sign
    dare_ties         the random share in place of the largest entries
    della             arXiv 2406.11617: as dare_ties, but larger entries of a row are kept more often
    sce               arXiv 2408.07990: the places where the adapters differ most; weights by energy; elected signs
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_engine.merging import chance
from lora_engine.merging.cutoffs import Cutoffs, chosen


def combine(
    method: str,
    options: Mapping[str, Any],
    X: Tensor,
    parts: Sequence[tuple[str, float]],
    cutoffs: Cutoffs,
    tensor: str,
    first_row: int = 0,
) -> Tensor:
    """The merged block (rows × columns) of one tensor, in the type of X.

    Args:
        method, options: of a `MergeConfig`, one of `NONLINEAR`.
        X: weighted blocks (k × rows × columns); whole rows.
        parts: digest and weight of each adapter.
        cutoffs: of all entries in scope, from `cutoffs.cutoffs`.
        tensor: name, which random numbers depend on.
        first_row: of the tensor, where X begins.
    """
    if method == "sce":
        return _sce(X, [digest for digest, _ in parts], cutoffs)
    if method in ("dare_linear", "dare_ties"):
        X = X * _dare(options, X, parts, tensor, first_row)
    elif method == "della":
        X = X * _della(options, X, parts, tensor, first_row)
    else:
        X = X * _trimmed(X, parts, cutoffs)
    if "election" not in options:
        return X.sum(dim=0)
    return _disjoint(X, torch.tensor([weight for _, weight in parts], dtype=X.dtype), options)


def _trimmed(X: Tensor, parts: Sequence[tuple[str, float]], cutoffs: Cutoffs) -> Tensor:
    """Which entries have a magnitude within the cutoffs, which are fp32."""
    magnitudes = X.float().abs()
    low = torch.tensor([cutoffs.low[digest] for digest, _ in parts])[:, None, None]
    high = torch.tensor([cutoffs.high[digest] for digest, _ in parts])[:, None, None]
    kept: Tensor = (magnitudes >= low) & (magnitudes < high)
    return kept


def _dare(
    options: Mapping[str, Any], X: Tensor, parts: Sequence[tuple[str, float]], tensor: str, first_row: int
) -> Tensor:
    density: float = options["density"]
    kept: Tensor = _draws(options, X, parts, tensor, first_row) < density
    return kept.to(X.dtype) / density


def _della(
    options: Mapping[str, Any], X: Tensor, parts: Sequence[tuple[str, float]], tensor: str, first_row: int
) -> Tensor:
    """MAGPRUNE: of a row, the entry of the j-th smallest magnitude (j from 0, of n) is kept with probability
    density - ε/2 + ε·j/(n - 1), and divided by it. (What mergekit calls epsilon is half of this ε.)"""
    density, epsilon, columns = options["density"], options["epsilon"], X.shape[-1]
    order = X.abs().argsort(dim=-1, stable=True)
    places = torch.arange(columns, dtype=X.dtype) / max(columns - 1, 1)
    ranks = torch.empty_like(X).scatter_(-1, order, places.expand_as(X))
    chances: Tensor = density + epsilon * (ranks - 0.5)
    kept: Tensor = _draws(options, X, parts, tensor, first_row) < chances
    return kept.to(X.dtype) / chances


def _draws(
    options: Mapping[str, Any], X: Tensor, parts: Sequence[tuple[str, float]], tensor: str, first_row: int
) -> Tensor:
    keys = [chance.key(options["seed"], digest, tensor) for digest, _ in parts]
    return torch.stack([chance.uniform(key, first_row, X.shape[1], X.shape[2]) for key in keys])


def _disjoint(X: Tensor, weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The elected sign's entries, averaged by number or by size of weight, or added up."""
    votes = X if options["election"] == "mass" else X.sign()
    agree = (X.sign() == _elected(votes)) & (X != 0)
    merged = (X * agree).sum(dim=0)
    if options["normalize"] == "none":
        return merged
    shares = torch.ones_like(weights) if options["normalize"] == "count" else weights.abs()
    divisor = (shares[:, None, None] * agree).sum(dim=0)
    return merged / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)


def _elected(votes: Tensor) -> Tensor:
    """The sign of the sum; a tie goes to the sign that is positive, as in mergekit."""
    return torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0).to(votes.dtype)


def _sce(X: Tensor, digests: Sequence[str], cutoffs: Cutoffs) -> Tensor:
    X = X * chosen(X, cutoffs.spread)
    energies = torch.tensor([cutoffs.energy[digest] for digest in digests], dtype=X.dtype)
    shares = energies / energies.sum() if energies.sum() else torch.full_like(energies, 1 / len(digests))
    agree = X.sign() == _elected(X)
    weights = shares[:, None, None] * agree
    divisor = weights.sum(dim=0)
    return (X * weights).sum(dim=0) / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
