"""The pieces between a decoder's matrix products, each with its backward pass written out.

The residual stream and everything that is summed over features is in fp32; what is kept for the backward pass is in
the compute dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_engine import kernels


@dataclass(frozen=True, slots=True)
class Normed:
    """What the backward pass of a norm needs: x / rms(x) in the compute dtype, and 1 / rms(x) (fp32, …, 1)."""

    unit: Tensor
    inverse: Tensor


class RMSNorm:
    """``weight · x / √(mean(x²) + eps)`` over the last dimension (arXiv 1910.07467); Gemma's adds 1 to the weight."""

    def __init__(self, module: Any, *, offset: bool) -> None:
        eps = getattr(module, "variance_epsilon", None)
        self._eps = float(module.eps if eps is None else eps)
        weight = module.weight.detach()
        self._weight = 1 + weight.float() if offset else weight
        self._wide_weight = self._weight.float().contiguous()

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Normed]:
        """Result in `dtype`, like x in shape; x may be fp32 or of that type."""
        x = x.float()
        if kernels.serve(x.device, dtype):
            result, unit, inverse = kernels.norm_forward(x, self._wide_weight, self._eps, dtype)
            return result, Normed(unit, inverse)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1 / x.shape[-1]).add_(self._eps).rsqrt_()
        unit = (x * inverse).to(dtype)
        return self.scaled(unit), Normed(unit, inverse)

    def scaled(self, unit: Tensor) -> Tensor:
        """The result, from what was kept."""
        scaled: Tensor = unit * self._weight
        return scaled.to(unit.dtype)

    def backward(self, dy: Tensor, kept: Normed, added: Tensor | None = None) -> Tensor:
        """dx, fp32; plus `added`, which has its shape."""
        if dy.dtype == kept.unit.dtype and kernels.serve(dy.device, dy.dtype):
            return kernels.norm_backward(dy, kept.unit, kept.inverse, self._wide_weight, added)
        dunit: Tensor = dy.float() * self._weight
        unit = kept.unit.float()
        along = (dunit * unit).mean(-1, keepdim=True)
        dx = dunit.addcmul_(unit, along, value=-1).mul_(kept.inverse)
        return dx if added is None else dx.add_(added)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> None:
    """Rotary embedding (arXiv 2104.09864) in place: x (rows, heads, head size), cos and sin (rows, 1, pairs).

    Feature i is paired with feature i + pairs; features beyond the pairs stay as they are. Direction -1 is the
    backward pass.
    """
    if kernels.serve(x.device, x.dtype):
        kernels.rotate(x, cos, sin, direction)
        return
    sin = sin * direction
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


class GatedActivation:
    """``activation(gate) · up`` of rows that hold gate and up side by side (arXiv 2002.05202)."""

    def __init__(self, name: str) -> None:
        self._silu = name == "silu"
        self._forward, self._backward = ACTIVATIONS[name]

    def forward(self, gate_up: Tensor) -> Tensor:
        """(rows × width) of gate_up (rows × 2 width)."""
        if self._silu and kernels.serve(gate_up.device, gate_up.dtype):
            return kernels.silu_product(gate_up)
        gate, up = gate_up.chunk(2, 1)
        return self._forward(gate).mul_(up)

    def backward(self, upstream: Tensor, gate_up: Tensor) -> Tensor:
        """Gradient of gate_up from that of the result, which is used up."""
        if self._silu and kernels.serve(gate_up.device, gate_up.dtype):
            return kernels.silu_product_backward(upstream, gate_up)
        gate, up = gate_up.chunk(2, 1)
        gradient = torch.empty_like(gate_up)
        dgate, dup = gradient.chunk(2, 1)
        torch.mul(upstream, self._forward(gate), out=dup)
        dgate.copy_(self._backward(upstream.mul_(up), gate))
        return gradient


_Forward = Callable[[Tensor], Tensor]
_Backward = Callable[[Tensor, Tensor], Tensor]


def _gelu_backward(approximate: str) -> _Backward:
    return lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _gelu(approximate: str) -> _Forward:
    return lambda x: functional.gelu(x, approximate=approximate)


_TANH_GELU = (_gelu("tanh"), _gelu_backward("tanh"))
# An elementwise function and its gradient (dy, x), by the name that transformers' configs give it.
ACTIVATIONS: dict[str, tuple[_Forward, _Backward]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (_gelu("none"), _gelu_backward("none")),
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,
}
