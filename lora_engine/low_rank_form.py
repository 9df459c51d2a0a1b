"""The best approximation of a dense matrix by B·A of some rank (Eckart and Young 1936), with the error it has."""

from dataclasses import dataclass

import torch
from torch import Tensor

_EXACT_UP_TO = 1024  # the smaller side; beyond it the leading singular vectors are found by projection
_EXTRA = 16  # vectors beyond the rank
_PASSES = 4
_SEED = 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """A (rank × in) and B (out × rank) in fp32; `relative_error` = ‖X - B·A‖/‖X‖ (Frobenius), as measured on them."""

    A: Tensor
    B: Tensor
    relative_error: float


def low_rank(X: Tensor, rank: int) -> LowRank:
    """Of X (out × in, fp64), with √S on both sides.

    Large matrices are projected onto random directions first (Halko, Martinsson and Tropp 2011, arXiv 0909.4061); the
    error is measured, not estimated, so it counts what that misses too.
    """
    rank = min(rank, *X.shape)
    if min(X.shape) <= max(_EXACT_UP_TO, rank + _EXTRA):
        U, S, V = torch.linalg.svd(X, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            U, S, V = torch.svd_lowrank(X, q=rank + _EXTRA, niter=_PASSES)
        V = V.mT
    root = S[:rank].sqrt()
    A, B = (root[:, None] * V[:rank]).float().contiguous(), (U[:, :rank] * root).float().contiguous()
    norm = X.norm()
    error = (X - B.double() @ A.double()).norm() / norm if norm > 0 else norm
    return LowRank(A, B, float(error))
