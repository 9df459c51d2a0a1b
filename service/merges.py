"""Merges: several adapters into one. Known by their recipe, checked from headers, small stacks made at once.

A recipe that was merged before is answered with the adapter that it gave. Otherwise all that can be wrong is found
from configs and headers, before a tensor moves. Stacks of a few megabytes are made within the request; their job is
taken by this process, so that a worker gets it should the process die on the way.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.merging import recipe
from lora_engine.merging.config import MergeConfig, check_count
from service import adapters, base_models, jobs, leases, sources, stacking
from service.db import Database
from service.jobs import Idempotency
from service.models import UNDER_WAY, Adapter, Job
from service.settings import Settings
from service.sources import Source
from service.stacking import Stack
from service.storage import Storage

_AT_ONCE = threading.BoundedSemaphore(2)  # stacks within a request: each holds its sources and its result in memory


@dataclass(frozen=True, kw_only=True)
class MergeRequest(MergeConfig):
    """The body of ``POST /adapters/merge``: how to merge (`MergeConfig`), and what.

    Attributes:
        adapters: the sources, all on one base model.
        name: of the job and of its adapter.
    """

    adapters: Sequence[Source]
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        jobs.check_name(self.name)
        sources.check(self.adapters)
        check_count(self.method, len({source.adapter for source in self.adapters}))

    @property
    def config(self) -> MergeConfig:
        return MergeConfig(**{item.name: getattr(self, item.name) for item in fields(MergeConfig)})


@dataclass(frozen=True)
class Answer:
    """A merge's job, and its adapter once there is one. `new`: made, or queued, by this very request."""

    job: Job
    adapter: Adapter | None
    new: bool


class _Slot:
    """The right to make a stack within the request, for the length of a `with` block."""

    def __init__(self, *, usable: bool) -> None:
        self._usable, self.held = usable, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.held:
            _AT_ONCE.release()

    def take(self) -> bool:
        """Whether it could be had; asking again changes nothing."""
        self.held = self.held or (self._usable and _AT_ONCE.acquire(blocking=False))
        return self.held


def merge(
    database: Database,
    storage: Storage,
    settings: Settings,
    owner_id: str,
    request: MergeRequest,
    idempotency: Idempotency | None = None,
) -> Answer:
    """The adapter of this recipe, or the job that makes it.

    Raises:
        NotFound, Invalid: an adapter is not the owner's, or they are on different base models.
        SpecError, AdapterError: what cannot be merged, told from configs and headers.
        NoSpace: there is no room for the result.
    """
    with database.reading() as session:
        if before := jobs.replayed(session, owner_id, idempotency):
            return _answer(session, before, new=False)
        found = sources.resolve(session, owner_id, request.adapters)
        # By id from here on: an alias may move on meanwhile.
        request = replace(request, adapters=sources.pinned(request.adapters, found))
        base = base_models.get(session, found[0].base_model_id)
        digest = _recipe_digest(request, found, base.digest)
        known = _known(session, owner_id, digest) is not None
    if not known:
        sources.check_headers(storage, settings, request.config, request.adapters, found)
    with _Slot(usable=_is_small(settings, request, found)) as slot:
        with database.unit_of_work() as session:
            build = _builder(session, owner_id, request, digest, slot, settings.lease_seconds)
            job, created = jobs.submit(session, owner_id, build, idempotency)
            if not created or not slot.held:
                return _answer(session, job, new=created)
        asked = Stack(request.config, request.adapters, found)
        stacking.make(database, storage, settings, leases.taken(job), asked)
    with database.reading() as session:
        return _answer(session, session.get_one(Job, job.id), new=True)


def _builder(
    session: Session, owner_id: str, request: MergeRequest, digest: str, slot: _Slot, lease_seconds: float
) -> Callable[[], Job]:
    """What `jobs.submit` calls; a new job is this process's own if there is a slot for it."""

    def build() -> Job:
        known = _known(session, owner_id, digest)
        if known is not None:
            return known
        found = sources.resolve(session, owner_id, request.adapters, keep=True)
        job = Job(
            kind="merge",
            name=request.name or f"merge of {len(found)}",
            spec={
                "method": request.method,
                "adapters": sources.spelled(request.adapters, found),
                **request.options,
            },
            base_model_id=found[0].base_model_id,
            recipe_digest=digest,
            parents=sources.lineage(request.adapters, found),
        )
        if slot.take():
            leases.take(job, leases.IN_REQUEST, lease_seconds)
        return job

    return build


def _known(session: Session, owner_id: str, digest: str) -> Job | None:
    """The job of this recipe that has left its adapter, or that is on its way to one."""
    adapter = adapters.by_recipe(session, owner_id, digest)
    if adapter is not None:
        return session.get_one(Job, adapter.job_id)
    rows = select(Job).where(Job.owner_id == owner_id, Job.recipe_digest == digest, Job.state.in_(UNDER_WAY))
    return session.scalar(rows)


def _recipe_digest(request: MergeRequest, found: Sequence[Adapter], base_digest: str) -> str:
    weighted = [
        (adapter.digest, source.weight, source.weights) for source, adapter in zip(request.adapters, found, strict=True)
    ]
    return recipe.digest(recipe.recipe(request.config, weighted, base_digest))


def _is_small(settings: Settings, request: MergeRequest, found: Sequence[Adapter]) -> bool:
    size = sum(file["size"] for adapter in sources.distinct(found) for file in adapter.files)
    return request.method == "stack" and size <= settings.max_merge_in_request_bytes


def _answer(session: Session, job: Job, *, new: bool) -> Answer:
    adapter = adapters.of_jobs(session, [job.id]).get(job.id)
    session.refresh(job)
    return Answer(job, adapter if adapter is not None and adapter.deleted_at is None else None, new)
