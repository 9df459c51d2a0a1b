"""The loss: negative log-likelihood of the target tokens, summed, so that a step divides once by all its targets.

The fast path's `Head` makes logits at the targets alone, a chunk at a time, and turns each chunk into its gradient at
once: logits never exist whole.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_engine import kernels
from lora_engine.blocks import RMSNorm
from lora_engine.data import MicroBatch
from lora_engine.layer import Rows
from lora_engine.packing import ROW_MULTIPLE, Pack
from lora_engine.product import Projection, Routing

# Of logits in the compute dtype at once: the head's weight is read anew for every chunk.
_CHUNK_BYTES = 32 << 20
# Rows whose softmax is computed at once, so that fp32 logits stay in the processor's cache.
_BLOCK_ROWS = {"cpu": 16, "cuda": 1024}


def summed_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Sum over the targets of -log p(target), a scalar in fp32.

    Logits exist at the targets alone. There is no attention mask: rows are padded on the right, and under causal
    attention no real token sees what lies to its right, so that padding changes nothing.
    """
    logits = model(input_ids=batch.ids, logits_to_keep=batch.predicts, use_cache=False).logits
    return functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


class Head:
    """Final norm, output head and loss of a decoder, on the predicting rows of a pack."""

    def __init__(self, norm: RMSNorm, projection: Projection, softcap: float | None) -> None:
        self._norm = norm
        self.projection = projection
        self._softcap = softcap

    @property
    def adapted(self) -> bool:
        return self.projection.adapted

    def loss(self, x: Tensor, rows: Rows) -> Tensor:
        """Summed loss of x (predicting rows × features, fp32)."""
        normed, _ = self._norm.forward(x, self.projection.dtype)
        total = torch.zeros((), device=x.device)
        for chunk, routing in self._chunks(normed, rows.target_routing):
            logits, _ = self.projection.forward(normed[chunk], routing)
            total += self._to_gradients(logits, rows, chunk, None)
        return total

    def gradients(self, x: Tensor, rows: Rows, divisor: float, *, needed: bool) -> tuple[Tensor, Tensor | None]:
        """Summed loss / divisor, and its gradient by x (fp32), where needed; the head's factors accumulate theirs."""
        normed, kept = self._norm.forward(x, self.projection.dtype)
        total = torch.zeros((), device=x.device)
        dnormed = torch.empty_like(normed) if needed else None
        for chunk, routing in self._chunks(normed, rows.target_routing):
            logits, hidden = self.projection.forward(normed[chunk], routing)
            total += self._to_gradients(logits, rows, chunk, divisor)
            dx, found = self.projection.backward(logits, normed[chunk], hidden, routing, dx_needed=needed)
            for gradients in found:
                gradients.accumulate()
            if dx is not None and dnormed is not None:
                dnormed[chunk] = dx
        return total / divisor, None if dnormed is None else self._norm.backward(dnormed, kept)

    def operations(self, pack: Pack, *, backward: bool, dx_needed: bool) -> int:
        """Multiplications and additions of the head's products."""
        return self.projection.operations(len(pack.predicts), backward=backward, dx_needed=dx_needed)

    def transient_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `gradients` holds at its widest."""
        rows, width = len(pack.predicts), self.projection.outputs
        chunk = min(rows * width * itemsize, _CHUNK_BYTES)
        block = 4 * min(rows, _BLOCK_ROWS.get(pack.ids.device.type, 1024)) * width
        return chunk + 2 * block + rows * self.projection.inputs * (2 * itemsize + 12)

    def _chunks(self, normed: Tensor, routing: Routing) -> Iterator[tuple[slice, Routing]]:
        size = max(1, _CHUNK_BYTES // (self.projection.outputs * normed.element_size()) // ROW_MULTIPLE) * ROW_MULTIPLE
        for start in range(0, len(normed), size):
            chunk = slice(start, start + size)
            yield chunk, Routing(keys=None if routing.keys is None else routing.keys[chunk])

    def _to_gradients(self, logits: Tensor, rows: Rows, chunk: slice, divisor: float | None) -> Tensor:
        """Summed loss of `logits` (rows × vocabulary), which become their gradient (by loss / divisor) in place."""
        targets, weights = rows.pack.targets[chunk, None], rows.pack.weights[chunk, None]
        if self._softcap is None and kernels.serve(logits.device, logits.dtype):
            losses = kernels.softmax_loss(logits, targets, None if divisor is None else weights / divisor)
            return (losses * weights[:, 0]).sum()
        total = torch.zeros((), device=logits.device)
        size = _BLOCK_ROWS.get(logits.device.type, 1024)
        for start in range(0, len(logits), size):
            block = slice(start, start + size)
            values, squashed = logits[block], None
            if self._softcap is not None:
                squashed = (values.float() / self._softcap).tanh_()
                values = squashed * self._softcap
            logs = torch.log_softmax(values, -1, dtype=torch.float32)
            total -= (logs.gather(1, targets[block]) * weights[block]).sum()
            if divisor is None:
                continue
            gradient = logs.exp_()
            gradient.scatter_add_(1, targets[block], torch.full_like(targets[block], -1, dtype=torch.float32))
            gradient *= weights[block] / divisor
            if squashed is not None:
                gradient *= 1 - squashed.square_()
            logits[block] = gradient
        return total
