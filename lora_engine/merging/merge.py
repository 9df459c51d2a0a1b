"""Several adapters into one, by any method, with a certificate of its error.

Everything is checked from configs and headers before a tensor is read. The bytes depend on the sources, their weights
and the options alone, not on the order of the sources.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from lora_engine.merging import result, sources
from lora_engine.merging.config import MergeSpec
from lora_engine.merging.stack import stack

Tell: TypeAlias = Callable[[int, int], None]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def merge(
    spec: MergeSpec,
    tell: Tell | None = None,
    *,
    lineage: Mapping[str, Any] = _NOTHING,
    files: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """Write the merged adapter to `spec.output` and return its metrics, as `result.publish` has them.

    Args:
        spec: what to merge, and how.
        tell: called with (done, total) as the work goes on; what it raises ends the merge, and nothing is left of it.
        lineage: further entries of `lineage.json`.
        files: texts by name to publish beside the adapter.

    Raises:
        SpecError: weights or options that cannot be.
        AdapterError: an adapter cannot be read, or they do not fit together.
    """
    plan = sources.plan(spec, sources.read(spec))
    results = stack(plan, tell or _silent)
    return result.publish(plan, results, Path(spec.output), lineage=lineage, files=files)


def _silent(_done: int, _total: int) -> None:
    """For whoever wants no progress."""
