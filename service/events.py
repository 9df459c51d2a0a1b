"""A job's event log: numbered without gaps, appended in the transaction of what it tells."""

import math
from typing import Any, Literal

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.orm import Session

from lora_engine.history import History
from service.models import Job, JobEvent

MAX_POINTS = 10_000


def append(
    session: Session,
    job_id: str,
    message: str,
    *,
    type: Literal["message", "metrics"] = "message",  # noqa: A002 - the wire's word
    level: Literal["info", "warn", "error"] = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Add one event. The counter lives in the job's row, so writers of one job queue up behind each other."""
    numbered = update(Job).where(Job.id == job_id).values(event_seq=Job.event_seq + 1)
    told = numbered.returning(Job.event_seq, Job.epoch).execution_options(synchronize_session=False)
    row = session.execute(told).one()
    _insert(session, job_id, row.event_seq, row.epoch, message, type, level, data or {})


def first(session: Session, job: Job, message: str) -> None:
    """That of a job that this transaction has made, with `event_seq` 1: nobody else can number events of it yet."""
    _insert(session, job.id, job.event_seq, job.epoch, message, "message", "info", {})


def _insert(
    session: Session, job_id: str, seq: int, epoch: int, message: str, type_: str, level: str, data: dict[str, Any]
) -> None:
    told = {"type": type_, "level": level, "message": message, "data": data}
    session.execute(insert(JobEvent.__table__).values(job_id=job_id, seq=seq, epoch=epoch, **told))  # type: ignore[arg-type]


def after(session: Session, job_id: str, seq: int, limit: int) -> list[JobEvent]:
    """Up to `limit` events with a higher number than `seq`, in order."""
    rows = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > seq).order_by(JobEvent.seq).limit(limit)
    return list(session.scalars(rows))


def metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """One point per step and kind. Steps that were repeated after a loss count once, as they ended up.

    Of long jobs every n-th point is given, so that there are some ten thousand, but every evaluation.
    """
    told = (JobEvent.job_id == job_id, JobEvent.type == "metrics")
    count = session.scalar(select(func.count()).where(*told)) or 0
    every_nth = JobEvent.seq % (1 + count // MAX_POINTS) == 0
    evaluation = JobEvent.data["validation_loss"].as_string().is_not(None)
    rows = select(JobEvent.data).where(*told, or_(every_nth, evaluation)).order_by(JobEvent.seq)
    points = {(data.get("step", 0), "validation_loss" in data): data for data in session.scalars(rows)}
    return [points[key] for key in sorted(points)]


def history(session: Session, job_id: str) -> History:
    """The losses of a training so far, for the figure of its curves."""
    points = metrics(session, job_id)
    last = next((point for point in reversed(points) if point.get("epoch")), {"step": 1, "epoch": 1})
    told = History(steps_per_epoch=max(1, round(last["step"] / last["epoch"])))
    for point in points:
        step = point.get("step", 0)
        if step:
            skipped = bool(point.get("skipped"))
            told.add_step(step, point.get("loss", math.nan), point.get("learning_rate", 0.0), skipped=skipped)
        if "validation_loss" in point:
            told.add_evaluation(step, point["validation_loss"])
    return told
