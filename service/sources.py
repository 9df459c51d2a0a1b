"""The adapters that a request names, with their weights: found, kept while it runs, and recorded as lineage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from lora_engine.adapter_header import inspect
from lora_engine.errors import SpecError
from lora_engine.fields import MAX_NAMES, bounded, bounded_values, to_mapping
from lora_engine.merging.config import MAX_WEIGHT, MergeConfig
from lora_engine.merging.sources import Plan, plan
from lora_engine.merging.sources import Source as MergeSource
from service import adapters, scratch
from service.errors import Invalid, NotFound
from service.models import Adapter, AdapterParent
from service.settings import Settings
from service.storage import Storage

MAX_SOURCES = 64


@dataclass(frozen=True, kw_only=True)
class Source:
    """One adapter and the weight its delta gets, of any sign.

    Attributes:
        adapter: an id or an alias.
        weight: of every module that `weights` does not name.
        weights: of the modules so named: "q_proj", "layers.[0-7].*" or a full name. The last entry that fits counts.
    """

    adapter: str
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounded(self, "weight", -MAX_WEIGHT, MAX_WEIGHT)
        bounded_values(self, "weights", -MAX_WEIGHT, MAX_WEIGHT)


def check(sources: Sequence[Source], limit: int = MAX_SOURCES, field: str = "adapters") -> None:
    """Raises SpecError for none or too many, or for too many entries of weights in all."""
    if not 1 <= len(sources) <= limit:
        raise SpecError(f"{field}: expected between 1 and {limit} adapters", field=field)
    if sum(len(source.weights) for source in sources) > MAX_NAMES:
        raise SpecError(f"{field}: expected at most {MAX_NAMES} entries of weights in all", field=field)


def resolve(
    session: Session,
    owner_id: str,
    sources: Sequence[Source],
    *,
    keep: bool = False,
    param: str = "adapters",
    first: int = 0,
) -> list[Adapter]:
    """The adapters, in this order; with `keep` nobody deletes them before this transaction ends.

    `param` and `first` say what the request calls them: "adapters[0]" is the first one. A negative number is that of
    the adapter in the request's path.

    Raises:
        NotFound: one of them is not the owner's.
        Invalid: they are on different base models.
    """
    named = enumerate(sources, first)
    found = [
        adapters.get(session, owner_id, source.adapter, keep=keep)
        if index < 0
        else _named(session, owner_id, source.adapter, f"{param}[{index}]", keep)
        for index, source in named
    ]
    for adapter in found:
        if adapter.base_model_id != found[0].base_model_id:
            raise Invalid(
                f"{param}: {found[0].id} is on the base model {found[0].base_model_id}, {adapter.id} on "
                f"{adapter.base_model_id}; choose adapters of one base model",
                param=param,
            )
    return found


def distinct(found: Sequence[Adapter]) -> list[Adapter]:
    """Each adapter once."""
    return list({adapter.id: adapter for adapter in found}.values())


def pinned(sources: Sequence[Source], found: Sequence[Adapter]) -> list[Source]:
    """The same by id."""
    return [replace(source, adapter=row.id) for source, row in zip(sources, found, strict=True)]


def lineage(sources: Sequence[Source], found: Sequence[Adapter]) -> list[AdapterParent]:
    """The rows that say what a job works on, and keep it from being deleted meanwhile."""
    return [
        AdapterParent(position=position, parent_id=adapter.id, weight=source.weight)
        for position, (source, adapter) in enumerate(zip(sources, found, strict=True))
    ]


def spelled(sources: Sequence[Source], found: Sequence[Adapter]) -> list[dict[str, Any]]:
    """For the job's spec: ids in the place of aliases, which may move on."""
    return [to_mapping(source) for source in pinned(sources, found)]


def check_headers(
    storage: Storage,
    settings: Settings,
    config: MergeConfig,
    sources: Sequence[Source],
    found: Sequence[Adapter],
    also: Callable[[Plan], None] | None = None,
) -> None:
    """Everything that putting them together can be refused for, before a tensor moves.

    `also` checks more of the plan while configs, lineages and headers are there.

    Raises:
        SpecError, AdapterError: what cannot be.
        ObjectMissing, ObjectDamaged: a file could not be had.
    """
    with scratch.folder(settings) as folder:
        for adapter in distinct(found):
            adapters.fetch_headers(storage, adapter, folder / adapter.id)
        plan = planned(config, sources, found, folder)
        if also is not None:
            also(plan)


def planned(config: MergeConfig, sources: Sequence[Source], found: Sequence[Adapter], folder: Path) -> Plan:
    """A merge of the adapters whose files, or headers, lie below `folder` by their ids.

    Raises:
        SpecError, AdapterError: whatever a merge can be refused for.
    """
    headers = {adapter.id: inspect(folder / adapter.id) for adapter in found}
    weighted = (
        MergeSource(headers[adapter.id], adapter.digest, source.weight, source.weights)
        for source, adapter in zip(sources, found, strict=True)
    )
    return plan(config, list(weighted))


def _named(session: Session, owner_id: str, name: str, param: str, keep: bool) -> Adapter:
    try:
        return adapters.get(session, owner_id, name, keep=keep)
    except NotFound as error:
        raise NotFound(f"{param}: {error.message}", param=param) from None
