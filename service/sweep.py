"""What keeps promises when somebody dies: sends messages, reaps leases, removes what nothing refers to.

Every API and worker process runs one sweep; all of it is idempotent, so any number may run at once.
"""

import logging
import random
import threading
import time
from collections.abc import Callable

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import func, select, update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lora_engine import failpoints
from service import datasets, erasure, leases, preemption, queue, scratch
from service.db import Database, now
from service.errors import ServiceError
from service.models import TERMINAL, Adapter, Artifact, Job, OutboxMessage
from service.settings import Settings
from service.storage import Storage

log = logging.getLogger(__name__)
_FENCED_GRACE_SECONDS = 900.0  # an attempt that lost its lease unnoticed may upload for so long


class Sweep:
    """A background thread; `start`, then `stop`."""

    def __init__(
        self, settings: Settings, database: Database, storage: Storage, celery: Celery, *, erases: bool = False
    ) -> None:
        """`erases`: also carry out erasures, for which workers lack the rights."""
        self._settings, self._database, self._storage, self._celery = settings, database, storage, celery
        self._erases = erases
        self._stopping = threading.Event()
        self._quiet_until = time.monotonic() + settings.lease_seconds  # it may be the end of an outage
        self._thread = threading.Thread(target=self._loop, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        deadline = time.monotonic() + 10
        while self._thread.is_alive() and time.monotonic() < deadline:
            queue.outbox_filled.set()  # again and again: another sweep of this process may have cleared it
            self._thread.join(timeout=0.05)

    def once(self) -> None:
        """Everything there is to do now. Faults of one part are logged and leave the others to run."""
        if self._guarded("reap", self._reap):
            self._guarded("preempt", self._preempt)
            self._guarded("relay", self._relay)
            self._guarded("rewake", self._rewake)
            self._guarded("purge", self._purge)
            if self._erases:
                self._guarded("erase", lambda: erasure.sweep(self._database, self._storage))

    def _loop(self) -> None:
        next_sweep = 0.0
        while not self._stopping.is_set():
            self._guarded("alive file", self._touch)
            if time.monotonic() >= next_sweep:
                self.once()
                next_sweep = time.monotonic() + self._settings.sweep_seconds * random.uniform(0.8, 1.2)  # noqa: S311
            else:
                self._guarded("relay", self._relay)
            queue.outbox_filled.wait(max(0.0, next_sweep - time.monotonic()))
            queue.outbox_filled.clear()

    def _guarded(self, name: str, part: Callable[[], None]) -> bool:
        """False when the database did not answer."""
        try:
            part()
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            log.warning("sweep: %s: the database does not answer: %s", name, type(error).__name__)
            return False
        except (BrokerError, ConnectionError, TimeoutError) as error:
            log.warning("sweep: %s: the broker does not answer: %s", name, error)
        except (ServiceError, OSError) as error:
            log.warning("sweep: %s: %s", name, error)
        except Exception:  # a thread that ended would end every promise it keeps
            log.exception("sweep: %s", name)
        return True

    def _touch(self) -> None:
        if self._settings.alive_file is not None:
            self._settings.alive_file.touch()

    def _reap(self) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            with self._database.unit_of_work() as session:
                reaped = leases.reap(session)
                failpoints.reach("sweep.before_reap_commit")
        except (OperationalError, InterfaceError, PoolTimeout):
            # After an outage every lease looks expired: healthy workers get one lease's time to renew first.
            self._quiet_until = time.monotonic() + self._settings.lease_seconds
            raise
        for job_id in reaped:
            log.warning("sweep: the lease of %s had run out", job_id)

    def _preempt(self) -> None:
        with self._database.unit_of_work() as session:
            asked = preemption.preempt(session, self._settings.preempt_after_seconds)
        if asked is not None:
            log.info("sweep: %s is to give way to a job of higher priority", asked)

    def _relay(self) -> None:
        queue.relay(self._database, self._celery)

    def _rewake(self) -> None:
        """Announce again what has waited for long: its message may be lost."""
        due = (
            select(Job.id)
            .where(Job.state == "queued", Job.run_after <= now())
            .where(Job.announced_at < now() - self._settings.rewake_seconds)
            .where(Job.id.not_in(select(OutboxMessage.job_id)))
            .order_by(Job.priority, Job.run_after)
            .limit(100)
        )
        with self._database.unit_of_work() as session:
            for job_id in session.scalars(due).all():
                session.execute(update(Job).where(Job.id == job_id).values(announced_at=now()))
                queue.enqueue(session, job_id)

    def _purge(self) -> None:
        datasets.sweep_abandoned(self._database, self._storage, self._settings)
        scratch.sweep_abandoned(self._settings)
        purge_deleted(self._database, self._storage)
        purge_leftovers(self._database, self._storage, _FENCED_GRACE_SECONDS)


def purge_deleted(database: Database, storage: Storage) -> None:
    """Remove the objects of deleted adapters and artifacts. No transaction is open while objects are deleted."""
    for table in (Adapter, Artifact):
        with database.reading() as session:
            gone = select(table.id, table.prefix).where(table.deleted_at.is_not(None), table.purged_at.is_(None))
            rows = session.execute(gone.limit(20)).all()
        for result_id, prefix in rows:
            storage.delete_prefix(prefix)
            failpoints.reach("sweep.objects_deleted")
            with database.unit_of_work() as session:
                session.execute(update(table).where(table.id == result_id).values(purged_at=now()))


def purge_leftovers(database: Database, storage: Storage, grace_seconds: float) -> None:
    """Remove what ended jobs leave behind: checkpoints, files they were given, and uploads of attempts that lost."""
    with database.reading() as session:
        ended = (
            select(Job.id, Job.epoch, func.coalesce(Adapter.prefix, Artifact.prefix))
            .outerjoin(Adapter, Adapter.job_id == Job.id)
            .outerjoin(Artifact, Artifact.job_id == Job.id)
            .where(Job.state.in_(TERMINAL), Job.purged_at.is_(None), Job.finished_at < now() - grace_seconds)
        )
        rows = session.execute(ended.limit(20)).all()
    for job_id, last_epoch, kept in rows:
        storage.delete_prefix(f"jobs/{job_id}")
        for epoch in range(1, last_epoch + 1):
            for prefix in (f"adapters/{job_id}/e{epoch}", f"artifacts/{job_id}/e{epoch}"):
                if prefix != kept:
                    storage.delete_prefix(prefix)
        with database.unit_of_work() as session:
            session.execute(update(Job).where(Job.id == job_id).values(purged_at=now()))
