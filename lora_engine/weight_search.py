"""The weights with which a stack of adapters has the lowest loss on examples of the task that it is wanted for.

LoRA Soups (arXiv 2410.13025) learns them by gradients, LoraHub (arXiv 2307.13269) without. Here the adapters stay
stacked beside the frozen base model, and one forward and backward pass gives loss and gradient of all weights. Every
adapter alone and their mean are tried first; the best weights of all that were tried, by the selection split, are kept,
so that on this split the result is never worse than these. What it is on examples that nothing was chosen by, the table
says.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine import base_files, base_model
from lora_engine.adapter_header import Header
from lora_engine.base_model import BaseModel
from lora_engine.errors import SpecError
from lora_engine.fields import to_mapping
from lora_engine.merging import sources
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from lora_engine.merging.sources import Source
from lora_engine.weight_search_climb import Count, Found, Row, Tell, climb, finite_or_none
from lora_engine.weight_search_config import SearchSpec
from lora_engine.weight_search_data import Splits, split
from lora_engine.weight_search_loss import StackLoss
from lora_engine.weight_search_stack import WeightedStack, group, pattern

REPORT = "weight_search.json"


@dataclass(frozen=True, slots=True)
class _Result:
    """Of a search by `sources`: `tested` are the losses on the test split of the beginnings and of the best."""

    sources: Sequence[Source]
    groups: Sequence[str]
    splits: Splits
    found: Found
    tested: Sequence[float]


def search(spec: SearchSpec, tell: Tell | None = None, base: BaseModel | None = None) -> dict[str, Any]:
    """Find the weights and write the stack with them to `spec.output`; the report, and the metrics of the merge.

    The report lies in the output too, as `weight_search.json`: losses of the base model alone, of each adapter, of
    their mean and of what was found, on the selection and the test split; the weights; the losses of the steps.

    Args:
        tell: called with (done, total), in evaluations and updates; what it raises ends the search, nothing is written.
        base: loaded already, and given back as it was; left out, `spec.base_model` is loaded.

    Raises:
        SpecError: the same adapter twice, or ranks that add up to more than can be stacked.
        AdapterError: an adapter cannot be read, or is not of this base model.
        DataError: a row that cannot be used, or too few of them.
        WouldNotFit, OutOfMemory: the longest example does not fit into memory.
        Diverged: with none of the adapters the loss is finite.
    """
    merged = MergeSpec(adapters=[WeightedAdapter(path=folder) for folder in spec.adapters], output=spec.output)
    named = sources.read(merged)
    sources.plan(merged, named)
    _check_different(named)
    base = base or _load(spec)
    splits = split(Path(spec.dataset), base, spec.search)
    count = Count(tell, len(named), spec.search.steps)
    headers = [source.header for source in named]
    with WeightedStack(base, headers, spec.search.per) as stack, StackLoss(stack, spec, splits) as losses:
        found = climb(losses, stack.shape, splits, spec.search, count)
        tested = [losses.loss(row.weights, splits.test) for row in count.over([*found.rows, found.best])]
        result = _Result(named, stack.groups, splits, found, tested)
    report = _report(spec, result)
    return report | _write(spec, result, report)


def _check_different(named: Sequence[Source]) -> None:
    digests = [source.digest for source in named]
    for index, digest in enumerate(digests):
        if (first := digests.index(digest)) < index:
            field = f"adapters[{index}]"
            raise SpecError(f"{field}: the same adapter as adapters[{first}]; name each of them once", field=field)


def _load(spec: SearchSpec) -> BaseModel:
    folder, config = Path(spec.base_model), spec.search
    if not folder.is_dir():
        raise SpecError(f"base_model: {folder} is not a folder", field="base_model")
    return base_model.load(
        folder,
        quantization=config.quantization,
        compute_dtype=config.compute_dtype,
        device=spec.device,
        digest=base_files.digest(folder),
    )


def _report(spec: SearchSpec, result: _Result) -> dict[str, Any]:
    found, splits = result.found, result.splits
    rows = [*found.rows, Row("found", found.best.weights, found.best.selection_loss)]
    losses = zip(rows, result.tested, strict=True)
    table: list[dict[str, Any]] = [
        {
            "name": row.name,
            "selection_loss": finite_or_none(row.selection_loss),
            "test_loss": finite_or_none(test_loss),
            "weights": _by_adapter(result, row),
        }
        for row, test_loss in losses
    ]
    singles = [index for index, row in enumerate(rows) if row.name == "single"]
    best = min(singles, key=lambda index: rows[index].rank)
    return {
        "dataset_sha256": splits.dataset.digest,
        "search": to_mapping(spec.search),
        "examples": {
            "search": len(splits.search),
            "selection": len(splits.selection),
            "test": len(splits.test),
            "duplicates": splits.duplicates,
        },
        "table": table,
        "best_single": result.sources[singles.index(best)].digest,
        "kept": found.best.name,
        "history": list(found.history),
        "skipped_steps": found.skipped,
    }


def _by_adapter(result: _Result, row: Row) -> dict[str, Any]:
    """Weights by digest; where every layer has its own, by layer."""
    weights = zip(result.sources, row.weights.tolist(), strict=True)
    whole = result.groups == ("",)
    return {source.digest: own[0] if whole else dict(zip(result.groups, own, strict=True)) for source, own in weights}


def _write(spec: SearchSpec, result: _Result, report: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the merge that writes the stack, as a merge with these weights would."""
    rows = zip(result.sources, result.found.best.weights.tolist(), strict=True)
    adapters = [
        WeightedAdapter(path=str(source.header.folder), **_weights(result.groups, source.header, row))
        for source, row in rows
    ]
    return merge(
        MergeSpec(adapters=adapters, output=spec.output),
        lineage={"weight_search": {name: report[name] for name in ("dataset_sha256", "search", "table")}},
        files={REPORT: json.dumps(report, indent=1, allow_nan=False) + "\n"},
    )


def _weights(groups: Sequence[str], header: Header, row: Sequence[float]) -> dict[str, Any]:
    """Of one adapter, as `WeightedAdapter` has them."""
    if groups == ("",):
        return {"weight": row[0]}
    own = {group(module, "layer") for module in header.modules}
    return {"weights": {pattern(name): weight for name, weight in zip(groups, row, strict=True) if name in own}}
