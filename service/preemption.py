"""A running training gives way to a job of higher priority that finds no free device: drained, counted as nothing.

Only a lower number takes the device from a higher one, so that two jobs cannot take it from each other in turns; and
whatever an operator does to the priorities, a job gives way `MAX_PREEMPTIONS` times and no more.
"""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service import events, leases, quotas
from service.db import now
from service.models import ACTIVE, Job

MAX_PREEMPTIONS = 3


def preempt(session: Session, patience_seconds: float) -> str | None:
    """Ask one training to give way to the job that could run next, if that one has waited for too long.

    Returns the id of the training that was asked. One at a time: the device that it leaves may be all it takes. Any
    number of processes may call this at once, as the job that waits stays locked until the end of the transaction.
    """
    waiting = leases.claimable(Job.id, Job.priority, Job.run_after < now() - patience_seconds)
    waiting = waiting.where(quotas.may_run(session))
    first = session.execute(waiting.limit(1).with_for_update(of=Job, skip_locked=True)).first()
    if first is None or not first[2] or _somebody_gives_way(session):
        return None
    running = _newest_of_lowest_priority(session, first.priority)
    if running is None:
        return None
    asked = update(Job).where(Job.id == running, Job.state.in_(ACTIVE))
    values = {"preempt_requested_at": now(), "preemptions": Job.preemptions + 1}
    session.execute(asked.values(**values).execution_options(synchronize_session=False))
    events.append(session, running, "Asked to give way to a job of higher priority")
    return running


def _somebody_gives_way(session: Session) -> bool:
    rows = select(Job.id).where(Job.state.in_(ACTIVE), Job.preempt_requested_at.is_not(None))
    return session.scalar(rows.limit(1)) is not None


def _newest_of_lowest_priority(session: Session, priority: int) -> str | None:
    """The training that loses least; other work would have to begin again, and is left alone."""
    rows = (
        select(Job.id)
        .where(Job.state.in_(("claimed", "running")), Job.kind == "train", Job.priority > priority)
        .where(Job.preemptions < MAX_PREEMPTIONS, Job.pause_requested_at.is_(None))
        .order_by(Job.priority.desc(), Job.started_at.desc(), Job.id.desc())
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return session.scalar(rows)
