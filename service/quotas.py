"""How much one user may have: unfinished jobs, jobs at work at once, bytes in the store.

A user's own limits stand in their row; where they are null, those hold that the session's database was opened with.
Who counts for a user holds a lock until the commit, so that a hundred requests at once get exactly what is left.
"""

from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import ColumnElement, Select, func, or_, select, text
from sqlalchemy.orm import Session, aliased

from service.errors import NotFound, TooMany
from service.models import ACTIVE, TERMINAL, Adapter, Artifact, Dataset, Job, User
from service.settings import Settings

_RETRY_JOBS_SECONDS, _RETRY_BYTES_SECONDS = 30, 3600


@dataclass(frozen=True)
class Limits:
    """Of one user. `running_jobs` 0 is no limit."""

    unfinished_jobs: int = 1000
    running_jobs: int = 0
    stored_bytes: int = 100 << 30

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.max_unfinished_jobs, settings.max_running_jobs, settings.max_stored_bytes)

    @property
    def info(self) -> dict[Any, Any]:
        """What a `Database` is opened with, so that every session knows them."""
        return {Limits: self}


def admit_job(session: Session, owner_id: str) -> None:
    """Room for one more job of this owner, kept until the commit.

    Raises:
        TooMany: as many jobs as may be have not ended, or as many bytes as may be are stored.
        NotFound: the owner is being deleted.
    """
    user = _locked(session, owner_id)
    limit = user.max_unfinished_jobs
    limit = _default(session).unfinished_jobs if limit is None else limit
    count, stored = _have(session, owner_id)
    if count >= limit:
        message = f"{limit} jobs have not ended, as many as you may have; wait until one has, or cancel one"
        raise TooMany(message, code="too_many_jobs", retry_after=_RETRY_JOBS_SECONDS)
    _check_bytes(session, user, stored)


def admit_bytes(session: Session, owner_id: str, count: int) -> None:
    """Room for `count` more bytes of this owner, kept until the commit. Raises TooMany and NotFound likewise."""
    user = _locked(session, owner_id)
    _check_bytes(session, user, stored_bytes(session, owner_id) + count)


def admit_running(session: Session, owner_id: str) -> None:
    """A job of this owner, already claimed in this transaction, may be at work beside the others. Raises TooMany."""
    limit = session.scalar(select(User.max_running_jobs).where(User.id == owner_id))
    limit = _default(session).running_jobs if limit is None else limit
    if not limit:
        return
    if session.get_bind().dialect.name == "postgresql":  # workers cannot lock the user's row; SQLite has one writer
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(owner_id, 0))))
    if running(session, owner_id) > limit:
        raise TooMany(f"{limit} jobs of {owner_id} are at work already", code="too_many_jobs")


def may_run(session: Session) -> ColumnElement[bool]:
    """Of a queued `Job`: its owner has fewer jobs at work than may be."""
    other, owner = aliased(Job, name="other"), aliased(User)
    limit = select(func.coalesce(owner.max_running_jobs, _default(session).running_jobs))
    limit_of_owner = limit.where(owner.id == Job.owner_id).scalar_subquery()
    unfinished = text(f"other.state NOT IN {TERMINAL}")  # see `_count`
    at_work = select(func.count()).where(other.owner_id == Job.owner_id, other.state.in_(ACTIVE), unfinished)
    return or_(limit_of_owner == 0, at_work.scalar_subquery() < limit_of_owner)


def unfinished(session: Session, owner_id: str) -> int:
    return _count(session, Job.owner_id == owner_id)


def running(session: Session, owner_id: str) -> int:
    return _count(session, Job.owner_id == owner_id, Job.state.in_(ACTIVE))


def stored_bytes(session: Session, owner_id: str) -> int:
    """Of everything that is not deleted. What jobs keep on the way, checkpoints and received files, does not count."""
    return sum(map(int, session.execute(select(*_sums(owner_id))).one()))


def _have(session: Session, owner_id: str) -> tuple[int, int]:
    """`unfinished` and `stored_bytes`, by one query."""
    count, *sums = session.execute(select(_counted(Job.owner_id == owner_id).scalar_subquery(), *_sums(owner_id))).one()
    return count, sum(map(int, sums))


def _sums(owner_id: str) -> list[ColumnElement[int]]:
    return [
        select(func.coalesce(func.sum(table.bytes), 0))
        .where(table.owner_id == owner_id, table.deleted_at.is_(None))
        .scalar_subquery()
        for table in (Dataset, Adapter, Artifact)
    ]


def _count(session: Session, *conditions: ColumnElement[bool]) -> int:
    return session.scalar(_counted(*conditions)) or 0


def _counted(*conditions: ColumnElement[bool]) -> Select[Any]:
    # Spelled as the partial index has it: from parameters the planner could not tell that the index fits.
    unfinished = text(f"jobs.state NOT IN {TERMINAL}")
    return select(func.count()).select_from(Job).where(*conditions, unfinished)


def _check_bytes(session: Session, user: User, count: int) -> None:
    """Raises TooMany when `count` bytes are more than this user may store."""
    limit = _default(session).stored_bytes if user.max_stored_bytes is None else user.max_stored_bytes
    if count > limit:
        message = f"that would be more than the {limit} bytes you may store; delete datasets, adapters or artifacts"
        raise TooMany(message, code="too_many_bytes", retry_after=_RETRY_BYTES_SECONDS)


def _locked(session: Session, owner_id: str) -> User:
    rows = select(User).where(User.id == owner_id, User.deleted_at.is_(None))
    user = session.scalar(rows.with_for_update(key_share=True).execution_options(populate_existing=True))
    if user is None:
        raise NotFound(f"there is no user {owner_id[:80]!r}")
    return user


def _default(session: Session) -> Limits:
    limits: Limits = session.info.get(Limits, Limits())
    return limits
