"""Linear layers whose frozen weight is kept in 4 bit: NF4 with double quantisation (QLoRA, arXiv 2305.14314).

The format and the kernels are bitsandbytes'; the module and its gradient are ours. Its own `Linear4bit` repacks the
weight at the first evaluation on some CPUs, after which gradients are silently wrong.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 64


class NF4Linear(nn.Module):
    """``y = x · dequantised(W)ᵀ + bias``, W frozen (out × in).

    `dequantize_once` keeps the dequantised weight beside the 4 bit: the same numbers without the cost per step.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """Quantises `weight` (out × in, any float type) on the device it lies on."""
        # Imported here: it takes seconds, and a job without quantisation does not need it.
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, self.state = quantize_4bit(weight.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.state.dtype = compute_dtype
        self.packed: Tensor
        self.register_buffer("packed", packed, persistent=False)
        self.bias = bias
        self._dequantized: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The dequantised weight (out × in) in the compute dtype."""
        from bitsandbytes.functional import dequantize_4bit

        if self._dequantized is not None:
            return self._dequantized
        result: Tensor = dequantize_4bit(self.packed, self.state)
        return result

    def keep_dequantized(self, keep: bool) -> None:
        self._dequantized = self.dequantized() if keep else None

    def forward(self, x: Tensor) -> Tensor:
        if self._dequantized is not None:
            return functional.linear(x, self._dequantized, self.bias)
        result: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _FrozenProduct(torch.autograd.Function):
    """The product with a gradient for x alone; the weight is dequantised anew rather than kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.dequantized(), None


def layers(model: nn.Module) -> Iterator[NF4Linear]:
    return (module for module in model.modules() if isinstance(module, NF4Linear))


def dequantize_once(model: nn.Module, keep: bool) -> None:
    """Keep the dequantised weight of every NF4 layer of `model`, or let it go."""
    for layer in layers(model):
        layer.keep_dequantized(keep)
