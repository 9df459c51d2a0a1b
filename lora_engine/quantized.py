"""Linear layers whose frozen weight is stored in fewer bits than it is computed with: NF4 (`nf4.py`) or int8.

The gradient is ours on every device. bitsandbytes' own `Linear4bit` repacks the weight at the first evaluation on some
CPUs, after which gradients are silently wrong.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_engine import nf4

# Where a scale is smaller (a row of zeros, as a rule) the codes cannot be found again in the dequantised values.
_SMALLEST_SCALE = 1e-30
_INT8_STEP = 7.874015718698502e-3  # 1/127, as bitsandbytes has it


class QuantizedLinear(nn.Module):
    """``y = x · dequantised(W)ᵀ + bias``, W frozen (out × in).

    `keep_dequantized` trades memory for the cost of dequantising in every pass: the numbers stay the same, and so do
    the codes when it is undone.

    Attributes:
        packed: the codes; empty while they are not needed.
        kept: the dequantised weight, while it is kept.
    """

    packed: Tensor

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias
        self.compute_dtype = compute_dtype
        self.kept: Tensor | None = None

    def dequantized(self, out: Tensor | None = None) -> Tensor:
        """The dequantised weight (out × in, compute dtype): what is kept, or written to `out` (contiguous), or new."""
        if self.kept is not None:
            return self.kept if out is None else out.copy_(self.kept)
        if out is None:
            out = self.new_buffer()
        self._write(out)
        return out

    def new_buffer(self) -> Tensor:
        """Room for the dequantised weight."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.compute_dtype, device=self.packed.device)

    def keep_dequantized(self, view: Tensor | None) -> None:
        """Keep the dequantised weight in `view` (as `out` of `dequantized`), or with None the codes alone again.

        The codes are let go meanwhile, and found again in the kept values, bit by bit.
        """
        if view is not None:
            self.kept = self.dequantized(view)
            if self._invertible():
                self.packed = self.packed.new_empty(0)
        elif self.kept is not None:
            if not self.packed.numel():
                self.packed = self._encode(self.kept)
            self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return functional.linear(x, self.kept, self.bias)
        result: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    @abstractmethod
    def _write(self, out: Tensor) -> None:
        """Dequantise the codes into `out`."""

    @abstractmethod
    def _encode(self, dequantized: Tensor) -> Tensor:
        """The codes of dequantised values."""

    @abstractmethod
    def _invertible(self) -> bool:
        """Whether `_encode` undoes `_write`."""

    def _store(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class NF4Linear(QuantizedLinear):
    """4.127 bits a weight."""

    codes: Tensor
    scales: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Quantises `weight` (out × in, any float type) on the device it lies on."""
        super().__init__(weight.shape, bias, compute_dtype)
        packed, statistics = nf4.quantize(weight)
        self._store(packed=packed, **statistics._asdict())

    def _statistics(self) -> nf4.Statistics:
        return nf4.Statistics(self.codes, self.scales, self.offset)

    def for_bitsandbytes(self) -> tuple[Tensor, Any]:
        """The packed weight and the `QuantState` that bitsandbytes' functions take; nothing is copied."""
        from bitsandbytes import functional as bitsandbytes

        make: Any = bitsandbytes.QuantState  # it is untyped
        levels, values = nf4.tables(self.packed.device)
        groups = make(absmax=self.scales, blocksize=nf4.GROUP, code=values, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        state = make(
            absmax=self.codes, shape=shape, code=levels, blocksize=nf4.BLOCK, quant_type="nf4",
            dtype=self.compute_dtype, offset=self.offset, state2=groups,
        )  # fmt: skip
        return self.packed[:, None], state

    def _write(self, out: Tensor) -> None:
        if not out.is_cuda:
            nf4.dequantize(self.packed, self._statistics().absmax(), out)
            return
        # One pass over the memory, of which PyTorch's operations need four. Imported here: it takes seconds.
        from bitsandbytes.functional import dequantize_4bit

        dequantize_4bit(*self.for_bitsandbytes(), out=out)

    def _encode(self, dequantized: Tensor) -> Tensor:
        return nf4.encode(dequantized, self._statistics().absmax())

    def _invertible(self) -> bool:
        return bool((self._statistics().absmax().abs() > _SMALLEST_SCALE).all())


class Int8Linear(QuantizedLinear):
    """Eight bits a weight, even steps up to the largest magnitude of each output row.

    The codes are those of bitsandbytes' `int8_vectorwise_quant` (LLM.int8, arXiv 2208.07339) without outliers, which
    concern activations: here these keep the compute dtype.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Quantises `weight` (out × in, any float type) on the device it lies on."""
        super().__init__(weight.shape, bias, compute_dtype)
        scales = weight.abs().amax(dim=1).float()
        factors = torch.where(scales > 0, 127 / scales, 0)
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in _row_slices(packed):
            packed[rows] = (weight[rows] * factors[rows, None]).round_()
        self._store(packed=packed, scales=scales)

    def _write(self, out: Tensor) -> None:
        for rows in _row_slices(out):
            torch.mul(self.packed[rows] * self.scales[rows, None], _INT8_STEP, out=out[rows])

    def _encode(self, dequantized: Tensor) -> Tensor:
        packed = torch.empty(dequantized.shape, dtype=torch.int8, device=dequantized.device)
        for rows in _row_slices(packed):
            packed[rows] = (dequantized[rows] / (self.scales[rows, None] * _INT8_STEP)).round_()
        return packed

    def _invertible(self) -> bool:
        return bool((self.scales > _SMALLEST_SCALE).all())


def _row_slices(matrix: Tensor) -> Iterator[slice]:
    """Rows whose intermediate results stay in the processor's cache."""
    rows = max(1, nf4.chunk_size(matrix.device) // matrix.shape[1])
    return (slice(start, start + rows) for start in range(0, len(matrix), rows))


class _FrozenProduct(torch.autograd.Function):
    """The product with a gradient for x alone; the weight is dequantised anew rather than kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.dequantized(), None


LAYERS: dict[str, type[NF4Linear] | type[Int8Linear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def dequantize_once(model: nn.Module, keep: bool) -> None:
    """Keep the dequantised weight of every quantised layer of `model`, or let it go."""
    for layer in layers(model):
        if not keep:
            layer.keep_dequantized(None)
        elif layer.kept is None:
            layer.keep_dequantized(layer.new_buffer())
