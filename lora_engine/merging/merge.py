"""Several adapters into one, by any method, with a certificate of its error.

Everything is checked from configs and headers before a tensor is read. The bytes depend on the sources, their weights
and the options alone, not on the order of the sources. A method says of every module what its exact result is, as
factors; what follows, compression, rounding, measuring and writing, is the same for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import hypot
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from lora_engine.merging import certificate, geometry, low_rank, projection, result, sources
from lora_engine.merging.arrays import Array
from lora_engine.merging.certificate import ModuleCertificate, Norms
from lora_engine.merging.config import GEOMETRIC, NONLINEAR, MergeSpec
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.result import ModuleResult, rounded
from lora_engine.merging.sources import Plan
from lora_engine.merging.stack import of_factors, rounding_error

Tell: TypeAlias = Callable[[int, int], None]
# The exact result of a module, by its name.
Exact: TypeAlias = Callable[[str], Factors]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def merge(
    spec: MergeSpec,
    tell: Tell | None = None,
    *,
    lineage: Mapping[str, Any] = _NOTHING,
    files: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """Write the merged adapter to `spec.output` and return its metrics, as `result.publish` has them.

    Args:
        spec: what to merge, and how.
        tell: called with (done, total) as the work goes on; what it raises ends the merge, and nothing is left of it.
        lineage: further entries of `lineage.json`.
        files: texts by name to publish beside the adapter.

    Raises:
        SpecError: weights or options that cannot be.
        AdapterError: an adapter cannot be read, or they do not fit together.
    """
    plan = sources.plan(spec, sources.read(spec))
    return merged(plan, Path(spec.output), tell, lineage=lineage, files=files)


def merged(
    plan: Plan,
    output: Path,
    tell: Tell | None = None,
    *,
    lineage: Mapping[str, Any] = _NOTHING,
    files: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """As `merge`, of a merge that was planned already."""
    passes = 2 if plan.config.max_bytes is not None else 1
    progress = _Progress(tell, passes * len(plan.modules))
    exact = exact_results(plan, progress.beat)
    ranks = _ranks(plan, exact, progress) if passes == 2 else {}
    measure = _dense_measure(plan, progress.beat)
    results = {}
    for module in plan.modules:
        results[module] = measure(module, _written(plan, module, exact(module), ranks.get(module)))
        progress.advance()
    return result.publish(plan, results, output, lineage=lineage, files=files)


class _Progress:
    def __init__(self, tell: Tell | None, total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0

    def advance(self) -> None:
        self._done += 1
        self.beat()

    def beat(self) -> None:
        """Says that the work goes on, so that it can be ended."""
        if self._tell:
            self._tell(self._done, self._total)


def exact_results(plan: Plan, beat: Callable[[], None] = lambda: None) -> Exact:
    """The method's exact result of every module, before any compression; `beat` is called as preparations go on."""
    method = plan.config.method
    exact: Exact | None = None
    if method in NONLINEAR:
        from lora_engine.merging import shared_basis  # torch

        exact = shared_basis.exact(plan, beat)
    elif method in GEOMETRIC:
        exact = geometry.exact(plan, beat)
    elif method == "project_out":
        exact = projection.projected_out(plan)
    elif method == "peft_linear":
        exact = projection.peft_linear(plan)
    return lambda module: exact(module) if exact and plan.modules[module].parts else load(module, plan.modules[module])


def _dense_measure(plan: Plan, beat: Callable[[], None]) -> Callable[[str, ModuleResult], ModuleResult]:
    """Adds the distance to a nonlinear method's result on the dense deltas to a module's certificate."""
    if plan.config.method not in NONLINEAR:
        return lambda _, written: written
    from lora_engine.merging import shared_basis  # torch

    whole = shared_basis.dense_cutoffs(plan, beat)

    def measure(module: str, written: ModuleResult) -> ModuleResult:
        if not plan.modules[module].parts:
            return written
        dense = shared_basis.dense_error(plan, module, written.B, written.A, whole)
        return replace(written, certificate=replace(written.certificate, dense=dense))

    return measure


def _ranks(plan: Plan, exact: Exact, progress: _Progress) -> dict[str, int]:
    """Of every module, from the singular values of all."""
    values = {}
    for module in plan.modules:
        factors = exact(module)
        values[module] = low_rank.decompose(factors.B, factors.A, factors.scale).values
        progress.advance()
    return low_rank.ranks_within(plan, values)


def _against_sum(plan: Plan, module: str, written: ModuleResult) -> ModuleResult:
    """With the distance to the exact weighted sum, where that is not what the method computes."""
    if plan.config.method in ("stack", "linear"):
        return written
    weighted_sum = load(module, plan.modules[module])
    certified = replace(
        written.certificate,
        weighted_sum=certificate.norms(weighted_sum.B * weighted_sum.scale, weighted_sum.A),
        sum_error=_distance(written.B, written.A, weighted_sum),
    )
    return replace(written, certificate=certified)


def _distance(B: Array, A: Array, exact: Factors) -> Norms:
    """Of B·A to another delta. Good to 1e-8 of either."""
    return certificate.norms(np.concatenate([B, -exact.B * exact.scale], axis=1), np.concatenate([A, exact.A]))


def _written(plan: Plan, module: str, exact: Factors, rank: int | None) -> ModuleResult:
    config, item = plan.config, plan.modules[module]
    dtype = config.options["dtype"]
    if not item.parts or not config.compresses:
        return _against_sum(plan, module, of_factors(exact, dtype, module))
    found = low_rank.decompose(exact.B, exact.A, exact.scale)
    if rank is None:
        rank = low_rank.rank_of(config, found.values, max(part.rank for part in item.parts))
    wide_B, wide_A = found.factors(rank)
    B, A = rounded(wide_B, dtype, module), rounded(wide_A, dtype, module)
    left_out = found.beyond(rank)
    if dtype == "fp32":
        rounding = low_rank.rounding_in_fp32(found.values[:rank], wide_B, wide_A, B, A)
        error = Norms(hypot(left_out.frobenius, rounding.frobenius), max(left_out.spectral, rounding.spectral))
    else:  # rounding is no longer small against what was left out
        rounding = rounding_error(wide_B, wide_A, B, A)
        error = _distance(B, A, exact)
    norm = certificate.of_singular_values(found.values)
    certified = ModuleCertificate(norm, error, norm, error, rounding.frobenius, item.rank, rank)
    return _against_sum(plan, module, ModuleResult(A, B, certified))
