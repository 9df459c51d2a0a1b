"""The two ways in which documents pass through a model, with the same numbers.

`PackedPass` is the fast one, for the dense decoders that `Decoder` knows. `PaddedPass` runs transformers' own forward
over rows padded on the right, and leaves the backward pass to autograd: it does for every causal language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from lora_engine import data, packing, quantized
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.data import Document, MicroBatch
from lora_engine.decoder import Decoder
from lora_engine.dropout import row_keys
from lora_engine.lora import Adapted
from lora_engine.loss import summed_loss
from lora_engine.packing import Pack

# Activations that transformers keeps, per byte of the linear layers' outputs: norms, residuals and attention on top.
_ACTIVATION_FACTOR = 1.3
# Layers that show what all of them cost, of at least so many times as many.
_SAMPLE_LAYERS, _SAMPLED_FROM = 4, 3


class Batch(Protocol):
    """A micro-batch: `rows` that are computed, `tokens` of its documents, `trained_tokens` of them targets."""

    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...


class Pass(Protocol):
    """How an adapted base model is run. `dropout` is (seed, step) of the masks; None switches dropout off."""

    # Whether documents are packed, dropout is on, and how many decoder layers can be recomputed.
    packed: bool
    drops: bool
    layers: int
    # See `plan.Choice`.
    recomputed: int
    offload: bool

    def batches(self, documents: Sequence[Document], max_tokens: int, *, share: bool = True) -> Iterator[Any]:
        """Micro-batches of at most `max_tokens` rows, but for a longer single document.

        Where documents can share the rows of their beginnings, `share` lets them.
        """

    def gradients(self, batch: Any, divisor: float, dropout: tuple[int, int] | None) -> float:
        """Accumulate the adapter's gradients of (summed loss / divisor); that loss."""

    def loss(self, batch: Any) -> float:
        """Summed loss of a micro-batch."""

    def operations(self, batch: Any) -> int:
        """Multiplications and additions that forward and backward need, recomputation not counted."""

    @property
    def recompute_share(self) -> float:
        """Of the operations that are carried out, those of layers that run forward a second time."""

    def needed_bytes(self, batch: Any) -> int:
        """Of memory that `gradients` takes at its widest, beside the base model and the adapter."""

    def sample(self) -> AbstractContextManager[None]:
        """Inside the context a pass goes through a few layers that are like all others, if there are many.

        `gradients` then computes nothing meaningful; `operations` and `needed_bytes` are those of these layers.
        """

    @property
    def head_seconds(self) -> float:
        """Of the last call of `gradients`, the time of what does not depend on the number of layers."""

    def head_operations(self, batch: Any) -> int:
        """Of `operations`, those that were made in that time."""

    def dequantized_bytes(self, *, keep: bool) -> int:
        """What `keep_dequantized` would add to the loaded base model, and what a pass needs where it does not."""

    def keep_dequantized(self, keep: bool) -> None:
        """Keep the dequantised weights of quantised layers, or let them go again."""


class PackedPass:
    """Documents side by side through `Decoder`."""

    packed = True

    def __init__(self, adapted: Adapted) -> None:
        self._device = adapted.base.device
        # With dropout, each document's prompt has masks of its own, so that none is shared.
        self.drops = adapted.config.dropout > 0
        self.decoder = Decoder(adapted.base)
        self.layers = len(self.decoder.layers) - self.decoder.lowest

    @property
    def recomputed(self) -> int:
        return self.decoder.recomputed

    @recomputed.setter
    def recomputed(self, layers: int) -> None:
        self.decoder.recomputed = layers

    @property
    def offload(self) -> bool:
        return self.decoder.offload

    @offload.setter
    def offload(self, offload: bool) -> None:
        self.decoder.offload = offload

    @property
    def recompute_share(self) -> float:
        return self.decoder.recompute_share

    def needed_bytes(self, batch: Pack) -> int:
        return self.decoder.needed_bytes(batch)

    def sample(self) -> AbstractContextManager[None]:
        many = len(self.decoder.layers) >= _SAMPLED_FROM * _SAMPLE_LAYERS
        alike = many and not self.recomputed and self._device.type == "cpu"
        return self.decoder.shortened(_SAMPLE_LAYERS) if alike else nullcontext()

    @property
    def head_seconds(self) -> float:
        return self.decoder.head_seconds

    def head_operations(self, batch: Pack) -> int:
        return self.decoder.head_operations(batch)

    def dequantized_bytes(self, *, keep: bool) -> int:
        projections = self.decoder.projections
        sizes = [projection.dequantized_bytes for projection in projections]
        return sum(sizes) - sum(projection.packed_bytes for projection in projections) if keep else max(sizes)

    def keep_dequantized(self, keep: bool) -> None:
        for projection in self.decoder.projections:
            projection.keep_dequantized(keep)

    def batches(self, documents: Sequence[Document], max_tokens: int, *, share: bool = True) -> Iterator[Pack]:
        return packing.packs(documents, max_tokens, self._device, share=share and not self.drops)

    def gradients(self, batch: Pack, divisor: float, dropout: tuple[int, int] | None) -> float:
        try:
            return float(self.decoder.gradients(batch, divisor, dropout))
        finally:
            batch.forget()

    def loss(self, batch: Pack) -> float:
        try:
            return float(self.decoder.loss(batch))
        finally:
            batch.forget()

    def operations(self, batch: Pack) -> int:
        return self.decoder.operations(batch)


class PaddedPass:
    """Documents of like length under one another through transformers' own forward."""

    packed = False
    # transformers keeps every activation: there is nothing to recompute or to offload.
    layers = recomputed = 0
    offload = False
    recompute_share = head_seconds = 0.0

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._model: Any = adapted.base.model
        self._modules = linear_modules(self._model)
        self.drops = adapted.config.dropout > 0

    def needed_bytes(self, batch: MicroBatch) -> int:
        item = self._adapted.base.compute_dtype.itemsize
        activations = _ACTIVATION_FACTOR * item * sum(module.outputs for module in self._modules if not module.head)
        # Logits in the compute dtype, in fp32, and their gradients in both.
        logits = sum(module.outputs for module in self._modules if module.head) * 2 * (item + 4)
        return int(batch.rows * activations + batch.trained_tokens * logits)

    def sample(self) -> AbstractContextManager[None]:
        return nullcontext()

    def head_operations(self, batch: MicroBatch) -> int:  # noqa: ARG002 - its layers and head are timed together
        return 0

    def dequantized_bytes(self, *, keep: bool) -> int:
        layers = list(quantized.layers(self._model))
        sizes = [layer.out_features * layer.in_features * layer.compute_dtype.itemsize for layer in layers]
        return sum(sizes) - sum(layer.packed.nbytes for layer in layers) if keep else max(sizes, default=0)

    def keep_dequantized(self, keep: bool) -> None:
        quantized.dequantize_once(self._model, keep)

    def batches(self, documents: Sequence[Document], max_tokens: int, *, share: bool = True) -> Iterator[MicroBatch]:  # noqa: ARG002
        return data.micro_batches(documents, max_tokens, self._adapted.base.device)

    def gradients(self, batch: MicroBatch, divisor: float, dropout: tuple[int, int] | None) -> float:
        self._route(batch, dropout)
        loss = summed_loss(self._model, batch) / divisor
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def loss(self, batch: MicroBatch) -> float:
        self._route(batch, None)
        return float(summed_loss(self._model, batch))

    def operations(self, batch: MicroBatch) -> int:
        trunk, head = (
            sum(module.inputs * module.outputs for module in self._modules if module.head == is_head)
            for is_head in (False, True)
        )
        adapter = 6 * batch.tokens * self._adapted.parameters.numel()
        return 4 * (batch.tokens * trunk + batch.trained_tokens * head) + adapter

    def _route(self, batch: MicroBatch, dropout: tuple[int, int] | None) -> None:
        """Tell the adapted layers which token each of their rows is, for dropout."""
        keys = predicting = None
        if dropout is not None:
            count, length = batch.ids.shape
            positions = torch.arange(length, device=batch.ids.device).repeat(count)
            keys = row_keys(*dropout, batch.examples.repeat_interleave(length), positions)
            predicting = keys[batch.predicts.flatten()]
        self._adapted.routing.keys, self._adapted.head_routing.keys = keys, predicting


def choose(adapted: Adapted) -> Pass:
    """The fast way where the base model allows it."""
    base: BaseModel = adapted.base
    return PackedPass(adapted) if Decoder.supports(base.model) else PaddedPass(adapted)
