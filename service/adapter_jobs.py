"""Work on adapters that is left to workers: exports, analyses, searches, extractions, verifications."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from lora_engine.analysis_config import MAX_ADAPTERS as MAX_ANALYZED
from lora_engine.analysis_config import AnalyzeConfig
from lora_engine.exporting.config import ExportConfig, ExportSpec
from lora_engine.fields import bounded, bounded_values, to_mapping
from lora_engine.merging.config import MAX_WEIGHT, ExtractConfig, MergeConfig, WeightedAdapter
from lora_engine.merging.sources import Plan
from lora_engine.weight_search_config import SearchConfig
from service import adapters, base_models, datasets, jobs, sources
from service.db import Database
from service.errors import Invalid
from service.jobs import Idempotency
from service.models import Adapter, AdapterParent, BaseModel, Job
from service.settings import Settings
from service.sources import Source
from service.storage import Storage

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExportRequest(ExportConfig):
    """The body of ``POST /adapters/{id}/export``: into which format (`ExportConfig`), and with which weight.

    Attributes:
        weight: of every module of the adapter that `weights` does not name.
        weights: of the modules so named.
        others: adapters on the same base model that are put together with it.
        merge: how: added up exactly, or into the weights of a whole model by one of the nonlinear methods.
        name: of the job and of its artifact.
    """

    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    others: Sequence[Source] = ()
    merge: MergeConfig = field(default_factory=MergeConfig)
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [WeightedAdapter(path=str(index)) for index in range(1 + len(self.others))]
        ExportSpec(base_model="", adapters=named, output="", export=self, merge=self.merge)  # checks what goes together
        bounded(self, "weight", -MAX_WEIGHT, MAX_WEIGHT)
        bounded_values(self, "weights", -MAX_WEIGHT, MAX_WEIGHT)
        jobs.check_name(self.name)
        sources.check(export_sources("", self), field="others")


@dataclass(frozen=True, kw_only=True)
class SearchRequest(SearchConfig):
    """The body of ``POST /adapters/search-weights``: how to search (`SearchConfig`), and what for.

    Attributes:
        adapters: ids or aliases of the adapters whose weights are wanted, all on one base model, none of them twice.
        dataset: an id of a ready dataset of the owner, with examples of the task that the stack is wanted for.
        name: of the job and of its adapter.
    """

    adapters: Sequence[str]
    dataset: str
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sources.check([Source(adapter=adapter) for adapter in self.adapters])
        jobs.check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class AnalyzeRequest(AnalyzeConfig):
    """The body of ``POST /adapters/analyze``: what to look at (`AnalyzeConfig`), and in what.

    Attributes:
        adapters: all on one base model, with the weights they would be merged with.
        name: of the job and of its artifact.
    """

    adapters: Sequence[Source]
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sources.check(self.adapters, MAX_ANALYZED)
        jobs.check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ExtractRequest(ExtractConfig):
    """The body of ``POST /adapters/extract``: how to approximate (`ExtractConfig`), and what.

    Attributes:
        base_model, tuned_model: ids of the catalogue, of one architecture; the adapter is on `base_model`.
        name: of the job and of its adapter.
    """

    base_model: str
    tuned_model: str
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        jobs.check_name(self.name)


def check(
    database: Database,
    storage: Storage,
    settings: Settings,
    owner_id: str,
    named: Sequence[Source],
    config: MergeConfig,
    idempotency: Idempotency | None = None,
    *,
    param: str = "adapters",
    first: int = 0,
    fits: Callable[[BaseModel, Plan], None] | None = None,
) -> None:
    """What the headers of the adapters tell about a request, before it is submitted; nothing if it was before.

    `fits` says what a base model and the plan of a stack on it tell besides.

    Raises:
        NotFound, Invalid: an adapter is not the owner's, or they are on different base models.
        SpecError, AdapterError: they cannot be put together so.
    """
    with database.reading() as session:
        if jobs.replayed(session, owner_id, idempotency):
            return
        found = sources.resolve(session, owner_id, named, param=param, first=first)
        base = base_models.get(session, found[0].base_model_id)
    also = None if fits is None else partial(fits, base)
    sources.check_headers(storage, settings, config, named, found, also)


def submit_export(
    session: Session, owner_id: str, adapter_id: str, request: ExportRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue an export. Returns the job and whether it is new.

    Raises:
        NotFound, Invalid: an adapter is not the owner's, or they are on different base models.
    """

    def build() -> Job:
        first = adapters.get(session, owner_id, adapter_id, keep=True)
        asked = export_sources(first.id, request)
        found = sources.resolve(session, owner_id, asked, keep=True, param="others", first=-1)
        return Job(
            kind="export",
            name=request.name or f"{first.name} as {request.format}",
            spec={
                "export": to_mapping(_part(ExportConfig, request)),
                "merge": _given(request.merge),
                "adapters": sources.spelled(asked, found),
            },
            base_model_id=first.base_model_id,
            parents=sources.lineage(asked, found),
        )

    return jobs.submit(session, owner_id, build, idempotency)


def submit_search(
    session: Session, owner_id: str, request: SearchRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue a search for weights. Returns the job and whether it is new.

    Raises:
        NotFound, Conflict: an adapter or the dataset is not the owner's, or the dataset is not ready.
        Invalid: the adapters are on different base models, or one is there twice.
    """

    def build() -> Job:
        asked = [Source(adapter=adapter) for adapter in request.adapters]
        found = sources.resolve(session, owner_id, asked, keep=True)
        _check_different(found)
        datasets.ready(session, owner_id, request.dataset)
        return Job(
            kind="search",
            name=request.name or f"weights of {len(found)}",
            spec={"search": to_mapping(_part(SearchConfig, request)), "adapters": sources.spelled(asked, found)},
            base_model_id=found[0].base_model_id,
            dataset_id=request.dataset,
            parents=sources.lineage(asked, found),
        )

    return jobs.submit(session, owner_id, build, idempotency)


def submit_analysis(
    session: Session, owner_id: str, request: AnalyzeRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue a report on how adapters interfere. Returns the job and whether it is new.

    Raises:
        NotFound: an adapter is not the owner's.
        Invalid: they are on different base models, or one is there twice.
    """

    def build() -> Job:
        found = sources.resolve(session, owner_id, request.adapters, keep=True)
        _check_different(found)
        return Job(
            kind="analyze",
            name=request.name or f"analysis of {len(found)}",
            spec={
                "analyze": to_mapping(_part(AnalyzeConfig, request)),
                "adapters": sources.spelled(request.adapters, found),
            },
            base_model_id=found[0].base_model_id,
            parents=sources.lineage(request.adapters, found),
        )

    return jobs.submit(session, owner_id, build, idempotency)


def submit_extraction(
    session: Session, owner_id: str, request: ExtractRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue the extraction of an adapter from two full models. Returns the job and whether it is new.

    Raises:
        Invalid: a model that is not in the catalogue, or two with other layers.
    """

    def build() -> Job:
        base = base_models.catalogued(session, request.base_model)
        tuned = base_models.catalogued(session, request.tuned_model, "tuned_model")
        if tuned.digest == base.digest:
            raise Invalid("tuned_model: its files are those of the base model", param="tuned_model")
        if tuned.modules != base.modules:
            raise Invalid("tuned_model: its layers are not those of the base model", param="tuned_model")
        return Job(
            kind="extract",
            name=request.name or f"{tuned.id} as an adapter",
            spec={"tuned_model": tuned.id, **to_mapping(_part(ExtractConfig, request))},
            base_model_id=base.id,
        )

    return jobs.submit(session, owner_id, build, idempotency)


def submit_verification(
    session: Session, owner_id: str, adapter_id: str, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue a check of a merge's certificate against its sources. Returns the job and whether it is new.

    Raises:
        NotFound: the adapter, or one that it was made of, is not there any more.
        Invalid: it was not merged.
    """

    def build() -> Job:
        made = adapters.get(session, owner_id, adapter_id, keep=True)
        parents = adapters.parents(session, [made.job_id]).get(made.job_id, [])
        if made.kind not in ("merge", "search"):
            message = f"{made.id} is not the result of a merge; there is nothing to compare it with"
            raise Invalid(message, param="adapter_id", code="not_merged")
        asked = [Source(adapter=parent.parent_id) for parent in parents]
        found = sources.resolve(session, owner_id, asked, keep=True)
        kept = [made, *sources.distinct(found)]
        return Job(
            kind="verify",
            name=f"certificate of {made.name}",
            spec={"adapter": made.id, "adapters": [{"adapter": row.id} for row in kept[1:]]},
            base_model_id=made.base_model_id,
            parents=[AdapterParent(position=index, parent_id=row.id, weight=1.0) for index, row in enumerate(kept)],
        )

    return jobs.submit(session, owner_id, build, idempotency)


def export_sources(adapter_id: str, request: ExportRequest) -> list[Source]:
    """The adapter of the path, then the others."""
    return [Source(adapter=adapter_id, weight=request.weight, weights=request.weights), *request.others]


def _part(cls: type[T], request: Any) -> T:
    """The engine's share of a request."""
    return cls(**{item.name: getattr(request, item.name) for item in fields(cls)})  # type: ignore[arg-type]


def _given(config: MergeConfig) -> dict[str, Any]:
    """The options that were given: an export takes fewer than a method has."""
    return {name: value for name, value in to_mapping(config).items() if value is not None}


def _check_different(found: Sequence[Adapter]) -> None:
    ids = [adapter.id for adapter in found]
    for index, adapter_id in enumerate(ids):
        if adapter_id in ids[:index]:
            raise Invalid(f"adapters[{index}]: the same adapter as adapters[{ids.index(adapter_id)}]", param="adapters")
