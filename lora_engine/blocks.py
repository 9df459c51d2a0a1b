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

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Normed]:
        """Result in `dtype`, like x in shape; x may be fp32 or of that type."""
        x = x.float()
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1 / x.shape[-1]).add_(self._eps).rsqrt_()
        unit = (x * inverse).to(dtype)
        return self.scaled(unit), Normed(unit, inverse)

    def scaled(self, unit: Tensor) -> Tensor:
        """The result, from what was kept."""
        scaled: Tensor = unit * self._weight
        return scaled.to(unit.dtype)

    def backward(self, dy: Tensor, kept: Normed) -> Tensor:
        """dx, fp32."""
        dunit: Tensor = dy.float() * self._weight
        unit = kept.unit.float()
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1).mul_(kept.inverse)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding (arXiv 2104.09864) in place: x (rows, heads, head size), cos and sin (rows, 1, pairs).

    Feature i is paired with feature i + pairs; features beyond the pairs stay as they are. With -sin it is the
    backward pass.
    """
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function and its gradient: `backward(dy, x)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu_backward(approximate: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _gelu(approximate: str) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.gelu(x, approximate=approximate)


_TANH_GELU = Activation(_gelu("tanh"), _gelu_backward("tanh"))
# By the name that transformers' configs give them.
ACTIVATIONS = {
    "silu": Activation(functional.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(_gelu("none"), _gelu_backward("none")),
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,
}
