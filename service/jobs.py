"""Jobs as their owners see them: submitted, listed, cancelled. What workers do with them is in `leases`."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import case, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_engine.config import MAX_STACK_RANK, LoraConfig, TrainingConfig, check_held_out, to_mapping
from lora_engine.errors import SpecError
from lora_engine.target_modules import Module, targets
from service import adapters, base_models, datasets, events, queue
from service.db import now
from service.errors import Conflict, Invalid, NotFound
from service.models import Adapter, AdapterParent, BaseModel, IdempotencyKey, Job, new_id

MAX_SOURCES = 64


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """The body of ``POST /jobs``.

    Attributes:
        base_model: an id of the catalogue.
        dataset: an id of a ready dataset of the owner.
        validation_dataset: held-out examples; without it a share of `dataset` is held out.
        name: of the job and of its adapter; made from the base model's when left out.
    """

    base_model: str
    dataset: str
    validation_dataset: str | None = None
    name: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _check_name(self.name)
        check_held_out(self.training, self.validation_dataset)


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """One adapter of a merge and the weight its delta gets, of any sign."""

    adapter: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not -1e4 <= self.weight <= 1e4:
            raise SpecError("weight: must be at least -10000 and at most 10000", field="weight")


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """The body of ``POST /adapters/merge``.

    Attributes:
        adapters: the sources, all on one base model.
        method: "stack" concatenates along the rank and is exact.
        name: of the job and of its adapter.
    """

    adapters: Sequence[MergeSource]
    method: Literal["stack"] = "stack"
    name: str | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not 1 <= len(self.adapters) <= MAX_SOURCES:
            raise SpecError(f"adapters: expected between 1 and {MAX_SOURCES} adapters", field="adapters")
        sums: dict[str, float] = defaultdict(float)
        for source in self.adapters:
            sums[source.adapter] += source.weight
        if not any(sums.values()):
            raise SpecError("adapters: the weights cancel out, which leaves nothing to merge", field="adapters")


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """The client's key for one request, with the SHA-256 of what it asked."""

    key: str
    body_sha256: str


def submit_training(
    session: Session, owner_id: str, request: TrainingRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Check everything that can be checked without a device, then queue. Returns the job and whether it is new.

    Raises:
        Invalid: a field that cannot be; its `param` names it.
        NotFound, Conflict: no such dataset, or one that is still being validated.
    """

    def build() -> Job:
        base = _base_model(session, request.base_model)
        _check_modules(base, request.lora)
        _ready_dataset(session, owner_id, request.dataset, "dataset")
        if request.validation_dataset is not None:
            _ready_dataset(session, owner_id, request.validation_dataset, "validation_dataset")
        return Job(
            kind="train",
            name=request.name or base.id,
            spec={"lora": to_mapping(request.lora), "training": to_mapping(request.training)},
            base_model_id=base.id,
            dataset_id=request.dataset,
            validation_dataset_id=request.validation_dataset,
        )

    return _submit(session, owner_id, build, idempotency)


def submit_merge(
    session: Session, owner_id: str, request: MergeRequest, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Queue a merge of the owner's adapters; its result is an adapter like any other, with its parents recorded.

    Raises:
        NotFound: one of them is not the owner's.
        Conflict: they are on different base models.
    """

    def build() -> Job:
        sources = [adapters.get(session, owner_id, source.adapter, keep=True) for source in request.adapters]
        _one_base_model(sources)
        rank = sum({source.id: source.rank for source in sources}.values())
        if rank > MAX_STACK_RANK:
            message = f"adapters: the ranks add up to {rank}; a stack has at most {MAX_STACK_RANK}"
            raise Invalid(message, param="adapters")
        return Job(
            kind="merge",
            name=request.name or f"merge of {len(sources)}",
            spec={"method": request.method, "adapters": [to_mapping(source) for source in request.adapters]},
            base_model_id=sources[0].base_model_id,
        )

    job, created = _submit(session, owner_id, build, idempotency)
    if created:
        for position, source in enumerate(request.adapters):
            parent = AdapterParent(job_id=job.id, position=position, parent_id=source.adapter, weight=source.weight)
            session.add(parent)
        session.flush()
    return job, created


def get(session: Session, owner_id: str, job_id: str) -> Job:
    """Raises NotFound, also for another owner's job."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.owner_id == owner_id))
    if job is None:
        raise NotFound(f"there is no job {job_id[:80]!r}")
    return job


def page(
    session: Session,
    owner_id: str,
    after: str | None,
    limit: int,
    *,
    kind: str | None = None,
    states: Sequence[str] | None = None,
) -> tuple[list[Job], bool]:
    """The owner's jobs, newest first, below the id `after`; and whether there are more."""
    rows = select(Job).where(Job.owner_id == owner_id)
    if after is not None:
        rows = rows.where(Job.id < after)
    if kind is not None:
        rows = rows.where(Job.kind == kind)
    if states is not None:
        rows = rows.where(Job.state.in_(states))
    found = list(session.scalars(rows.order_by(Job.id.desc()).limit(limit + 1)))
    return found[:limit], len(found) > limit


def cancel(session: Session, owner_id: str, job_id: str) -> Job:
    """A queued job ends at once; a running one stops between two steps, and never succeeds any more (T9).

    Raises:
        NotFound: no such job of this owner.
        Conflict: it has ended already.
    """
    queued = Job.state == "queued"
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.owner_id == owner_id)
        .where(Job.state.in_(("queued", "claimed", "running", "cancelling")))
        .values(
            cancel_requested_at=func.coalesce(Job.cancel_requested_at, now()),
            state=case((queued, "cancelled"), else_="cancelling"),
            finished_at=case((queued, now()), else_=None),
        )
        .returning(Job.state)
        .execution_options(synchronize_session=False)
    )
    state = session.scalar(statement)
    job = get(session, owner_id, job_id)
    session.refresh(job)
    if state is None:
        raise Conflict(
            f"the job has already {'been ' if job.state == 'cancelled' else ''}{job.state}", code="job_ended"
        )
    events.append(session, job_id, "Cancelled" if state == "cancelled" else "Cancel requested")
    return job


def _submit(
    session: Session, owner_id: str, build: Callable[[], Job], idempotency: Idempotency | None
) -> tuple[Job, bool]:
    if idempotency is not None and (known := _replay(session, owner_id, idempotency)):
        return known, False
    try:
        with session.begin_nested():
            job = build()
            job.id, job.owner_id = new_id("job"), owner_id
            session.add(job)
            session.flush()
            if idempotency is not None:
                session.add(
                    IdempotencyKey(
                        owner_id=owner_id, key=idempotency.key, body_sha256=idempotency.body_sha256, job_id=job.id
                    )
                )
                session.flush()
    except IntegrityError:
        # The same key was accepted by another request while this one waited for it to commit.
        if idempotency is not None and (known := _replay(session, owner_id, idempotency)):
            return known, False
        raise
    events.append(session, job.id, "Queued")
    queue.enqueue(session, job.id)
    return job, True


def _replay(session: Session, owner_id: str, idempotency: Idempotency) -> Job | None:
    row = session.get(IdempotencyKey, (owner_id, idempotency.key))
    if row is None:
        return None
    if row.body_sha256 != idempotency.body_sha256:
        raise Invalid("this Idempotency-Key was used for another request; use a new key", code="idempotency_mismatch")
    return get(session, owner_id, row.job_id)


def _base_model(session: Session, base_model_id: str) -> BaseModel:
    try:
        return base_models.get(session, base_model_id)
    except NotFound:
        raise Invalid(
            f"base_model: {base_model_id[:80]!r} is not in the catalogue; GET /base-models lists what is",
            param="base_model",
        ) from None


def _check_modules(base: BaseModel, lora: LoraConfig) -> None:
    try:
        targets([Module(**module) for module in base.modules], lora)
    except SpecError as error:
        raise Invalid(error.message, param=error.field) from None


def _ready_dataset(session: Session, owner_id: str, dataset_id: str, param: str) -> None:
    try:
        dataset = datasets.get(session, owner_id, dataset_id, keep=True)
    except NotFound as error:
        raise NotFound(f"{param}: {error.message}", param=param) from None
    if dataset.status != "ready":
        raise Conflict(f"{param}: is still being validated; wait until its status is ready", param=param)


def _one_base_model(sources: Sequence[Adapter]) -> None:
    base_ids = sorted({source.base_model_id for source in sources})
    if len(base_ids) > 1:
        raise Conflict(f"adapters: they are on different base models: {', '.join(base_ids)}", param="adapters")


def _check_name(name: str | None) -> None:
    if name is None:
        return
    allowed = all(character.isalnum() or character in " ._-" for character in name)
    if not 1 <= len(name) <= 100 or not allowed or not name.strip():
        raise SpecError("name: 1 to 100 letters, digits, spaces, dots, dashes or underscores", field="name")
