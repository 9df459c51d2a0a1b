import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from torch import nn

from lora_engine import nf4, quantized
from lora_engine.quantized import LAYERS, Int8Linear, NF4Linear

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 0.05
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

kinds = pytest.mark.parametrize("kind", LAYERS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dtypes
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    packed, state = quantize_4bit(WEIGHT.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = NF4Linear(WEIGHT.to(dtype), None, dtype)
    assert torch.equal(layer.dequantized(), dequantize_4bit(packed, state))
    assert 0 < float((layer.dequantized() - WEIGHT).abs().max()) < 0.05


@dtypes
def test_int8_is_that_of_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales, _ = int8_vectorwise_quant(WEIGHT.to(dtype))
    monkeypatch.setattr(nf4, "_CHUNK", 7 * 64)
    layer = Int8Linear(WEIGHT.to(dtype), None, dtype)
    assert torch.equal(layer.packed, codes)
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.dequantized(), int8_vectorwise_dequant(codes, scales).to(dtype))


@dtypes
def test_bitsandbytes_reads_our_nf4(dtype: torch.dtype) -> None:
    """Its CUDA kernels do the work there; those for CPUs have the same interface."""
    layer = NF4Linear(WEIGHT, None, dtype)
    assert torch.equal(dequantize_4bit(*layer.for_bitsandbytes()), layer.dequantized())


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    layer = Int8Linear(weight, None, torch.bfloat16)
    assert torch.equal(layer.dequantized()[3], torch.zeros(64, dtype=torch.bfloat16))


@kinds
@dtypes
def test_a_weight_is_dequantised_into_a_part_of_a_buffer(kind: str, dtype: torch.dtype) -> None:
    layer = LAYERS[kind](WEIGHT, None, dtype)
    buffer = torch.full((200, 64), 7.0, dtype=dtype)
    assert layer.dequantized(buffer[50:146]).data_ptr() == buffer[50].data_ptr()
    assert torch.equal(buffer[50:146], layer.dequantized())
    assert (buffer[:50] == 7).all()
    assert (buffer[146:] == 7).all()


@kinds
@dtypes
@pytest.mark.parametrize("shape", [(96, 64), (7, 9)])
def test_kept_weights_replace_the_codes_which_come_back_bit_by_bit(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    layer = LAYERS[kind](torch.randn(shape), None, dtype)
    codes, expected = layer.packed, layer.dequantized()
    view = layer.new_buffer()
    layer.keep_dequantized(view)
    assert layer.kept is view
    assert layer.packed.nbytes == 0
    assert torch.equal(layer.dequantized(), expected)
    other = layer.new_buffer()
    layer.keep_dequantized(other)
    assert layer.dequantized() is other
    layer.keep_dequantized(None)
    assert layer.kept is None
    assert torch.equal(layer.packed, codes)


@kinds
def test_codes_that_the_values_do_not_tell_are_not_let_go(kind: str) -> None:
    """Weights so small that bf16 has too few digits for them."""
    layer = LAYERS[kind](WEIGHT * 1e-38, None, torch.bfloat16)
    codes = layer.packed
    layer.keep_dequantized(layer.new_buffer())
    layer.keep_dequantized(None)
    assert torch.equal(layer.packed, codes)


@kinds
def test_product_and_gradient_with_and_without_keeping_the_dequantised_weight(kind: str) -> None:
    bias = nn.Parameter(torch.ones(96), requires_grad=False)
    layer = LAYERS[kind](WEIGHT, bias, torch.float32)
    results = []
    for view in (None, layer.new_buffer(), None):
        layer.keep_dequantized(view)
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


@kinds
def test_dequantizing_once_reaches_every_layer_and_is_undone(kind: str) -> None:
    layer = LAYERS[kind]
    model = nn.Sequential(layer(WEIGHT, None, torch.float32), nn.ReLU(), layer(WEIGHT.t(), None, torch.float32))
    quantized.dequantize_once(model, True)
    kept = [layer.dequantized() for layer in quantized.layers(model)]
    assert len(kept) == 2
    assert all(first is layer.dequantized() for first, layer in zip(kept, quantized.layers(model), strict=True))
    quantized.dequantize_once(model, False)
    assert all(layer.kept is None for layer in quantized.layers(model))
