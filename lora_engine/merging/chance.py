"""Random numbers that are a pure function of where they are used: adapter, tensor, row and column.

A generator's state would tie them to the order of computation. Here a merge that is streamed in blocks of rows, or done
again, draws the same.
"""

import hashlib

import torch
from torch import Tensor

from lora_engine.counter_hash import MASK, crossed, mixed

_BITS = 24  # what fp32 holds of a number below 1


def key(seed: int, digest: str, tensor: str) -> int:
    """64 bits of one adapter's tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{digest}\0{tensor}".encode()).digest()[:8], "little")


def uniform(key: int, first_row: int, rows: int, columns: int) -> Tensor:
    """Numbers in [0, 1), fp32 (rows × columns), of the rows that begin with `first_row`."""
    lines = mixed(mixed(torch.arange(first_row, first_row + rows) + (key & MASK)) ^ (key >> 32))
    places = mixed(torch.arange(columns) + (key >> 32))
    hashed = crossed(lines, places)
    return (hashed >> (32 - _BITS)).bitwise_and_((1 << _BITS) - 1).to(torch.float32).div_(1 << _BITS)
