"""What follows from a job's end, whoever ended it: the log's last event, its owner's webhooks, and a count."""

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import events, metrics, webhooks
from service.db import after_commit
from service.models import Job


def tell(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: Literal["info", "error"] = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """To be called in the transaction that ended the job, after everything else of it."""
    events.append(session, job_id, message, level=level, data=data)
    webhooks.announce(session, job_id)
    kind, state = session.execute(select(Job.kind, Job.state).where(Job.id == job_id)).one()
    after_commit(session, lambda: metrics.JOBS_ENDED.labels(kind, state).inc())
