"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a frozen base model.

Every adapted layer computes, for the rows of x that belong to an adapter,

    y = W·x + bias + scaling · B · A · dropout(x)          A: rank × in, B: out × rank, W frozen

Rows are the flattened tokens of a micro-batch. `Routing` says which rows belong to which adapter slot, so that several
adapters can share one pass over the base; one slot for all rows is the ordinary case.
"""

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
from lora_engine.dropout import keep_mask
from lora_engine.errors import SpecError
from lora_engine.nf4 import NF4Linear


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows start … stop (exclusive; None: to the end) belong to adapter slot `slot`."""

    slot: int = 0
    start: int = 0
    stop: int | None = None


@dataclass(slots=True)
class Routing:
    """What the layers of one model must know about the rows they are given; one object for all of them.

    Attributes:
        segments: rows outside every segment see the base model alone.
        keys: int64 (rows), see `dropout.row_keys`; None switches dropout off.
    """

    segments: tuple[Segment, ...] = (Segment(),)
    keys: Tensor | None = None


@dataclass(slots=True)
class Slot:
    """One adapter's factors for one layer: fp32 masters A and B that carry the gradient, a and b to compute with."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float
    a: Tensor
    b: Tensor


class LoraLinear(nn.Module):
    """A frozen linear layer of any kind with adapter slots; `index` tells layers apart in the dropout hash."""

    def __init__(self, base: nn.Module, routing: Routing, index: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.index = index
        self.slots: dict[int, Slot] = {}

    def forward(self, x: Tensor) -> Tensor:
        segments, keys = self.routing.segments, self.routing.keys
        slots = [self.slots[segment.slot] for segment in segments]
        factors = [factor for slot in slots for factor in (slot.A, slot.B)]
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = _AdaptedProduct.apply(rows, self, segments, keys, *factors)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)


class _AdaptedProduct(torch.autograd.Function):
    """The formula above with gradients for x, A and B, none for W.

    x is kept by reference and the dropped x computed anew from the hash. The fp32 masters are inputs only to receive
    fp32 gradients; the products use the slots' copies in the compute dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: LoraLinear, segments: Sequence[Segment], keys: Tensor | None, *_masters: Tensor
    ) -> Tensor:
        y: Tensor = layer.base(x)
        hidden = []
        for segment in segments:
            rows, slot = slice(segment.start, segment.stop), layer.slots[segment.slot]
            h = (_dropped(x, rows, layer, slot, keys) @ slot.a.t()).mul_(slot.scaling)
            y[rows].addmm_(h, slot.b.t())
            hidden.append(h)
        ctx.layer, ctx.segments, ctx.keys = layer, segments, keys
        ctx.save_for_backward(x, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *hidden = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        dx = _input_gradient(layer.base, gradient) if ctx.needs_input_grad[0] else None
        factor_gradients: list[Tensor] = []
        for segment, h in zip(ctx.segments, hidden, strict=True):
            rows, slot = slice(segment.start, segment.stop), layer.slots[segment.slot]
            dy = gradient[rows]
            dh = (dy @ slot.b).mul_(slot.scaling)
            dA = dh.t() @ _dropped(x, rows, layer, slot, ctx.keys)
            factor_gradients += [dA.float(), (dy.t() @ h).float()]
            if dx is None:
                continue
            mask = _mask(x, rows, layer, slot, ctx.keys)
            if mask is None:
                dx[rows].addmm_(dh, slot.a)
            else:
                dx[rows] += mask * (dh @ slot.a)
        return dx, None, None, None, *factor_gradients


def _mask(x: Tensor, rows: slice, layer: LoraLinear, slot: Slot, keys: Tensor | None) -> Tensor | None:
    if keys is None or not slot.dropout:
        return None
    return keep_mask(keys[rows], layer.index, x.shape[1], slot.dropout, x.dtype)


def _dropped(x: Tensor, rows: slice, layer: LoraLinear, slot: Slot, keys: Tensor | None) -> Tensor:
    mask = _mask(x, rows, layer, slot, keys)
    return x[rows] if mask is None else x[rows] * mask


def _input_gradient(base: nn.Module, gradient: Tensor) -> Tensor:
    if isinstance(base, NF4Linear):
        return gradient @ base.dequantized()
    weight: Tensor = base.weight  # type: ignore[assignment]
    return gradient @ (weight if isinstance(base, nn.Linear) else weight.t())


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
