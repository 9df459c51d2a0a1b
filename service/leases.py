"""The worker's side of a job: claimed, kept by a lease, and ended, each by one compare-and-set.

`Job.epoch` is the fencing token. It rises at every claim, reap and release, so whoever holds an older one changes no
row: that raises `Fenced`, and the holder stops at once. The lease only licenses the reaper. All times are the
database's. A job that goes back rests (`paused`) if its owner asked for that, and is queued if not. State machine and
SQL follow what River, Oban, Solid Queue and Hatchet do, with completion fenced too.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Select, case, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service import endings, events, metrics, queue, quotas, remarks
from service.db import after_commit, now
from service.errors import TooMany
from service.models import ACTIVE, Adapter, AdapterParent, Artifact, Checkpoint, Job, new_id

IN_REQUEST = "the API"  # who holds a job that a request works on
MAX_LOSSES = 3  # losses in a row without a newer checkpoint, after which a job fails
Wish = Literal["cancel", "drain"]
_BACKOFF_SECONDS = 5.0
_MAX_BACKOFF_SECONDS = 300.0
_PAUSED_OR_QUEUED = case((Job.pause_requested_at.is_not(None), "paused"), else_="queued")


class Fenced(Exception):
    """Another epoch owns the job now, or it has ended: nothing of this attempt counts any more."""


@dataclass(frozen=True)
class Claim:
    """One attempt at one job. Every effect of the attempt carries `epoch`."""

    job_id: str
    owner_id: str
    kind: str
    epoch: int
    attempt: int
    trace_parent: str | None = None


@dataclass(frozen=True)
class Progress:
    """What an attempt has to tell since it last did; `points` go to the event log as metrics."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    eta_seconds: float | None = None
    points: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job leaves, with its files in the store: an adapter, which has a rank, or else an artifact."""

    prefix: str
    files: list[dict[str, Any]]
    digest: str
    rank: int | None
    metrics: dict[str, Any]
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", new_id(self.noun))

    @property
    def noun(self) -> Literal["adapter", "artifact"]:
        return "artifact" if self.rank is None else "adapter"


def result_prefix(claim: Claim, noun: Literal["adapter", "artifact"]) -> str:
    """Where an attempt puts the files of its result."""
    return f"{noun}s/{claim.job_id}/e{claim.epoch}"


def claim(session: Session, worker_id: str, device_slot: str, lease_seconds: float) -> Claim | None:
    """Take the next queued job (T3), or None when there is none or the device is in use."""
    # The CTE keeps PostgreSQL from updating more rows than LIMIT says; SQLite has one writer and ignores FOR UPDATE.
    free = claimable(Job.id).where(quotas.may_run(session))
    candidate = free.limit(1).with_for_update(skip_locked=True).cte("candidate")
    statement = (
        update(Job)
        .where(Job.id == candidate.c.id, Job.state == "queued")
        .values(
            state="claimed",
            epoch=Job.epoch + 1,
            attempt=Job.attempt + 1,
            worker_id=worker_id,
            device_slot=device_slot,
            lease_until=now() + lease_seconds,
            phase="claimed",
        )
        .returning(Job.id, Job.owner_id, Job.kind, Job.epoch, Job.attempt, Job.trace_parent)
        .execution_options(synchronize_session=False)
    )
    try:
        with session.begin_nested():
            row = session.execute(statement).first()
            if row is not None:
                quotas.admit_running(session, row.owner_id)
    except (IntegrityError, TooMany):  # uq_jobs_device_slot: one runner per device, by the database's word
        return None
    if row is None:
        return None
    events.append(session, row.id, f"Claimed by a worker (attempt {row.attempt})")
    return Claim(row.id, row.owner_id, row.kind, row.epoch, row.attempt, row.trace_parent)


def claimable(*columns: Any) -> Select[Any]:
    """Of the jobs that a worker may take, these columns; the next one comes first."""
    return (
        select(*columns)
        .where(Job.state == "queued", Job.run_after <= now(), Job.pause_requested_at.is_(None))
        .order_by(Job.priority, Job.run_after, Job.id)
    )


def take(job: Job, holder: str, lease_seconds: float) -> None:
    """Make a new job one that the process which submits it works on itself (T3 and T4 at once).

    Should that process die, the lease runs out and a worker gets the job.
    """
    job.state, job.epoch, job.attempt, job.worker_id = "running", 1, 1, holder
    job.lease_until, job.started_at = now() + lease_seconds, now()


def taken(job: Job) -> Claim:
    """The claim on a job that `take` was called with."""
    return Claim(job.id, job.owner_id, job.kind, job.epoch, job.attempt)


def hand_over(session: Session, claim: Claim) -> None:
    """What was taken has been prepared: the workers do the rest. Raises Fenced."""
    row = _change(session, claim, ACTIVE)
    if row.cancel_requested_at is not None:
        cancelled(session, claim)
        return
    _give_back(session, claim, "Queued", attempt=0, started_at=None)


def start(session: Session, claim: Claim) -> None:
    """The attempt begins its work (T4). Again after a commit whose answer was lost, nothing changes."""
    if _change(session, claim, ("claimed", "running")).state == "claimed":
        _change(session, claim, ("claimed",), state="running", started_at=func.coalesce(Job.started_at, now()))
        events.append(session, claim.job_id, "Running")


def renew(session: Session, claim: Claim, lease_seconds: float, progress: Progress | None = None) -> Wish | None:
    """Keep the lease and tell the progress (T5). Returns what somebody asks of the attempt.

    "drain": make a checkpoint if the work can, stop, and call `release`.

    Raises:
        Fenced: the job is no longer this attempt's.
    """
    told = progress or Progress()
    values: dict[str, Any] = {"lease_until": now() + lease_seconds}
    for name in ("phase", "step", "total_steps", "eta_seconds"):
        if getattr(told, name) is not None:
            values[name] = getattr(told, name)
    row = _change(session, claim, ACTIVE, **values)
    for point in told.points:
        level: Literal["info", "warn"] = "warn" if point.get("skipped") else "info"
        events.append(session, claim.job_id, remarks.of_point(point), type="metrics", level=level, data=point)
    if row.cancel_requested_at is not None:
        return "cancel"
    return "drain" if row.pause_requested_at is not None or row.preempt_requested_at is not None else None


def warn(session: Session, claim: Claim, message: str) -> None:
    """Tell the owner something about this attempt, unless it was fenced."""
    _change(session, claim, ACTIVE)
    events.append(session, claim.job_id, message, level="warn")


def add_checkpoint(session: Session, claim: Claim, step: int, prefix: str, manifest_sha256: str) -> None:
    """Record a checkpoint that is uploaded and verified (T6). The object store cannot fence; this row does."""
    _change(session, claim, ("running", "cancelling"), lost_without_progress=0)
    if session.get(Checkpoint, (claim.job_id, step, claim.epoch)) is not None:
        return  # committed before, but the answer was lost
    session.add(
        Checkpoint(job_id=claim.job_id, step=step, epoch=claim.epoch, prefix=prefix, manifest_sha256=manifest_sha256)
    )
    events.append(session, claim.job_id, f"Checkpoint at step {step}", data={"step": step})


def checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """The recorded checkpoints, newest first."""
    rows = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return list(session.scalars(rows.order_by(Checkpoint.step.desc(), Checkpoint.epoch.desc())))


def reject_checkpoint(session: Session, claim: Claim, checkpoint: Checkpoint) -> None:
    """Forget one whose bytes do not verify, so that it does not push out a sound one. Raises Fenced."""
    _change(session, claim, ACTIVE)
    session.delete(session.merge(checkpoint))
    message = f"The checkpoint at step {checkpoint.step} is missing or damaged; going on from an older one"
    events.append(session, claim.job_id, message, level="warn")


def forget_checkpoints(session: Session, claim: Claim, keep: int) -> list[str]:
    """Forget all but the newest `keep`; returns the prefixes whose objects nothing refers to any more."""
    _change(session, claim, ACTIVE)
    old = checkpoints(session, claim.job_id)[keep:]
    for checkpoint in old:
        session.delete(checkpoint)
    session.flush()
    return [checkpoint.prefix for checkpoint in old]


def succeed(session: Session, claim: Claim, result: Result) -> None:
    """Publish (T7): the result's row and the job's end in one transaction. A cancel that came first wins."""
    if _is_published(session, result):
        return  # committed before, but the answer was lost
    row = _change(session, claim, ("running",), **_ended("succeeded"), phase=None, eta_seconds=None)
    _publish(session, claim, row, result)
    if claim.kind == "search":
        _record_weights(session, claim, result.metrics.get("parents", []))
    for remark in remarks.of_result(result.metrics):
        events.append(session, claim.job_id, remark)
    endings.tell(session, claim.job_id, "Succeeded", data={result.noun: result.id})


def fail(session: Session, claim: Claim, code: str, category: str, message: str, left: Result | None = None) -> None:
    """End the job with a reason its owner can act on. What it `left` behind, a sound adapter, is theirs to use."""
    if left is not None and _is_published(session, left):
        return  # committed before, but the answer was lost
    row = _change(
        session, claim, ACTIVE, **_ended("failed"), phase=None, eta_seconds=None,
        error_code=code, error_category=category, error_message=message,
    )  # fmt: skip
    if row.cancel_requested_at is not None:  # the owner had given it up already
        session.execute(
            update(Job)
            .where(Job.id == claim.job_id)
            .values(state="cancelled", error_code=None, error_category=None, error_message=None)
        )
        endings.tell(session, claim.job_id, "Cancelled")
        return
    told: dict[str, Any] = {"code": code}
    if left is not None:
        _publish(session, claim, row, left)
        told["adapter"] = left.id
        events.append(session, claim.job_id, "The last good adapter was kept", data={"adapter": left.id})
    endings.tell(session, claim.job_id, f"Failed: {message}", level="error", data=told)


def retry(session: Session, claim: Claim, code: str, message: str, *, counted: bool = True) -> None:
    """The attempt was lost through no fault of the job (T8): queue it again, or fail after too many losses.

    An outage of what the worker depends on is not `counted`: the job waits for as long as it takes.
    """
    row = _change(session, claim, ACTIVE)
    if row.cancel_requested_at is not None:
        cancelled(session, claim)
    elif not counted:
        delay = min(_BACKOFF_SECONDS * 2 ** min(claim.attempt - 1, 6), _MAX_BACKOFF_SECONDS)
        _give_back_later(session, claim, code, message, delay)
    elif row.lost_without_progress + 1 >= MAX_LOSSES:
        text = f"gave up after {MAX_LOSSES} attempts without progress; the last one: {message}"
        fail(session, claim, code, "platform", text)
    else:
        losses = row.lost_without_progress + 1
        delay = _BACKOFF_SECONDS * 2 ** (losses - 1)
        _give_back_later(session, claim, code, message, delay, lost_without_progress=losses)


def release(session: Session, claim: Claim) -> None:
    """Give the job back after a checkpoint (T12): this worker stops, or the job pauses or gives way. Counts nothing."""
    row = _change(session, claim, ACTIVE)
    if row.cancel_requested_at is not None:
        cancelled(session, claim)
        return
    gives_way = row.preempt_requested_at is not None
    why = "Gave way to a job of higher priority" if gives_way else "Given back by a worker that stops"
    _give_back(session, claim, f"{why}; queued again")


def cancelled(session: Session, claim: Claim) -> None:
    """The attempt has stopped because its owner asked for it (T10)."""
    _change(session, claim, ACTIVE, **_ended("cancelled"), phase=None, eta_seconds=None)
    endings.tell(session, claim.job_id, "Cancelled")


def reap(session: Session) -> list[str]:
    """Jobs whose lease ran out go back to the queue, or rest, or end (T11). Returns their ids."""
    expired = select(Job.id).where(Job.lease_until < now()).with_for_update(skip_locked=True).cte("expired")
    gone = Job.lost_without_progress + 1 >= MAX_LOSSES
    ends = case((Job.cancel_requested_at.is_not(None), "cancelled"), (gone, "failed"), else_=_PAUSED_OR_QUEUED)
    over = Job.cancel_requested_at.is_not(None) | gone
    statement = (
        update(Job)
        .where(Job.id == expired.c.id)
        .values(
            **_freed(), state=ends, lost_without_progress=Job.lost_without_progress + 1,
            finished_at=case((over, now()), else_=None), phase=None, eta_seconds=None, preempt_requested_at=None,
        )
        .returning(Job.id, Job.state)
        .execution_options(synchronize_session=False)
    )  # fmt: skip
    _settle(session)
    rows = session.execute(statement).all()
    for job_id, state in rows:
        if state == "queued":
            events.append(session, job_id, "The worker was lost; queued again", level="warn")
            queue.enqueue(session, job_id)
        elif state == "paused":
            events.append(session, job_id, "The worker was lost; paused", level="warn")
        elif state == "cancelled":
            endings.tell(session, job_id, "Cancelled")
        else:
            message = f"the worker was lost {MAX_LOSSES} times without progress; the job may be killing it"
            reason = {"error_code": "worker_lost", "error_category": "platform", "error_message": message}
            session.execute(update(Job).where(Job.id == job_id).values(**reason))
            endings.tell(session, job_id, f"Failed: {message}", level="error", data={"code": "worker_lost"})
    after_commit(session, lambda: metrics.LEASES_EXPIRED.inc(len(rows)))
    return [row.id for row in rows]


def _settle(session: Session) -> None:
    """Rest for queued jobs that shall: workers of an older release give a job back without looking at the wish."""
    wished = (Job.state == "queued", Job.pause_requested_at.is_not(None))
    statement = update(Job).where(*wished).values(state="paused").returning(Job.id, Job.state)
    for row in session.execute(statement.execution_options(synchronize_session=False)).all():
        events.append(session, row.id, "Paused")


def _change(session: Session, claim: Claim, states: tuple[str, ...], **values: Any) -> Any:
    """Compare and set. The row stays locked until the end of the transaction."""
    statement = (
        update(Job)
        .where(Job.id == claim.job_id, Job.epoch == claim.epoch, Job.state.in_(states))
        .values(**values or {"epoch": Job.epoch})
        .returning(
            Job.state, Job.cancel_requested_at, Job.pause_requested_at, Job.preempt_requested_at,
            Job.lost_without_progress, Job.base_model_id, Job.name,
        )
        .execution_options(synchronize_session=False)
    )  # fmt: skip
    row = session.execute(statement).first()
    if row is None:
        metrics.FENCES.inc()
        raise Fenced(claim.job_id)
    return row


def _ended(state: str) -> dict[str, Any]:
    return {"state": state, "finished_at": now(), "lease_until": None, "worker_id": None, "device_slot": None}


def _freed() -> dict[str, Any]:
    return {"epoch": Job.epoch + 1, "lease_until": None, "worker_id": None, "device_slot": None}


def _given_back() -> dict[str, Any]:
    changed = {"state": _PAUSED_OR_QUEUED, "phase": None, "eta_seconds": None, "preempt_requested_at": None}
    return {**_freed(), **changed, "announced_at": now()}


def _give_back(session: Session, claim: Claim, queued: str, **values: Any) -> None:
    """To rest, if the owner asked for that, or else into the queue, which is then told as `queued`."""
    if _change(session, claim, ACTIVE, **_given_back(), **values).state == "paused":
        events.append(session, claim.job_id, "Paused")
    else:
        events.append(session, claim.job_id, queued)
        queue.enqueue(session, claim.job_id)


def _give_back_later(session: Session, claim: Claim, code: str, message: str, seconds: float, **values: Any) -> None:
    """After a loss, with its reason; nobody is to take the job before some time has passed."""
    row = _change(session, claim, ACTIVE, **_given_back(), run_after=now() + seconds, **values)
    told = "Paused" if row.state == "paused" else "Queued again"
    events.append(session, claim.job_id, f"{told}: {message}", level="warn", data={"code": code})


def _is_published(session: Session, result: Result) -> bool:
    return session.get(Adapter if result.noun == "adapter" else Artifact, result.id) is not None


def _publish(session: Session, claim: Claim, row: Any, result: Result) -> None:
    told: dict[str, Any] = {
        "id": result.id, "owner_id": claim.owner_id, "job_id": claim.job_id, "base_model_id": row.base_model_id,
        "name": row.name, "kind": claim.kind, "epoch": claim.epoch, "prefix": result.prefix, "files": result.files,
        "digest": result.digest, "metrics": result.metrics, "bytes": sum(file["size"] for file in result.files),
    }  # fmt: skip
    session.add(Artifact(**told) if result.rank is None else Adapter(**told, rank=result.rank))


def _record_weights(session: Session, claim: Claim, parents: list[dict[str, Any]]) -> None:
    """Into the lineage, what a search has found; `lineage.json` has the weights of layers, where they differ."""
    found = {parent["digest"]: parent["weight"] for parent in parents}
    rows = select(AdapterParent, Adapter.digest).join(Adapter, Adapter.id == AdapterParent.parent_id)
    for parent, digest in session.execute(rows.where(AdapterParent.job_id == claim.job_id)):
        parent.weight = found.get(digest, parent.weight)
