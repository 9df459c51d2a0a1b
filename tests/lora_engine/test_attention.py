from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine import attention, kernels
from lora_engine.attention import AttentionShape
from lora_engine.packing import Pack, packs
from tests.lora_engine.documents import templated

HEADS, KEY_HEADS, SIZE = 4, 2, 8


@pytest.fixture(params=["kernels", "products"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the kernels, where they can be compiled, and with PyTorch's operations."""
    if request.param == "products":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return str(request.param)


@pytest.fixture(scope="module", params=[4096, 60])
def pack(request: pytest.FixtureRequest) -> Pack:
    return max(packs(templated(lengths=(20, 33, 50, 300, 90, 17, 34)), request.param, torch.device("cpu")), key=_rows)


def _rows(pack: Pack) -> int:
    return pack.rows


def inputs(pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(pack.rows, HEADS, SIZE, generator=generator)
    k, v = (torch.randn(pack.rows, KEY_HEADS, SIZE, generator=generator) for _ in range(2))
    return q, k, v


def visible(pack: Pack, window: int | None) -> Tensor:
    """bool (rows, rows), from the groups' biases."""
    seen = torch.zeros(pack.rows, pack.rows, dtype=torch.bool)
    for group in pack.attention.groups:
        for segment in range(len(group.queries)):
            for place in (group.query_positions[segment] >= 0).nonzero().flatten().tolist():
                keys = group.keys[segment][torch.isfinite(group.bias(window)[segment, 0, place])]
                seen[group.queries[segment, place], keys] = True
    return seen


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, shape: AttentionShape) -> Tensor:
    repeated = (part.repeat_interleave(HEADS // KEY_HEADS, 1).transpose(0, 1) for part in (k, v))
    keys, values = repeated
    scores = q.transpose(0, 1) @ keys.mT * shape.scaling
    if shape.softcap is not None:
        scores = (scores / shape.softcap).tanh() * shape.softcap
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 7}, {"softcap": 1.5}, {"softcap": 1.5, "window": 30}],
    ids=["plain", "window", "cap", "both"],
)
def test_values_and_gradients_are_those_of_the_formula_in_float64(pack: Pack, settings: Any) -> None:
    shape = AttentionShape(scaling=0.4, **settings)
    q, k, v = inputs(pack)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    ours, kept = attention.forward(q, k, v, pack.attention, shape)
    gradients = attention.backward(upstream, ours, q, k, v, kept, pack.attention, shape)
    twins = [part.double().requires_grad_() for part in (q, k, v)]
    expected = reference(*twins, visible(pack, shape.window), shape)
    expected.backward(upstream.double())
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
    for found, twin in zip(gradients, twins, strict=True):
        assert twin.grad is not None
        torch.testing.assert_close(found, twin.grad.float(), rtol=1e-4, atol=1e-5)


def test_products_keep_the_probabilities_of_short_documents_and_kernels_none(pack: Pack, way: str) -> None:
    q, k, v = inputs(pack)
    _, kept = attention.forward(q, k, v, pack.attention, AttentionShape(scaling=0.4))
    if way == "kernels" and kernels.library() is not None:
        assert [tuple(tensor.shape) for tensor in kept if tensor is not None] == [(pack.rows, HEADS)]
        return
    for group, probabilities in zip(pack.attention.groups, kept, strict=True):
        assert (probabilities is not None) == (group.keys.shape[1] <= 256)


def test_rows_that_predict_attend_as_they_do_among_all(pack: Pack) -> None:
    q, k, v = inputs(pack)
    shape = AttentionShape(scaling=0.4)
    whole, _ = attention.forward(q, k, v, pack.attention, shape)
    some, kept = attention.forward(q[pack.predicts], k, v, pack.target_attention, shape)
    torch.testing.assert_close(some, whole[pack.predicts], rtol=1e-5, atol=1e-6)
    upstream = torch.randn(some.shape, generator=torch.Generator().manual_seed(4)) * pack.weights[:, None, None]
    spread = torch.zeros_like(q).index_add_(0, pack.predicts, upstream)
    everyone, all_kept = attention.forward(q, k, v, pack.attention, shape)
    expected = attention.backward(spread, everyone, q, k, v, all_kept, pack.attention, shape)
    dq, dk, dv = attention.backward(upstream, some, q[pack.predicts], k, v, kept, pack.target_attention, shape)
    torch.testing.assert_close(dk, expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dv, expected[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.zeros_like(q).index_add_(0, pack.predicts, dq), expected[0], rtol=1e-4, atol=1e-5)


def test_bf16_scores_are_summed_in_fp32(pack: Pack) -> None:
    q, k, v = (part.bfloat16() for part in inputs(pack))
    ours, _ = attention.forward(q * 8, k, v, pack.attention, AttentionShape(scaling=0.4))
    exact = reference((q * 8).double(), k.double(), v.double(), visible(pack, None), AttentionShape(scaling=0.4))
    # What is left is the rounding of probabilities, values and results: scores rounded to bf16 would be far off.
    assert float((ours.double() - exact).abs().max()) < 2e-2
