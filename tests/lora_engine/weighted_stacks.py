"""Random adapters on a base model, and the loss of their weighted sum in float64, by transformers' own model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_engine import adapter
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.data import Document
from lora_engine.weight_search_stack import group


def random_adapter(
    folder: Path, base: BaseModel, seed: int, *, rank: int, alpha: float, last: Sequence[str] = (), **more: Any
) -> Path:
    """With random factors on the layers of these last names; without names on all but the head."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for module in linear_modules(base.model):
        if not module.head and (not last or module.name.rpartition(".")[2] in last):
            A = torch.randn(rank, module.inputs, generator=generator) * 0.1
            B = torch.randn(module.outputs, rank, generator=generator) * 0.1
            weights[module.name] = LoraWeights(A, B)
    made = Adapter(weights, rank=rank, alpha=alpha, base_model_name="tiny", base_digest=base.digest, **more)
    adapter.write(made, folder, lineage={})
    return folder


def dense_loss(
    base: BaseModel, folders: Sequence[Path], weights: Tensor, groups: Sequence[str], documents: Sequence[Document]
) -> float:
    """Per target token, of W + Σ w·D with weights (adapters × groups)."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64)
    for folder, row in zip(folders, weights, strict=True):
        source = adapter.read(folder)
        for name in source.weights:
            place = list(groups).index(group(name, "adapter" if list(groups) == [""] else "layer"))
            layer, delta = model.get_submodule(name), row[place] * adapter.delta(source, name)
            layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    total = 0.0
    for document in documents:
        with torch.no_grad():
            logits = model(document.ids[None].long()).logits[0, :-1][document.trained[1:]]
        total += float(functional.cross_entropy(logits, document.ids[document.trained].long(), reduction="sum"))
    return total / sum(document.trained_tokens for document in documents)
