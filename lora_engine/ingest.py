"""A foreign adapter into one of ours: exactly, converted with its error stated, or refused with the reason.

    LoRA, rsLoRA, patterns, selected layers, regular expressions    exact: the scaling goes into B where it must
    PiSSA, OLoRA, CorDA, LoRA-GA    exact with the adapter as it was before training: s·(B·A - B₀·A₀), twice the rank
    DoRA (arXiv 2402.09353)         (m/‖W + D‖)·(W + D) - W, row by row, in its best low-rank form
    whole modules                   dropped where they equal the base model's; a linear layer in its best low-rank form
    LoRA on a tied output head      exact, as a delta of the head alone

`ingest.json` beside the adapter is the certificate of what was done to every module.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine import adapter, safetensors_file, strict_json
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.adapter_header import CONFIG, WEIGHTS, digest
from lora_engine.base_weights import BaseWeights
from lora_engine.errors import AdapterError
from lora_engine.fields import to_mapping
from lora_engine.ingest_config import IngestConfig, IngestSpec
from lora_engine.ingest_plan import ModulePlan, Plan, plan
from lora_engine.low_rank_form import LowRank, low_rank
from lora_engine.safetensors_file import Entry
from lora_engine.target_modules import last_names

CERTIFICATE = "ingest.json"
_SMALLEST_NORM = 1e-12
_LARGEST = 1e12  # of an entry of a delta
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in which the base model may have been loaded


@dataclass(slots=True)
class _Foreign:
    """A folder of PEFT's, planned."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Entry]
    plan: Plan

    def read(self, key: str) -> Tensor:
        """fp32. Raises AdapterError where a value is not finite."""
        tensor = torch.from_numpy(safetensors_file.read_array(self.folder / WEIGHTS, self.tensors[key]))
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key}: values that are not finite; the training that wrote them had diverged")
        _check_size(key, _largest(tensor))
        return tensor

    def factors(self, item: ModulePlan) -> LoraWeights:
        A, B = self.read(item.keys["A"]), self.read(item.keys["B"])
        _check_size(item.keys["B"], abs(item.scaling) * item.rank * _largest(A) * _largest(B))
        return LoraWeights(A, B)


@dataclass(slots=True)
class _Taken:
    """What becomes of the foreign adapter: our weights, the alphas that are not the config's, and what was done."""

    weights: dict[str, LoraWeights] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def ingest(spec: IngestSpec, tell: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the adapter to `spec.output`; its metrics: rank, modules, largest relative error, notes.

    `tell(modules done, all of them)` may raise, and then nothing is written.

    Raises:
        AdapterError: what the adapter does cannot be kept, or only with a larger error than `spec.ingest` allows; it
            is of another base model; its files are torn, or hold values that are not finite.
    """
    foreign = _read(Path(spec.folder), spec.ingest)
    base = None if spec.base_model is None else BaseWeights(Path(spec.base_model))
    initial = _initial(spec, foreign)
    _check_base(foreign.plan, base)
    taken = _Taken(notes=[*foreign.plan.notes, *_notes(spec, foreign)])
    total = len(foreign.plan.modules) + len(foreign.plan.whole)
    for done, (name, item) in enumerate(foreign.plan.modules.items()):
        _tell(tell, done, total)
        _take(name, item, foreign, initial, base, spec.ingest, taken)
    for done, (name, key) in enumerate(foreign.plan.whole.items(), len(foreign.plan.modules)):
        _tell(tell, done, total)
        _take_whole(name, foreign.read(key), base, spec.ingest, foreign.plan.settings.use_rslora, taken)
    if not taken.weights:
        raise AdapterError("nothing of the adapter is left: it equals the base model")
    metrics = _write(spec, foreign, base, taken)
    _tell(tell, total, total)
    return metrics


def _notes(spec: IngestSpec, foreign: _Foreign) -> list[str]:
    """What nothing in the files can settle."""
    notes, named = [], foreign.plan.settings.base_model_name
    if spec.base_model_name and named and named != spec.base_model_name:
        notes.append(f"its config names {named[:200]} as the base model; it was taken in for {spec.base_model_name}")
    if foreign.config.get("use_dora"):
        notes.append("DoRA was converted against the base model's original weights, not quantised ones")
    return notes


def _tell(tell: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if tell is not None:
        tell(done, total)


def _read(folder: Path, ingest: IngestConfig | None = None) -> _Foreign:
    try:
        config = strict_json.loads((folder / CONFIG).read_bytes())
    except OSError:
        raise AdapterError(f"{CONFIG} is missing or unreadable") from None
    except strict_json.StrictJSONError as error:
        raise AdapterError(f"{CONFIG}: {error}") from None
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{WEIGHTS} is missing; .bin and .pt files run code when they are read, and never are")
    tensors = safetensors_file.read_header(folder / WEIGHTS)
    return _Foreign(folder, config, tensors, plan(config, tensors, ingest))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _check_size(key: str, size: float) -> None:
    """Squares of what is far beyond any weight overflow in whatever is computed with it later."""
    if size > _LARGEST:
        raise AdapterError(f"{key}: values up to {size:.1g} in size; the training that wrote them had diverged")


def _initial(spec: IngestSpec, foreign: _Foreign) -> _Foreign | None:
    """The adapter as it was before training, where that must be subtracted."""
    if not foreign.plan.moved_base:
        if spec.initial is not None:
            raise AdapterError("initial: the adapter's initialisation did not change the base model; leave it out")
        return None
    start = foreign.config["init_lora_weights"]
    if spec.initial is None:
        raise AdapterError(
            f"init_lora_weights is {start!r}, which changed the base model too: give the adapter as it was before "
            "training (save_pretrained before the first step) as initial, or convert it with PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    initial = _read(Path(spec.initial))
    shapes = [
        {name: (m.rank, m.inputs, m.outputs, m.scaling) for name, m in x.plan.modules.items()}
        for x in (foreign, initial)
    ]
    if shapes[0] != shapes[1] or foreign.plan.whole:
        raise AdapterError("initial: not of the same modules, ranks and scaling as the trained adapter")
    return initial


def _check_base(planned: Plan, base: BaseWeights | None) -> None:
    if base is not None:
        base.check({name: (item.outputs, item.inputs) for name, item in planned.modules.items()})
    elif planned.needs_base:
        what = ", ".join(list(planned.whole)[:5]) or "DoRA's magnitudes"
        raise AdapterError(f"{what}: without the base model it cannot be told what they change; name base_model")


def _take(
    name: str,
    item: ModulePlan,
    foreign: _Foreign,
    initial: _Foreign | None,
    base: BaseWeights | None,
    ingest: IngestConfig,
    taken: _Taken,
) -> None:
    """One adapted linear layer."""
    weights = foreign.factors(item)
    facts: dict[str, Any] = {"rank_before": item.rank, "scaling": item.scaling, "how": "exact", "relative_error": 0.0}
    if "bias" in item.keys and bool(foreign.read(item.keys["bias"]).any()):
        raise AdapterError(f"{item.keys['bias']}: a trained bias (lora_bias), which B·A cannot say; train without it")
    if base is not None and base.is_tied(name):
        facts["tied"] = True
        taken.notes.append(
            f"{name} shares its weight with the embedding in the base model; the delta is the head's alone"
        )
    alpha = item.alpha
    if initial is not None:
        start = initial.factors(initial.plan.modules[name])
        weights = LoraWeights(torch.cat([weights.A, start.A]), torch.cat([weights.B, -start.B], dim=1))
        growth = 2.0 if not foreign.plan.settings.use_rslora else sqrt(2.0)
        alpha, facts["how"] = alpha * growth, "exact, with what it was before training subtracted"
    elif "magnitude" in item.keys and base is not None:
        change = _dora(name, item, weights, foreign.read(item.keys["magnitude"]), base)
        weights, alpha = _converted(name, change, ingest, foreign.plan.settings.use_rslora, facts, "DoRA")
    taken.weights[name], taken.modules[name] = weights, facts | {"rank": len(weights.A)}
    if alpha != foreign.plan.settings.alpha:
        taken.alphas[name] = alpha


def _dora(name: str, item: ModulePlan, weights: LoraWeights, magnitude: Tensor, base: BaseWeights) -> Tensor:
    """(m / ‖W + D‖)·(W + D) - W in fp64, with the norm of each output's row."""
    W = base.weight(name)
    if W is None:
        raise AdapterError(f"{name}: the base model's files do not hold its weight as it is; DoRA cannot be converted")
    wide = W.double()
    changed = wide + item.scaling * (weights.B.double() @ weights.A.double())
    norms = changed.norm(dim=1)
    if not bool((norms > _SMALLEST_NORM).all()):
        raise AdapterError(f"{name}: an output whose weights are all 0, which DoRA cannot scale")
    change: Tensor = changed * (magnitude.double() / norms)[:, None] - wide
    return change


def _converted(
    name: str, change: Tensor, ingest: IngestConfig, use_rslora: bool, facts: dict[str, Any], what: str
) -> tuple[LoraWeights, float]:
    """The best low-rank form of a change of weights, and the alpha with which its scaling is 1."""
    assert ingest.rank is not None  # noqa: S101 - `plan` and `_take_whole` refuse it
    found: LowRank = low_rank(change, ingest.rank)
    if found.relative_error > ingest.max_error:
        raise AdapterError(
            f"{name}: at rank {ingest.rank} {what} is off by {found.relative_error:.1%} (of the change's norm), more "
            f"than max_error {ingest.max_error:.1%}; give a larger rank, or allow more"
        )
    rank = len(found.A)
    facts |= {"how": f"{what}, in its best form of rank {rank}", "relative_error": found.relative_error}
    return LoraWeights(found.A, found.B), sqrt(rank) if use_rslora else float(rank)


def _take_whole(
    name: str, tensor: Tensor, base: BaseWeights | None, ingest: IngestConfig, use_rslora: bool, taken: _Taken
) -> None:
    """A parameter that the file holds whole."""
    W = base.read(name) if base is not None and base.shape(name) is not None else None
    if base is None or W is None:
        raise AdapterError(f"{name}: the base model has no such parameter; the adapter is of another base model")
    if tensor.shape != W.shape:
        added = " (tokens were added to the vocabulary, which an adapter cannot do)" if W.ndim == 2 else ""
        raise AdapterError(f"{name}: {list(tensor.shape)} in the adapter, {list(W.shape)} in the base model{added}")
    if any(torch.equal(tensor, W.to(dtype).float()) for dtype in _DTYPES):
        taken.notes.append(f"{name} equals the base model's and was left out")
        return
    module, _, leaf = name.rpartition(".")
    if module in taken.weights:
        raise AdapterError(f"{name}: the file changes it whole, and puts LoRA on it besides; train with one of the two")
    if leaf != "weight" or module not in base.modules:
        raise AdapterError(f"{name}: trained whole (modules_to_save), and no linear layer: no B·A can say what changed")
    if ingest.rank is None:
        raise AdapterError(
            f"{name}: trained whole (modules_to_save); give a rank for the best low-rank form of its change"
        )
    change = base.oriented(module, tensor.double() - W.double())
    facts: dict[str, Any] = {"rank_before": min(change.shape), "scaling": 1.0}
    weights, alpha = _converted(module, change, ingest, use_rslora, facts, "a module trained whole")
    taken.weights[module], taken.alphas[module] = weights, alpha
    taken.modules[module] = facts | {"rank": len(weights.A)} | ({"tied": True} if base.is_tied(module) else {})


def _write(spec: IngestSpec, foreign: _Foreign, base: BaseWeights | None, taken: _Taken) -> dict[str, Any]:
    settings = foreign.plan.settings
    name = spec.base_model_name or settings.base_model_name
    chosen = [] if base is None else [base.modules[module] for module in taken.weights]
    targets = last_names(list(base.modules.values()), chosen) if base is not None else settings.target_modules
    if base is None and set(taken.weights) != set(foreign.plan.modules):
        targets = ()
    ranks = {len(item.A) for item in taken.weights.values()}
    result = Adapter(
        weights=dict(sorted(taken.weights.items())),
        rank=max(ranks),
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        base_model_name=name,
        base_digest=spec.base_digest,
        target_modules=targets,
        alphas=taken.alphas,
    )
    errors = [float(facts["relative_error"]) for facts in taken.modules.values()]
    metrics = {
        "method": "ingest",
        "rank": max(ranks),
        "modules": len(taken.weights),
        "converted": sorted(module for module, facts in taken.modules.items() if facts["relative_error"]),
        "relative_error": max(errors),
        "notes": taken.notes,
    }
    source = digest(foreign.folder)
    lineage: dict[str, Any] = {"method": "ingest", "source_digest": source, "ingest": to_mapping(spec.ingest)}
    if spec.ingest.quantization is not None:
        lineage["training"] = {"quantization": spec.ingest.quantization}
    certificate = {**metrics, "source_digest": source, "modules": dict(sorted(taken.modules.items()))}
    text = json.dumps(certificate, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    adapter.write(result, Path(spec.output), lineage=lineage, files={CERTIFICATE: text}, notes=_card(metrics))
    return metrics


def _card(metrics: Mapping[str, Any]) -> str:
    """What the model card says of it."""
    converted, error = len(metrics["converted"]), metrics["relative_error"]
    exact = "Every module computes what it did there, up to rounding to fp32."
    lossy = f"{converted} modules had no form B·A and have their best one of a given rank, off by {error:.2%} at most."
    lines = [f"It came from elsewhere; {CERTIFICATE} says what was done to it.", lossy if converted else exact]
    return "\n".join([*lines, *(f"- {note}" for note in metrics["notes"])]) + "\n"
