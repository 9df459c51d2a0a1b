"""What can be asked of the engine: frozen, keyword-only dataclasses that check themselves.

The service takes `LoraConfig` and `TrainingConfig` as they stand in the body of ``POST /jobs`` (through
`from_mapping`), so that one definition runs from the HTTP request to the device. A wrong value raises
`SpecError`, which is a `ValueError` with the field's name. No torch is imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_engine.errors import SpecError
from lora_engine.fields import MAX_NAMES, bounded, bounded_values, check_module_name, from_mapping, one_of, to_mapping

ALL_LINEAR = "all-linear"
MAX_RANK = 1024
MAX_STACK_RANK = 4096
_PAGED = ("paged_adamw", "paged_adamw_8bit")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter's shape (Hu et al. 2021, arXiv 2106.09685).

    The adapted layer computes ``W·x + scaling · B·A·x`` with A (rank × in), B (out × rank) and
    ``scaling = alpha / rank``, or ``alpha / √rank`` with rsLoRA (arXiv 2312.03732).

    A module is named by its last name ("q_proj"), its full name or the end of it ("mlp.up_proj"), a pattern of these
    with the wildcards of file names ("layers.[0-7].*.q_proj"; ``*`` also stands for dots), or one of the roles query,
    key, value, projection (attention's output), mlp and head. A fused layer of query, key and value takes all three.

    Attributes:
        rank: rows of A.
        alpha: numerator of the scaling; twice the rank when left out.
        dropout: share of the adapter's inputs zeroed while training.
        target_modules: the linear layers to adapt, or "all-linear": every one but the output head.
        use_rslora: divide alpha by √rank instead of rank.
        rank_pattern, alpha_pattern: rank and alpha of the modules so named; of several entries the last one counts.
            A module without an entry in `alpha_pattern` has `alpha`, or twice its own rank.
        learning_rate_pattern: peak rate of the modules so named, in place of `TrainingConfig.learning_rate`.
        lora_plus_ratio: B's learning rate over A's (LoRA+, arXiv 2402.12354); both have the same when left out.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | Literal["all-linear"] = ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    learning_rate_pattern: Mapping[str, float] = field(default_factory=dict)
    lora_plus_ratio: float | None = None

    def __post_init__(self) -> None:
        bounded(self, "rank", 1, MAX_RANK)
        if self.alpha is not None:
            bounded(self, "alpha", 0, 65536, exclusive_low=True)
        bounded(self, "dropout", 0, 0.95)
        bounded_values(self, "rank_pattern", 1, MAX_RANK)
        bounded_values(self, "alpha_pattern", 0, 65536, exclusive_low=True)
        bounded_values(self, "learning_rate_pattern", 0, 1, exclusive_low=True)
        if self.lora_plus_ratio is not None:
            bounded(self, "lora_plus_ratio", 0, 1024, exclusive_low=True)
        if self.target_modules == ALL_LINEAR:
            return
        if isinstance(self.target_modules, str):
            raise SpecError(
                f'target_modules: expected a list of module names or "{ALL_LINEAR}"', field="target_modules"
            )
        names = tuple(self.target_modules)
        if not 1 <= len(names) <= MAX_NAMES:
            raise SpecError(f"target_modules: expected between 1 and {MAX_NAMES} module names", field="target_modules")
        for name in names:
            check_module_name("target_modules", name)
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(names)))

    @property
    def resolved_alpha(self) -> float:
        """Of a module of rank `rank` that no pattern names."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the adapter is trained.

    Attributes:
        quantization: "nf4" keeps the base weights in 4 bit with double quantisation (QLoRA, arXiv 2305.14314), "int8"
            in 8 bit with one scale per output (arXiv 2208.07339, its weights alone).
        compute_dtype: of dequantised weights and activations; "auto" is bf16 on CUDA, fp32 on CPU.
        epochs: passes over the training examples.
        max_steps: end after so many optimizer steps, whatever `epochs` says.
        global_batch: examples per optimizer step, however many micro-batches it takes.
        sequence_length: longer examples are cut at the end, in tokens.
        learning_rate: peak rate.
        optimizer: "adamw", "sgd", or one of bitsandbytes: "adamw_8bit" keeps its state in 8 bit (arXiv 2110.02861);
            "paged_adamw" and "paged_adamw_8bit" keep it in memory that moves between GPU and host (CUDA only).
        momentum: of "sgd"; the others have none.
        schedule: "cosine" (half a cycle, down to 0), "linear" (down to 0) or "constant", after the warm-up.
        warmup_ratio: share of all steps in which the rate rises from 0.
        weight_decay: on A and B; decoupled (AdamW, arXiv 1711.05101), but part of the gradient with "sgd".
        max_grad_norm: gradients are scaled down to this norm.
        validation_fraction: share of the examples held out when no validation dataset is named.
        eval_every: steps between two evaluations; 0 evaluates at the start and the end only.
        early_stopping_patience: end after so many evaluations in a row without a new lowest validation loss.
        max_nonfinite_steps: a step whose loss or gradient is not finite is left out; so many in a row end the job.
        checkpoint_every: steps between two checkpoints.
        seed: of the initial A, the data order, the held-out split and the dropout masks.
    """

    quantization: Literal["none", "nf4", "int8"] = "none"
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    epochs: int = 1
    max_steps: int | None = None
    global_batch: int = 8
    sequence_length: int = 2048
    learning_rate: float = 2e-4
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    momentum: float = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.05
    eval_every: int = 0
    early_stopping_patience: int | None = None
    max_nonfinite_steps: int = 3
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "quantization", ("none", "nf4", "int8"))
        one_of(self, "compute_dtype", ("auto", "fp32", "bf16"))
        one_of(self, "schedule", ("cosine", "linear", "constant"))
        one_of(self, "optimizer", ("adamw", "sgd", "adamw_8bit", *_PAGED))
        bounded(self, "epochs", 1, 1000)
        if self.max_steps is not None:
            bounded(self, "max_steps", 1, 10_000_000)
        bounded(self, "global_batch", 1, 4096)
        bounded(self, "sequence_length", 8, 131_072)
        bounded(self, "learning_rate", 0, 1, exclusive_low=True)
        bounded(self, "momentum", 0, 0.9999)
        bounded(self, "warmup_ratio", 0, 1)
        bounded(self, "weight_decay", 0, 1)
        bounded(self, "max_grad_norm", 0, 1e6, exclusive_low=True)
        bounded(self, "validation_fraction", 0, 0.5)
        bounded(self, "eval_every", 0, 10_000_000)
        bounded(self, "checkpoint_every", 1, 10_000_000)
        bounded(self, "max_nonfinite_steps", 1, 1000)
        bounded(self, "seed", 0, 2**31 - 1)
        if self.early_stopping_patience is not None:
            bounded(self, "early_stopping_patience", 1, 10_000)
            if not self.eval_every:
                raise SpecError(
                    "early_stopping_patience: nothing would be evaluated on the way; set eval_every to the steps "
                    "between two evaluations",
                    field="early_stopping_patience",
                )


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training job on files of this machine.

    Attributes:
        base_model: folder with config, tokenizer and safetensors.
        dataset: JSONL file of training examples.
        output: folder for the adapter and the checkpoints.
        validation_dataset: JSONL file; without it a share of `dataset` is held out.
        base_model_name: what `adapter_config.json` calls the base model; the folder when left out.
        device: "auto" is the first CUDA device, or the CPU.
        threads: of the processor; left out, as many as are quickest on the machine as it is when the job begins.
    """

    base_model: str
    dataset: str
    output: str
    validation_dataset: str | None = None
    base_model_name: str | None = None
    device: str = "auto"
    threads: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.threads is not None:
            bounded(self, "threads", 1, 1024)
        check_held_out(self.training, self.validation_dataset)
        if self.device != "auto":
            check_device(self.training, self.device.partition(":")[0])


def check_held_out(training: TrainingConfig, validation_dataset: str | None) -> None:
    """Raises SpecError where early stopping would have no examples to go by."""
    if training.early_stopping_patience is not None and validation_dataset is None and not training.validation_fraction:
        raise SpecError(
            "training.early_stopping_patience: no examples are held out; name a validation_dataset, or set "
            "training.validation_fraction above 0",
            field="training.early_stopping_patience",
        )


def check_device(training: TrainingConfig, device_type: str) -> None:
    """Raises SpecError for an optimizer that the kind of device ("cpu", "cuda") does not have."""
    if training.optimizer in _PAGED and device_type != "cuda":
        raise SpecError(
            f"training.optimizer: {training.optimizer} moves its state between GPU and host and needs a CUDA device; "
            f"on {device_type} use {training.optimizer.removeprefix('paged_')}",
            field="training.optimizer",
        )


__all__ = [
    "ALL_LINEAR",
    "LoraConfig",
    "TrainSpec",
    "TrainingConfig",
    "check_device",
    "check_held_out",
    "from_mapping",
    "to_mapping",
]
