"""What can be asked of an analysis. No torch is imported here.

`AnalyzeConfig` stands in the body of ``POST /adapters/analyze`` as it is; `AnalyzeSpec` adds the folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_engine.errors import SpecError
from lora_engine.fields import bounded
from lora_engine.merging.config import WeightedAdapter

MAX_ADAPTERS = 32


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """How adapters are compared.

    Attributes:
        density: share of each delta's weights that TIES keeps, for what it would lose and how signs conflict then.
        signs: count sign conflicts and trim loss too. It takes every weight of every delta, computed in row blocks:
            the one part whose cost grows with the base model.
    """

    density: float = 0.2
    signs: bool = True

    def __post_init__(self) -> None:
        bounded(self, "density", 0, 1, exclusive_low=True)


@dataclass(frozen=True, kw_only=True)
class AnalyzeSpec:
    """Adapters of one base model to compare.

    Attributes:
        adapters: with the weights they would be merged with.
        output: folder for report.json and the pictures, which appears whole or not at all.
        names: what the report calls the adapters; the folders' names when left out.
        base_model: folder of the base model, for the size of the deltas against its weights.
    """

    adapters: Sequence[WeightedAdapter]
    output: str
    names: Sequence[str] = ()
    base_model: str | None = None
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)

    def __post_init__(self) -> None:
        if not 1 <= len(self.adapters) <= MAX_ADAPTERS:
            raise SpecError(f"adapters: expected between 1 and {MAX_ADAPTERS} adapters", field="adapters")
        if self.names and len(self.names) != len(self.adapters):
            raise SpecError("names: expected as many as there are adapters", field="names")
