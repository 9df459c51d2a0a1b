"""The product of one adapted linear layer, forward and backward, for the rows of one or several adapters.

    y = W·x + bias + scaling · B · A · dropout(x)          A: rank × in, B: out × rank, W frozen

Rows are the flattened tokens of a micro-batch. `Routing` says which rows belong to which adapter slot, so that several
adapters can share one pass over the base; one slot for all rows is the ordinary case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.dropout import keep_mask
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
