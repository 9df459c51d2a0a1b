"""Random numbers that are a pure function of where they are used: adapter, tensor, row and column.

A generator's state would tie them to the order of computation. Here a merge that is streamed in blocks of rows, or done
again, draws the same.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_BITS = 24  # what fp32 holds of a number below 1


def key(seed: int, digest: str, tensor: str) -> int:
    """64 bits of one adapter's tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{digest}\0{tensor}".encode()).digest()[:8], "little")


def uniform(key: int, first_row: int, rows: int, columns: int) -> Tensor:
    """Numbers in [0, 1), fp32 (rows × columns), of the rows that begin with `first_row`."""
    lines = _mix(_mix(torch.arange(first_row, first_row + rows) + (key & _MASK)) ^ (key >> 32))
    places = _mix(torch.arange(columns) + (key >> 32))
    # 32 bits that overflow, in place: there is one number for every entry of a weight.
    hashed = _wrapped(lines)[:, None] + _wrapped(places)[None, :]
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    hashed.bitwise_xor_((hashed >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF))
    return (hashed >> (32 - _BITS)).bitwise_and_((1 << _BITS) - 1).to(torch.float32).div_(1 << _BITS)


def _wrapped(value: Tensor) -> Tensor:
    """int64 below 2³² as the int32 of the same bits."""
    return (value - ((value >> 31) << 32)).int()


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >> 31 else constant


def _mix(value: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (32 bit), in int64 whose upper half is cut off."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)
