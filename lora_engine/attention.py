"""Attention among the rows of a pack, forward and backward: by kernels where there are any, else by batched products.

Scores and their softmax are in fp32 whatever the compute dtype. The kernels keep the logarithm of each softmax's
denominator and compute the probabilities anew (arXiv 2205.14135). The products keep the probabilities for the backward
pass, in the compute dtype, where documents are short; where they would outgrow everything else they are computed anew.
Grouped-query attention: each key head serves `heads / key heads` query heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine import kernels
from lora_engine.packing import Attention, AttentionGroup

# Beyond so many keys, a row's probabilities would take more than what its layer keeps otherwise.
_KEPT_KEYS = 256


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the scores of a layer depend on.

    Attributes:
        scaling: of the scores.
        softcap: scores are squashed into (-softcap, softcap) by tanh (Gemma 2, arXiv 2408.00118); None: they are not.
        window: a query sees so many tokens up to and with itself; None: all.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


def forward(
    q: Tensor, k: Tensor, v: Tensor, attention: Attention, shape: AttentionShape
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Attended values, like q (query rows, heads, head size), and what to keep; k and v are (rows, key heads, …)."""
    if fused(q.device, q.dtype, shape):
        attended, logs = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
        for group in attention.groups:
            kernels.attend(q, k, v, group, shape.scaling, shape.window, attended, logs)
        return attended, (logs,)
    results, kept = [], []
    for group in attention.groups:
        queries, keys, values = _gathered(q, k, v, group)
        probabilities, _ = _probabilities(queries, keys, group, shape)
        rounded = probabilities.to(v.dtype)
        results.append(torch.bmm(rounded, values))
        kept.append(rounded if keeps_probabilities(group, shape) else None)
    return _by_row(results, attention, q), tuple(kept)


def fused(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> bool:
    """Whether kernels compute the attention of such tensors."""
    return shape.softcap is None and kernels.serve(device, dtype)


def keeps_probabilities(group: AttentionGroup, shape: AttentionShape) -> bool:
    """Whether the backward pass of this group finds its probabilities kept."""
    return group.keys.shape[1] <= _KEPT_KEYS and shape.softcap is None


def backward(
    gradient: Tensor,
    attended: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Sequence[Tensor | None],
    attention: Attention,
    shape: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of what `forward` returned, like them in shape and type."""
    dk, dv = (torch.zeros(tensor.shape, device=k.device) for tensor in (k, v))
    if fused(q.device, q.dtype, shape):
        (logs,) = kept
        dq = torch.empty(q.shape, dtype=q.dtype)
        assert logs is not None  # noqa: S101 - for the type checker
        for group in attention.groups:
            found = (dq, dk, dv)
            kernels.attend_backward(gradient, q, k, v, attended, logs, group, shape.scaling, shape.window, found)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    dqs = []
    for group, rounded in zip(attention.groups, kept, strict=True):
        queries, keys, values = _gathered(q, k, v, group)
        squashed = None
        if rounded is None:
            probabilities, squashed = _probabilities(queries, keys, group, shape)
            rounded = probabilities.to(v.dtype)
        upstream = _by_key_head(gradient, group.queries, k.shape[1])
        group.clear_padded(upstream.view(len(group.queries), -1, group.queries.shape[1], upstream.shape[-1]))
        _add_by_key(dv, torch.bmm(rounded.mT, upstream), group)
        dp = torch.bmm(upstream, values.mT)
        ds = torch._softmax_backward_data(dp.float(), rounded.float(), -1, torch.float32)
        if squashed is not None:
            ds *= 1 - squashed.square_()
        ds = ds.mul_(shape.scaling).to(q.dtype)
        _add_by_key(dk, torch.bmm(ds.mT, queries), group)
        dqs.append(torch.bmm(ds, keys))
    return _by_row(dqs, attention, q), dk.to(k.dtype), dv.to(v.dtype)


def _gathered(q: Tensor, k: Tensor, v: Tensor, group: AttentionGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (segments · key heads, heads of each · queries, head size); keys and values (…, keys, head size)."""
    heads = k.shape[1]
    keys, values = (_by_key_head(part, group.keys, heads) for part in (k, v))
    return _by_key_head(q, group.queries, heads), keys, values


def _by_key_head(rows: Tensor, chosen: Tensor, key_heads: int) -> Tensor:
    """(segments · key heads, heads of each · chosen, head size) of (rows, heads, head size), in one gather.

    Heads lie head size apart, and rows a multiple of it: also where `rows` is a part of a wider product.
    """
    segments, length = chosen.shape
    heads, size = rows.shape[1:]
    apart = rows.stride(0) // size
    flat = rows.as_strided(((rows.shape[0] - 1) * apart + heads, size), (size, 1))
    numbers = torch.arange(heads, device=rows.device).view(key_heads, -1, 1)
    places = chosen.view(segments, 1, 1, length) * apart + numbers
    return flat.index_select(0, places.flatten()).view(segments * key_heads, -1, size)


def _by_row(grouped: list[Tensor], attention: Attention, q: Tensor) -> Tensor:
    """Like q: the inverse of how `_gathered` lays queries out."""
    heads, size = q.shape[1:]
    flat = torch.cat([part.view(-1, size) for part in grouped]) if len(grouped) > 1 else grouped[0].view(-1, size)
    return flat.index_select(0, attention.places(heads)).view(q.shape)


def _add_by_key(total: Tensor, grouped: Tensor, group: AttentionGroup) -> None:
    """Add (segments · key heads, keys, head size) to the rows (rows, key heads, head size) they were gathered from."""
    heads, size = total.shape[1:]
    numbers = torch.arange(heads, device=total.device)[:, None]
    places = group.keys[:, None, :] * heads + numbers
    total.view(-1, size).index_add_(0, places.flatten(), grouped.reshape(-1, size).float())


def _probabilities(
    queries: Tensor, keys: Tensor, group: AttentionGroup, shape: AttentionShape
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, fp32 (segments · key heads, …, keys), and tanh(scores / softcap) where there is a cap."""
    scores = torch.bmm(queries.float() * shape.scaling, keys.float().mT)
    squashed = None
    if shape.softcap is not None:
        squashed = (scores / shape.softcap).tanh_()
        scores = squashed * shape.softcap
    segments, count = group.queries.shape
    scores.view(segments, -1, count, keys.shape[1]).add_(group.bias(shape.window))
    return torch.softmax(scores, -1), squashed
