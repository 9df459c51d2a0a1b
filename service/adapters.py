"""Adapters: what jobs leave. Files in the object store, and a row that pins each one's size and SHA-256."""

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.db import now
from service.errors import Conflict, NotFound
from service.models import TERMINAL, Adapter, AdapterParent, Job


def get(session: Session, owner_id: str, adapter_id: str, *, keep: bool = False) -> Adapter:
    """One adapter; with `keep` nobody deletes it before this transaction ends.

    Raises:
        NotFound: also for another owner's and for a deleted one.
    """
    rows = select(Adapter).where(Adapter.id == adapter_id, Adapter.owner_id == owner_id, Adapter.deleted_at.is_(None))
    adapter = session.scalar(rows.with_for_update(read=True) if keep else rows)
    if adapter is None:
        raise NotFound(f"there is no adapter {adapter_id[:80]!r}")
    return adapter


def page(session: Session, owner_id: str, after: str | None, limit: int) -> tuple[list[Adapter], bool]:
    """The owner's adapters, newest first, below the id `after`; and whether there are more."""
    rows = select(Adapter).where(Adapter.owner_id == owner_id, Adapter.deleted_at.is_(None))
    if after is not None:
        rows = rows.where(Adapter.id < after)
    found = list(session.scalars(rows.order_by(Adapter.id.desc()).limit(limit + 1)))
    return found[:limit], len(found) > limit


def delete(session: Session, owner_id: str, adapter_id: str) -> None:
    """From the commit on it is gone; the sweep removes its files. Its row stays for the lineage of merges.

    Raises:
        NotFound: no such adapter of this owner.
        Conflict: a merge that has not ended uses it.
    """
    rows = select(Adapter.id).where(
        Adapter.id == adapter_id, Adapter.owner_id == owner_id, Adapter.deleted_at.is_(None)
    )
    if session.scalar(rows.with_for_update()) is None:
        raise NotFound(f"there is no adapter {adapter_id[:80]!r}")
    uses = select(Job.id).join(AdapterParent, AdapterParent.job_id == Job.id)
    job_id = session.scalar(uses.where(AdapterParent.parent_id == adapter_id, Job.state.not_in(TERMINAL)).limit(1))
    if job_id is not None:
        raise Conflict(f"{job_id} uses the adapter; wait until it has ended, or cancel it", code="in_use")
    session.execute(update(Adapter).where(Adapter.id == adapter_id).values(deleted_at=now()))


def of_jobs(session: Session, job_ids: Collection[str]) -> dict[str, Adapter]:
    """By job, the adapter it has left, a deleted one too."""
    rows = select(Adapter).where(Adapter.job_id.in_(job_ids))
    return {adapter.job_id: adapter for adapter in session.scalars(rows)}


def parents(session: Session, job_ids: Collection[str]) -> dict[str, list[AdapterParent]]:
    """What each merge among the jobs was made of, in the order it was asked for."""
    rows = select(AdapterParent).where(AdapterParent.job_id.in_(job_ids)).order_by(AdapterParent.position)
    found: dict[str, list[AdapterParent]] = defaultdict(list)
    for parent in session.scalars(rows):
        found[parent.job_id].append(parent)
    return found
