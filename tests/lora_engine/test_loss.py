from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_engine import loss
from lora_engine.blocks import RMSNorm
from lora_engine.layer import Rows
from lora_engine.loss import Head
from lora_engine.packing import Pack, packs
from lora_engine.product import Projection, Routing
from tests.lora_engine.documents import templated

HIDDEN, VOCABULARY = 16, 300


@pytest.fixture(scope="module")
def pack() -> Pack:
    return next(packs(templated(), 4096, torch.device("cpu")))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(pack: Pack, softcap: float | None) -> tuple[Head, Rows, Tensor, nn.Linear, Any]:
    norm = SimpleNamespace(weight=normal(HIDDEN, seed=1), eps=1e-5)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    linear.weight.copy_(normal(VOCABULARY, HIDDEN, seed=2))
    head = Head(RMSNorm(norm, offset=False), Projection([linear]), softcap)
    return head, Rows(pack, Routing(), Routing(), {}), normal(len(pack.predicts), HIDDEN, seed=3), linear, norm


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 32 << 20])
def test_loss_and_gradient_are_those_of_cross_entropy_in_float64(
    pack: Pack, softcap: float | None, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", chunk_bytes)
    head, rows, x, linear, norm = parts(pack, softcap)
    found, gradient = head.gradients(x.clone(), rows, 7.0, needed=True)
    twin = x.double().requires_grad_()
    unit = twin * (twin.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    logits = (norm.weight.double() * unit) @ linear.weight.double().t()
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    terms = nn.functional.cross_entropy(logits, pack.targets, reduction="none")
    expected = (terms * pack.weights).sum() / 7
    expected.backward()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert twin.grad is not None and gradient is not None  # noqa: PT018 - for the type checker
    torch.testing.assert_close(gradient, twin.grad.float(), rtol=1e-4, atol=1e-6)
    assert float(head.loss(x.clone(), rows)) == pytest.approx(7 * float(expected.detach()), rel=1e-6)


def test_where_no_gradient_is_needed_there_is_none(pack: Pack) -> None:
    head, rows, x, _, _ = parts(pack, None)
    assert head.gradients(x, rows, 1.0, needed=False)[1] is None


def test_logits_never_exist_whole(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 16 * 4 * VOCABULARY)
    head, rows, x, _, _ = parts(pack, None)
    counted: list[int] = []
    forward = Projection.forward

    def counting(self: Projection, normed: Tensor, routing: Routing) -> tuple[Tensor, tuple[Tensor, ...]]:
        counted.append(len(normed))
        return forward(self, normed, routing)

    monkeypatch.setattr(Projection, "forward", counting)
    head.gradients(x, rows, 1.0, needed=True)
    assert set(counted) == {16}
    assert sum(counted) == len(pack.predicts)
    assert head.transient_bytes(pack, 4) < 4 * len(pack.predicts) * VOCABULARY
