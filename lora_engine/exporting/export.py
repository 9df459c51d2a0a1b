"""Exports: adapters into other formats, each with a certificate of what it computes.

    merged = base model + Σ weight_i · scaling_i · B_i·A_i, in one of the formats of `ExportConfig`

Whatever can be wrong is found from configs and headers first. The result is written into a folder that nobody sees,
read back from disk, compared with base model and adapters as they were trained, and published only then.
"""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_engine.adapter_header import LINEAGE
from lora_engine.exporting import base as bases
from lora_engine.exporting import (
    card,
    companions,
    gguf_adapter,
    gguf_layout,
    gguf_model,
    gguf_vocabulary,
    limits,
    merged,
    mlx,
    parity,
    peft,
)
from lora_engine.exporting.base import Base
from lora_engine.exporting.config import ExportConfig, ExportSpec, gap_limit
from lora_engine.exporting.deltas import Deltas, ModuleDeltas
from lora_engine.exporting.parity import Parity, Text
from lora_engine.exporting.streamed import weight_bytes
from lora_engine.exporting.sums import Piece, Rounding
from lora_engine.exporting.tensors import Tensors
from lora_engine.folders import published
from lora_engine.merging.config import WeightedAdapter

CERTIFICATE = "certificate.json"
_SPARE_BYTES = 64 << 20  # for tokenizer, configs and what the disk itself needs
_BAD_ROUNDING = 0.1


@dataclass(frozen=True, slots=True)
class Job:
    """An export that can be done.

    Attributes:
        trained_on: quantisation of the weights that the reference computes with: those of the training.
        target: quantisation of the weights that the deltas are put into; that of `trained_on` for adapters.
        prompts: of the parity.
    """

    config: ExportConfig
    base: Base
    deltas: Deltas
    base_name: str
    base_digest: str | None
    trained_on: str
    target: str
    prompts: list[Text]
    progress: "_Progress"

    def reference(self) -> Tensor:
        """Log-probabilities of base model and adapters as trained."""
        return self.predicted(self.base, quantization=self.trained_on, deltas=self.deltas)

    def with_adapter(self, deltas: ModuleDeltas) -> Tensor:
        """Those of the base model with an adapter that was written."""
        return self.predicted(self.base, quantization=self.trained_on, deltas=deltas)

    def predicted(self, base: Base, tensors: Tensors | None = None, **options: Any) -> Tensor:
        """Those of `base`, or of its architecture with other `tensors`."""
        model = base.evaluated(tensors, tell=self.progress.add, **options)
        return parity.log_probabilities(model, self.prompts)


class _Progress:
    """Bytes written, and bytes of weights computed with, for one number that grows to its total."""

    def __init__(self, tell: Callable[[int, int], None], base: Base) -> None:
        self._tell, self._done = tell, 0
        self._total = 2 * sum(weight_bytes(module.outputs, module.inputs) for module in base.modules)

    def expect(self, written: int) -> None:
        """So many bytes are going to be written."""
        self._total += written

    def add(self, count: int) -> None:
        self._done += count
        self._tell(min(self._done, self._total), self._total)


def export(spec: ExportSpec, tell: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the export to `spec.output` and return its metrics, which `certificate.json` in it holds too.

    Args:
        tell: called in this thread with bytes done and in all; what it raises ends the export without a trace.

    Raises:
        SpecError: a field of the spec is impossible.
        AdapterError: adapters that do not fit together or to the base model, or a format that cannot hold them; a
            value that leaves the range of its type; a result that does not compute what was trained.
        BaseModelError: the base model's files are missing, torn or unsupported.
        OSError: a file cannot be read or written; the disk is full.
    """
    job = _prepare(spec, tell or (lambda *_: None))
    output = Path(spec.output)
    with published(output) as temporary:
        facts = _FORMATS[spec.export.format](job, temporary)
        result = {**_facts(job), **facts}
        (temporary / "README.md").write_text(card.text(result), encoding="utf-8")
        _write_json(temporary / LINEAGE, card.lineage(result, job.deltas))
        result["files"] = sorted([*(path.name for path in temporary.iterdir()), CERTIFICATE])
        result["bytes"] = sum(path.stat().st_size for path in temporary.iterdir())
        _write_json(temporary / CERTIFICATE, result)
    return result


def _prepare(spec: ExportSpec, tell: Callable[[int, int], None]) -> Job:
    base = bases.open_base(Path(spec.base_model))
    deltas = Deltas(spec.adapters, spec.merge)
    digest = bases.check(base, deltas, spec.base_digest)
    trained_on, target = _quantizations(spec.export, deltas)
    name = spec.base_model_name or deltas.plan.base_model_name or base.folder.name
    prompts, progress = parity.texts(base.tokenizer), _Progress(tell, base)
    return Job(spec.export, base, deltas, name, digest, trained_on, target, prompts, progress)


def _quantizations(config: ExportConfig, deltas: Deltas) -> tuple[str, str]:
    """What the adapters were trained on, and what the export puts them on."""
    asked = "none" if config.base == "original" else config.base
    limits.check_quantizations(config.base, deltas.quantizations)
    trained_on = deltas.quantization or ("none" if asked == "auto" else asked)
    return trained_on, trained_on if asked == "auto" else asked


def _facts(job: Job) -> dict[str, Any]:
    return {
        "format": job.config.format,
        "precision": job.config.precision,
        "base_model": job.base_name,
        "base_digest": job.base_digest,
        "base": _named(job.target),
        "trained_on": "unknown" if job.deltas.quantization is None else _named(job.trained_on),
        "method": job.deltas.plan.config.method,
        "parents": job.deltas.parents,
        "modules": len(job.deltas.modules),
        "rank": max(job.deltas.rank(name) for name in job.deltas.modules),
        "engine": version("luthier"),
    }


def _peft(job: Job, folder: Path) -> dict[str, Any]:
    return _adapter(job, folder, lambda dtype: peft.write_native(job.deltas, folder, job.base_name, dtype))


def _peft_portable(job: Job, folder: Path) -> dict[str, Any]:
    modules = job.base.modules
    return _adapter(job, folder, lambda dtype: peft.write_portable(job.deltas, modules, folder, job.base_name, dtype))


def _adapter(job: Job, folder: Path, write: Callable[[str], None]) -> dict[str, Any]:
    """An adapter in PEFT's layout, read back and run on the weights that it was trained on."""
    dtype = str(job.config.precision)
    write(dtype)
    companions.copy_tokenizer(job.base, folder)
    companions.check_companions(job.base, folder)
    written = job.with_adapter(Deltas([WeightedAdapter(path=str(folder))]))
    return {"parity": _parity(job, written, dtype, "export it with dtype fp32")}


def _merged(job: Job, folder: Path) -> dict[str, Any]:
    pieces = bases.pieces(job.base, job.deltas, job.config.dtype, job.target)
    _expect(job, folder, sum(map(merged.written_bytes, pieces)))
    untied = job.base.tied_head in job.deltas.shapes
    companions.copy_tokenizer(job.base, folder)
    companions.write_configs(job.base, folder, dtype=job.config.dtype, untied=untied)
    rounding = merged.write(pieces, job.deltas, folder, job.config.shard_bytes, job.progress.add)
    written = bases.open_base(folder)
    companions.check_companions(job.base, folder)
    precision = _coarsest(pieces)
    return {
        "parity": _parity(job, job.predicted(written), precision, _advice(job, "fp32")),
        "precision": precision,
        "head_untied": untied,
        **_rounding(rounding),
    }


def _advice(job: Job, finer: str) -> str:
    if job.target != job.trained_on:
        return (
            f"the adapters were trained on {_named(job.trained_on)} weights and these are {_named(job.target)}; export "
            f"with base {_named(job.trained_on)}, or allow for the difference by max_gap"
        )
    return f"export it as {finer}, or serve the adapter unmerged"


def _rounding(rounding: Rounding) -> dict[str, Any]:
    total = rounding.total()
    advice = "rounding loses much of the delta: export it in a finer type, or serve the adapter unmerged"
    return {
        "rounding": {"total": total, "modules": rounding.relative()},
        "advice": advice if total > _BAD_ROUNDING else None,
    }


def _named(quantization: str) -> str:
    return "original" if quantization == "none" else quantization


def _mlx(job: Job, folder: Path) -> dict[str, Any]:
    dtype = str(job.config.precision)
    mlx.write(job.deltas, job.base.modules, job.base.layers, folder, dtype)
    written = job.with_adapter(mlx.MLXDeltas(folder))
    return {"parity": _parity(job, written, dtype, "export it with dtype fp32")}


def _gguf(job: Job, folder: Path) -> dict[str, Any]:
    layout = gguf_layout.layout(job.base.model.config)
    limits.check_untied(job.base.tied_head, job.deltas.shapes)
    precision, path = str(job.config.precision), folder / "adapter.gguf"
    gguf_adapter.write(job.deltas, layout, path, base_name=job.base_name, precision=precision)
    written = job.with_adapter(gguf_adapter.GGUFDeltas(path, layout, job.deltas.modules))
    return {"parity": _parity(job, written, precision, "export it as F32")}


def _gguf_merged(job: Job, folder: Path) -> dict[str, Any]:
    layout = gguf_layout.layout(job.base.model.config)
    gguf_model.check(job.base)
    precision, path = str(job.config.precision), folder / "model.gguf"
    plain = bases.pieces(job.base, job.deltas, None, job.target)
    pieces = gguf_model.pieces(plain, job.base, layout, precision)
    _expect(job, folder, sum(map(gguf_model.written_bytes, pieces)))
    rounding = gguf_model.write(
        pieces, job.base, job.deltas, path,
        architecture=layout.architecture, name=job.base_name, precision=precision, tell=job.progress.add,
    )  # fmt: skip
    gguf_vocabulary.check_written(path, job.base.tokenizer)
    written = job.predicted(job.base, gguf_model.GGUFTensors(path, layout, job.base.model))
    return {
        "parity": _parity(job, written, precision, _advice(job, "F16 or F32")),
        **_rounding(rounding),
    }


def _coarsest(pieces: list[Piece]) -> str:
    names = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    found = {names[piece.dtype] for piece in pieces if piece.dtype in names}
    return next(name for name in ("bf16", "fp16", "fp32") if name in found)


def _parity(job: Job, written: Tensor, precision: str, advice: str) -> dict[str, Any]:
    measured: Parity = parity.compare(job.reference(), written, job.prompts)
    limit = gap_limit(job.config, precision)
    parity.check(measured, limit, advice)
    return {**asdict(measured), "limit": limit}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _expect(job: Job, folder: Path, needed: int) -> None:
    """So many bytes are about to be written; raises OSError where the disk has no room for them."""
    job.progress.expect(needed)
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"the export takes {needed} bytes, and {free} are free", str(folder))


_FORMATS: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
    "peft": _peft,
    "peft-portable": _peft_portable,
    "merged": _merged,
    "mlx": _mlx,
    "gguf": _gguf,
    "gguf-merged": _gguf_merged,
}
