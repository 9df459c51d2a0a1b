"""What can be asked of an export. No torch is imported here.

`ExportConfig` stands in the body of ``POST /adapters/{id}/export`` as it is; `ExportSpec` adds the folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_engine.errors import SpecError
from lora_engine.merging.config import NONLINEAR, MergeConfig, WeightedAdapter

Format = Literal["peft", "peft-portable", "merged", "gguf", "gguf-merged", "mlx"]
Dtype = Literal["fp32", "fp16", "bf16"]
Base = Literal["auto", "original", "nf4", "int8"]
GGUFType = Literal["F32", "F16", "Q8_0"]

FORMATS: tuple[Format, ...] = ("peft", "peft-portable", "merged", "gguf", "gguf-merged", "mlx")
# Which formats an option means anything for.
_USED_BY: dict[str, tuple[Format, ...]] = {
    "dtype": ("peft", "peft-portable", "merged", "mlx"),
    "base": ("merged", "gguf-merged"),
    "gguf_type": ("gguf", "gguf-merged"),
    "max_shard_bytes": ("merged",),
}
_DEFAULTS = {"dtype": None, "base": "auto", "gguf_type": None, "max_shard_bytes": None}
_SHARD_BYTES = 5_000_000_000
_SMALLEST_SHARD = 1_000
# Of the largest log-probability gap: some five times what SmolLM2-135M shows for each precision.
_GAPS = {"fp32": 0.001, "F32": 0.001, "fp16": 0.05, "F16": 0.05, "bf16": 0.5, "Q8_0": 0.5}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Into which format, and how exact it has to be. An option that a format does not have is refused.

    Attributes:
        format: "peft": PEFT's layout, factors and ranks as they are (patterns where modules differ);
            "peft-portable": one rank, alpha = rank, every layer filled, which every loader reads alike;
            "merged": the base model with the deltas in its weights, as a Hugging Face folder;
            "gguf": an adapter for llama.cpp; "gguf-merged": the whole model for llama.cpp; "mlx": an adapter for MLX.
        dtype: of the weights that are written; left out, fp32 for factors and the base model's own for "merged".
        base: whose weights the deltas go into: "original", or dequantised "nf4" or "int8" (QLoRA's adapters were
            trained against those); "auto" takes what the adapters say they were trained on.
        gguf_type: of matrices; left out, F32 for an adapter and F16 for a model. Vectors are F32 always.
        max_shard_bytes: of one safetensors file of "merged"; 5 GB when left out.
        max_gap: the export fails where the log-probability of a token of the fixed prompts differs by more (nats)
            between base model + adapters as trained and what was written; left out, by the precision written.
    """

    format: Format = "peft"
    dtype: Dtype | None = None
    base: Base = "auto"
    gguf_type: GGUFType | None = None
    max_shard_bytes: int | None = None
    max_gap: float | None = None

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("dtype", self.dtype, (None, "fp32", "fp16", "bf16"))
        _one_of("base", self.base, ("auto", "original", "nf4", "int8"))
        _one_of("gguf_type", self.gguf_type, (None, "F32", "F16", "Q8_0"))
        for option, formats in _USED_BY.items():
            if getattr(self, option) != _DEFAULTS[option] and self.format not in formats:
                raise SpecError(f"{option}: the format {self.format} has no such option", field=option)
        if self.format == "gguf" and self.gguf_type == "Q8_0":
            raise SpecError("gguf_type: the factors of an adapter are F32 or F16", field="gguf_type")
        if self.max_shard_bytes is not None and not self.max_shard_bytes >= _SMALLEST_SHARD:
            raise SpecError(f"max_shard_bytes: must be at least {_SMALLEST_SHARD}", field="max_shard_bytes")
        if self.max_gap is not None and not 0 < self.max_gap <= 100:  # NaN too
            raise SpecError("max_gap: must be greater than 0 and at most 100", field="max_gap")

    @property
    def shard_bytes(self) -> int:
        return self.max_shard_bytes or _SHARD_BYTES

    @property
    def precision(self) -> str | None:
        """The name of the type written for matrices; None: the base model's own."""
        if self.format in ("gguf", "gguf-merged"):
            return self.gguf_type or ("F32" if self.format == "gguf" else "F16")
        return self.dtype or (None if self.format == "merged" else "fp32")


def gap_limit(config: ExportConfig, precision: str) -> float:
    """`max_gap`, or the default of a precision ("bf16", "Q8_0")."""
    return _GAPS[precision] if config.max_gap is None else config.max_gap


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """One or several adapters, weighted, of one base model, into a format.

    Attributes:
        base_model: folder with config, tokenizer and safetensors.
        adapters: the sources; more than one are added up exactly.
        output: folder for the result, which appears whole or not at all.
        base_digest: SHA-256 of the base model, where the caller has just computed it; left out, it is computed.
        base_model_name: what the result calls the base model; left out, as the adapters do.
        merge: how several adapters become one: a stack, or, into the weights of a whole model, one of the nonlinear
            methods on the dense deltas, whose results are of full rank.
    """

    base_model: str
    adapters: Sequence[WeightedAdapter]
    output: str
    base_digest: str | None = None
    base_model_name: str | None = None
    export: ExportConfig = field(default_factory=ExportConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)

    def __post_init__(self) -> None:
        if not self.adapters:
            raise SpecError("adapters: expected at least one adapter", field="adapters")
        self._check_merge()

    def _check_merge(self) -> None:
        method, layout = self.merge.method, self.export.format
        if method != "stack" and method not in NONLINEAR:
            raise SpecError(f"merge.method: merge by {method} first, and export the result", field="merge.method")
        if method != "stack" and layout not in ("merged", "gguf-merged"):
            raise SpecError(
                f"merge.method: what {method} gives is of full rank, which {layout} cannot hold; export it merged, or "
                "merge into an adapter first",
                field="merge.method",
            )
        for name in ("rank", "energy", "max_bytes", "fit", "dtype", "basis"):
            if getattr(self.merge, name) is not None:
                raise SpecError(f"merge.{name}: only an adapter has it; leave it out", field=f"merge.{name}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        shown = ", ".join(str(item) for item in allowed if item is not None)
        raise SpecError(f"{name}: {str(value)[:40]!r} must be one of {shown}", field=name)
