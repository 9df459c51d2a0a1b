"""The halves of a decoder layer over the rows of a pack, attention and gated MLP, forward and backward written out.

Both halves add to the residual stream (fp32) in place. What they keep for the backward pass is in the compute dtype:
the normed input without its weight, the outputs of the products, and the hidden rows of the adapters.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine import attention
from lora_engine.attention import AttentionShape
from lora_engine.blocks import GatedActivation, Normed, RMSNorm, rotate
from lora_engine.packing import Pack
from lora_engine.product import FactorGradients, Projection, Routing, Scratch

_Hidden = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """A pack on its way through the layers.

    Attributes:
        routing: of all rows; `target_routing` of the predicting ones.
        rotary: by layer type (None where there is only one): cos and sin (rows, 1, pairs) in the compute dtype.
    """

    pack: Pack
    routing: Routing
    target_routing: Routing
    rotary: dict[str | None, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class KeptAttention:
    """What the backward pass of `AttentionHalf` needs."""

    normed: Normed
    q: Tensor
    k: Tensor
    v: Tensor
    head_norms: tuple[Normed, Normed] | None
    probabilities: tuple[Tensor | None, ...]
    attended: Tensor
    hidden: tuple[_Hidden, ...]
    hidden_out: _Hidden
    normed_out: Normed | None


@dataclass(slots=True)
class KeptMLP:
    """What the backward pass of `MLPHalf` needs."""

    normed: Normed
    gate_up: Tensor
    hidden: _Hidden
    hidden_down: _Hidden
    normed_out: Normed | None


class AttentionHalf:
    """Norm, q, k and v, rotary embedding, attention and output projection of a transformers decoder layer.

    With `last`, queries and everything after them are computed for the predicting rows alone.
    """

    def __init__(self, layer: Any, config: Any, *, norm_offset: bool, last: bool, scratch: Scratch) -> None:
        module = layer.self_attn
        self._last = last
        self._norm = RMSNorm(layer.input_layernorm, offset=norm_offset)
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        self._norm_out = RMSNorm(layer.post_attention_layernorm, offset=norm_offset) if sandwiched else None
        self._size = int(module.head_dim)
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._widths = [heads * self._size, key_heads * self._size, key_heads * self._size]
        # The layer's own names: one fused layer (Phi-3), or three.
        separate = [module.qkv_proj] if hasattr(module, "qkv_proj") else [module.q_proj, module.k_proj, module.v_proj]
        whole = Projection(separate, scratch)
        split = last and len(separate) == 3
        # Views of the weights that `whole` has put under one another.
        self._inner = [Projection(separate[:1], scratch), Projection(separate[1:], scratch)] if split else [whole]
        self._out = Projection([module.o_proj], scratch)
        self._head_norms = (
            (RMSNorm(module.q_norm, offset=norm_offset), RMSNorm(module.k_norm, offset=norm_offset))
            if hasattr(module, "q_norm")
            else None
        )
        everywhere = config.sliding_window if config.model_type in ("mistral", "phi3") else None
        self._shape = AttentionShape(
            scaling=module.scaling,
            softcap=getattr(module, "attn_logit_softcapping", None),
            window=getattr(module, "sliding_window", everywhere),
        )
        self._rotary = bool(getattr(module, "use_rope", True))
        self._layer_type: str | None = module.layer_type if config.model_type == "gemma3_text" else None

    @property
    def adapted(self) -> bool:
        return self._out.adapted or self._inner_adapted

    @property
    def window(self) -> int | None:
        return self._shape.window

    @property
    def _inner_adapted(self) -> bool:
        return any(projection.adapted for projection in self._inner)

    @property
    def projections(self) -> list[Projection]:
        return [*self._inner, self._out]

    def forward(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, KeptAttention]:
        """The residual stream after this half (x itself, or its predicting rows), and what to keep."""
        normed_x, normed = self._norm.forward(x, dtype)
        q, k, v, hidden = self._queries(normed_x, rows)
        head_norms = None
        if self._head_norms is not None:
            q, first = self._head_norms[0].forward(q, dtype)
            k, second = self._head_norms[1].forward(k, dtype)
            head_norms = first, second
            v = v.contiguous()  # so that the rest of the product it is a view of can go
        self._rotate(q, k, rows, 1)
        attended, kept = attention.forward(q, k, v, self._attention(rows), self._shape)
        attended = attended.flatten(1)
        y, hidden_out = self._out.forward(attended, self._routing(rows))
        normed_out = None
        if self._norm_out is not None:
            y, normed_out = self._norm_out.forward(y, dtype)
        residual = x[rows.pack.predicts] if self._last else x
        residual += y
        return residual, KeptAttention(normed, q, k, v, head_norms, kept, attended, hidden, hidden_out, normed_out)

    def backward(self, gradient: Tensor, kept: KeptAttention, rows: Rows, *, needed: bool) -> Tensor | None:
        """Gradient of x (fp32), where needed, from that of the result; the factors' gradients are accumulated."""
        dtype = kept.attended.dtype
        dy = gradient if kept.normed_out is None else self._norm_out.backward(gradient, kept.normed_out)  # type: ignore[union-attr]
        inner = needed or self._inner_adapted
        dattended, found = self._out.backward(
            dy.to(dtype), kept.attended, kept.hidden_out, self._routing(rows), dx_needed=inner
        )
        _accumulate(found)
        if dattended is None:
            return None
        dq, dk, dv = attention.backward(
            dattended.view(kept.q.shape),
            kept.attended.view(kept.q.shape),
            kept.q,
            kept.k,
            kept.v,
            kept.probabilities,
            self._attention(rows),
            self._shape,
        )
        self._rotate(dq, dk, rows, -1)
        if kept.head_norms is not None and self._head_norms is not None:
            dq, dk = (
                norm.backward(part, own).to(dtype)
                for norm, part, own in zip(self._head_norms, (dq, dk), kept.head_norms, strict=True)
            )
        dx = self._backward_inner(dq, dk, dv, kept, rows, needed=needed)
        if dx is None:
            return None
        if self._last:
            return self._norm.backward(dx, kept.normed).index_add_(0, rows.pack.predicts, gradient)
        return self._norm.backward(dx, kept.normed, gradient)

    def operations(self, pack: Pack, *, backward: bool, dx_needed: bool) -> int:
        """Multiplications and additions of this half."""
        rows = len(pack.predicts) if self._last else pack.rows
        counts = [rows, pack.rows] if len(self._inner) == 2 else [pack.rows]
        inner = dx_needed or self._inner_adapted
        total = self._out.operations(rows, backward=backward, dx_needed=inner)
        for projection, count in zip(self._inner, counts, strict=True):
            total += projection.operations(count, backward=backward, dx_needed=dx_needed)
        # Scores and attended values; the gradients of q, k, v and of the probabilities.
        scores = pack.target_scores if self._last else pack.scores
        return total + scores * self._widths[0] * (12 if backward and inner else 4)

    def kept_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `forward` keeps, without views of others."""
        rows, queries = pack.rows, len(pack.predicts) if self._last else pack.rows
        q, k, v = self._widths
        size = itemsize * rows * (self._out.outputs + k + v) + 4 * rows
        size += itemsize * queries * 2 * q  # q and the attended values
        if self._last and len(self._inner) == 1 and self._head_norms is None:
            size += itemsize * rows * q  # k and v are views of a product that holds all queries
        if self._head_norms is not None:
            size += itemsize * (queries * q + rows * k) + 4 * (queries * q + rows * k) // self._size
        if self._norm_out is not None:
            size += (itemsize * self._out.outputs + 4) * queries
        counts = [queries, rows] if len(self._inner) == 2 else [rows]
        ranks = sum(count * projection.ranks for projection, count in zip(self._inner, counts, strict=True))
        size += itemsize * (ranks + queries * self._out.ranks)
        groups = (pack.target_attention if self._last else pack.attention).groups
        if attention.fused(pack.ids.device, self._out.dtype, self._shape):
            return size + 4 * queries * q // self._size
        kept = sum(group.scores for group in groups if attention.keeps_probabilities(group, self._shape))
        return size + itemsize * kept * q // self._size

    def transient_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `backward` holds at its widest, beside what is kept."""
        q, k, v = self._widths
        groups = (pack.target_attention if self._last else pack.attention).groups
        scores = max(group.scores for group in groups) * q // self._size
        rows, width = pack.rows, self._out.outputs
        # Gradients of q, k and v and their sum in fp32.
        size = rows * (itemsize * (2 * q + 2 * (k + v) + width) + 4 * (k + v) + 8 * width)
        if attention.fused(pack.ids.device, self._out.dtype, self._shape):
            return size + max(4 * group.keys.numel() * (k + v) for group in groups)
        # Probabilities, their gradient and that of the scores.
        return size + scores * (12 + 2 * itemsize)

    def _queries(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, tuple[_Hidden, ...]]:
        """q (query rows, heads, head size), k and v (rows, key heads, head size), and the adapters' hidden rows."""
        hidden: tuple[_Hidden, ...]
        if len(self._inner) == 2:
            q, hidden_q = self._inner[0].forward(x[rows.pack.predicts], rows.target_routing)
            kv, hidden_kv = self._inner[1].forward(x, rows.routing)
            parts = [q, *kv.split(self._widths[1:], 1)]
            hidden = hidden_q, hidden_kv
        else:
            y, own = self._inner[0].forward(x, rows.routing)
            parts = list(y.split(self._widths, 1))
            hidden = (own,)
            if self._last:
                parts[0] = parts[0][rows.pack.predicts]
        q, k, v = (part.unflatten(1, (-1, self._size)) for part in parts)
        return q, k, v, hidden

    def _backward_inner(
        self, dq: Tensor, dk: Tensor, dv: Tensor, kept: KeptAttention, rows: Rows, *, needed: bool
    ) -> Tensor | None:
        x = self._norm.scaled(kept.normed.unit)
        predicts = rows.pack.predicts
        if len(self._inner) == 2:
            dkv = torch.cat([dk.flatten(1), dv.flatten(1)], 1)
            dx, found = self._inner[1].backward(dkv, x, kept.hidden[1], rows.routing, dx_needed=needed)
            _accumulate(found)
            dxq, found = self._inner[0].backward(
                dq.flatten(1), x[predicts], kept.hidden[0], rows.target_routing, dx_needed=needed
            )
            _accumulate(found)
            return dx.index_add_(0, predicts, dxq) if dx is not None and dxq is not None else None
        if self._last:
            dq = torch.zeros(len(x), *dq.shape[1:], dtype=dq.dtype, device=dq.device).index_add_(0, predicts, dq)
        dy = torch.cat([dq.flatten(1), dk.flatten(1), dv.flatten(1)], 1)
        dx, found = self._inner[0].backward(dy, x, kept.hidden[0], rows.routing, dx_needed=needed)
        _accumulate(found)
        return dx

    def _rotate(self, q: Tensor, k: Tensor, rows: Rows, direction: int) -> None:
        if not self._rotary:
            return
        cos, sin = rows.rotary[self._layer_type]
        rotate(k, cos, sin, direction)
        if self._last:
            cos, sin = cos[rows.pack.predicts], sin[rows.pack.predicts]
        rotate(q, cos, sin, direction)

    def _attention(self, rows: Rows) -> Any:
        return rows.pack.target_attention if self._last else rows.pack.attention

    def _routing(self, rows: Rows) -> Routing:
        return rows.target_routing if self._last else rows.routing


class MLPHalf:
    """Norm, gate and up, activation, and down projection of a transformers decoder layer."""

    def __init__(self, layer: Any, activation: str, *, norm_offset: bool, last: bool, scratch: Scratch) -> None:
        module = layer.mlp
        self._last = last
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        before = layer.pre_feedforward_layernorm if sandwiched else layer.post_attention_layernorm
        self._norm = RMSNorm(before, offset=norm_offset)
        self._norm_out = RMSNorm(layer.post_feedforward_layernorm, offset=norm_offset) if sandwiched else None
        fused = hasattr(module, "gate_up_proj")
        self._gate_up = Projection([module.gate_up_proj] if fused else [module.gate_proj, module.up_proj], scratch)
        self._down = Projection([module.down_proj], scratch)
        self._activation = GatedActivation(activation)

    @property
    def adapted(self) -> bool:
        return self._gate_up.adapted or self._down.adapted

    @property
    def projections(self) -> list[Projection]:
        return [self._gate_up, self._down]

    def forward(self, x: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, KeptMLP]:
        """The residual stream after this half, which is x itself, and what to keep."""
        normed_x, normed = self._norm.forward(x, dtype)
        gate_up, hidden = self._gate_up.forward(normed_x, self._routing(rows))
        y, hidden_down = self._down.forward(self._activation.forward(gate_up), self._routing(rows))
        normed_out = None
        if self._norm_out is not None:
            y, normed_out = self._norm_out.forward(y, dtype)
        x += y
        return x, KeptMLP(normed, gate_up, hidden, hidden_down, normed_out)

    def backward(self, gradient: Tensor, kept: KeptMLP, rows: Rows, *, needed: bool) -> Tensor | None:
        """Gradient of x (fp32), where needed, from that of the result; the factors' gradients are accumulated."""
        dtype = kept.gate_up.dtype
        dy = gradient if kept.normed_out is None else self._norm_out.backward(gradient, kept.normed_out)  # type: ignore[union-attr]
        inner = needed or self._gate_up.adapted
        product = self._activation.forward(kept.gate_up)
        dproduct, found = self._down.backward(
            dy.to(dtype), product, kept.hidden_down, self._routing(rows), dx_needed=inner
        )
        _accumulate(found)
        if dproduct is None:
            return None
        dgate_up = self._activation.backward(dproduct, kept.gate_up)
        x = self._norm.scaled(kept.normed.unit)
        dx, found = self._gate_up.backward(dgate_up, x, kept.hidden, self._routing(rows), dx_needed=needed)
        _accumulate(found)
        return None if dx is None else self._norm.backward(dx, kept.normed, gradient)

    def operations(self, pack: Pack, *, backward: bool, dx_needed: bool) -> int:
        """Multiplications and additions of this half."""
        rows = len(pack.predicts) if self._last else pack.rows
        inner = dx_needed or self._gate_up.adapted
        return self._gate_up.operations(rows, backward=backward, dx_needed=dx_needed) + self._down.operations(
            rows, backward=backward, dx_needed=inner
        )

    def kept_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `forward` keeps."""
        rows, width = len(pack.predicts) if self._last else pack.rows, self._down.outputs
        size = rows * (itemsize * (width + self._gate_up.outputs + self._gate_up.ranks + self._down.ranks) + 4)
        return size + (0 if self._norm_out is None else rows * (itemsize * width + 4))

    def transient_bytes(self, pack: Pack, itemsize: int) -> int:
        """Of what `backward` holds at its widest, beside what is kept."""
        rows, width = len(pack.predicts) if self._last else pack.rows, self._down.outputs
        # Activation, product, its gradient and that of gate and up; gradient and normed input of the residual stream.
        return rows * (itemsize * (3 * self._gate_up.outputs + 2 * width) + 8 * width)

    def _routing(self, rows: Rows) -> Routing:
        return rows.target_routing if self._last else rows.routing


def _accumulate(found: list[FactorGradients]) -> None:
    for gradients in found:
        gradients.accumulate()
