"""Random bits that are a pure function of where they are used: the finaliser of MurmurHash3 (32 bit) over counters."""

from torch import Tensor

MASK = 0xFFFFFFFF


def mixed(value: Tensor) -> Tensor:
    """Of each number its hash, in int64 whose upper half is cut off."""
    value = value & MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & MASK
    return value ^ (value >> 16)


def crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """The hash of every row + column, both below 2³² in int64: int32 (rows × columns) of the same bits.

    In 32 bits that overflow, and in place: there is one number for every element of a tensor.
    """
    hashed = _wrapped(rows)[:, None] + _wrapped(columns)[None, :]
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF)).mul_(signed(0x85EBCA6B))
    hashed.bitwise_xor_((hashed >> 13).bitwise_and_(0x7FFFF)).mul_(signed(0xC2B2AE35))
    return hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF))


def signed(constant: int) -> int:
    """A number below 2³² as the int32 of the same bits."""
    return constant - (1 << 32) if constant >> 31 else constant


def _wrapped(value: Tensor) -> Tensor:
    return (value - ((value >> 31) << 32)).int()
