"""The loss: negative log-likelihood of the target tokens, summed, so that a step divides once by all its targets."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_engine.data import MicroBatch


def summed_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Sum over the targets of -log p(target), a scalar in fp32.

    Logits exist at the targets alone. There is no attention mask: rows are padded on the right, and under causal
    attention no real token sees what lies to its right, so that padding changes nothing.
    """
    logits = model(input_ids=batch.ids, logits_to_keep=batch.predicts, use_cache=False).logits
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, batches: Iterable[MicroBatch]) -> float:
    """Loss per target token over all `batches`, without gradients."""
    total, targets = 0.0, 0
    for batch in batches:
        total += summed_loss(model, batch).item()
        targets += len(batch.targets)
    return total / targets
