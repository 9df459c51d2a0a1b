from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lora_engine.blocks import ACTIVATIONS, RMSNorm, rotate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [False, True])
def test_norm_against_autograd_in_float64(offset: bool) -> None:
    module = SimpleNamespace(weight=normal(16, seed=1), variance_epsilon=1e-3)
    norm = RMSNorm(module, offset=offset)
    x, upstream = normal(5, 16), normal(5, 16, seed=2)
    y, kept = norm.forward(x, torch.float32)
    twin, weight = x.double().requires_grad_(), module.weight.double() + offset
    expected = weight * twin * (twin.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    expected.backward(upstream.double())
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(norm.scaled(kept.unit), y)
    torch.testing.assert_close(norm.backward(upstream, kept), twin.grad.float(), rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_norm_in_bf16_sums_in_fp32() -> None:
    norm = RMSNorm(SimpleNamespace(weight=torch.ones(4096, dtype=torch.bfloat16), eps=0.0), offset=False)
    y, kept = norm.forward(normal(2, 4096) + 3, torch.bfloat16)
    assert y.dtype == kept.unit.dtype == torch.bfloat16
    assert kept.inverse.dtype == torch.float32
    expected = ((normal(2, 4096) + 3).double().square().mean(-1, keepdim=True)) ** -0.5
    torch.testing.assert_close(kept.inverse, expected.float(), rtol=1e-5, atol=0)


def test_rotation_pairs_halves_leaves_the_rest_and_is_undone_by_its_backward_pass() -> None:
    x = normal(6, 2, 10)
    angles = normal(6, 1, 3, seed=1)
    rotated = x.clone()
    rotate(rotated, angles.cos(), angles.sin())
    whole = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated[..., :3], whole.real, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotated[..., 3:6], whole.imag, rtol=1e-5, atol=1e-6)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    rotate(rotated, angles.cos(), -angles.sin())
    torch.testing.assert_close(rotated, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers_with_their_gradients(name: str) -> None:
    x = normal(4, 50).mul(3).requires_grad_()
    upstream = normal(4, 50, seed=1)
    expected = ACT2FN[name](x)
    expected.backward(upstream)
    found = ACTIVATIONS[name]
    torch.testing.assert_close(found.forward(x.detach()), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.backward(upstream, x.detach()), x.grad, rtol=1e-4, atol=1e-5)
