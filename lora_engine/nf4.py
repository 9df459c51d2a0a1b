"""The NF4 format: four bits a weight, in blocks of 64, with double quantisation (QLoRA, arXiv 2305.14314).

Of each block the largest magnitude (absmax) is stored, less its mean over the tensor, in the 8-bit dynamic format of
arXiv 2110.02861, in groups of 256. That makes 4.127 bits a weight. Every bit is that of bitsandbytes' `quantize_4bit`
and `dequantize_4bit` on a CPU, and its CUDA kernels read what is packed here; but it is not imported: that takes
seconds and 240 MB, and its quantising takes several times as long.

Work is done in chunks whose intermediate results stay in the processor's cache.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
GROUP = 256
# QLoRA's appendix E: quantiles of the normal distribution, with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BINS = 64  # of [-1, 1]; so fine that no bin holds two of the borders between levels
_DYNAMIC_GRID = 65536
_CHUNK = 262144
_SMALLEST = 1e-38  # stands for the absmax of a block of zeros where it divides


class Statistics(NamedTuple):
    """The doubly quantised absmax of a tensor's blocks.

    Attributes:
        codes: uint8 (blocks), of absmax - offset.
        scales: fp32 (groups), the largest magnitude of absmax - offset in each group.
        offset: fp32 scalar, the mean of absmax.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor

    def absmax(self) -> Tensor:
        """fp32 (blocks), as it multiplies the levels."""
        values = _dynamic_map(self.codes.device)[self.codes.int()]
        return values * self.scales.repeat_interleave(GROUP)[: len(values)] + self.offset


def quantize(weight: Tensor) -> tuple[Tensor, Statistics]:
    """Packed codes (uint8, two weights a byte, the first in the high bits) and statistics of a contiguous tensor."""
    flat = weight.reshape(-1)
    absmax = _absmax(flat)
    offset = absmax.mean()
    groups = -(-len(absmax) // GROUP)
    centred = torch.zeros(groups * GROUP, device=weight.device)
    centred[: len(absmax)] = absmax - offset
    scales = centred.view(groups, GROUP).abs().amax(dim=1)
    normalised = centred.view(groups, GROUP) * (1 / scales)[:, None]
    codes = _dynamic_codes(normalised).where(scales[:, None] > 0, 0).view(-1)[: len(absmax)]
    return encode(flat, absmax.clamp(min=_SMALLEST)), Statistics(codes, scales, offset)


def encode(weight: Tensor, absmax: Tensor) -> Tensor:
    """The packed codes of the levels nearest to weight / absmax; absmax: fp32 (blocks), without zeros."""
    flat = weight.reshape(-1)
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=flat.device)
    inverse, whole = absmax.reciprocal(), len(flat) - len(flat) % BLOCK
    for start, stop in _chunks(whole, flat.device):
        blocks = flat[start:stop].view(-1, BLOCK)
        packed[start // 2 : stop // 2] = _pack(blocks * inverse[start // BLOCK : stop // BLOCK, None])
    if whole < len(flat):
        rest = torch.zeros(BLOCK, device=flat.device)
        rest[: len(flat) - whole] = flat[whole:] / absmax[-1]
        packed[whole // 2 :] = _pack(rest)[: len(packed) - whole // 2]
    return packed


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (contiguous, of any float type) with level × absmax, rounded once; returns it."""
    flat = out.view(-1)
    pairs, whole = _pairs(out.device), len(flat) - len(flat) % BLOCK
    for start, stop in _chunks(whole, out.device):
        levels = pairs.index_select(0, packed[start // 2 : stop // 2].int()).view(torch.float32).view(-1, BLOCK)
        torch.mul(levels, absmax[start // BLOCK : stop // BLOCK, None], out=flat[start:stop].view(-1, BLOCK))
    if whole < len(flat):
        levels = pairs.index_select(0, packed[whole // 2 :].int()).view(torch.float32)
        flat[whole:] = levels[: len(flat) - whole] * absmax[-1]
    return out


def _absmax(flat: Tensor) -> Tensor:
    """fp32 (blocks), the last one of what is left."""
    whole = len(flat) - len(flat) % BLOCK
    found = [flat[start:stop].view(-1, BLOCK).abs().amax(dim=1) for start, stop in _chunks(whole, flat.device)]
    if whole < len(flat):
        found.append(flat[whole:].abs().max().clamp(min=_SMALLEST)[None])
    return torch.cat(found).float()


def _pack(normalised: Tensor) -> Tensor:
    """Codes of fp32 values in [-1, 1], whose number is even: the number of borders below each.

    The bin of a value says how many borders lie in lower bins, and which border it has to be compared with.
    """
    below, border = _borders(normalised.device)
    values = normalised.view(-1)
    bins = _bin(values)
    codes = below.index_select(0, bins) + (values > border.index_select(0, bins))
    both = codes.view(torch.int16)  # the first of two codes in the low byte
    return ((both << 4) | (both >> 8)).to(torch.uint8)


def _bin(values: Tensor) -> Tensor:
    """int32; it never falls as the values rise, whatever the rounding. Rebuilt values may be a trifle beyond ±1."""
    return (values * (_BINS / 2) + (_BINS / 2 + 1)).int()


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels and the 256 values of the dynamic format, fp32, as the kernels of bitsandbytes want them."""
    return torch.tensor(LEVELS, device=device), _dynamic_map(device)


@cache
def _borders(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per bin: how many of the borders between levels lie in lower bins (uint8), and the border in it, or infinity."""
    levels = torch.tensor(LEVELS)
    borders = (levels[:-1] + levels[1:]) / 2
    bins = _bin(borders)
    below = torch.tensor([int((bins < number).sum()) for number in range(_BINS + 3)], dtype=torch.uint8)
    border = torch.full((_BINS + 3,), torch.inf)
    border[bins] = borders
    return below.to(device), border.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Per packed byte its two levels, as one number of eight bytes, which is looked up at once."""
    levels = torch.tensor(LEVELS)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return pairs.view(torch.float64).view(-1).to(device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic 8-bit format (arXiv 2110.02861), rising.

    Seven decades, each with twice as many values as the one below, evenly spaced from 0.1 to 1 of it; zero; and one.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(values), device=device)


@cache
def _dynamic_table(device: torch.device) -> Tensor:
    """uint8: the nearest code of each point of an even grid over [-1, 1]."""
    values = _dynamic_map(torch.device("cpu"))
    grid = torch.arange(_DYNAMIC_GRID) * 2.0 / (_DYNAMIC_GRID - 1) - 1
    return torch.bucketize(grid, (values[:-1] + values[1:]) / 2).to(torch.uint8).to(device)


def _dynamic_codes(normalised: Tensor) -> Tensor:
    """Of fp32 values in [-1, 1]: as in bitsandbytes, the code nearest to the closest point of the grid."""
    points = (normalised.clamp(-1, 1) + 1).double() * ((_DYNAMIC_GRID - 1) / 2) + 0.5
    return _dynamic_table(normalised.device)[points.float().int().clamp(0, _DYNAMIC_GRID - 1)]


def chunk_size(device: torch.device) -> int:
    """How many weights to work on at a time: of a size for each thread's cache, or to occupy a GPU."""
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else 1 << 24


def _chunks(length: int, device: torch.device) -> list[tuple[int, int]]:
    size = chunk_size(device)
    return [(start, min(start + size, length)) for start in range(0, length, size)]
