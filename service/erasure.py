"""Erasing a user, or a dataset with all that was made of it, and saying afterwards what is gone.

The order is one transaction: whoever is to go can do nothing more, nothing of theirs is visible, and their jobs are
cancelled. `work` does the rest, at once where no worker holds a job of theirs and by the sweep where one does: objects
first, then the rows. What stays is the receipt, with ids and counts and no content; the audit log stays too.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from service import jobs, users
from service.db import Database, newest, now
from service.errors import Conflict, NotFound
from service.models import (
    TERMINAL,
    Adapter,
    AdapterAlias,
    AdapterParent,
    ApiKey,
    Artifact,
    Checkpoint,
    Dataset,
    Erasure,
    IdempotencyKey,
    Job,
    JobEvent,
    OutboxMessage,
    Table,
    User,
    Webhook,
    WebhookDelivery,
    new_id,
)
from service.storage import Storage

# An attempt that lost its lease unnoticed may upload for so long; what it leaves is removed after that.
LATE_SECONDS = 900.0
_CHUNK = 500
log = logging.getLogger(__name__)


@dataclass
class Lineage:
    """Ids of all that goes."""

    datasets: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)

    @property
    def prefixes(self) -> list[str]:
        """Everything that the store has of them, also what attempts that lost have left."""
        of_jobs = [f"{folder}/{job_id}" for job_id in self.jobs for folder in ("jobs", "adapters", "artifacts")]
        return [*(f"datasets/{dataset_id}" for dataset_id in self.datasets), *of_jobs]


def order_user(session: Session, user_id: str) -> Erasure:
    """The user's keys open nothing from the commit on. Asked for again, the same order is answered.

    Raises:
        NotFound.
    """
    user = users.get_user(session, user_id, keep=True)
    if user.deleted_at is not None:
        return session.scalars(select(Erasure).where(Erasure.subject_id == user_id, Erasure.kind == "user")).one()
    user.deleted_at = now()
    revoked = update(ApiKey).where(ApiKey.user_id == user_id, ApiKey.revoked_at.is_(None))
    session.execute(revoked.values(revoked_at=now()))
    return _order(session, "user", user_id, user_id)


def order_dataset(session: Session, owner_id: str, dataset_id: str) -> Erasure:
    """The dataset, the jobs that used it, their results, and what was made of those.

    Raises:
        NotFound: no such dataset of this owner.
        Conflict: it is just being stored.
    """
    rows = select(Dataset).where(Dataset.id == dataset_id, Dataset.owner_id == owner_id)
    dataset = session.scalar(rows.with_for_update())
    if dataset is None:
        raise NotFound(f"there is no dataset {dataset_id[:80]!r}")
    if dataset.status != "ready":
        raise Conflict("the dataset is still being stored; try again in a moment")
    before = select(Erasure).where(Erasure.subject_id == dataset_id, Erasure.finished_at.is_(None))
    return session.scalar(before) or _order(session, "dataset", dataset_id, owner_id)


def get(session: Session, owner_id: str | None, erasure_id: str) -> Erasure:
    """One order or receipt; of this owner, or of anybody. Raises NotFound."""
    rows = select(Erasure).where(Erasure.id == erasure_id)
    row = session.scalar(rows if owner_id is None else rows.where(Erasure.owner_id == owner_id))
    if row is None:
        raise NotFound(f"there is no erasure {erasure_id[:80]!r}")
    return row


def page(session: Session, owner_id: str | None, after: str | None, limit: int) -> tuple[list[Erasure], bool]:
    """Of this owner, or of anybody, newest first, below the id `after`; and whether there are more."""
    rows = select(Erasure)
    if owner_id is not None:
        rows = rows.where(Erasure.owner_id == owner_id)
    return newest(session, rows, Erasure.id, after, limit)


def work(database: Database, storage: Storage, erasure_id: str) -> Erasure:
    """Carry out an order as far as it can be now; afterwards it is finished, unless a worker still holds a job.

    Raises:
        Unavailable, OSError: the store failed; the sweep tries again.
    """
    with database.unit_of_work() as session:
        order = session.get_one(Erasure, erasure_id)
        if order.finished_at is not None:
            return order
        lineage = _lineage(session, order)
        _stop(session, order.owner_id, lineage)  # also what was accepted while the order waited to be given
        waits = _unfinished(session, lineage)
    if waits:
        return order
    objects = sum(_remove(storage, prefix) for prefix in lineage.prefixes)
    with database.unit_of_work() as session:
        order = session.get_one(Erasure, erasure_id, with_for_update=True)
        if order.finished_at is None and _lineage(session, order) == lineage and not _unfinished(session, lineage):
            order.receipt = {"objects": objects, **vars(lineage), **_delete_rows(session, order, lineage)}
            order.finished_at = now()
            session.flush()
            session.refresh(order)
    database.scrub()
    return order


def sweep(database: Database, storage: Storage) -> None:
    """Go on with what could not be finished, and remove what late attempts have uploaded since."""
    with database.reading() as session:
        unfinished = select(Erasure.id).where(Erasure.finished_at.is_(None))
        orders = session.scalars(unfinished.order_by(Erasure.id).limit(20)).all()
        late = select(Erasure).where(Erasure.finished_at < now() - LATE_SECONDS, Erasure.purged_at.is_(None))
        receipts = session.scalars(late.limit(20)).all()
    for erasure_id in orders:
        if work(database, storage, erasure_id).finished_at is not None:
            log.info("%s is finished", erasure_id)
    for receipt in receipts:
        for prefix in Lineage(receipt.receipt["datasets"], receipt.receipt["jobs"]).prefixes:
            storage.delete_prefix(prefix)
        with database.unit_of_work() as session:
            session.execute(update(Erasure).where(Erasure.id == receipt.id).values(purged_at=now()))
        database.scrub()


def _order(session: Session, kind: str, subject_id: str, owner_id: str) -> Erasure:
    order = Erasure(id=new_id("erasure"), kind=kind, subject_id=subject_id, owner_id=owner_id, receipt={})
    session.add(order)
    session.flush()
    session.refresh(order)
    _stop(session, owner_id, _lineage(session, order))
    return order


def _stop(session: Session, owner_id: str, lineage: Lineage) -> None:
    """Cancel the jobs that have not ended, and hide the rest."""
    for condition in _in(Job.id, lineage.jobs):
        for job_id in session.scalars(select(Job.id).where(condition, Job.state.not_in(TERMINAL))).all():
            with suppress(Conflict):  # it has ended since
                jobs.cancel(session, owner_id, job_id)
    for table, ids in ((Dataset, lineage.datasets), (Adapter, lineage.adapters), (Artifact, lineage.artifacts)):
        for condition in _in(table.id, ids):
            visible = update(table).where(condition, table.deleted_at.is_(None))
            session.execute(visible.values(deleted_at=now()).execution_options(synchronize_session=False))
    for condition in _in(AdapterAlias.adapter_id, lineage.adapters):
        session.execute(delete(AdapterAlias).where(condition))


def _lineage(session: Session, order: Erasure) -> Lineage:
    """What there is now; more than when the order was given, if a job has ended or was accepted since."""
    found = Lineage()
    if order.kind == "user":
        for table, ids in ((Dataset, found.datasets), (Job, found.jobs)):
            ids += session.scalars(select(table.id).where(table.owner_id == order.owner_id).order_by(table.id))
        found.adapters = _ids(session, Adapter.id, Adapter.job_id, found.jobs)
    else:
        found.datasets = [order.subject_id]
        uses = (Job.dataset_id == order.subject_id) | (Job.validation_dataset_id == order.subject_id)
        fresh = list(session.scalars(select(Job.id).where(uses)))
        while fresh:
            found.jobs += fresh
            made = _ids(session, Adapter.id, Adapter.job_id, fresh)
            found.adapters += made
            children = _ids(session, AdapterParent.job_id, AdapterParent.parent_id, made)
            fresh = sorted(set(children) - set(found.jobs))
    found.artifacts = _ids(session, Artifact.id, Artifact.job_id, found.jobs)
    for ids in (found.jobs, found.adapters, found.artifacts):
        ids.sort()
    return found


def _unfinished(session: Session, lineage: Lineage) -> bool:
    return any(
        session.scalar(select(Job.id).where(condition, Job.state.not_in(TERMINAL)).limit(1)) is not None
        for condition in _in(Job.id, lineage.jobs)
    )


def _remove(storage: Storage, prefix: str) -> int:
    count = sum(1 for _ in storage.keys(prefix))
    storage.delete_prefix(prefix)
    return count


def _delete_rows(session: Session, order: Erasure, lineage: Lineage) -> dict[str, int]:
    """All rows, in the order in which they refer to each other; how many there were of those that have no id."""
    of_jobs: list[tuple[str, type[Table], InstrumentedAttribute[Any]]] = [
        ("deliveries", WebhookDelivery, WebhookDelivery.job_id), ("messages", OutboxMessage, OutboxMessage.job_id),
        ("events", JobEvent, JobEvent.job_id), ("checkpoints", Checkpoint, Checkpoint.job_id),
        ("parents", AdapterParent, AdapterParent.job_id), ("idempotency_keys", IdempotencyKey, IdempotencyKey.job_id),
    ]  # fmt: skip
    counts = {name: _delete(session, table, column, lineage.jobs) for name, table, column in of_jobs}
    _delete(session, AdapterAlias, AdapterAlias.adapter_id, lineage.adapters)
    _delete(session, Adapter, Adapter.id, lineage.adapters)
    _delete(session, Artifact, Artifact.id, lineage.artifacts)
    _delete(session, Job, Job.id, lineage.jobs)
    _delete(session, Dataset, Dataset.id, lineage.datasets)
    if order.kind == "user":
        owner = [order.owner_id]
        _delete(session, WebhookDelivery, WebhookDelivery.owner_id, owner)
        counts["webhooks"] = _delete(session, Webhook, Webhook.owner_id, owner)
        counts["api_keys"] = _delete(session, ApiKey, ApiKey.user_id, owner)
        _delete(session, User, User.id, owner)
    return counts


def _delete(session: Session, table: type[Table], column: InstrumentedAttribute[Any], ids: Sequence[str]) -> int:
    deleted = 0
    for condition in _in(column, ids):
        deleted += session.scalar(select(func.count()).select_from(table).where(condition)) or 0
        session.execute(delete(table).where(condition).execution_options(synchronize_session=False))
    return deleted


def _ids(
    session: Session, column: InstrumentedAttribute[str], key: InstrumentedAttribute[str], ids: Sequence[str]
) -> list[str]:
    return [found for condition in _in(key, ids) for found in session.scalars(select(column).where(condition))]


def _in(column: InstrumentedAttribute[Any], ids: Sequence[str]) -> Iterator[ColumnElement[bool]]:
    """Conditions that together say `column IN ids`, each with no more parameters than any database takes."""
    for start in range(0, len(ids), _CHUNK):
        yield column.in_(ids[start : start + _CHUNK])
