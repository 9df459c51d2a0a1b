"""Merges that are not a weighted sum (TIES, DARE and kin) on the dense deltas themselves, block by block of rows.

Their results are of full rank, which an adapter cannot hold, but a model's weights can.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_engine import nf4
from lora_engine.exporting.tensors import aligned
from lora_engine.merging.cutoffs import Cutoffs, cutoffs
from lora_engine.merging.factors import changing, load
from lora_engine.merging.nonlinear import combine
from lora_engine.merging.sources import Plan


class DenseDelta:
    """One module's delta (out × in), computed when it is asked for; nothing of it is kept."""

    def __init__(self, plan: Plan, module: str, whole: Cutoffs | None) -> None:
        """`whole`: of the whole adapters, where the options take the cutoffs over these."""
        item = plan.modules[module]
        # Adapters that are zero here, as where their loaders want all layers of a kind, have no say in it.
        found, parts = changing(load(module, item), item.parts)
        self._plan, self._module, self._blocks = plan, module, found.blocks
        self._B, self._A = (
            aligned(found.B * found.scale),
            aligned(found.A),
        )
        self._parts = [(part.digest, part.weight) for part in parts]
        method, options = plan.config.method, plan.config.options
        self._cutoffs = cutoffs(method, options, self.blocks) if whole is None else whole
        self._transposed: Tensor | None = None

    def squared_norm(self) -> None:
        """Known when all of it was computed."""

    def part(self, start: int, stop: int, *, transposed: bool) -> Tensor:
        """Rows start … stop of the delta, or of its transpose (which is computed whole), fp32."""
        if transposed:
            if self._transposed is None:
                self._transposed = self._merged(0, len(self._B)).t().contiguous()
            return self._transposed[start:stop]
        return self._merged(start, stop)

    def add_to(self, weight: Tensor, start: int, stop: int, *, transposed: bool) -> Tensor:
        """`weight` + part; it may be changed in place."""
        return weight.add_(self.part(start, stop, transposed=transposed))

    def product(self, x: Tensor) -> Tensor:
        """x · Dᵀ."""
        parts = [x @ self._merged(start, stop).t() for start, stop in self._rows()]
        return torch.cat(parts, dim=1)

    def blocks(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """The adapters' own weighted deltas with their digests, as `cutoffs` reads them."""
        for start, stop in self._rows() if self._parts else ():
            yield [digest for digest, _ in self._parts], self._stacked(start, stop)

    def _merged(self, start: int, stop: int) -> Tensor:
        method, options = self._plan.config.method, self._plan.config.options
        X = self._stacked(start, stop)
        if not self._parts:
            return X.sum(dim=0)
        return combine(method, options, X, self._parts, self._cutoffs, self._module, start)

    def _stacked(self, start: int, stop: int) -> Tensor:
        deltas = [self._B[start:stop, block] @ self._A[block] for block in self._blocks]
        return torch.stack(deltas) if deltas else torch.zeros(0, stop - start, self._A.shape[1])

    def _rows(self) -> Iterator[tuple[int, int]]:
        step = max(1, nf4.chunk_size(torch.device("cpu")) // self._A.shape[1])
        return ((start, min(start + step, len(self._B))) for start in range(0, len(self._B), step))


def whole_cutoffs(plan: Plan) -> Cutoffs | None:
    """Over the whole adapters, where the options ask for that."""
    if plan.config.options.get("scope") != "adapter":
        return None

    def blocks() -> Iterator[tuple[Sequence[str], Tensor]]:
        for module, item in plan.modules.items():
            if item.parts:
                yield from DenseDelta(plan, module, Cutoffs()).blocks()

    return cutoffs(plan.config.method, plan.config.options, blocks)
