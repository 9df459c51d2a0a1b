"""What a search for the weights of a merge is asked: frozen dataclasses that check themselves. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_engine.config import TrainingConfig
from lora_engine.errors import SpecError
from lora_engine.fields import bounded, one_of

MAX_SOURCES = 64


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the weights of a stack are found: by gradients of the loss on examples of the dataset.

    The different examples are parted three ways: the gradients see the search split; the selection split says which of
    all weights that were tried are kept; the test split is seen by neither, and its losses are reported.

    Attributes:
        per: "adapter" finds one weight an adapter, "layer" one for each adapter and layer of the base model.
        steps: updates of the weights (Adam, arXiv 1412.6980).
        eval_every: steps between two evaluations on the selection split.
        selection_fraction, test_fraction: shares of the examples in these splits.
        global_batch: examples of the search split per step.
        learning_rate: peak rate, in units of the weights; half a cosine, down to 0.
        sequence_length: longer examples are cut at the end, in tokens.
        quantization, compute_dtype: of the base model, as `TrainingConfig` has them.
        seed: of the splits and of the order of the examples.
    """

    per: Literal["adapter", "layer"] = "adapter"
    steps: int = 40
    eval_every: int = 5
    selection_fraction: float = 0.25
    test_fraction: float = 0.25
    global_batch: int = 16
    learning_rate: float = 0.05
    sequence_length: int = 2048
    quantization: Literal["none", "nf4", "int8"] = "none"
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "per", ("adapter", "layer"))
        bounded(self, "steps", 1, 100_000)
        bounded(self, "eval_every", 1, 100_000)
        bounded(self, "selection_fraction", 0.01, 0.5)
        bounded(self, "test_fraction", 0.01, 0.5)
        if self.selection_fraction + self.test_fraction > 0.9:
            raise SpecError(
                "test_fraction: with selection_fraction it leaves less than a tenth of the examples to search on; "
                "lower one of the two",
                field="test_fraction",
            )
        self.training  # noqa: B018 - checks the rest

    @property
    def training(self) -> TrainingConfig:
        """These settings as the base model's loader, the planner and the schedule take them."""
        return TrainingConfig(
            quantization=self.quantization,
            compute_dtype=self.compute_dtype,
            max_steps=self.steps,
            global_batch=self.global_batch,
            sequence_length=self.sequence_length,
            learning_rate=self.learning_rate,
            optimizer="sgd",  # what the planner counts for it is the copy of B that the search keeps
            warmup_ratio=0.0,
            eval_every=self.eval_every,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """One search on files of this machine.

    Attributes:
        base_model: folder with config, tokenizer and safetensors.
        dataset: JSONL file of examples as for training.
        adapters: folders of the adapters whose weights are wanted, all of this base model, none of them twice.
        output: folder for the stack with the weights found.
        device: "auto" is the first CUDA device, or the CPU.
        threads: of the processor; left out, as many as are quickest on the machine as it is when the search begins.
    """

    base_model: str
    dataset: str
    adapters: Sequence[str]
    output: str
    device: str = "auto"
    threads: int | None = None
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        if not 1 <= len(self.adapters) <= MAX_SOURCES:
            raise SpecError(f"adapters: expected between 1 and {MAX_SOURCES} adapters", field="adapters")
        if self.threads is not None:
            bounded(self, "threads", 1, 1024)
        object.__setattr__(self, "adapters", tuple(self.adapters))
