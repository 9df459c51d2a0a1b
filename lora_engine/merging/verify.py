"""Whether a merged adapter is what its certificate says, computed anew from the adapters it was made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import strict_json
from lora_engine.adapter_header import LINEAGE, Header, inspect
from lora_engine.adapter_header import digest as adapter_digest
from lora_engine.errors import AdapterError
from lora_engine.fields import from_mapping
from lora_engine.merging import certificate
from lora_engine.merging.certificate import ModuleCertificate, Norms, exact_norms
from lora_engine.merging.config import MergeConfig, WeightedAdapter
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.merge import exact_results
from lora_engine.merging.recipe import digest
from lora_engine.merging.sources import ModulePlan, Part, Plan, Source, plan

_TOLERANCE = 1e-5  # of a relative error
_COMPARED = ("frobenius", "spectral", "sum_frobenius", "sum_spectral")


def verify(folder: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Compare a merged adapter with its recipe done again, without writing anything.

    Args:
        folder: of the merged adapter, with its `lineage.json` and `certificate.json`.
        sources: folders of the adapters it was made of, in any order; they are told by their digests.

    Returns:
        `verified`; `faults`, a text for each module or fact that is not as certified; `modules`, their number;
        `totals`, the relative errors as measured now; `certified`, as the certificate has them.

    Raises:
        AdapterError: the folder has no recipe or certificate, or a source is missing or cannot be read.
    """
    lineage, certified = _document(folder / LINEAGE), _document(folder / certificate.FILE)
    merge = _plan(folder, lineage, sources)
    header = inspect(folder)
    faults = []
    if digest(merge.recipe) != lineage.get("recipe_digest") or digest(merge.recipe) != certified.get("recipe_digest"):
        faults.append("the recipe is not the one whose digest lineage.json and certificate.json have")
    faults += [f"{name}: is no module of the recipe" for name in sorted(set(header.modules) - set(merge.modules))]
    exact = exact_results(merge)
    measured = {name: _measured(merge, name, exact(name), header) for name in merge.modules}
    for name, item in measured.items():
        faults += _compared(name, item.to_mapping(), _object(_object(certified, "modules"), name))
    totals = certificate.totals(measured)
    faults += _compared("totals", totals, _object(certified, "totals"))
    return {
        "verified": not faults,
        "faults": faults,
        "modules": len(measured),
        "totals": {name: totals[name] for name in _COMPARED},
        "certified": {name: _object(certified, "totals").get(name) for name in _COMPARED},
    }


def _compared(name: str, measured: Mapping[str, Any], certified: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {key} is {measured[key]}, certified is {certified.get(key)}"
        for key in _COMPARED
        if not _near(measured[key], certified.get(key))
    ]


def _near(measured: float | None, certified: Any) -> bool:
    if measured is None or not isinstance(certified, float | int):
        return measured is certified
    return abs(measured - certified) <= _TOLERANCE * max(1.0, abs(certified))


def _plan(folder: Path, lineage: Mapping[str, Any], folders: Sequence[Path]) -> Plan:
    config, named = _recipe(folder, lineage)
    found = {adapter_digest(path): path for path in folders}
    missing = [digest for digest, _, _ in named if digest not in found]
    if missing:
        raise AdapterError(f"{folder.name}: was made of {', '.join(missing)} too; give all of its sources")
    return plan(config, [Source(inspect(found[digest]), digest, weight, weights) for digest, weight, weights in named])


def _recipe(folder: Path, lineage: Mapping[str, Any]) -> tuple[MergeConfig, list[tuple[str, float, dict[str, float]]]]:
    """The recipe of a lineage, which may have been altered by anyone."""
    recipe: Any = lineage.get("recipe")
    try:
        config = from_mapping(MergeConfig, {"method": recipe["method"], **recipe["options"]})
        named = [
            WeightedAdapter(path=item["digest"], weight=item["weight"], weights=dict(item["weights"]))
            for item in recipe["sources"]
        ]
        return config, [(item.path, item.weight, dict(item.weights)) for item in named]
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder.name}: {LINEAGE} has no recipe of a merge ({error})") from None


def _object(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that should be an object; anything else has nothing in it that could agree."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def _measured(merge: Plan, module: str, exact: Factors, header: Header) -> ModuleCertificate:
    item = merge.modules[module]
    written, weighted_sum = _written(module, item, header), load(module, item)
    return ModuleCertificate(
        exact=exact_norms(exact.B * exact.scale, exact.A),
        error=_distance(written, exact),
        weighted_sum=exact_norms(weighted_sum.B * weighted_sum.scale, weighted_sum.A),
        sum_error=_distance(written, weighted_sum),
        rounding=0.0,  # no part of what is compared
        ranks_before=item.rank,
        rank=written.scale.size,
    )


def _written(module: str, item: ModulePlan, header: Header) -> Factors:
    """What the file has; nothing of a module that was cut to rank 0."""
    parts: tuple[Part, ...] = ()
    if module in header.modules:
        found = header.modules[module]
        parts = (Part(header, "", 1.0, found.scaling, found.rank),)
    return load(module, ModulePlan(item.inputs, item.outputs, parts))


def _distance(written: Factors, exact: Factors) -> Norms:
    left = np.concatenate([written.B * written.scale, -exact.B * exact.scale], axis=1)
    return exact_norms(left, np.concatenate([written.A, exact.A]))


def _document(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.loads(path.read_bytes())
    except (OSError, strict_json.StrictJSONError) as error:
        raise AdapterError(f"{path.parent.name}: {path.name}: {error}; only merged adapters can be verified") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path.parent.name}: {path.name} is not an object")
    return found
