"""Nonlinear merges in a basis that the adapters share, so that the result is an adapter again.

KnOTS (arXiv 2410.19735): with [D_1 … D_k] = U·Σ·Vᵀ every D_i is U·X_i, X_i = Uᵀ·D_i (ρ × in); what is merged are the
X_i, and U · merged has rank ρ ≤ Σ r_i. Core Space (2509.17786): with the left singular vectors U of [s_1·B_1 … s_k·B_k]
and the right ones V of [A_1; …; A_k], D_i = U·X_i·Vᵀ, and the X_i are ρ × ρ. No dense delta is formed.

What this gives is not what the same method gives on the dense deltas; `dense_error` measures by how much.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lora_engine.merging.arrays import Array, Wide
from lora_engine.merging.certificate import Norms
from lora_engine.merging.cutoffs import Cutoffs, cutoffs
from lora_engine.merging.factors import Factors, changing, load
from lora_engine.merging.nonlinear import combine
from lora_engine.merging.sources import Part, Plan
from lora_engine.merging.spectral import norms_of_dense

_BLOCK = 1 << 20  # entries of all adapters together
_NEGLIGIBLE = 1e-7  # of the largest singular value: what fp32 inputs cannot tell from zero


@dataclass(frozen=True, slots=True)
class Shared:
    """D_i = left · X_i · right: left (out × ρ), X (k × ρ × p) in fp64, right (p × in); no right is the identity."""

    left: Wide
    X: Wide
    right: Wide | None


def exact(plan: Plan, beat: Callable[[], None]) -> Callable[[str], Factors]:
    """The result of every module that has parts, as factors."""
    whole = None
    if plan.config.options.get("scope") == "adapter":
        whole = cutoffs(plan.config.method, plan.config.options, lambda: _all_blocks(plan, beat))
    return lambda module: _of_module(plan, module, whole)


def share(factors: Factors, basis: str) -> Shared:
    """The basis "knots" or "core" of one module's parts, and what each part is in it."""
    scaled = factors.B * factors.scale
    columns, triangle = np.linalg.qr(scaled)
    A = np.asarray(factors.A, np.float64)
    if basis == "knots":
        coordinates = [triangle[:, block] @ A[block] for block in factors.blocks]
        U = _directions(np.sum([item @ item.T for item in coordinates], axis=0))
        return Shared(columns @ U, np.stack([U.T @ item for item in coordinates]), None)
    rows, row_triangle = np.linalg.qr(A.T)
    U, V = _directions(triangle @ triangle.T), _directions(row_triangle @ row_triangle.T)
    left, right = U.T @ triangle, row_triangle.T @ V
    cores = [left[:, block] @ right[block] for block in factors.blocks]
    return Shared(columns @ U, np.stack(cores), (rows @ V).T)


def _directions(products: Wide) -> Wide:
    """Singular vectors from products, the longest first, without those that are nothing but rounding."""
    values, vectors = np.linalg.eigh(products)
    kept = values > _NEGLIGIBLE**2 * values.max(initial=0)
    directions: Wide = vectors[:, kept][:, ::-1]
    return directions


def _shared(plan: Plan, module: str) -> tuple[Shared, tuple[Part, ...]]:
    """With the weights multiplied into X; the basis itself does not depend on them. And the parts that X is of."""
    item = plan.modules[module]
    factors, parts = changing(load(module, item, weighted=False), item.parts)
    if not parts:
        return Shared(np.zeros((item.outputs, 0)), np.zeros((0, 0, item.inputs)), None), ()
    shared = share(factors, plan.config.options["basis"])
    weights = np.array([part.weight for part in parts])
    return replace(shared, X=shared.X * weights[:, None, None]), parts


def _all_blocks(plan: Plan, beat: Callable[[], None]) -> Iterator[tuple[Sequence[str], Tensor]]:
    for module in plan.modules:
        beat()
        shared, parts = _shared(plan, module)
        if parts:
            yield [part.digest for part in parts], torch.from_numpy(shared.X)


def _of_module(plan: Plan, module: str, whole: Cutoffs | None) -> Factors:
    shared, parts = _shared(plan, module)
    if not parts:
        return Factors(shared.left, np.zeros((0, plan.modules[module].inputs)), np.zeros(0))
    merged = _merged(plan, module, torch.from_numpy(shared.X), parts, whole).numpy()
    right = merged if shared.right is None else merged @ shared.right
    return Factors(shared.left, right, np.ones(right.shape[0]))


def _merged(plan: Plan, module: str, X: Tensor, parts: tuple[Part, ...], whole: Cutoffs | None) -> Tensor:
    """By the plan's method, of blocks that are the whole of a module."""
    method, options = plan.config.method, plan.config.options
    found = whole or cutoffs(method, options, lambda: [([part.digest for part in parts], X)])
    return combine(method, options, X, [(part.digest, part.weight) for part in parts], found, module)


def dense_cutoffs(plan: Plan, beat: Callable[[], None]) -> Cutoffs | None:
    """Of the dense deltas of whole adapters; none where each module is in a scope of its own."""
    if plan.config.options.get("scope") != "adapter":
        return None
    return cutoffs(plan.config.method, plan.config.options, lambda: _all_dense(plan, beat))


def dense_error(plan: Plan, module: str, B: Array, A: Array, whole: Cutoffs | None) -> tuple[Norms, Norms]:
    """Norms of the method's result on the dense deltas, and of its distance to B·A.

    Memory: four times the module, whatever k. Time grows with it too, which for the factored result it does not.
    """
    item, method, options = plan.modules[module], plan.config.method, plan.config.options
    error = torch.zeros(item.outputs, item.inputs) - torch.from_numpy(B) @ torch.from_numpy(A)
    merged = torch.zeros_like(error)
    found = whole or cutoffs(method, options, lambda: (_told(block) for block in _dense(plan, module)))
    for start, parts, X in _dense(plan, module):
        weighted = [(part.digest, part.weight) for part in parts]
        merged[start : start + X.shape[1]] = combine(method, options, X, weighted, found, module, start)
    return norms_of_dense(merged), norms_of_dense(error.add_(merged))


def _all_dense(plan: Plan, beat: Callable[[], None]) -> Iterator[tuple[Sequence[str], Tensor]]:
    for module in plan.modules:
        beat()
        yield from (_told(block) for block in _dense(plan, module))


def _told(block: tuple[int, tuple[Part, ...], Tensor]) -> tuple[Sequence[str], Tensor]:
    _, parts, X = block
    return [part.digest for part in parts], X


def _dense(plan: Plan, module: str) -> Iterator[tuple[int, tuple[Part, ...], Tensor]]:
    """The weighted deltas that are not zero, in blocks of rows: the first row, the parts, and X in fp32."""
    item = plan.modules[module]
    factors, parts = changing(load(module, item), item.parts)
    B = torch.from_numpy((factors.B * factors.scale).astype(np.float32))
    A = torch.from_numpy(np.asarray(factors.A, np.float32))
    rows = max(1, _BLOCK // (max(len(parts), 1) * item.inputs))
    for start in range(0, item.outputs if parts else 0, rows):
        yield start, parts, torch.stack([B[start : start + rows, block] @ A[block] for block in factors.blocks])
