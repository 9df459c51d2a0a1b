"""The two ways in which documents pass through a model, with the same numbers.

`PackedPass` is the fast one, for the dense decoders that `Decoder` knows. `PaddedPass` runs transformers' own forward
over rows padded on the right, and leaves the backward pass to autograd: it does for every causal language model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from lora_engine import data, packing
from lora_engine.base_model import BaseModel, linear_modules
from lora_engine.data import Document, MicroBatch
from lora_engine.decoder import Decoder
from lora_engine.dropout import row_keys
from lora_engine.lora import Adapted
from lora_engine.loss import summed_loss
from lora_engine.packing import Pack


class Batch(Protocol):
    """A micro-batch on the device. `rows` are computed; `tokens` are the documents', `trained_tokens` of them targets."""

    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...


class Pass(Protocol):
    """How an adapted base model is run. `dropout` is (seed, step) of the masks; None switches dropout off."""

    recomputed: int

    def batches(self, documents: Sequence[Document], max_tokens: int) -> Iterator[Any]:
        """Micro-batches of at most `max_tokens` rows, but for a longer single document."""

    def gradients(self, batch: Any, divisor: float, dropout: tuple[int, int] | None) -> float:
        """Accumulate the adapter's gradients of (summed loss / divisor); that loss."""

    def loss(self, batch: Any) -> float:
        """Summed loss of a micro-batch."""

    def operations(self, batch: Any) -> int:
        """Multiplications and additions that forward and backward need, recomputation not counted."""


class PackedPass:
    """Documents side by side through `Decoder`."""

    def __init__(self, adapted: Adapted) -> None:
        self._device = adapted.base.device
        # With dropout, each document's prompt has masks of its own.
        self._share = not adapted.config.dropout
        self.decoder = Decoder(adapted.base)
        self._trainable = adapted.parameters.numel()

    @property
    def recomputed(self) -> int:
        return self.decoder.recomputed

    @recomputed.setter
    def recomputed(self, layers: int) -> None:
        self.decoder.recomputed = layers

    def batches(self, documents: Sequence[Document], max_tokens: int) -> Iterator[Pack]:
        return packing.packs(documents, max_tokens, self._device, share=self._share)

    def gradients(self, batch: Pack, divisor: float, dropout: tuple[int, int] | None) -> float:
        return float(self.decoder.gradients(batch, divisor, dropout))

    def loss(self, batch: Pack) -> float:
        return float(self.decoder.loss(batch))

    def operations(self, batch: Pack) -> int:
        return self.decoder.operations(batch)


class PaddedPass:
    """Documents of like length under one another through transformers' own forward."""

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._model: Any = adapted.base.model
        modules = linear_modules(self._model)
        self._weights = sum(module.inputs * module.outputs for module in modules)
        # transformers keeps every activation; there is nothing to recompute here.
        self.recomputed = 0

    def batches(self, documents: Sequence[Document], max_tokens: int) -> Iterator[MicroBatch]:
        return data.micro_batches(documents, max_tokens, self._adapted.base.device)

    def gradients(self, batch: MicroBatch, divisor: float, dropout: tuple[int, int] | None) -> float:
        self._route(batch, dropout)
        loss = summed_loss(self._model, batch) / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def loss(self, batch: MicroBatch) -> float:
        self._route(batch, None)
        return float(summed_loss(self._model, batch))

    def operations(self, batch: MicroBatch) -> int:
        return batch.tokens * (4 * self._weights + 6 * self._adapted.parameters.numel())

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
