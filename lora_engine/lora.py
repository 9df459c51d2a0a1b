"""LoRA (Hu et al. 2021, arXiv 2106.09685) put on the linear layers of a frozen base model, and taken off again."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import target_modules
from lora_engine.adapter import LoraWeights
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.config import LoraConfig
from lora_engine.errors import SpecError
from lora_engine.optim import Rate
from lora_engine.product import LoraLinear, Routing, Slot
from lora_engine.target_modules import Module, Shape


@dataclass(slots=True)
class Adapted:
    """A base model with one adapter on it.

    Attributes:
        layers: by full module name, in the model's order; `shapes` of their factors likewise.
        parameters: fp32 (trainable parameters): every A and B is a view of it.
        gradients: like `parameters`; backward accumulates into it.
        rates: of learning, for `optim.Optimizer`.
        routing: of the trunk's layers; `head_routing` of an adapted output head, which sees target tokens only.
    """

    base: BaseModel
    config: LoraConfig
    layers: dict[str, LoraLinear]
    shapes: dict[str, Shape]
    parameters: Tensor
    gradients: Tensor
    rates: tuple[Rate, ...]
    routing: Routing
    head_routing: Routing
    _compute: Tensor = field(repr=False)

    def refresh(self) -> None:
        """Copy the masters into the compute dtype; call it after each change of `parameters`."""
        if self._compute is not self.parameters:
            self._compute.copy_(self.parameters)

    def weights(self) -> dict[str, LoraWeights]:
        """Copies of A and B (fp32, CPU) by full module name."""
        copies = {name: (layer.slots[0].A, layer.slots[0].B) for name, layer in self.layers.items()}
        return {name: LoraWeights(_copy(A), _copy(B)) for name, (A, B) in copies.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """Of the modules whose alpha is not that of the config."""
        alphas = {name: shape.alpha for name, shape in self.shapes.items()}
        return {name: alpha for name, alpha in alphas.items() if alpha != self.config.resolved_alpha}

    def detach(self) -> None:
        """Put the plain layers back; the base model is as it was before `attach`."""
        for name, layer in self.layers.items():
            self.base.model.set_submodule(name, layer.base)


def attach(base: BaseModel, config: LoraConfig, seed: int) -> Adapted:
    """Adapt the targeted layers of `base`: A drawn as PEFT draws it, B zero, so that nothing changes at first.

    Raises:
        SpecError: as `target_modules.targets`; field `lora.target_modules` for a tied output head.
    """
    modules = linear_modules(base.model)
    chosen = target_modules.targets(modules, config)
    _refuse_tied_head(base.model, chosen)
    shapes = {module.name: target_modules.shape(config, module) for module in chosen}
    places, rates = _layout(chosen, shapes, config.lora_plus_ratio or 1.0)
    parameters = torch.zeros(rates[-1].where.stop, device=base.device)
    gradients = torch.zeros_like(parameters)
    compute = parameters if base.compute_dtype == torch.float32 else parameters.to(base.compute_dtype)
    routing, head_routing = Routing(), Routing()
    layers: dict[str, LoraLinear] = {}
    # Of all modules of the model: what a layer's masks are does not hang on which others are adapted.
    indices = {key: index for index, key in enumerate(dict.fromkeys(map(target_modules.shared_input, modules)))}
    for module in chosen:
        name, shape = module.name, shapes[module.name]
        index = indices[target_modules.shared_input(module)]
        layer = LoraLinear(base.model.get_submodule(name), head_routing if module.head else routing, index)
        A, a = _views(parameters, gradients, compute, places[name, "A"], (shape.rank, module.inputs))
        B, b = _views(parameters, gradients, compute, places[name, "B"], (module.outputs, shape.rank))
        if not A.is_meta:
            A.data.copy_(initial_factor(seed, name, shape.rank, module.inputs))
        layer.slots[0] = Slot(A, B, shape.scaling, config.dropout, a, b)
        layers[name] = layer
        base.model.set_submodule(name, layer)
    adapted = Adapted(base, config, layers, shapes, parameters, gradients, rates, routing, head_routing, compute)
    adapted.refresh()
    return adapted


def _layout(
    modules: Sequence[Module], shapes: Mapping[str, Shape], ratio: float
) -> tuple[dict[tuple[str, str], slice], tuple[Rate, ...]]:
    """Where each (module, "A" or "B") lies among the parameters, and the rates, in order of their places.

    Factors of one rate lie together, A before B, then in the model's order: so that an optimizer needs one call a
    rate, and the As of layers that read the same input are one matrix.
    """
    factors = [
        ((shapes[module.name].learning_rate or 0.0, ratio if factor == "B" else 1.0), factor, number)
        for number, module in enumerate(modules)
        for factor in ("A", "B")
    ]
    places: dict[tuple[str, str], slice] = {}
    rates: list[Rate] = []
    stop = 0
    for (peak, multiplier), group in groupby(sorted(factors), key=itemgetter(0)):
        begin = stop
        for _, factor, number in group:
            module = modules[number]
            size = shapes[module.name].rank * (module.inputs if factor == "A" else module.outputs)
            places[module.name, factor] = slice(stop, stop + size)
            stop += size
        rates.append(Rate(slice(begin, stop), peak or None, multiplier))
    return places, tuple(rates)


def initial_factor(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """Kaiming-uniform with a = √5, as PEFT (fp32, CPU); a function of the seed and the module's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)


def _views(
    parameters: Tensor, gradients: Tensor, compute: Tensor, place: slice, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    master = parameters[place].view(shape).detach().requires_grad_()
    master.grad = gradients[place].view(shape)
    return master, compute[place].view(shape)


def _refuse_tied_head(model: Any, chosen: Sequence[Module]) -> None:
    head = next((module for module in chosen if module.head), None)
    if head is not None and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise SpecError(
            f"lora.target_modules: {head.name} shares its weight with the input embeddings in this base model; "
            "an adapter on it could not be merged without changing the embeddings too",
            field="lora.target_modules",
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
