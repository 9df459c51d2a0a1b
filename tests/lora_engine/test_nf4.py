import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from lora_engine import nf4
from lora_engine.nf4 import NF4Linear

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 0.05
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dequantised_weight_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    packed, state = quantize_4bit(WEIGHT.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = NF4Linear(WEIGHT.to(dtype), None, dtype)
    assert layer.dequantized().dtype == dtype
    assert torch.equal(layer.dequantized(), dequantize_4bit(packed, state))
    assert 0 < float((layer.dequantized() - WEIGHT).abs().max()) < 0.05


def test_storage_is_what_qlora_promises() -> None:
    """4 bit per weight, 8 per block of 64, 32 per 256 blocks: 4.127."""
    weight = torch.randn(1024, 1024)
    layer = NF4Linear(weight, None, torch.float32)
    state = layer.state
    size = layer.packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 8 * size / weight.numel() == pytest.approx(4.127, abs=5e-4)


def test_product_and_gradient_with_and_without_keeping_the_dequantised_weight() -> None:
    bias = nn.Parameter(torch.ones(96), requires_grad=False)
    layer = NF4Linear(WEIGHT, bias, torch.float32)
    results = []
    for keep in (False, True, False):
        layer.keep_dequantized(keep)
        x = X.clone().requires_grad_()
        y = layer(x)
        y.sin().sum().backward()
        results.append((y.detach(), x.grad))
    expected = X @ layer.dequantized().t() + 1
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0][1], expected.cos() @ layer.dequantized())
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gradient, results[0][1])  # type: ignore[arg-type]


def test_dequantizing_once_reaches_every_layer_and_is_undone() -> None:
    model = nn.Sequential(
        NF4Linear(WEIGHT, None, torch.float32), nn.ReLU(), NF4Linear(WEIGHT.t().contiguous(), None, torch.float32)
    )
    nf4.dequantize_once(model, True)
    kept = [layer.dequantized() for layer in nf4.layers(model)]
    assert all(first is layer.dequantized() for first, layer in zip(kept, nf4.layers(model), strict=True))
    nf4.dequantize_once(model, False)
    assert all(first is not layer.dequantized() for first, layer in zip(kept, nf4.layers(model), strict=True))
