import pytest
import torch

from lora_engine import low_rank_form
from lora_engine.low_rank_form import low_rank


def matrix(out: int, width: int, decay: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(out, min(out, width), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(width, min(out, width), generator=generator, dtype=torch.float64))
    return U * decay ** torch.arange(min(out, width)) @ V.T


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("out", "width"), [(40, 60), (60, 40)])
def test_it_is_the_dense_optimum_and_says_its_error(
    projected: bool, out: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank_form, "_EXACT_UP_TO", 0 if projected else 1024)
    X = matrix(out, width, 0.8)
    found = low_rank(X, 5)
    S = torch.linalg.svdvals(X)
    assert (tuple(found.B.shape), tuple(found.A.shape)) == ((out, 5), (5, width))
    measured = (X - found.B.double() @ found.A.double()).norm() / X.norm()
    assert found.relative_error == pytest.approx(measured.item(), rel=1e-9)
    assert found.relative_error == pytest.approx((S[5:].norm() / S.norm()).item(), rel=1e-4)
    again = low_rank(X, 5)
    assert torch.equal(found.A, again.A)


def test_rank_beyond_the_matrix_and_zeros_are_exact() -> None:
    found = low_rank(matrix(8, 6, 0.9), 50)
    assert found.A.shape == (6, 6)
    assert found.relative_error < 1e-6
    assert low_rank(torch.zeros(8, 6, dtype=torch.float64), 2).relative_error == 0
