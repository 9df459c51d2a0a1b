"""What the adapters of an export add to a base model: their weighted sum, factored, module by module.

    D = Σ weight_i · scaling_i · B_i·A_i = B·A,  B = [c_1·B_1 | … | c_k·B_k],  A = [A_1; …; A_k]

with c_i = weight_i · scaling_i, in the order of the adapters' digests: the order in which they were named changes no
bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from lora_engine.adapter_header import Header
from lora_engine.exporting import limits
from lora_engine.exporting.dense import DenseDelta, whole_cutoffs
from lora_engine.exporting.tensors import aligned
from lora_engine.merging import factors, sources
from lora_engine.merging.config import NONLINEAR, MergeConfig, MergeSpec, WeightedAdapter
from lora_engine.merging.cutoffs import Cutoffs
from lora_engine.target_modules import Module


class Delta(Protocol):
    """What is added to one weight (out × in), fp32 on the CPU."""

    def squared_norm(self) -> float | None:
        """‖D‖² (Frobenius), where it is known without computing all of D."""

    def part(self, start: int, stop: int, *, transposed: bool) -> Tensor:
        """Rows start … stop of D, or of its transpose."""
        raise NotImplementedError

    def add_to(self, weight: Tensor, start: int, stop: int, *, transposed: bool) -> Tensor:
        """`weight` + part; it may be changed in place."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x · Dᵀ."""
        raise NotImplementedError


class ModuleDeltas(Protocol):
    """Deltas by module name."""

    @property
    def modules(self) -> Sequence[str]:
        """Their full names."""

    def delta(self, module: str) -> Delta:
        """Of one module."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class FactoredDelta:
    """D = B·A with A (R × in) and B (out × R): nothing else to multiply with."""

    A: Tensor
    B: Tensor

    def squared_norm(self) -> float:
        """Without forming D: Σ (BᵀB)∘(AAᵀ), in fp64."""
        A, B = self.A.double(), self.B.double()
        return float(((B.t() @ B) * (A @ A.t())).sum().clamp(min=0))

    def sides(self, *, transposed: bool) -> tuple[Tensor, Tensor]:
        """The two factors whose product D is, or its transpose."""
        return (self.A.t(), self.B.t()) if transposed else (self.B, self.A)

    def part(self, start: int, stop: int, *, transposed: bool) -> Tensor:
        """As `Delta.part`."""
        left, right = self.sides(transposed=transposed)
        return left[start:stop] @ right

    def add_to(self, weight: Tensor, start: int, stop: int, *, transposed: bool) -> Tensor:
        """As `Delta.add_to`, in one product."""
        left, right = self.sides(transposed=transposed)
        return weight.addmm_(left[start:stop], right)

    def product(self, x: Tensor) -> Tensor:
        """As `Delta.product`, by way of the factors."""
        return (x @ self.A.t()) @ self.B.t()


class Deltas:
    """The weighted sum of adapter folders, read module by module.

    Attributes:
        shapes: module name → (out, in).
        quantizations: of the weights that the adapters were trained against: "none", "nf4", "int8", or "unknown" of
            those that do not say.
    """

    def __init__(self, adapters: Sequence[WeightedAdapter], config: MergeConfig | None = None) -> None:
        """Reads configs and headers; `config` is a stack when left out, or one of the nonlinear methods.

        Raises:
            AdapterError: an adapter cannot be read, or they are not of one base model.
            SpecError: the weights cancel out, or a pattern of weights names nothing.
        """
        config = config or MergeConfig()
        self.plan = sources.plan(config, sources.read(MergeSpec(adapters=adapters, output="")))
        self.shapes = {name: (item.outputs, item.inputs) for name, item in self.plan.modules.items() if item.parts}
        self.quantizations = limits.quantizations(source.header for source in self.plan.sources)

    @property
    def modules(self) -> Sequence[str]:
        return tuple(self.shapes)

    @property
    def headers(self) -> list[Header]:
        return [source.header for source in self.plan.sources]

    @property
    def parents(self) -> list[dict[str, Any]]:
        """Digests and weights of the sources, for the lineage."""
        found: Any = self.plan.recipe["sources"]
        return [
            {"digest": source["digest"], "weight": source["weight"]}
            | ({"weights": dict(source["weights"])} if source["weights"] else {})
            for source in found
        ]

    @property
    def quantization(self) -> str | None:
        """The one of `quantizations`, where there is one and it is known."""
        return self.quantizations[0] if len(self.quantizations) == 1 and self.quantizations != ("unknown",) else None

    def rank(self, module: str) -> int:
        return self.plan.modules[module].rank

    @cached_property
    def _whole_cutoffs(self) -> Cutoffs | None:
        return whole_cutoffs(self.plan)

    def delta(self, module: str) -> Delta:
        """Of one module, by the method of the config.

        Raises:
            AdapterError: values that are not finite.
        """
        if self.plan.config.method in NONLINEAR:
            return DenseDelta(self.plan, module, self._whole_cutoffs)
        return self.factors(module)

    def factors(self, module: str) -> FactoredDelta:
        """Of a stack: A (R × in) and B (out × R), fp32, the scale in B rounded once.

        Raises:
            AdapterError: values that are not finite.
        """
        found = factors.load(module, self.plan.modules[module])
        return FactoredDelta(aligned(found.A), aligned(found.B * found.scale))

    def check(self, modules: Sequence[Module]) -> None:
        """Raises AdapterError for a module that is not among the linear layers of the base model, in this shape."""
        limits.check_modules(self.shapes, modules)
