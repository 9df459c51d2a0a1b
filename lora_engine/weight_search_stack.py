"""Adapters stacked on a base model, with a weight for each of them and each group of layers.

For a module of group g, with s_i the scaling of adapter i,

    A = [A_1; …; A_k],  B = [w_1g·s_1·B_1 | … | w_kg·s_k·B_k]   ⇒   ∂L/∂w_ig = Σ ⟨∂L/∂B[:, i], s_i·B_i⟩

summed over the group's modules: the engine's own gradient of B, which is no larger than the stack, holds that of every
weight. No delta is ever formed, and the base model is passed once for all adapters.
"""

import re
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from lora_engine import adapter, lora, target_modules
from lora_engine import weight_search_limits as limits
from lora_engine.adapter_header import Header
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.config import LoraConfig

# "model.layers.7", "transformer.h.7": up to the first number of a module's name.
_LAYER = re.compile(r".*?\.\d+(?=\.|$)")


class WeightedStack:
    """k adapters on a base model, which is as it was before once this is closed.

    Attributes:
        adapted: the base model with the stack on it, as the passes take it.
        groups: names of the groups of layers, in the model's order; a single one, "", with a weight an adapter.
    """

    def __init__(self, base: BaseModel, headers: Sequence[Header], per: Literal["adapter", "layer"]) -> None:
        """Attach the stack, all its weights 0.

        Raises:
            AdapterError: an adapter is of another base model, or holds values that are not finite.
            SpecError: the ranks of a module add up to more than an adapter's largest.
        """
        check_fit(base, headers)
        self._headers = tuple(headers)
        self._ranks = limits.stacked_ranks(headers)
        self.adapted = lora.attach(base, _config(base, self._ranks), seed=0)
        try:
            self.groups = tuple(dict.fromkeys(group(module, per) for module in self.adapted.layers))
            self._places = {module: self.groups.index(group(module, per)) for module in self.adapted.layers}
            self._columns = {module: self._sources(module) for module in self.adapted.layers}
            self._factors = {module: self._load(module) for module in self.adapted.layers}
            self.set(torch.zeros(self.shape, dtype=torch.float64))
        except BaseException:
            self.close()
            raise

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weights: (adapters, groups)."""
        return len(self._headers), len(self.groups)

    @torch.no_grad()
    def set(self, weights: Tensor) -> None:
        """Compute with these weights (adapters × groups, fp64 on the CPU) from now on."""
        for module, layer in self.adapted.layers.items():
            columns = weights[self._columns[module], self._places[module]].to(layer.slots[0].B)
            torch.mul(self._factors[module], columns, out=layer.slots[0].B)
        self.adapted.refresh()

    def gradient(self) -> Tensor:
        """Of the weights (adapters × groups, fp64 on the CPU), from the gradients that the passes have accumulated."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for module, layer in self.adapted.layers.items():
            gradient = layer.slots[0].B.grad
            assert gradient is not None  # noqa: S101 - made by attach
            columns = (gradient * self._factors[module]).sum(0, dtype=torch.float64).cpu()
            total[:, self._places[module]].index_add_(0, self._columns[module], columns)
        return total

    def close(self) -> None:
        self.adapted.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sources(self, module: str) -> Tensor:
        """int64 (rank): whose each column of B is."""
        ranks = [header.modules[module].rank if module in header.modules else 0 for header in self._headers]
        return torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))

    @torch.no_grad()
    def _load(self, module: str) -> Tensor:
        """Put the module's A in its place; its B with scalings and without weights (out × rank, fp32)."""
        slot = self.adapted.layers[module].slots[0]
        B = torch.empty_like(slot.B)
        start = 0
        for header in self._headers:
            if module not in header.modules:
                continue
            weights = adapter.load_module(header, module)
            stop = start + len(weights.A)
            slot.A[start:stop] = weights.A
            B[:, start:stop] = weights.B * header.modules[module].scaling
            start = stop
        return B


def check_fit(base: BaseModel, headers: Sequence[Header]) -> None:
    """As `weight_search_limits.check_fit`, of a base model that is loaded."""
    modules = linear_modules(base.model)
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    head = next((module.name for module in modules if module.head and tied), None)
    limits.check_fit(modules, head, base.digest, headers)


def group(module: str, per: Literal["adapter", "layer"]) -> str:
    """The layer that a module lies in ("model.layers.7"), its own name outside; "" where an adapter has one weight."""
    if per == "adapter":
        return ""
    found = _LAYER.match(module)
    return found.group() if found else module


def pattern(group: str) -> str:
    """What names the modules of a group of layers in `WeightedAdapter.weights`."""
    return f"{group}.*" if _LAYER.fullmatch(group) else group


def _config(base: BaseModel, ranks: dict[str, int]) -> LoraConfig:
    """An adapter of these ranks by module, whose B·A is multiplied by 1."""
    modules = linear_modules(base.model)
    names = target_modules.last_names(modules, [module for module in modules if module.name in ranks])
    rank = max(ranks.values())
    smaller = {name: own for name, own in ranks.items() if own != rank}
    return LoraConfig(rank=rank, alpha=rank, target_modules=names, rank_pattern=smaller, alpha_pattern=smaller)
