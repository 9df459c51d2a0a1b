"""What can be asked when a foreign adapter is taken in. No torch is imported here.

`IngestConfig` stands beside the files in ``POST /adapters``; `IngestSpec` adds the folders.
"""

from dataclasses import dataclass, field

from lora_engine.config import MAX_STACK_RANK
from lora_engine.errors import SpecError
from lora_engine.fields import bounded


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What may be done to an adapter that is no sum of B·A.

    Attributes:
        rank: of the best low-rank form of DoRA and of whole modules (`modules_to_save`); left out, both are refused.
        max_error: the largest relative error ‖Δ − B·A‖/‖Δ‖ (Frobenius) that such a form may have in any module.
    """

    rank: int | None = None
    max_error: float = 0.1

    def __post_init__(self) -> None:
        if self.rank is not None:
            bounded(self, "rank", 1, MAX_STACK_RANK)
        bounded(self, "max_error", 0, 1)


@dataclass(frozen=True, kw_only=True)
class IngestSpec:
    """A foreign adapter into one of ours.

    Attributes:
        folder: adapter_config.json and adapter_model.safetensors, as PEFT writes them.
        output: folder for the adapter, which appears whole or not at all.
        base_model: folder of the base model; with it, names and shapes are checked and conversions are possible.
        base_model_name: what the result calls the base model; what the adapter says when left out.
        base_digest: of the base model, where the caller knows it.
        initial: folder with the adapter as it was before training (PEFT writes it for PiSSA and its kin), without
            which an adapter whose initialisation changed the base model cannot be converted.
    """

    folder: str
    output: str
    base_model: str | None = None
    base_model_name: str | None = None
    base_digest: str | None = None
    initial: str | None = None
    ingest: IngestConfig = field(default_factory=IngestConfig)

    def __post_init__(self) -> None:
        if self.ingest.rank is not None and self.base_model is None:
            raise SpecError(
                "ingest.rank: converting takes the base model's weights; name base_model", field="ingest.rank"
            )
