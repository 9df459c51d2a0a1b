"""What can be asked when a foreign adapter is taken in. No torch is imported here.

`IngestConfig` stands beside the files in ``POST /adapters``; `IngestSpec` adds the folders.
"""

from dataclasses import dataclass, field
from typing import Literal

from lora_engine.config import MAX_STACK_RANK
from lora_engine.errors import SpecError
from lora_engine.fields import bounded, one_of


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What may be done to an adapter that is no sum of B·A.

    Attributes:
        rank: of the best low-rank form of DoRA and of whole modules (`modules_to_save`); left out, both are refused.
        max_error: the largest relative error ‖Δ − B·A‖/‖Δ‖ (Frobenius) that such a form may have in any module.
        quantization: what the base model's weights were quantised to while the adapter was trained (QLoRA), where that
            is known: an export into the base model goes by it.
    """

    rank: int | None = None
    max_error: float = 0.1
    quantization: Literal["none", "nf4", "int8"] | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            bounded(self, "rank", 1, MAX_STACK_RANK)
        bounded(self, "max_error", 0, 1)
        if self.quantization is not None:
            one_of(self, "quantization", ("none", "nf4", "int8"))


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
