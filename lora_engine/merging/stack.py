"""The exact stack: B = [c_1·B_1 | … | c_k·B_k], A = [A_1; …; A_k] with c_i = weight_i · scaling_i. No torch.

    B·A = Σ weight_i · scaling_i · B_i·A_i

so any mix of ranks, alphas, rsLoRA, patterns, target modules and signs is one plain adapter of rank R = Σ rank_i with
alpha = R. The only error is the rounding of c_i·B_i, and it is measured. The sources stand in the order of their
digests: the order in which they were named changes no byte.
"""

from collections.abc import Callable

import numpy as np

from lora_engine.merging.arrays import Array, Wide
from lora_engine.merging.certificate import ZERO, ModuleCertificate, Norms, norms
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.result import ModuleResult, rounded
from lora_engine.merging.sources import Plan


def stack(plan: Plan, tell: Callable[[int, int], None]) -> dict[str, ModuleResult]:
    """Every module of the plan. Memory: the result, and one module in fp64."""
    results = {}
    for index, (module, item) in enumerate(plan.modules.items()):
        results[module] = of_factors(load(module, item), plan.config.options["dtype"], module)
        tell(index + 1, len(plan.modules))
    return results


def of_factors(factors: Factors, dtype: str, module: str) -> ModuleResult:
    """One module, with the scale multiplied into B in fp64 before the one rounding."""
    exact = factors.B * factors.scale
    B, A = rounded(exact, dtype, module), rounded(factors.A, dtype, module)
    norm = norms(exact, factors.A)
    error = rounding_error(exact, factors.A, B, A)
    rank = factors.A.shape[0]
    return ModuleResult(A, B, ModuleCertificate(norm, error, norm, error, error.frobenius, rank, rank))


def rounding_error(B: Wide, A: Wide | Array, written_B: Array, written_A: Array) -> Norms:
    """Of B'·A' - B·A = (B' - B)·A + B'·(A' - A), whose terms are small, so that nothing cancels."""
    off_B, off_A = written_B - B, written_A - A
    if not off_A.any():
        return norms(off_B, A) if off_B.any() else ZERO
    return norms(np.concatenate([off_B, written_B], axis=1), np.concatenate([A, off_A]))
