"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a frozen base model: which layers, of what shape."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.adapter import LoraWeights
from lora_engine.base_model import BaseModel, Module, linear_modules
from lora_engine.config import ALL_LINEAR, LoraConfig
from lora_engine.errors import SpecError
from lora_engine.product import LoraLinear, Routing, Slot


@dataclass(slots=True)
class Adapted:
    """A base model with one adapter on it.

    Attributes:
        layers: by full module name, in the model's order.
        parameters: fp32 (trainable parameters): every A and B is a view of it.
        gradients: like `parameters`; backward accumulates into it.
        routing: of the trunk's layers; `head_routing` of an adapted output head, which sees target tokens only.
    """

    base: BaseModel
    config: LoraConfig
    layers: dict[str, LoraLinear]
    parameters: Tensor
    gradients: Tensor
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

    def detach(self) -> None:
        """Put the plain layers back; the base model is as it was before `attach`."""
        for name, layer in self.layers.items():
            self.base.model.set_submodule(name, layer.base)


def attach(base: BaseModel, config: LoraConfig, seed: int) -> Adapted:
    """Adapt the targeted layers of `base`: A drawn as PEFT draws it, B zero, so that nothing changes at first.

    Raises:
        SpecError: field `lora.target_modules`, for a name that is not in the model or a tied output head.
    """
    chosen = targets(linear_modules(base.model), config)
    _refuse_tied_head(base.model, chosen)
    size = trainable_parameters(chosen, config.rank)
    parameters = torch.zeros(size, device=base.device)
    gradients = torch.zeros_like(parameters)
    compute = parameters if base.compute_dtype == torch.float32 else parameters.to(base.compute_dtype)
    routing, head_routing = Routing(), Routing()
    layers: dict[str, LoraLinear] = {}
    offset = 0
    for index, module in enumerate(chosen):
        layer = LoraLinear(base.model.get_submodule(module.name), head_routing if module.head else routing, index)
        shapes = ((config.rank, module.inputs), (module.outputs, config.rank))
        (A, a), (B, b) = (
            _views(parameters, gradients, compute, offset + skip, shape)
            for shape, skip in zip(shapes, (0, config.rank * module.inputs), strict=True)
        )
        A.data.copy_(initial_factor(seed, module.name, *shapes[0]))
        layer.slots[0] = Slot(A, B, config.scaling, config.dropout, a, b)
        offset += A.numel() + B.numel()
        layers[module.name] = layer
        base.model.set_submodule(module.name, layer)
    adapted = Adapted(base, config, layers, parameters, gradients, routing, head_routing, compute)
    adapted.refresh()
    return adapted


def targets(modules: Sequence[Module], config: LoraConfig) -> tuple[Module, ...]:
    """The modules that `config.target_modules` names, in the model's order; the head only when it is named.

    Raises:
        SpecError: a name fits no module.
    """
    if config.target_modules == ALL_LINEAR:
        return tuple(module for module in modules if not module.head)
    chosen: set[str] = set()
    for name in config.target_modules:
        matching = {module.name for module in modules if module.name == name or module.name.endswith(f".{name}")}
        if not matching:
            known = sorted({module.name.rpartition(".")[2] for module in modules})
            raise SpecError(
                f"lora.target_modules: no linear layer is called {name!r}; there are {', '.join(known[:20])}",
                field="lora.target_modules",
            )
        chosen |= matching
    return tuple(module for module in modules if module.name in chosen)


def last_names(modules: Sequence[Module], chosen: Sequence[Module]) -> tuple[str, ...]:
    """Last names ("q_proj") that stand for exactly the modules `chosen`; their full names where there are none such."""
    full = {module.name for module in chosen}
    names = {name.rpartition(".")[2] for name in full}
    matched = {module.name for module in modules if module.name.rpartition(".")[2] in names}
    return tuple(sorted(names if matched == full else full))


def trainable_parameters(modules: Sequence[Module], rank: int) -> int:
    return sum(rank * (module.inputs + module.outputs) for module in modules)


def initial_factor(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """Kaiming-uniform with a = √5, as PEFT (fp32, CPU); a function of the seed and the module's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)


def _views(
    parameters: Tensor, gradients: Tensor, compute: Tensor, start: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    rows = slice(start, start + shape[0] * shape[1])
    master = parameters[rows].view(shape).detach().requires_grad_()
    master.grad = gradients[rows].view(shape)
    return master, compute[rows].view(shape)


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
