"""A model that computes straight from disk: its matrices are read block by block whenever they are multiplied with.

transformers' own forward runs; only linear layers and embeddings are replaced. So a model, or a base model with the
factored deltas of adapters, can be evaluated in memory far smaller than itself, always in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.base_model import linear_modules, place, rebuild_buffers
from lora_engine.errors import BaseModelError
from lora_engine.exporting.deltas import Delta, ModuleDeltas
from lora_engine.exporting.tensors import Tensors
from lora_engine.quantized import LAYERS
from lora_engine.weights import some

_BLOCK_WEIGHTS = 4 << 20


class StreamedLinear(nn.Module):
    """``y = x · Wᵀ + bias + x · Dᵀ``, W on disk (out × in; a Conv1D's in × out).

    Attributes:
        positions: where set, rows of (batch, token) that are computed, and no others: y is (rows × out).
    """

    def __init__(
        self,
        layer: Any,
        name: str,
        tensors: Tensors,
        quantization: str,
        delta: Delta | None,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._transposed = isinstance(layer, Conv1D)
        self._shape = tuple(layer.weight.shape)
        self._name, self._tensors, self._quantization, self._delta = name, tensors, quantization, delta
        self._tell = tell
        self.bias = layer.bias  # on the meta device still; filled as every other small tensor is
        self.positions: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._tell is not None:
            self._tell(weight_bytes(*self._shape))
        if self.positions is not None:
            x = x[self.positions]
        flat = x.reshape(-1, x.shape[-1])
        y = self._product(flat) if self._quantization == "none" else flat @ self._dequantized().t()
        if self.bias is not None:
            y += self.bias
        if self._delta is not None:
            y += self._delta.product(flat)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, x: Tensor) -> Tensor:
        count, width = self._shape
        step = max(1, _BLOCK_WEIGHTS // width)
        y = x.new_zeros(len(x), width if self._transposed else count)
        for start in range(0, count, step):
            stop = min(start + step, count)
            block = self._tensors.rows(self._name, start, stop)
            if self._transposed:
                y += x[:, start:stop] @ block
            else:
                y[:, start:stop] = x @ block.t()
        return y

    def _dequantized(self) -> Tensor:
        return dequantized(self._whole, self._quantization)

    def _whole(self) -> Tensor:
        weight = self._tensors.rows(self._name, 0, self._shape[0])
        return weight.t().contiguous() if self._transposed else weight


def weight_bytes(outputs: int, inputs: int) -> int:
    """Of a weight in fp32."""
    return 4 * outputs * inputs


def dequantized(read: Callable[[], Tensor], quantization: str) -> Tensor:
    """What the engine computes with when it has quantised the weight that `read` returns (out × in): fp32.

    The weight is let go before the dequantised one takes its place.
    """
    return LAYERS[quantization](read(), None, torch.float32).dequantized()


def streamed(
    model: Any,
    tensors: Tensors,
    *,
    quantization: str = "none",
    deltas: ModuleDeltas | None = None,
    tell: Callable[[int], None] | None = None,
) -> Any:
    """`model`, a transformers causal language model on the meta device, made to compute from `tensors`.

    What is neither the weight of a linear layer nor an embedding is read into memory at once: norms and biases, but
    also experts that lie together in one tensor.

    Args:
        quantization: of every linear layer but the output head.
        deltas: added to the outputs of their modules.
        tell: called before each product with the bytes of its weight in fp32; what it raises ends the evaluation.

    Raises:
        BaseModelError: `tensors` does not fill the model.
    """
    ties = model.all_tied_weights_keys
    given = set() if deltas is None else set(deltas.modules)
    linear = linear_modules(model)
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    read = {f"{name}.weight" for name in (*(module.name for module in linear), *embeddings)} & _held(tensors, model)
    for module in linear:
        source = _source(f"{module.name}.weight", read, ties)
        if source is None and (module.name in given or (quantization != "none" and not module.head)):
            raise BaseModelError(f"{module.name}: its weight is not stored as one tensor, which an export needs")
        if source is not None:
            delta = deltas.delta(module.name) if deltas is not None and module.name in given else None
            layer, kind = model.get_submodule(module.name), "none" if module.head else quantization
            model.set_submodule(module.name, StreamedLinear(layer, source, tensors, kind, delta, tell))
    for name, embedding in embeddings.items():
        source = _source(f"{name}.weight", read, ties)
        if source is not None:
            _stream_embedding(embedding, source, tensors)
    for name, tensor in tensors.rest(read):
        path, _, leaf = name.rpartition(".")
        place(model.get_submodule(path), leaf, tensor)
    rebuild_buffers(model, torch.device("cpu"))
    empty = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and name.removesuffix(".weight") not in embeddings
    ]
    if empty:
        raise BaseModelError(f"tensors missing: {some(empty)}")
    return model.eval().requires_grad_(False)


def _held(tensors: Tensors, model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name in tensors}


def _source(name: str, held: set[str], ties: Any) -> str | None:
    """Under which name the tensor lies: its own, or that of one it is tied to."""
    tied = [ties.get(name), *(other for other, source in ties.items() if source == name)]
    return next((candidate for candidate in (name, *tied) if candidate in held), None)


def _stream_embedding(embedding: Any, name: str, tensors: Tensors) -> None:
    """Before each call the rows that it needs are read, and the ids replaced by their places among them."""

    def read(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, inverse = torch.unique(arguments[0], return_inverse=True)
        rows = torch.cat([tensors.rows(name, number, number + 1) for number in ids.tolist()])
        module.weight = nn.Parameter(rows, requires_grad=False)
        return (inverse, *arguments[1:])

    embedding.padding_idx = None  # an id among all, of which it has a few now
    embedding.register_forward_pre_hook(read)
