"""Takes jobs while there are any, one at a time, on one device. Celery's message and the poll both end up here."""

import logging
import os
import socket
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from lora_engine import failpoints
from service import leases, logs, traces
from service.db import Database
from service.errors import ServiceError
from service.leases import Claim
from service.settings import Settings
from service.storage import Storage
from worker import workspace
from worker.child import Host
from worker.device import DeviceLock
from worker.device_faults import DeviceFaults, Quarantine
from worker.run import Attempt, run_job

_TOLERATED_FAILURES = 2
_PAUSE_SECONDS = 10.0
_MAX_PAUSE_SECONDS = 300.0
log = logging.getLogger(__name__)


class Supervisor:
    """One per worker process."""

    def __init__(self, settings: Settings, database: Database, storage: Storage) -> None:
        self._settings, self._database, self._storage = settings, database, storage
        self._worker_id = f"{socket.gethostname()}:{os.getpid()}"
        self._lock = DeviceLock(settings)
        self._faults = DeviceFaults.of_device(self._lock.device, settings.kernel_log)
        self._quarantine = Quarantine(settings.run_dir, self._lock.device)
        self._host: Host | None = None
        self._busy = threading.Lock()
        self._drain = threading.Event()
        self._failures = 0
        self._last_failed: str | None = None
        self._pause_until = 0.0
        self._poller = threading.Thread(target=self._poll, name="poll", daemon=True)

    def start(self) -> None:
        """Take the device, start the host so that it is warm, and poll for jobs that no message announced."""
        self._lock.acquire()
        for name in workspace.remove_abandoned(self._settings.work_dir):
            log.info("removed the leftovers of %s", name)
        self._poller.start()

    def drain(self) -> None:
        """Take no more jobs; the present one gives back its job after a checkpoint."""
        self._drain.set()

    def stop(self) -> None:
        """Wait until the present job is given back, then end the host."""
        self._drain.set()
        with self._busy:
            if self._host is not None and self._host.alive:
                self._host.kill()
        self._lock.release()
        self._faults.close()

    def work(self) -> None:
        """Run jobs until none can be claimed. A second caller waits for the first, so that hints stay with others."""
        with self._busy:
            while not self._drain.is_set() and time.monotonic() >= self._pause_until:
                host = self._warm_host()  # before the claim: a job is not taken by a worker that cannot start
                claim = self._claim()
                if claim is None:
                    return
                failpoints.reach("worker.claimed")
                log.info("%s: %s, epoch %d", claim.job_id, claim.kind, claim.epoch)
                self._faults.forget()
                attempt = Attempt(claim, self._settings, self._database, self._storage, host, self._drain, self._faults)
                facts = {"luthier.job": claim.job_id, "luthier.kind": claim.kind, "luthier.epoch": str(claim.epoch)}
                with logs.about(job_id=claim.job_id), traces.span("attempt", claim.trace_parent, facts):
                    in_order = run_job(attempt)
                self._set_apart()
                self._heed(claim.job_id, in_order)

    def _set_apart(self) -> None:
        """A GPU that needs a reset, or somebody who looks at it, gets no more jobs."""
        fault = self._faults.worst()
        if fault is not None and fault.remedy != "restart":
            self._quarantine.impose(fault)

    def _heed(self, job_id: str, in_order: bool) -> None:
        """A worker that keeps failing must not draw in every job of the queue: it pauses, longer each time.

        One job that fails again and again says more about the job than about the worker, and counts once.
        """
        if not in_order and job_id == self._last_failed:
            return
        self._last_failed = None if in_order else job_id
        self._failures = 0 if in_order else self._failures + 1
        if self._failures > _TOLERATED_FAILURES:
            pause = min(_PAUSE_SECONDS * 2 ** (self._failures - _TOLERATED_FAILURES), _MAX_PAUSE_SECONDS)
            self._pause_until = time.monotonic() + pause
            log.error("%d attempts in a row failed here; no job is taken for %.0f s", self._failures, pause)

    def _claim(self) -> Claim | None:
        if (reason := self._quarantine.reason) is not None:
            log.warning("no jobs are taken: %s is out of use (%s); see %s", self._lock.device, reason, self._quarantine)
            return None
        try:
            workspace.check_room(self._settings.work_dir, self._settings.min_free_bytes)
            self._storage.check()
            with self._database.unit_of_work() as session:
                return leases.claim(session, self._worker_id, self._lock.slot, self._settings.lease_seconds)
        except (SQLAlchemyError, ServiceError) as error:
            log.warning("no jobs are taken: %s", error if isinstance(error, ServiceError) else type(error).__name__)
            return None

    def _warm_host(self) -> Host:
        if self._host is None or not self._host.alive:
            self._host = Host(self._lock.device, self._settings.threads, self._lock.descriptor)
        return self._host

    def _poll(self) -> None:
        while not self._drain.is_set():
            try:
                self.work()
                self._cool()
            except Exception:  # the thread that ended would leave this worker deaf
                log.exception("poll")
            self._drain.wait(self._settings.poll_seconds)

    def _cool(self) -> None:
        """A base model that nobody has asked for in a while gives its memory back."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            host = self._host
            if host is not None and host.alive and host.used and host.idle_seconds > self._settings.host_idle_seconds:
                host.kill()
        finally:
            self._busy.release()
