"""The products of adapted linear layers, forward and backward, for the rows of one or several adapters.

    y = W·x + bias + scaling · B · A · dropout(x)          A: rank × in, B: out × rank, W frozen

Rows are the flattened tokens of a micro-batch. `Routing` says which rows belong to which adapter slot, so that several
adapters can share one pass over the base; one slot for all rows is the ordinary case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.dropout import keep_mask
from lora_engine.quantized import QuantizedLinear


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


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one adapted layer lies in a projection: columns of y and of the hidden h = A·x."""

    slot: Slot
    outputs: slice
    ranks: slice


@dataclass(frozen=True, slots=True)
class FactorGradients:
    """Of one segment: that of A of all adapted layers (ranks in all × in), and of each layer's B (out × rank)."""

    parts: tuple[_Part, ...]
    A: Tensor
    B: tuple[Tensor, ...]

    def by_factor(self) -> Iterator[Tensor]:
        """Of A and B of each layer in turn, in the masters' type."""
        for part, dB in zip(self.parts, self.B, strict=True):
            yield self.A[part.ranks].to(part.slot.A.dtype)
            yield dB.to(part.slot.B.dtype)

    def accumulate(self) -> None:
        """Add to the masters' `grad`."""
        for part, dB in zip(self.parts, self.B, strict=True):
            assert part.slot.A.grad is not None and part.slot.B.grad is not None  # noqa: S101, PT018 - made by attach
            part.slot.A.grad.add_(self.A[part.ranks])
            part.slot.B.grad.add_(dB)


class Projection:
    """Frozen linear layers that read the same input, with the adapters on them, as one product.

    Their weights lie under one another in one buffer (out of all × in), of which each layer's own weight is a view; a
    quantised layer that does not keep its dequantised weight is dequantised into `scratch`, which projections share.
    """

    def __init__(self, layers: Sequence[nn.Module], scratch: "Scratch | None" = None) -> None:
        self._layers = tuple(layers)
        self._bases: tuple[Any, ...] = tuple(layer.base if isinstance(layer, LoraLinear) else layer for layer in layers)
        self._scratch = scratch
        sizes = [_outputs(base) for base in self._bases]
        self._slices = [slice(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]
        self.outputs, self.inputs = sum(sizes), _inputs(self._bases[0])
        self._put_together()
        self._bias = _fused_bias(self._bases, sizes)
        self._parts: dict[int, tuple[_Part, ...]] = {}
        self._views: dict[int, Tensor | None] = {}
        self._resident: Tensor | None = None

    @property
    def adapted(self) -> bool:
        return any(isinstance(layer, LoraLinear) for layer in self._layers)

    @property
    def ranks(self) -> int:
        """Of all adapters on all layers."""
        adapted = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        return sum(len(slot.a) for layer in adapted for slot in layer.slots.values())

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        base = self._bases[0]
        dtype: torch.dtype = base.compute_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        return dtype

    def weight(self) -> Tensor:
        """(out of all × in) in the compute dtype; what lies in `scratch` is valid until its next use."""
        if self._resident is not None:
            return self._resident
        weights = [_weight(base) for base in self._bases]
        resident = [weight for weight in weights if weight is not None]
        if len(resident) == len(weights):
            together = resident[0] if len(resident) == 1 else _together(resident)
            if together is not None and not any(isinstance(base, QuantizedLinear) for base in self._bases):
                self._resident = together
            return torch.cat(resident) if together is None else together
        first = self._bases[0]
        if self._scratch is None:
            assert isinstance(first, QuantizedLinear) and len(self._bases) == 1  # noqa: S101, PT018 - see LoraLinear
            return first.dequantized()
        return self._scratch.dequantized(self._bases, self._slices, self.inputs)

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y (rows × out of all) of x (rows × in), and what `backward` needs beside x."""
        weight = self.weight()
        y = x @ weight.t() if self._bias is None else torch.addmm(self._bias, x, weight.t())
        hidden = []
        for segment in self._segments(routing):
            parts, a = self._factors_of(segment.slot)
            rows = slice(segment.start, segment.stop)
            h = self._dropped(x, rows, parts, routing.keys) @ a.t()
            for part in parts:
                y[rows, part.outputs].addmm_(h[:, part.ranks], part.slot.b.t(), alpha=part.slot.scaling)
            hidden.append(h)
        return y, tuple(hidden)

    def backward(
        self, dy: Tensor, x: Tensor, hidden: Sequence[Tensor], routing: Routing, *, dx_needed: bool = True
    ) -> tuple[Tensor | None, list[FactorGradients]]:
        """dx (rows × in), where needed, and the gradients of the factors; none for W."""
        dx = dy @ self.weight() if dx_needed else None
        gradients = []
        for segment, h in zip(self._segments(routing), hidden, strict=True):
            parts, a = self._factors_of(segment.slot)
            rows = slice(segment.start, segment.stop)
            if len(parts) == 1:
                dh = (dy[rows, parts[0].outputs] @ parts[0].slot.b).mul_(parts[0].slot.scaling)
            else:
                dh = torch.empty_like(h)
                for part in parts:
                    torch.mul(dy[rows, part.outputs] @ part.slot.b, part.slot.scaling, out=dh[:, part.ranks])
            dA = dh.t() @ self._dropped(x, rows, parts, routing.keys)
            # A wide result is quicker to compute than a tall one.
            dB = tuple(
                (h[:, part.ranks].t() @ dy[rows, part.outputs]).t().mul_(part.slot.scaling) for part in parts
            )  # fmt: skip
            gradients.append(FactorGradients(parts, dA, dB))
            if dx is None:
                continue
            mask = self._mask(x, rows, parts, routing.keys)
            if mask is None:
                dx[rows].addmm_(dh, a)
            else:
                dx[rows] += mask * (dh @ a)
        return dx, gradients

    def _segments(self, routing: Routing) -> list[Segment]:
        """Those whose slot adapts a layer of this projection."""
        layers = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        return [segment for segment in routing.segments if any(segment.slot in layer.slots for layer in layers)]

    def _mask(self, x: Tensor, rows: slice, parts: tuple[_Part, ...], keys: Tensor | None) -> Tensor | None:
        dropout = parts[0].slot.dropout
        if keys is None or not dropout:
            return None
        # Layers that read the same input share their index, and so their mask.
        index = next(layer.index for layer in self._layers if isinstance(layer, LoraLinear))
        return keep_mask(keys[rows], index, x.shape[1], dropout, x.dtype)

    def _dropped(self, x: Tensor, rows: slice, parts: tuple[_Part, ...], keys: Tensor | None) -> Tensor:
        mask = self._mask(x, rows, parts, keys)
        return x[rows] if mask is None else x[rows] * mask

    def _factors_of(self, number: int) -> tuple[tuple[_Part, ...], Tensor]:
        """Parts of the layers that have slot `number`, and their a's under one another (ranks in all × in)."""
        if number not in self._parts:
            found: list[_Part] = []
            for layer, outputs in zip(self._layers, self._slices, strict=True):
                if isinstance(layer, LoraLinear) and number in layer.slots:
                    slot = layer.slots[number]
                    begin = found[-1].ranks.stop if found else 0
                    found.append(_Part(slot, outputs, slice(begin, begin + len(slot.a))))
            self._parts[number] = tuple(found)
            self._views[number] = _together([part.slot.a for part in found])
        parts, view = self._parts[number], self._views[number]
        return parts, torch.cat([part.slot.a for part in parts]) if view is None else view

    def operations(self, rows: int, *, backward: bool, dx_needed: bool) -> int:
        """Multiplications and additions for so many rows."""
        frozen = self.inputs * self.outputs * (2 if backward and dx_needed else 1)
        adapted = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        ranks = sum(len(slot.a) * (self.inputs + len(slot.b)) for layer in adapted for slot in layer.slots.values())
        return 2 * rows * (frozen + ranks * (3 if backward else 1))

    @property
    def dequantized_bytes(self) -> int:
        """Of the dequantised weights of quantised layers."""
        quantized = [base for base in self._bases if isinstance(base, QuantizedLinear)]
        return sum(base.out_features * base.in_features for base in quantized) * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Of quantised weights, while they are not kept dequantised."""
        return sum(base.packed.nbytes for base in self._bases if isinstance(base, QuantizedLinear))

    def keep_dequantized(self, keep: bool) -> None:
        """Keep the dequantised weights of quantised layers, under one another, or let them go again."""
        layers = [base for base in self._bases if isinstance(base, QuantizedLinear)]
        if not keep:
            for layer in layers:
                layer.keep_dequantized(None)
        elif len(layers) == len(self._bases) and any(layer.kept is None for layer in layers):
            buffer = torch.empty(self.outputs, layers[0].in_features, dtype=self.dtype, device=layers[0].packed.device)
            for layer, rows in zip(layers, self._slices, strict=True):
                layer.keep_dequantized(buffer[rows])

    def _put_together(self) -> None:
        """Make weights that are not quantised views of one buffer."""
        if len(self._bases) > 1 and not any(isinstance(base, QuantizedLinear) for base in self._bases):
            weights: list[Tensor] = [base.weight for base in self._bases]
            if _together([weight.detach() for weight in weights]) is None:
                fused = torch.cat([weight.detach() for weight in weights])
                for weight, rows in zip(weights, self._slices, strict=True):
                    weight.data = fused[rows]


class Scratch:
    """One buffer into which quantised layers are dequantised, one projection at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, device=device, dtype=dtype)

    def dequantized(self, layers: Sequence[nn.Module], rows: Sequence[slice], inputs: int) -> Tensor:
        """The weights of `layers` under one another, at `rows` (out of all × inputs)."""
        total = rows[-1].stop * inputs
        if len(self._buffer) < total:
            self._buffer = self._buffer.new_empty(total)
        weight = self._buffer[:total].view(-1, inputs)
        for layer, own in zip(layers, rows, strict=True):
            if isinstance(layer, QuantizedLinear):
                layer.dequantized(weight[own])
            else:
                weight[own] = layer.weight  # type: ignore[assignment]
        return weight


class LoraLinear(nn.Module):
    """A frozen linear layer of any kind with adapter slots; `index` tells inputs apart in the dropout hash."""

    def __init__(self, base: nn.Module, routing: Routing, index: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.index = index
        self.slots: dict[int, Slot] = {}
        self._projection: Projection | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._projection is None:
            self._projection = Projection([self])
        segments, keys = self.routing.segments, self.routing.keys
        slots = [self.slots[segment.slot] for segment in segments]
        factors = [factor for slot in slots for factor in (slot.A, slot.B)]
        rows = x.reshape(-1, x.shape[-1])
        routing = Routing(segments, keys)
        result: Tensor = _AdaptedProduct.apply(rows, self._projection, routing, *factors)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)


class _AdaptedProduct(torch.autograd.Function):
    """`Projection` for autograd, with gradients for x, A and B.

    x is kept by reference and the dropped x computed anew from the hash. The fp32 masters are inputs only to receive
    fp32 gradients; the products use the slots' copies in the compute dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, routing: Routing, *_masters: Tensor) -> Tensor:
        y, hidden = projection.forward(x, routing)
        ctx.projection, ctx.routing = projection, routing
        ctx.save_for_backward(x, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *hidden = ctx.saved_tensors
        projection: Projection = ctx.projection
        dx, gradients = projection.backward(gradient, x, hidden, ctx.routing, dx_needed=ctx.needs_input_grad[0])
        factors = [factor for found in gradients for factor in found.by_factor()]
        return dx, None, None, *factors


def _weight(base: Any) -> Tensor | None:
    """(out × in), where it lies in memory as such."""
    if isinstance(base, QuantizedLinear):
        return base.kept
    weight: Tensor = base.weight.detach()
    return weight if isinstance(base, nn.Linear) else weight.t()  # transformers' Conv1D keeps in × out


def _outputs(base: Any) -> int:
    return int(base.out_features if isinstance(base, nn.Linear | QuantizedLinear) else base.nf)


def _inputs(base: Any) -> int:
    return int(base.in_features if isinstance(base, nn.Linear | QuantizedLinear) else base.nx)


def _fused_bias(bases: Sequence[Any], sizes: Sequence[int]) -> Tensor | None:
    given = [base.bias for base in bases if base.bias is not None]
    if not given:
        return None
    parts = [
        given[0].new_zeros(size) if base.bias is None else base.bias for base, size in zip(bases, sizes, strict=True)
    ]
    return torch.cat([part.detach() for part in parts])


def _together(tensors: Sequence[Tensor]) -> Tensor | None:
    """The rows of all `tensors` as one view, where they lie under one another in memory."""
    first = tensors[0]
    storage, expected = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        near = tensor.untyped_storage().data_ptr() == storage and tensor.data_ptr() == expected
        if not near or not tensor.is_contiguous() or tensor.is_meta:
            return None
        expected += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, first.shape[1]), first.stride())
