"""Jobs as their owners see them: submitted, listed, cancelled. What workers do with them is in `leases`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import ColumnElement, and_, case, delete, func, insert, not_, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, load_only

from lora_engine import failpoints
from lora_engine.config import LoraConfig, TrainingConfig, check_held_out, to_mapping
from lora_engine.errors import SpecError
from lora_engine.target_modules import Module, targets
from service import base_models, datasets, endings, events, leases, queue, quotas, traces
from service.db import newest, now
from service.errors import Conflict, Invalid, NotFound
from service.models import ACTIVE, Adapter, Artifact, BaseModel, IdempotencyKey, Job, new_id

Status = Literal["queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
_STOPPABLE = ("queued", "claimed", "running")
# Put together once, as clients ask for single jobs again and again.
_WITH_RESULT = (
    select(Job, Adapter, Artifact)
    .outerjoin(Adapter, Adapter.job_id == Job.id)
    .outerjoin(Artifact, Artifact.job_id == Job.id)
    .options(load_only(Adapter.id, Adapter.deleted_at, Adapter.metrics))
    .options(load_only(Artifact.id, Artifact.deleted_at, Artifact.metrics))
)


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
        check_name(self.name)
        check_held_out(self.training, self.validation_dataset)


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
        base = base_models.catalogued(session, request.base_model)
        _check_modules(base, request.lora)
        datasets.ready(session, owner_id, request.dataset, "dataset")
        if request.validation_dataset is not None:
            datasets.ready(session, owner_id, request.validation_dataset, "validation_dataset")
        return Job(
            kind="train",
            name=request.name or base.id,
            spec={"lora": to_mapping(request.lora), "training": to_mapping(request.training)},
            base_model_id=base.id,
            dataset_id=request.dataset,
            validation_dataset_id=request.validation_dataset,
        )

    return submit(session, owner_id, build, idempotency)


def get(session: Session, owner_id: str, job_id: str) -> Job:
    """Raises NotFound, also for another owner's job."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.owner_id == owner_id))
    if job is None:
        raise NotFound(f"there is no job {job_id[:80]!r}")
    return job


def with_result(session: Session, owner_id: str, job_id: str) -> tuple[Job, Adapter | None, Artifact | None]:
    """`get`, and what the job has left, be it deleted: by one query."""
    row = session.execute(_WITH_RESULT.where(Job.id == job_id, Job.owner_id == owner_id)).first()
    if row is None:
        raise NotFound(f"there is no job {job_id[:80]!r}")
    return row[0], row[1], row[2]


def page(
    session: Session,
    owner_id: str,
    after: str | None,
    limit: int,
    *,
    kind: str | None = None,
    status: Status | None = None,
) -> tuple[list[Job], bool]:
    """The owner's jobs, newest first, below the id `after`; and whether there are more."""
    rows = select(Job).where(Job.owner_id == owner_id)
    if kind is not None:
        rows = rows.where(Job.kind == kind)
    if status is not None:
        rows = rows.where(_has_status(status))
    return newest(session, rows, Job.id, after, limit)


def status(job: Job) -> Status:
    """The state as its owner sees it."""
    if job.pause_requested_at is not None and job.state in _STOPPABLE:
        return "pausing"
    return "running" if job.state in ACTIVE else job.state  # type: ignore[return-value]


def _has_status(status: Status) -> ColumnElement[bool]:
    """What `status` says, as a condition."""
    pausing = Job.pause_requested_at.is_not(None) & Job.state.in_(_STOPPABLE)
    if status == "pausing":
        return pausing
    return Job.state.in_(ACTIVE if status == "running" else (status,)) & not_(pausing)


def pause(session: Session, owner_id: str, job_id: str) -> Job:
    """A queued job rests at once; a running one after a checkpoint (T12), and stays down until it is resumed.

    It may still succeed, if it was about to. Asked for again, nothing changes.

    Raises:
        NotFound: no such job of this owner.
        Conflict: it has ended already, or is being cancelled.
    """
    job = _locked(session, owner_id, job_id)
    if job.state not in ("paused", *_STOPPABLE):
        raise _over(job)
    if job.pause_requested_at is None:
        job.pause_requested_at = now()
        job.state = "paused" if job.state == "queued" else job.state
        events.append(session, job_id, "Paused" if job.state == "paused" else "Pause requested")
        session.refresh(job)
    return job


def resume(session: Session, owner_id: str, job_id: str) -> Job:
    """Back into the queue, from where it goes on at its newest checkpoint. Of a job that runs, nothing changes.

    Raises:
        NotFound: no such job of this owner.
        Conflict: it has ended already, or is being cancelled.
    """
    job = _locked(session, owner_id, job_id)
    if job.state not in ("paused", *_STOPPABLE):
        raise _over(job)
    if job.pause_requested_at is not None:
        job.pause_requested_at = None
        if job.state == "paused":
            job.state, job.run_after, job.announced_at = "queued", now(), now()
            queue.enqueue(session, job_id)
        events.append(session, job_id, "Resumed")
        session.refresh(job)
    return job


def prioritise(session: Session, job_id: str, priority: int) -> Job:
    """For operators: a lower number runs first, and makes a training of a higher one give way.

    Raises NotFound.
    """
    changed = update(Job).where(Job.id == job_id).values(priority=priority).returning(Job.id)
    if session.scalar(changed.execution_options(synchronize_session=False)) is None:
        raise NotFound(f"there is no job {job_id[:80]!r}")
    return session.get_one(Job, job_id, populate_existing=True)


def cancel(session: Session, owner_id: str, job_id: str) -> Job:
    """A queued or paused job ends at once; a running one between two steps, and never succeeds any more (T9).

    At once too ends a merge that a request works on: nobody could tell its lease from that of a process that died.
    Asked for again, nothing changes.

    Raises:
        NotFound: no such job of this owner.
        Conflict: it has ended already.
    """
    in_request = and_(Job.state == "running", Job.kind == "merge", Job.worker_id == leases.IN_REQUEST)
    ends = or_(Job.state.in_(("queued", "paused")), in_request)
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.owner_id == owner_id)
        .where(Job.state.in_(("paused", *_STOPPABLE)))
        .values(
            cancel_requested_at=func.coalesce(Job.cancel_requested_at, now()),
            state=case((ends, "cancelled"), else_="cancelling"),
            finished_at=case((ends, now()), else_=None),
            lease_until=case((ends, None), else_=Job.lease_until),
            worker_id=case((ends, None), else_=Job.worker_id),
        )
        .returning(Job.state)
        .execution_options(synchronize_session=False)
    )
    state = session.scalar(statement)
    job = get(session, owner_id, job_id)
    session.refresh(job)
    if state == "cancelled":
        endings.tell(session, job_id, "Cancelled")
    elif state == "cancelling":
        events.append(session, job_id, "Cancel requested")
    elif job.state != "cancelling":
        raise _over(job)
    return job


def _locked(session: Session, owner_id: str, job_id: str) -> Job:
    """`get`, and nobody else changes the row until the end of the transaction."""
    get(session, owner_id, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)


def _over(job: Job) -> Conflict:
    if job.state == "cancelling":
        return Conflict("the job is being cancelled", code="job_ended")
    return Conflict(f"the job has already {'been ' if job.state == 'cancelled' else ''}{job.state}", code="job_ended")


def submit(
    session: Session, owner_id: str, build: Callable[[], Job], idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Accept what `build` makes: a new job, or one that there is already and that answers the same request.

    Returns the job and whether it is new. A key that was used before answers with its job, whatever else has changed.
    """
    for last_try in (False, True):
        if known := replayed(session, owner_id, idempotency):
            return known, False
        try:
            with session.begin_nested():
                job, created = _accept(session, owner_id, build(), idempotency)
            break
        except IntegrityError:
            # The same key or the same recipe was accepted by another request while this one waited for it to commit.
            if last_try:
                raise
    if created and job.state == "queued":
        events.first(session, job, "Queued")
        queue.enqueue(session, job.id)
    failpoints.reach("submit.before_commit")
    return job, created


def replayed(session: Session, owner_id: str, idempotency: Idempotency | None) -> Job | None:
    """The job that a request with this key was answered with.

    Raises:
        Invalid: that was another request.
    """
    row = session.get(IdempotencyKey, (owner_id, idempotency.key)) if idempotency is not None else None
    if row is None or idempotency is None:
        return None
    if row.body_sha256 != idempotency.body_sha256:
        raise Invalid("this Idempotency-Key was used for another request; use a new key", code="idempotency_mismatch")
    return get(session, owner_id, row.job_id)


def forget_key(session: Session, job_id: str) -> None:
    """Let the request that made this job be made again."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.job_id == job_id))


def _accept(session: Session, owner_id: str, job: Job, idempotency: Idempotency | None) -> tuple[Job, bool]:
    created = job.id is None
    if created:
        quotas.admit_job(session, owner_id)
        job.id, job.owner_id, job.trace_parent = new_id("job"), owner_id, traces.current()
        job.event_seq = 1 if job.state in (None, "queued") else 0  # its first event is written by `submit`
        session.add(job)
        session.flush()
    if idempotency is not None:
        row = {"key": idempotency.key, "body_sha256": idempotency.body_sha256, "job_id": job.id}
        session.execute(insert(IdempotencyKey.__table__).values(owner_id=owner_id, **row))  # type: ignore[arg-type]
    return job, created


def _check_modules(base: BaseModel, lora: LoraConfig) -> None:
    try:
        targets([Module(**module) for module in base.modules], lora)
    except SpecError as error:
        raise Invalid(error.message, param=error.field) from None


def check_name(name: str | None) -> None:
    """Raises SpecError unless it is one that can be shown and written anywhere, or none."""
    if name is None:
        return
    allowed = all(character.isalnum() or character in " ._-" for character in name)
    if not 1 <= len(name) <= 100 or not allowed or not name.strip():
        raise SpecError("name: 1 to 100 letters, digits, spaces, dots, dashes or underscores", field="name")
