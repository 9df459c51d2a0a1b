"""Dropout masks that are a pure function of where they apply.

A random generator's state would tie the mask to the order of computation. Here each element's fate is a hash of
(seed, step, layer, example, position, feature), so that resuming, recomputing and another split into micro-batches
see the same masks.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def row_keys(seed: int, step: int, examples: Tensor, positions: Tensor) -> Tensor:
    """One key per token: int64 (rows) below 2³², from the example's number in the dataset and the token's position."""
    start = _mix(torch.tensor(seed & _MASK, device=examples.device) + 0x9E3779B9 * (step + 1))
    return _mix(_mix(start ^ examples.long()) + 0x85EBCA6B * (positions.long() + 1))


def keep_mask(keys: Tensor, layer: int, features: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 with probability `dropout`, else 1 / (1 - dropout): (rows, features). `layer` tells inputs apart."""
    columns = _mix(torch.arange(features, device=keys.device) + 0x9E3779B9 * (layer + 1))
    # The same hash in 32 bits that overflow, and in place: there is one number for every element of the input.
    hashed = _wrapped(keys)[:, None] + _wrapped(columns)[None, :]
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x85EBCA6B))
    hashed.bitwise_xor_((hashed >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(0xC2B2AE35))
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF))
    # Signed numbers compare as unsigned ones do once the highest bit is flipped.
    kept = hashed.bitwise_xor_(_signed(1 << 31)) >= int(dropout * (_MASK + 1)) - (1 << 31)
    return kept.to(dtype).mul_(1 / (1 - dropout))


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
