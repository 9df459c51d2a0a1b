"""Norms of a dense matrix whose singular values nobody needs but the largest."""

import torch
from torch import Tensor

from lora_engine.merging.certificate import Norms

_MOST_STEPS = 400
_SETTLED = 1e-9  # relative change of the norm over ten steps
_EVERY = 10
_SMALL = 1 << 20  # entries that are worth fp64


def norms_of_dense(matrix: Tensor) -> Norms:
    """Frobenius and spectral norm of a matrix (rows × columns).

    The spectral norm is that of Lanczos' tridiagonal matrix of MᵀM (Golub and Kahan 1965), with full
    reorthogonalisation: a handful of products with M for each digit, where the decomposition takes hours.
    """
    frobenius = float(matrix.double().square().sum().sqrt())
    if not frobenius:
        return Norms(0.0, 0.0)
    wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    wide = wide.double() if wide.numel() <= _SMALL else wide
    steps = min(wide.shape[1], _MOST_STEPS)
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(1, wide.shape[1], generator=generator, dtype=torch.float64))
    projected = torch.zeros(0, wide.shape[0], dtype=torch.float64)
    settled = 0.0
    for step in range(steps):
        image = (
            wide.double() @ basis[-1] if wide.shape[1] <= _MOST_STEPS else (wide @ basis[-1].to(wide.dtype)).double()
        )
        projected = torch.cat([projected, image[None]])
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            largest = float(torch.linalg.matrix_norm(projected @ projected.T, 2).sqrt())
            if step == steps - 1 or abs(largest - settled) <= _SETTLED * largest:
                return Norms(frobenius, largest)
            settled = largest
        direction = (wide.T @ image.to(wide.dtype)).double()
        for _ in range(2):  # once is not enough where directions nearly repeat
            direction -= basis.T @ (basis @ direction)
        length = direction.norm()
        if length <= 1e-12 * frobenius**2:  # all of the matrix is spanned
            return Norms(frobenius, float(torch.linalg.matrix_norm(projected @ projected.T, 2).sqrt()))
        basis = torch.cat([basis, (direction / length)[None]])
    raise AssertionError("the last step returns")
