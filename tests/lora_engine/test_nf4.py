import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit

from lora_engine import nf4

SHAPES = [(96, 64), (300, 1024), (7, 9), (3, 37), (100, 130), (1, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    return quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")  # type: ignore[no-any-return]


def assert_equal_to_bitsandbytes(weight: torch.Tensor) -> None:
    packed, statistics = nf4.quantize(weight)
    expected, state = reference(weight)
    assert torch.equal(packed, expected.flatten())
    assert torch.equal(statistics.codes, state.absmax)
    assert torch.equal(statistics.scales, state.state2.absmax)
    assert torch.equal(statistics.offset, state.offset)
    for dtype in DTYPES:
        state.dtype = dtype
        dequantised = nf4.dequantize(packed, statistics.absmax(), torch.empty(weight.shape, dtype=dtype))
        assert torch.equal(dequantised, dequantize_4bit(expected, state))


def test_the_tables_are_those_of_bitsandbytes() -> None:
    levels, dynamic = nf4.tables(torch.device("cpu"))
    assert torch.equal(levels, get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic, create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_equal_to_bitsandbytes(values(*shape).to(dtype))


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_CHUNK", 256)
    assert_equal_to_bitsandbytes(values(101, 67))


def test_values_on_the_borders_between_levels() -> None:
    levels = torch.tensor(nf4.LEVELS)
    borders = (levels[:-1] + levels[1:]) / 2
    up, down = (torch.nextafter(borders, torch.tensor(end)) for end in (1.0, -1.0))
    assert_equal_to_bitsandbytes(torch.cat([borders, up, down, torch.ones(19)])[None])


@pytest.mark.parametrize("scale", [0.05 + 0.001 * number for number in range(20)])
def test_values_on_the_borders_in_a_block_that_is_not_full(scale: float) -> None:
    levels = torch.tensor(nf4.LEVELS)
    assert_equal_to_bitsandbytes(torch.cat([(levels[:-1] + levels[1:]) / 2, torch.ones(1)])[None] * scale)


def test_blocks_of_zeros_and_of_outliers() -> None:
    weight = values(128, 128)
    weight[3:40] = 0
    weight[50, 7] = 100.0
    assert_equal_to_bitsandbytes(weight)
    assert_equal_to_bitsandbytes(torch.zeros(64, 64))
    assert_equal_to_bitsandbytes(torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_codes_are_found_again_in_the_dequantised_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, statistics = nf4.quantize(values(*shape))
    dequantised = nf4.dequantize(packed, statistics.absmax(), torch.empty(shape, dtype=dtype))
    assert torch.equal(nf4.encode(dequantised, statistics.absmax()), packed)


def test_storage_is_what_qlora_promises() -> None:
    """4 bit per weight, 8 per block of 64, 32 per 256 blocks: 4.127."""
    weight = values(1024, 1024)
    packed, statistics = nf4.quantize(weight)
    size = packed.nbytes + sum(tensor.nbytes for tensor in statistics)
    assert 8 * size / weight.numel() == pytest.approx(4.127, abs=5e-4)


def test_bitsandbytes_is_not_imported_on_a_cpu() -> None:
    code = (
        "import sys, torch; from lora_engine.quantized import NF4Linear; "
        "layer = NF4Linear(torch.randn(64, 64), None, torch.bfloat16); layer(torch.randn(2, 64).bfloat16()); "
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
