"""The fast path: a dense decoder's loss and adapter gradients over a pack, with forward and backward written out.

The modules, weights and rotary frequencies are those of the transformers model; only the order of computation is ours:

- q, k and v are one product, and so are gate and up; normed inputs, scores and the MLP's activation are computed again
  in the backward pass, so that a layer keeps little more than the outputs of its products,
- below the lowest adapter nothing is kept and no gradient computed,
- the last layer computes queries, output projection and MLP for the rows that predict a target, and for no other,
- the lowest `recomputed` layers above that keep their input alone (with `offload`, in the host's memory) and run
  forward again when their gradient is due: the same operations, so the same bits.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.base_model import BaseModel
from lora_engine.blocks import ACTIVATIONS, RMSNorm
from lora_engine.dropout import row_keys
from lora_engine.layer import AttentionHalf, KeptAttention, KeptMLP, MLPHalf, Rows
from lora_engine.loss import Head
from lora_engine.packing import Pack
from lora_engine.product import Projection, Routing, Scratch

# model_type of the config → whether its norms add 1 to their weight.
_FAMILIES = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "phi3": False,
    "smollm3": False,
    "gemma2": True,
    "gemma3_text": True,
}
# Rotary frequencies that do not depend on the longest position of the batch.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


@dataclass(slots=True)
class Kept:
    """What a layer keeps for its backward pass; `input` alone (rows × features, fp32) where it is recomputed."""

    input: Tensor | None = None
    attention: KeptAttention | None = None
    mlp: KeptMLP | None = None


class DecoderLayer:
    """Both halves; `last` narrows the rows to the predicting ones on the way."""

    def __init__(
        self, layer: Any, config: Any, activation: str, *, norm_offset: bool, last: bool, scratch: Scratch
    ) -> None:
        self._attention = AttentionHalf(layer, config, norm_offset=norm_offset, last=last, scratch=scratch)
        self._mlp = MLPHalf(layer, activation, norm_offset=norm_offset, last=last, scratch=scratch)

    @property
    def adapted(self) -> bool:
        return self._attention.adapted or self._mlp.adapted

    @property
    def window(self) -> int | None:
        """So many tokens a query sees; None: all."""
        return self._attention.window

    @property
    def projections(self) -> list[Projection]:
        return [*self._attention.projections, *self._mlp.projections]

    def operations(self, pack: Pack, *, backward: bool, dx_needed: bool) -> int:
        """Multiplications and additions that the layer needs; those of a recomputation are not counted."""
        between = dx_needed or self._attention.adapted
        return self._mlp.operations(pack, backward=backward, dx_needed=between) + self._attention.operations(
            pack, backward=backward and between, dx_needed=dx_needed
        )

    def kept_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `forward` keeps for a pack."""
        return self._attention.kept_bytes(pack, itemsize) + self._mlp.kept_bytes(pack, itemsize)

    def transient_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `backward` holds at its widest, beside what is kept."""
        return max(self._attention.transient_bytes(pack, itemsize), self._mlp.transient_bytes(pack, itemsize))

    def forward(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Kept]:
        """The residual stream after the layer (x is changed in place), and all that the backward pass needs."""
        x, of_attention = self._attention.forward(x, rows, dtype)
        x, of_mlp = self._mlp.forward(x, rows, dtype)
        return x, Kept(attention=of_attention, mlp=of_mlp)

    def backward(self, gradient: Tensor, kept: Kept, rows: Rows, dtype: torch.dtype, *, needed: bool) -> Tensor | None:
        """Gradient of the layer's input (fp32), where needed, from that of its output; uses `kept` up."""
        if kept.input is not None:
            kept = self.forward(kept.input.to(gradient.device), rows, dtype)[1]
        assert kept.attention is not None and kept.mlp is not None  # noqa: S101, PT018 - for the type checker
        between = self._mlp.backward(gradient, kept.mlp, rows, needed=needed or self._attention.adapted)
        kept.mlp = None
        return None if between is None else self._attention.backward(between, kept.attention, rows, needed=needed)


class Decoder:
    """A base model of one of the dense families, with or without an adapter attached."""

    def __init__(self, base: BaseModel) -> None:
        model, config = base.model, base.model.config
        self._trunk = model.get_decoder()
        self._dtype = base.compute_dtype
        offset = _FAMILIES[config.model_type]
        scratch = Scratch(base.device, self._dtype)
        modules = self._trunk.layers
        self.layers = [
            DecoderLayer(
                module,
                config,
                _activation(config),
                norm_offset=offset,
                last=index == len(modules) - 1,
                scratch=scratch,
            )
            for index, module in enumerate(modules)
        ]
        self._head = Head(
            RMSNorm(self._trunk.norm, offset=offset),
            Projection([model.get_output_embeddings()]),
            getattr(config, "final_logit_softcapping", None),
        )
        adapted = [index for index, layer in enumerate(self.layers) if layer.adapted]
        self.lowest = adapted[0] if adapted else len(self.layers)
        self.recomputed = 0
        self.offload = False
        self.head_seconds = 0.0  # of the last call of `gradients`, where the host computes

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether this path computes what `model`, a transformers causal language model, computes."""
        config = model.config
        if config.model_type not in _FAMILIES or _activation(config) not in ACTIVATIONS:
            return False
        ropes = getattr(config, "rope_parameters", None) or {}
        nested = [value for value in ropes.values() if isinstance(value, dict)]
        types = {rope.get("rope_type", "default") for rope in nested or [ropes]}
        return types <= _ROPE_TYPES and not getattr(config, "use_bidirectional_attention", False)

    @property
    def projections(self) -> list[Projection]:
        """Of all layers, in order; the head is not among them."""
        return [projection for layer in self.layers for projection in layer.projections]

    @property
    def _all_projections(self) -> list[Projection]:
        return [*self.projections, self._head.projection]

    @contextmanager
    def shortened(self, depth: int) -> Iterator[None]:
        """Only the highest `depth` layers are there inside the context, and compute nothing meaningful."""
        layers, lowest = self.layers, self.lowest
        self.layers, self.lowest = layers[-depth:], max(0, lowest - max(0, len(layers) - depth))
        try:
            yield
        finally:
            self.layers, self.lowest = layers, lowest

    @torch.no_grad()
    def gradients(self, pack: Pack, divisor: float, dropout: tuple[int, int] | None = None) -> Tensor:
        """Accumulate the adapter's gradients of (summed loss / divisor); that loss, a scalar in fp32.

        `dropout` is (seed, step) of the masks; None switches them off.
        """
        rows = self._rows(pack, dropout)
        x = self._trunk.embed_tokens(pack.ids[None])[0].float()
        kept: dict[int, Kept] = {}
        for index, layer in enumerate(self.layers):
            recomputed = 0 <= index - self.lowest < self.recomputed
            own = Kept(input=x.to("cpu", copy=True) if self.offload else x.clone()) if recomputed else None
            x, found = layer.forward(x, rows, self._dtype)
            if index >= self.lowest:
                kept[index] = own or found
            del found
        started = time.perf_counter()
        loss, gradient = self._head.gradients(x, rows, divisor, needed=self.lowest < len(self.layers))
        self.head_seconds = time.perf_counter() - started
        for index in reversed(range(self.lowest, len(self.layers))):
            if gradient is None:
                break
            needed = index > self.lowest
            gradient = self.layers[index].backward(gradient, kept.pop(index), rows, self._dtype, needed=needed)
        return loss

    @torch.no_grad()
    def loss(self, pack: Pack) -> Tensor:
        """Summed loss of the targets without dropout, a scalar in fp32."""
        rows = self._rows(pack, None)
        x = self._trunk.embed_tokens(pack.ids[None])[0].float()
        for layer in self.layers:
            x, _ = layer.forward(x, rows, self._dtype)
        return self._head.loss(x, rows)

    def operations(self, pack: Pack) -> int:
        """Multiplications and additions that forward and backward need; recomputed ones are not counted."""
        total = self.head_operations(pack)
        for index, layer in enumerate(self.layers):
            total += layer.operations(pack, backward=index >= self.lowest, dx_needed=index > self.lowest)
        return total

    def head_operations(self, pack: Pack) -> int:
        """Those of `operations` that are the logits' and the loss'."""
        return self._head.operations(pack, backward=True, dx_needed=self.lowest < len(self.layers))

    @property
    def recompute_share(self) -> float:
        """Of the operations that are carried out, those of recomputed layers: a third of what each computes."""
        depth, adapted = len(self.layers), len(self.layers) - self.lowest
        return self.recomputed / (depth + adapted + self.recomputed)

    def needed_bytes(self, pack: Pack) -> int:
        """Of memory that `gradients` takes for a pack at its widest, beside the base model and the adapter."""
        item = self._dtype.itemsize
        stream: int = 4 * pack.rows * self._trunk.config.hidden_size
        kept = widest = 0
        for index, layer in enumerate(self.layers[self.lowest :]):
            own, transient = layer.kept_bytes(pack, item), layer.transient_bytes(pack, item)
            recomputed = index < self.recomputed
            kept += stream if recomputed and not self.offload else 0 if recomputed else own
            widest = max(widest, transient + (own if recomputed else 0))
        windows = len({layer.window for layer in self.layers})
        if pack.ids.device.type == "cpu" and item < 4:
            # oneDNN rearranges a weight for every product, and keeps the room of the largest.
            stream += item * max(projection.outputs * projection.inputs for projection in self._all_projections)
        return stream + kept + windows * pack.mask_bytes + max(widest, self._head.transient_bytes(pack, item))

    def _rows(self, pack: Pack, dropout: tuple[int, int] | None) -> Rows:
        keys = None if dropout is None else row_keys(*dropout, pack.examples, pack.positions)
        target_keys = None if keys is None else keys[pack.predicts]
        return Rows(pack, Routing(keys=keys), Routing(keys=target_keys), self._rotary(pack.positions))

    def _rotary(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        embedding, config = self._trunk.rotary_emb, self._trunk.config
        if config.model_type == "gemma3_text":
            types = set(config.layer_types)
            found = {name: embedding(like, positions[None], name) for name in types}
        else:
            found = {None: embedding(like, positions[None])}
        # Both halves of a head turn by the same angles.
        return {name: tuple(part[0, :, None, : part.shape[-1] // 2] for part in pair) for name, pair in found.items()}


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))
