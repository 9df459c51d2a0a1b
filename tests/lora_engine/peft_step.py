"""One optimizer step as PEFT, transformers and plain PyTorch make it."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_engine.data import Document


def peft_step(
    twin: Any, parameters: list[Any], optimizer: Any, documents: Sequence[Document], rate: float, max_norm: float
) -> tuple[float, float]:
    """(loss per target, gradient norm before clipping) of one step, document by document."""
    optimizer.zero_grad()
    targets = sum(document.trained_tokens for document in documents)
    total = 0.0
    for document in documents:
        ids = document.ids.long()
        labels = torch.where(document.trained, ids, -100)
        predicted = twin(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(predicted, labels[1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    return total, float(norm)
