"""Artifacts: what jobs leave that is no adapter. Files in the object store, and a row that pins each one."""

from collections.abc import Collection

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.db import newest, now
from service.errors import NotFound
from service.models import Artifact


def get(session: Session, owner_id: str, artifact_id: str) -> Artifact:
    """Raises NotFound, also for another owner's and for a deleted one."""
    artifact = session.get(Artifact, artifact_id)
    if artifact is None or artifact.owner_id != owner_id or artifact.deleted_at is not None:
        raise NotFound(f"there is no artifact {artifact_id[:80]!r}")
    return artifact


def page(
    session: Session, owner_id: str, after: str | None, limit: int, *, kind: str | None = None
) -> tuple[list[Artifact], bool]:
    """The owner's artifacts, newest first, below the id `after`; and whether there are more."""
    rows = select(Artifact).where(Artifact.owner_id == owner_id, Artifact.deleted_at.is_(None))
    if kind is not None:
        rows = rows.where(Artifact.kind == kind)
    return newest(session, rows, Artifact.id, after, limit)


def delete(session: Session, owner_id: str, artifact_id: str) -> None:
    """From the commit on it is gone; the sweep removes its files. Raises NotFound."""
    get(session, owner_id, artifact_id)
    session.execute(update(Artifact).where(Artifact.id == artifact_id).values(deleted_at=now()))


def of_jobs(session: Session, job_ids: Collection[str]) -> dict[str, Artifact]:
    """By job, the artifact it has left, a deleted one too."""
    rows = select(Artifact).where(Artifact.job_id.in_(job_ids))
    return {artifact.job_id: artifact for artifact in session.scalars(rows)}
