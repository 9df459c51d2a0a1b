"""A claim's heartbeat and its progress: one thread with a database connection of its own."""

import logging
import threading
import time
from collections import deque
from contextvars import copy_context
from itertools import islice
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from service import leases
from service.db import Database
from service.leases import Claim, Fenced, Progress
from service.settings import Settings

log = logging.getLogger(__name__)
_FLUSH_SECONDS = 0.5  # a step of a tiny model takes milliseconds; a commit each would cost more than the step
_POINTS_AT_ONCE = 200
_CUT_SECONDS = 600.0  # without a database for longer than this, the work stops


class Reporter:
    """Renews the lease while its block runs. `wish`, `fenced` and `cut_off` say what it learnt."""

    def __init__(self, database: Database, claim: Claim, settings: Settings) -> None:
        self._database, self._claim, self._settings = database, claim, settings
        self._lock = threading.Lock()
        self._told: dict[str, Any] = {}
        self._points: deque[dict[str, Any]] = deque()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._renewed = time.monotonic()
        self.wish: leases.Wish | None = None  # a cancel stays; a drain may be taken back by a resume
        self.fenced = False
        self._thread = threading.Thread(target=copy_context().run, args=(self._beat,), name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._wake.set()
        self._thread.join()

    @property
    def cut_off(self) -> bool:
        return time.monotonic() - self._renewed > _CUT_SECONDS

    def tell(self, **progress: Any) -> None:
        """Phase, step, total_steps, eta_seconds: the newest value counts."""
        with self._lock:
            self._told |= progress
        self._wake.set()

    def point(self, point: dict[str, Any]) -> None:
        """A point of the metrics; every one is kept."""
        with self._lock:
            self._points.append(point)
        self._wake.set()

    def flush(self) -> None:
        """Write now what was told.

        Raises:
            Fenced: the job is no longer this attempt's.
            SQLAlchemyError: the database does not answer; everything is kept for the next time.
        """
        with self._flushing:
            while self._flush_some():
                pass

    def _flush_some(self) -> bool:
        """One short transaction; whether points are left."""
        with self._lock:
            told, points = dict(self._told), tuple(islice(self._points, _POINTS_AT_ONCE))
        with self._database.unit_of_work() as session:
            progress = Progress(**told, points=points)
            wish = leases.renew(session, self._claim, self._settings.lease_seconds, progress)
        self._renewed = time.monotonic()
        self.wish = wish
        with self._lock:
            for _ in points:
                self._points.popleft()
            for name, value in told.items():
                if self._told.get(name) == value:
                    del self._told[name]
            return bool(self._points)

    def _beat(self) -> None:
        while not self._ending.is_set():
            try:
                self.flush()
            except Fenced:
                self.fenced = True
                return
            except SQLAlchemyError as error:
                # Training goes on: no reaper can run either while the database is away.
                log.warning("heartbeat of %s: %s", self._claim.job_id, type(error).__name__)
            self._wake.clear()
            if self._wake.wait(self._settings.heartbeat_seconds):
                self._ending.wait(_FLUSH_SECONDS)
