"""Takes jobs while there are any, one at a time, on one device. Celery's message and the poll both end up here."""

import logging
import os
import socket
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from service import leases
from service.db import Database
from service.leases import Claim
from service.settings import Settings
from service.storage import Storage
from worker import workspace
from worker.child import Host
from worker.device import DeviceLock
from worker.run import Attempt, Drain, run_job

log = logging.getLogger(__name__)


class Supervisor:
    """One per worker process."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self._settings, self._database, self._storage = settings, database, storage
        self._worker_id = f"{socket.gethostname()}:{os.getpid()}"
        self._lock = DeviceLock(settings)
        self._host: Host | None = None
        self._busy = threading.Lock()
        self._drain = Drain()
        self._poller = threading.Thread(target=self._poll, name="poll", daemon=True)

    def start(self) -> None:
        """Take the device, start the host so that it is warm, and poll for jobs that no message announced."""
        self._lock.acquire()
        for name in workspace.remove_abandoned(self._settings.work_dir):
            log.info("removed the leftovers of %s", name)
        self._poller.start()

    def drain(self) -> None:
        """Take no more jobs; the present one gives back its job after a checkpoint."""
        self._drain.begin()

    def stop(self) -> None:
        """Wait until the present job is given back, then end the host."""
        self._drain.begin()
        with self._busy:
            if self._host is not None and self._host.alive:
                self._host.kill()
        self._lock.release()

    def work(self) -> None:
        """Run jobs until none can be claimed. A second caller waits for the first, so that hints stay with others."""
        with self._busy:
            while not self._drain and (claim := self._claim()) is not None:
                log.info("%s: %s, epoch %d", claim.job_id, claim.kind, claim.epoch)
                run_job(Attempt(claim, self._settings, self._database, self._storage, self._warm_host(), self._drain))

    def _claim(self) -> Claim | None:
        try:
            with self._database.unit_of_work() as session:
                return leases.claim(session, self._worker_id, self._lock.slot, self._settings.lease_seconds)
        except SQLAlchemyError as error:
            log.warning("could not look for jobs: %s", type(error).__name__)
            return None

    def _warm_host(self) -> Host:
        if self._host is None or not self._host.alive:
            self._host = Host(self._lock.device, self._settings.threads, self._lock.descriptor)
        return self._host

    def _poll(self) -> None:
        with self._busy:
            self._warm_host()
        while not self._drain:
            self.work()
            self._cool()
            self._sleep()

    def _sleep(self) -> None:
        until = time.monotonic() + self._settings.poll_seconds
        while not self._drain and time.monotonic() < until:
            time.sleep(min(0.2, self._settings.poll_seconds))

    def _cool(self) -> None:
        """A base model that nobody has asked for in a while gives its memory back."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            host = self._host
            if host is not None and host.alive and host.idle_seconds > self._settings.host_idle_seconds:
                host.kill()
        finally:
            self._busy.release()
