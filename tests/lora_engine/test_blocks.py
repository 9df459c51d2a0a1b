from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lora_engine import kernels
from lora_engine.blocks import ACTIVATIONS, GatedActivation, RMSNorm, rotate


@pytest.fixture(params=["kernels", "products"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the kernels, where they can be compiled, and with PyTorch's operations."""
    if request.param == "products":
        monkeypatch.setattr(kernels, "library", lambda: None)


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
    rotate(rotated, angles.cos(), angles.sin(), 1)
    whole = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated[..., :3], whole.real, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotated[..., 3:6], whole.imag, rtol=1e-5, atol=1e-6)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    rotate(rotated, angles.cos(), angles.sin(), -1)
    torch.testing.assert_close(rotated, x, rtol=1e-5, atol=1e-6)


def test_a_norm_adds_the_gradient_that_passes_it_by() -> None:
    norm = RMSNorm(SimpleNamespace(weight=normal(19, seed=1), eps=1e-5), offset=False)
    _, kept = norm.forward(normal(5, 19), torch.float32)
    upstream, by = normal(5, 19, seed=2), normal(5, 19, seed=3)
    expected = norm.backward(upstream, kept) + by
    torch.testing.assert_close(norm.backward(upstream, kept, by), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [50, 64])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gated_activations_are_those_of_transformers_with_their_gradients(name: str, width: int) -> None:
    gate_up = normal(4, 2 * width).mul(3).requires_grad_()
    upstream = normal(4, width, seed=1)
    gate, up = gate_up.chunk(2, 1)
    expected = ACT2FN[name](gate) * up
    expected.backward(upstream)
    activation = GatedActivation(name)
    torch.testing.assert_close(activation.forward(gate_up.detach()), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = activation.backward(upstream.clone(), gate_up.detach())
    torch.testing.assert_close(gradient, gate_up.grad, rtol=1e-4, atol=1e-5)


def test_extreme_gates_stay_finite_and_what_is_not_a_number_stays_so() -> None:
    activation = GatedActivation("silu")
    gates = torch.tensor([[-1e4, -90.0, 90.0, 1e4]])
    found = activation.forward(torch.cat([gates, torch.ones_like(gates)], 1))
    torch.testing.assert_close(found, torch.nn.functional.silu(gates), rtol=1e-5, atol=1e-20)
    assert activation.forward(torch.tensor([[float("nan"), 1.0]])).isnan().all()
