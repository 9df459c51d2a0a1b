"""How adapters get on with each other before they are merged: an interference report, from their factors.

Everything is said of the weighted deltas D_i = weight · scaling · B·A, per module, layer ("model.layers.3") and in all:

    cosines      ⟨D_i, D_j⟩ / ‖D_i‖·‖D_j‖, from k × k inner products of the factors
    norm_ratio   ‖Σ D_i‖ / √Σ‖D_i‖²: 1 at right angles, below it where they cancel out, √k where they are the same
    angles       between what the deltas give (columns) and what they look at (rows)
    signs        places where two trimmed deltas have different signs; energy lost to trimming, and to electing signs
    of_base      ‖D_i‖ / ‖W‖, where the base model is at hand
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import analysis_signs, analysis_subspaces, heat_maps
from lora_engine.adapter_header import digest, inspect
from lora_engine.analysis_config import AnalyzeSpec
from lora_engine.analysis_signs import Signs
from lora_engine.base_weights import BaseWeights
from lora_engine.errors import SpecError
from lora_engine.folders import published
from lora_engine.merging.arrays import Wide
from lora_engine.merging.config import MergeConfig
from lora_engine.merging.factors import load
from lora_engine.merging.geometry import products
from lora_engine.merging.sources import Plan, Source, plan

REPORT = "report.json"
_LAYER = re.compile(r"(.*?\.\d+)\..*")


@dataclass(slots=True)
class _Sums:
    """What adds up over modules, for k adapters: inner products, signs, and ‖W‖² of the modules that each has."""

    inner: Wide
    base: Wide
    both: Wide
    conflicts: Wide
    energy: Wide
    kept: Wide
    elected: Wide

    @classmethod
    def zeros(cls, count: int) -> "_Sums":
        square, line = (count, count), (count,)
        shapes = (square, line, square, square, line, line, line)
        return cls(*(np.zeros(shape) for shape in shapes))

    def add(self, places: Sequence[int], inner: Wide, base: float | None, signs: Signs | None) -> None:
        """One module, of the adapters at `places`."""
        grid = np.ix_(places, places)
        self.inner[grid] += inner
        self.base[places] += np.nan if base is None else base
        if signs is not None:
            self.both[grid] += signs.both
            self.conflicts[grid] += signs.conflicts
            self.energy[places] += signs.energy
            self.kept[places] += signs.kept
            self.elected[places] += signs.elected


def analyze(spec: AnalyzeSpec, tell: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write report.json and the heat maps to `spec.output`; the metrics: cosines and norm ratio over everything.

    `tell(modules looked at, all of them)` may raise, and then nothing is written. Memory: the factors of one module,
    and blocks of 4 MB of each delta.

    Raises:
        SpecError: the same adapter twice; as `merging.sources.plan` does.
        AdapterError: the adapters are not of one base model, or not of `spec.base_model`.
    """
    planned = _plan(spec)
    base = None if spec.base_model is None else BaseWeights(Path(spec.base_model))
    if base is not None:
        base.check({name: (item.outputs, item.inputs) for name, item in planned.modules.items()})
    index = {source.digest: place for place, source in enumerate(planned.sources)}
    total, layers, modules = _Sums.zeros(len(index)), defaultdict[str, _Sums](lambda: _Sums.zeros(len(index))), {}
    for done, (name, item) in enumerate(planned.modules.items()):
        if tell is not None:
            tell(done, len(planned.modules))
        if not item.parts:
            continue
        parts = sorted(item.parts, key=lambda part: index[part.digest])
        places = [index[part.digest] for part in parts]
        factors = load(name, replace(item, parts=tuple(parts)))
        signs = analysis_signs.count(factors, spec.analyze.density) if spec.analyze.signs else None
        facts = (places, products(factors), None if base is None else base.squared(name), signs)
        alone = _Sums.zeros(len(index))
        for sums in (alone, layers[_layer(name)], total):
            sums.add(*facts)
        spaces = [analysis_subspaces.spaces(factors, block) for block in factors.blocks]
        modules[name] = {"adapters": places, **_said(alone, spec), "angles": analysis_subspaces.compare(spaces, places)}
    report = _report(spec, planned, total, layers, modules)
    _write(spec, report)
    if tell is not None:
        tell(len(planned.modules), len(planned.modules))
    return {name: report["total"][name] for name in ("cosines", "norm_ratio")} | {"modules": len(modules)}


def _plan(spec: AnalyzeSpec) -> Plan:
    folders = [Path(item.path) for item in spec.adapters]
    sources = [
        Source(inspect(folder), digest(folder), item.weight, item.weights)
        for folder, item in zip(folders, spec.adapters, strict=True)
    ]
    digests = [source.digest for source in sources]
    for place, found in enumerate(digests):
        if digests.index(found) != place:
            field = f"adapters[{place}]"
            raise SpecError(f"{field}: the same adapter as adapters[{digests.index(found)}]; name it once", field=field)
    return plan(MergeConfig(method="stack"), sources)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own, with those of the folders that they lie in where that is not enough to tell them apart."""
    own = [folder.name for folder in folders]
    return own if len(set(own)) == len(own) else [f"{folder.parent.name}/{folder.name}" for folder in folders]


def _place(layer: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def _layer(module: str) -> str:
    """ "model.layers.3" of all that is in it; of a module outside the layers its name."""
    found = _LAYER.fullmatch(module)
    return found[1] if found else module


def _report(
    spec: AnalyzeSpec, planned: Plan, total: _Sums, layers: Mapping[str, _Sums], modules: Mapping[str, Any]
) -> dict[str, Any]:
    names = list(spec.names) or _names([source.header.folder for source in planned.sources])
    adapters = [
        {
            "name": name,
            "digest": source.digest,
            "weight": source.weight,
            "weights": dict(source.weights),
            "rank": max(item.rank for item in source.header.modules.values()),
            "modules": len(source.header.modules),
        }
        for name, source in zip(names, planned.sources, strict=True)
    ]
    return {
        "base_model": planned.base_model_name,
        "base_digest": planned.base_digest,
        "density": spec.analyze.density,
        "adapters": adapters,
        "total": _said(total, spec),
        "layers": {name: _said(layers[name], spec) for name in sorted(layers, key=_place)},
        "modules": dict(modules),
    }


def _said(sums: _Sums, spec: AnalyzeSpec) -> dict[str, Any]:
    """Sums as the report has them; null where there is nothing to divide by."""
    squares = np.diagonal(sums.inner)
    said = {
        "norms": _plain(np.sqrt(squares)),
        "cosines": _plain(_ratio(sums.inner, np.sqrt(np.outer(squares, squares))).clip(-1, 1)),
        "norm_ratio": _plain(np.sqrt(np.maximum(_ratio(sums.inner.sum(), squares.sum()), 0))),
    }
    if spec.base_model is not None:
        said["of_base"] = _plain(np.sqrt(_ratio(squares, sums.base)))
    if spec.analyze.signs:
        said["signs"] = {
            "conflicts": _plain(_ratio(sums.conflicts, sums.both)),
            "trim_loss": _plain(1 - _ratio(sums.kept, sums.energy)),
            "election_loss": _plain(1 - _ratio(sums.elected, sums.kept)),
        }
    return said


def _ratio(numerator: Wide, denominator: Wide) -> Wide:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Wide = np.where(denominator == 0, np.nan, np.asarray(numerator) / denominator)
    return found


def _plain(values: Wide) -> Any:
    """Numbers and lists for JSON, null for what is not finite."""
    if values.ndim:
        return [_plain(item) for item in values]
    return float(values) if np.isfinite(values) else None


def _write(spec: AnalyzeSpec, report: Mapping[str, Any]) -> None:
    with published(Path(spec.output)) as folder:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
        heat_maps.draw(report, folder)
