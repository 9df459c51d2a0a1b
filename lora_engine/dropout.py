"""Dropout masks that are a pure function of where they apply.

A random generator's state would tie the mask to the order of computation. Here each element's fate is a hash of
(seed, step, layer, example, position, feature), so that resuming, recomputing and another split into micro-batches
see the same masks.
"""

import torch
from torch import Tensor

from lora_engine.counter_hash import MASK, crossed, mixed, signed


def row_keys(seed: int, step: int, examples: Tensor, positions: Tensor) -> Tensor:
    """One key per token: int64 (rows) below 2³², from the example's number in the dataset and the token's position."""
    start = mixed(torch.tensor(seed & MASK, device=examples.device) + 0x9E3779B9 * (step + 1))
    return mixed(mixed(start ^ examples.long()) + 0x85EBCA6B * (positions.long() + 1))


def keep_mask(keys: Tensor, layer: int, features: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 with probability `dropout`, else 1 / (1 - dropout): (rows, features). `layer` tells inputs apart."""
    columns = mixed(torch.arange(features, device=keys.device) + 0x9E3779B9 * (layer + 1))
    hashed = crossed(keys, columns)
    # Signed numbers compare as unsigned ones do once the highest bit is flipped.
    kept = hashed.bitwise_xor_(signed(1 << 31)) >= int(dropout * (MASK + 1)) - (1 << 31)
    return kept.to(dtype).mul_(1 / (1 - dropout))
